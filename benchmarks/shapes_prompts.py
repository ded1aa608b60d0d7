"""Does a model draw what the prompt says? Shapes of combinations that it was never shown, read from the pixels.

    reverie train --data shapes:32,groups=1,split=train,count=60000 --captions --patch 2 --widths 64,64,128 --out RUN
    python benchmarks/shapes_prompts.py RUN --json prompts.json --figure prompts.svg --sheet prompts.png

Prompts are the 63 of 700 combinations of number, size, colour, kind and place that split "train" leaves out. A picture
is right when the program that reads scenes (reverie.data.reading) finds exactly the group asked for. Diversity is what
a prompt leaves free: the mean distance between pictures of one prompt, in root mean square of the pixels (0..1), and
the standard deviation of the shapes' mean place in pixels, both beside those of real pictures of the same prompts.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from report import machine, table, versions

import reverie as rv
from reverie.base.randomness import generator
from reverie.data.reading import read_scene
from reverie.data.shapes import COLOURS, KINDS, PLACES, SIZES, Group, Scene, arrange, draw, held

PACKAGES = ("reverie", "torch")
PARTS = ("count", "size", "colour", "kind", "place")


def combinations() -> list[Group]:
    """Return the groups that were held out."""
    every = [
        Group(count, size, colour, kind, place)
        for size, colour, kind, place in product(SIZES, COLOURS, KINDS, PLACES)
        for count in ((1, 2, 3) if size == "small" else (1,))
    ]
    return [group for group in every if held(group)]


def judge(groups: Sequence[Group], wanted: Group) -> dict[str, bool]:
    """Return whether the groups of a picture are the one asked for, and which of its attributes are right.

    Arguments:
        groups: What was read from it.
        wanted: What was asked for.
    """
    if len(groups) != 1:
        return dict.fromkeys(("all", *PARTS), False)
    found = {part: getattr(groups[0], part) == getattr(wanted, part) for part in PARTS}
    return found | {"all": all(found.values())}


def middle(scene: Scene, side: int) -> list[float]:
    """Return the mean of a scene's centres in pixels."""
    return [side * float(np.mean([getattr(shape, axis) for shape in scene.shapes])) for axis in ("x", "y")]


def distance(images: UInt8[torch.Tensor, "n c h w"]) -> float:
    """Return the mean distance between pictures, in root mean square."""
    flat = images.flatten(1).float() / 255
    distances = torch.cdist(flat, flat) / flat.shape[1] ** 0.5
    return float(distances.sum() / (len(flat) * (len(flat) - 1)))


