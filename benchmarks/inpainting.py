"""Filling in by a prompt: a model fine-tuned for it (GLIDE's step) beside one that has what is known put back.

    reverie train --from RUN --fill --captions --data shapes:32,groups=1,split=train,count=20000 --batch-size 16 \\
        --minutes 8 --out FILLING
    python benchmarks/inpainting.py RUN FILLING --json inpainting.json --sheet inpainting.png

Two tasks on real pictures of groups that split "train" leaves out, read by the program that knows the truth:

    another   the mask covers the group, and the prompt names another group at the same place;
    crossing  the mask's edge goes through a large shape's middle, and the prompt is the picture's own: what is drawn
              must go on with what is left.

Right is a picture that shows exactly the group of the prompt. The jump is the mean squared difference (0..1) of pixels
that are neighbours across the mask's edge, beside that of the real pictures; changed are values outside of the mask
that came back otherwise than they were.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, UInt8
from PIL import Image
from report import machine, table, versions
from shapes_prompts import combinations, judge, sheet
from torch import Tensor

import reverie as rv
from reverie.base.randomness import generator
from reverie.data.reading import read_scene
from reverie.data.shapes import PLACES, Group, arrange, draw

PACKAGES = ("reverie", "torch")
GREY = 160


class Case(NamedTuple):
    """What is asked of a model.

    Arguments:
        image: The picture (3, H, W).
        mask: Where it is to be drawn anew (H, W).
        group: What it is to show then.
    """

    image: UInt8[Tensor, "3 h w"]
    mask: Bool[Tensor, "h w"]
    group: Group


def another(groups: Sequence[Group], side: int, seed: int) -> list[Case]:
    """Return pictures of other groups at the places of some, that are to become these."""
    cases = []
    for i, group in enumerate(groups):
        random = generator(seed, "another", i)
        here = [g for g in groups if g.place == group.place and (g.kind, g.colour) != (group.kind, group.colour)]
        scene = arrange(random, [here[int(random.integers(len(here)))]])
        x, y = PLACES[group.place]
        middle = round(x * side), round(y * side)
        reach = side // 4 + (side // 8 if group.place == "centre" else 0)
        mask = torch.zeros(side, side, dtype=torch.bool)
        mask[max(0, middle[1] - reach) : middle[1] + reach, max(0, middle[0] - reach) : middle[0] + reach] = True
        for shape in scene.shapes:  # what a group of three leaves of its quarter is masked too
            left, top, right, low = (
                round(side * at)
                for at in (
                    shape.x - shape.radius - 0.04,
                    shape.y - shape.radius - 0.04,
                    shape.x + shape.radius + 0.04,
                    shape.y + shape.radius + 0.04,
                )
            )
            mask[max(0, top) : low, max(0, left) : right] = True
        cases.append(Case(torch.from_numpy(draw(scene, side, side)).permute(2, 0, 1), mask, group))
    return cases


def crossing(groups: Sequence[Group], side: int, seed: int) -> list[Case]:
    """Return pictures of large shapes, each half hidden: from its middle on, in one of four directions."""
    cases = []
    for i, group in enumerate(groups):
        random = generator(seed, "crossing", i)
        scene = arrange(random, [group])
        along = torch.arange(side)
        hidden = (along >= round(side * scene.shapes[0].x)) if i % 2 else (along >= round(side * scene.shapes[0].y))
        hidden = ~hidden if i // 2 % 2 else hidden
        mask = hidden.expand(side, side) if i % 2 else hidden[:, None].expand(side, side)
        cases.append(Case(torch.from_numpy(draw(scene, side, side)).permute(2, 0, 1), mask.clone(), group))
    return cases


def jump(image: UInt8[Tensor, "3 h w"], mask: Bool[Tensor, "h w"]) -> float:
    """Return the mean squared difference of neighbours of which one is masked and one is not."""
    x, differences = image.float() / 255, []
    for axis in (0, 1):
        n = mask.shape[axis] - 1
        edge = mask.narrow(axis, 0, n) != mask.narrow(axis, 1, n)
        differences.append((x.narrow(axis + 1, 0, n) - x.narrow(axis + 1, 1, n)).square().mean(0)[edge])
    return float(torch.cat(differences).mean())


def fill(model: rv.Model, cases: Sequence[Case], options: argparse.Namespace) -> list[Tensor]:
    """Return the pictures that a model makes of some cases."""
    pictures = []
    for i, case in enumerate(cases):
        made = model.edit(
            case.image, mask=(case.mask.to(torch.uint8) * 255)[None], prompt=str(case.group),
            guidance=options.guidance, sampler=options.sampler, steps=options.steps, seed=options.seed + i,
        )  # fmt: skip
        pictures.append(made.uint8[0])
    return pictures


def assess(pictures: Sequence[Tensor], cases: Sequence[Case]) -> dict[str, float]:
    """Return the share that is right, the mean jump, and how many values changed outside of the masks."""
    right = [
        judge(read_scene(picture).scene.groups, case.group)["all"]
        for picture, case in zip(pictures, cases, strict=True)
    ]
    jumps = [jump(picture, case.mask) for picture, case in zip(pictures, cases, strict=True)]
    changed = [((picture != case.image) & ~case.mask).sum() for picture, case in zip(pictures, cases, strict=True)]
    return {"right": sum(right) / len(right), "jump": sum(jumps) / len(jumps), "changed": int(sum(changed))}


def main() -> None:
    """Measure both models on both tasks; print a table, write the JSON and the sheet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", help="a run trained on shapes with captions: what is known is put back at each step")
    parser.add_argument("filling", help="the same, fine-tuned with --fill")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--sampler", help="default: the model's")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--count", type=int, help="use so many cases of each task")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sheet", type=Path, help="cases, and below each what both make of it")
    options = parser.parse_args()
    models = {"put back": rv.load(options.model), "fine-tuned": rv.load(options.filling)}
    if models["put back"].fills or not models["fine-tuned"].fills:
        parser.error("the first model must be one that does not fill in, the second one that was trained to")
    side, groups = models["put back"].card.shape[-1], combinations()
    large = [group for group in groups if group.size == "large"]
    tasks = {"another": another(groups, side, options.seed), "crossing": crossing(large * 3, side, options.seed)}
    rows: list[dict[str, Any]] = []
    shown: list[list[Case]] = []
    for task, every in tasks.items():
        cases = every[: options.count]
        made = {name: fill(model, cases, options) for name, model in models.items()}
        if task == "crossing":
            made["real pictures"] = [case.image for case in cases]
        rows += [{"task": task, "model": name, "cases": len(cases), **assess(made[name], cases)} for name in made]
        shown += [
            [Case(torch.where(case.mask, GREY, case.image).to(torch.uint8), case.mask, case.group),
             *(case._replace(image=made[name][i]) for name in models)]
            for i, case in list(enumerate(cases))[:: max(1, len(cases) // 6)][:6]
        ]  # fmt: skip
    cells = [
        [f"{row['task']}, {row['model']}", f"{100 * row['right']:.1f}", f"{row['jump']:.4f}", str(row["changed"])]
        for row in rows
    ]
    print(table(["", "right, %", "jump", "changed"], cells))
    if options.sheet:
        cut = [shown[i : i + 6] for i in range(0, len(shown), 6)]
        ordered = [column[row] for part in cut for row in range(3) for column in part]
        page: Image.Image = sheet(torch.stack([case.image for case in ordered]), [case.group for case in ordered])
        page.save(options.sheet)
    if options.json:
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        about = {"command": command, "machine": machine(), "versions": versions(PACKAGES)}
        options.json.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
