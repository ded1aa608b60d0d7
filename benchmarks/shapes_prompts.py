"""Does a model draw what the prompt says? Shapes of combinations that it was never shown, read from the pixels.

    reverie train --data shapes:32,count=20000,groups=1,split=train --captions --out RUN --minutes 60
    python benchmarks/shapes_prompts.py RUN --json prompts.json --figure prompts.svg

Prompts are the 63 of 700 combinations of number, size, colour, kind and place that split "train" leaves out. A picture
is right when the program that reads scenes (reverie.data.reading) finds exactly the group asked for. Diversity is the
mean distance between pictures of one prompt, in root mean square of the pixels (0..1), beside that of real pictures.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch
from report import machine, table, versions

import reverie as rv
from reverie.data.reading import read_scene
from reverie.data.shapes import COLOURS, KINDS, PLACES, SIZES, Group, held

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


def judge(image: torch.Tensor, wanted: Group) -> dict[str, bool]:
    """Return whether a picture shows the group and nothing else, and which of its attributes are right."""
    groups = read_scene(image).scene.groups
    if len(groups) != 1:
        return dict.fromkeys(("all", *PARTS), False)
    found = {part: getattr(groups[0], part) == getattr(wanted, part) for part in PARTS}
    return found | {"all": all(found.values())}


def diversity(images: torch.Tensor) -> float:
    """Return the mean distance between pictures (N, C, H, W) of uint8."""
    flat = images.flatten(1).float() / 255
    distances = torch.cdist(flat, flat) / flat.shape[1] ** 0.5
    return float(distances.sum() / (len(flat) * (len(flat) - 1)))


def measure(
    model: rv.Model, groups: Sequence[Group], guidance: float, each: int, steps: int, seed: int
) -> dict[str, float]:
    """Return the share of pictures that are right at a guidance, by attribute, and how they differ."""
    prompts = [str(group) for group in groups for _ in range(each)]
    drawn = model.sample(len(prompts), prompt=prompts, guidance=guidance, steps=steps, seed=seed, exact=False).uint8
    rows = [judge(drawn[i], groups[i // each]) for i in range(len(prompts))]
    shares = {part: sum(row[part] for row in rows) / len(rows) for part in ("all", *PARTS)}
    spread = [diversity(drawn[i * each : (i + 1) * each]) for i in range(len(groups))]
    return {"guidance": guidance, **shares, "diversity": sum(spread) / len(spread), "pictures": len(rows)}


def figure(rows: Sequence[dict[str, float]], path: Path) -> None:
    """Draw accuracy and diversity against guidance."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    shown, left = pyplot.subplots(figsize=(5, 3.2))
    w = [row["guidance"] for row in rows]
    left.plot(w, [100 * row["all"] for row in rows], "o-", color="C0")
    left.set_xlabel("guidance")
    left.set_ylabel("right, %", color="C0")
    left.set_ylim(0, 100)
    right = left.twinx()
    right.plot(w, [row["diversity"] for row in rows], "s--", color="C1")
    right.set_ylabel("diversity", color="C1")
    right.set_ylim(0)
    shown.tight_layout()
    shown.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure, print a table, write the JSON and the figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", help="a run trained on shapes with captions")
    parser.add_argument("--guidance", default="0.5,1,1.5,2,3,4,6,8", help="with commas")
    parser.add_argument("--each", type=int, default=4, help="pictures of each of the prompts")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    model, groups, began = rv.load(options.model), combinations(), time.perf_counter()
    rows = []
    for w in map(float, options.guidance.split(",")):
        rows.append(measure(model, groups, w, options.each, options.steps, options.seed))
        print(
            f"guidance {w}: {100 * rows[-1]['all']:.1f} % right, {time.perf_counter() - began:.0f} s", file=sys.stderr
        )
    shown = [
        [f"{row['guidance']:g}", *(f"{100 * row[p]:.1f}" for p in ("all", *PARTS)), f"{row['diversity']:.3f}"]
        for row in rows
    ]
    print(table(["guidance", "right, %", *PARTS, "diversity"], shown))
    if options.figure:
        figure(rows, options.figure)
    if options.json:
        training = model.card.training
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        about = {"command": command, "machine": machine(), "versions": versions(PACKAGES)}
        about["training"] = training.model_dump(mode="json") if training else None
        options.json.write_text(json.dumps(about | {"prompts": len(groups), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