def assess(images: UInt8[torch.Tensor, "n c h w"], groups: Sequence[Group], each: int) -> dict[str, float]:
    """Return the share of pictures that are right, by attribute, and how those of a prompt differ.

    Arguments:
        images: So many of each group, one group after the other.
        groups: What was asked for.
        each: How many of each, 2 or more.
    """
    scenes = [read_scene(image).scene for image in images]
    rows = [judge(scene.groups, groups[i // each]) for i, scene in enumerate(scenes)]
    shares = {part: sum(row[part] for row in rows) / len(rows) for part in ("all", *PARTS)}
    prompts = [slice(i * each, (i + 1) * each) for i in range(len(groups))]
    distances = [distance(images[prompt]) for prompt in prompts]
    variances = []
    for prompt in prompts:
        right = [scene for scene, row in zip(scenes[prompt], rows[prompt], strict=True) if row["all"]]
        if len(right) > 1:  # places of pictures that are wrong say nothing of what a prompt leaves free
            variances.append(np.var([middle(scene, images.shape[-1]) for scene in right], axis=0, ddof=1).mean())
    return {
        **shares,
        "distance": sum(distances) / len(distances),
        "spread": float(np.mean(variances)) ** 0.5 if variances else 0.0,
        "pictures": len(rows),
    }


def drawn(model: rv.Model, groups: Sequence[Group], guidance: float, options: argparse.Namespace) -> torch.Tensor:
    """Return a model's pictures of some groups, so many of each."""
    prompts = [str(group) for group in groups for _ in range(options.each)]
    how = {"sampler": options.sampler, "steps": options.steps, "seed": options.seed}
    return model.sample(len(prompts), prompt=prompts, guidance=guidance, exact=False, **how).uint8


def real(groups: Sequence[Group], each: int, side: int, seed: int) -> torch.Tensor:
    """Return real pictures of some groups, so many of each."""
    pictures = []
    for i, group in enumerate(groups):
        random = generator(seed, "shapes_prompts", i)
        for _ in range(each):
            pictures.append(torch.from_numpy(draw(arrange(random, [group]), side, side)).permute(2, 0, 1))
    return torch.stack(pictures)


def figure(rows: Sequence[dict[str, float]], truth: dict[str, float], path: Path) -> None:
    """Draw accuracy and diversity against guidance; what real pictures have is dashed."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "reverie"
    from matplotlib import pyplot

    shown, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3.2))
    w = [row["guidance"] for row in rows]
    for part in PARTS:
        left.plot(w, [100 * row[part] for row in rows], "-", label=part, linewidth=1)
    left.plot(w, [100 * row["all"] for row in rows], "o-", color="black", label="all")
    left.set(xlabel="guidance", ylabel="right, %", ylim=(0, 102))
    left.legend(fontsize="small")
    right.plot(w, [row["spread"] for row in rows], "o-", color="black")
    right.axhline(truth["spread"], color="grey", linestyle="--", label="real pictures")
    right.set(xlabel="guidance", ylabel="spread of the place, pixels", ylim=(0, None))
    right.legend(fontsize="small")
    shown.tight_layout()
    shown.savefig(path, metadata={"Date": None})


def sheet(images: UInt8[torch.Tensor, "n c h w"], groups: Sequence[Group], columns: int = 6) -> Image.Image:
    """Return pictures with their prompts, in rows."""
    tall, wide, size = 158, 150, 128
    page = Image.new("RGB", (columns * wide, -(-len(groups) // columns) * tall + 4), (235, 235, 235))
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(10)
    for i, group in enumerate(groups):
        x, y = i % columns * wide + (wide - size) // 2, i // columns * tall + 4
        picture = Image.fromarray(images[i].permute(1, 2, 0).numpy())
        page.paste(picture.resize((size, size), Image.Resampling.NEAREST), (x, y))
        look, place = str(group).split(f" {group.kind}", 1)
        ending, _, where = place.partition(" ")
        for line, text in enumerate((f"{look} {group.kind}{ending}", where)):
            pen.text((x + size / 2, y + size + 6 + 11 * line), text, (0, 0, 0), font, anchor="mm")
    return page


def main() -> None:
    """Measure, print a table, write the JSON, the figure and the sheet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", help="a run trained on shapes with captions")
    parser.add_argument("--guidance", default="1,1.5,2,3,4,6,8", help="with commas")
    parser.add_argument("--each", type=int, default=4, help="pictures of each of the prompts, 2 or more")
    parser.add_argument("--prompts", type=int, help="use so many of the prompts")
    parser.add_argument("--sampler", help="the model's own, if not said")
    parser.add_argument("--speed", choices=("exact", "fast"), default="exact")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--sheet", type=Path, help="a picture of each of 24 prompts at the best guidance")
    options = parser.parse_args()
    if options.each < 2:
        parser.error("--each must be 2 or more: one picture differs from no other")
    model, groups, began = rv.load(options.model, speed=options.speed), combinations(), time.perf_counter()
    groups = [
        groups[i * len(groups) // (options.prompts or len(groups))] for i in range(options.prompts or len(groups))
    ]
    truth = assess(real(groups, options.each, model.card.shape[-1], options.seed), groups, options.each)
    rows, best = [], None
    for w in sorted(map(float, options.guidance.split(","))):
        images = drawn(model, groups, w, options)
        rows.append({"guidance": w, **assess(images, groups, options.each)})
        print(
            f"guidance {w}: {100 * rows[-1]['all']:.1f} % right, {time.perf_counter() - began:.0f} s", file=sys.stderr
        )
        if rows[-1]["all"] == max(row["all"] for row in rows):
            best = images
    shown = [
        [name, *(f"{100 * row[p]:.1f}" for p in ("all", *PARTS)), f"{row['distance']:.3f}", f"{row['spread']:.2f}"]
        for name, row in [*((f"{row['guidance']:g}", row) for row in rows), ("real pictures", truth)]
    ]
    print(table(["guidance", "right, %", *PARTS, "distance", "spread"], shown))
    if options.figure:
        figure(rows, truth, options.figure)
    if options.sheet and best is not None:
        shown_groups = range(0, len(groups), max(1, len(groups) // 24))[:24]
        sheet(best[[options.each * i for i in shown_groups]], [groups[i] for i in shown_groups]).save(options.sheet)
    if options.json:
        training = model.card.training
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        about = {"command": command, "machine": machine(), "versions": versions(PACKAGES)}
        trained = training.model_dump(mode="json") if training else None
        result = {"training": trained, "prompts": len(groups), "rows": rows, "real": truth}
        options.json.write_text(json.dumps(about | result, indent=1) + "\n")


if __name__ == "__main__":
    main()
