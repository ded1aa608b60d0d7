r"""Edits by a model of few steps that was trained for none of them: PSNR, and agreement with what is known.

    python benchmarks/zero_shot.py runs/quick --data FOLDER --out pictures --json zero_shot.json

takes pictures of a data set, hides half of each, shrinks each and takes the colour from those that have any, lets
`reverie edit`'s tasks put back what is missing, and prints the peak signal-to-noise ratio beside that of a naive fill
(the mean of all pictures; repeated pixels; the grey picture), and by how many of 255 levels the result is off what was
known at most: a pixel's own, a block's mean, the brightness. It writes a picture of each task, row by row the pictures,
what was known, the edits; and one of samples on the way between others.

References:
    Consistency Models (Song et al., 2023), section 3.3 and appendix D
    https://arxiv.org/abs/2303.01469
"""

import argparse
import json
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from report import machine, table, versions
from torch import Tensor

import reverie as rv
from reverie.data import open_dataset
from reverie.data.batches import run_split
from reverie.diffusion.guidance.zero_shot import Grey
from reverie.models.model import Model
from reverie.training.config import TrainConfig
from reverie.training.setup import read_config

SHOWN = 12
PACKAGES = ("reverie", "torch", "numpy")
Pictures = UInt8[Tensor, "n c h w"]


class Edited(NamedTuple):
    """A task's outcome: what was shown, the naive fill, the edits, and how far off what is known they are."""

    shown: Pictures
    naive: Pictures
    edits: Pictures
    off: float


def psnr(a: Pictures, b: Pictures) -> float:
    """Return the mean over pictures of 10 log10(255^2 / mean square difference)."""
    squares = (a.double() - b.double()).square().flatten(1).mean(1).clamp(min=1e-9)
    return float((10 * torch.log10(255**2 / squares)).mean())


def edit(model: Model, pictures: Pictures, steps: int, masks: Tensor | None = None, **how: Any) -> Pictures:
    """Return an edit of each picture, by itself."""
    done = [
        model.edit(one, mask=masks, seed=i, steps=steps, exact=False, **how).uint8 for i, one in enumerate(pictures)
    ]
    return torch.cat(done)


def inpaint(model: Model, x: Pictures, mean: Tensor, steps: int) -> Edited:
    """Draw the right half of each picture."""
    mask = torch.zeros(1, *x.shape[2:], dtype=torch.uint8)
    mask[..., x.shape[3] // 2 :] = 255
    hidden = (mask == 255).expand_as(x)
    edits = edit(model, x, steps, mask, task="inpaint")
    off = float((edits.int() - x.int()).abs()[~hidden].max())
    grey = torch.where(hidden, torch.full_like(x, 128), x)
    return Edited(grey, torch.where(hidden, mean.expand_as(x), x), edits, off)


def enlarge(model: Model, x: Pictures, mean: Tensor, steps: int, factor: int = 4) -> Edited:
    """Draw each picture from one of a fourth of its height and width."""
    small = torch.nn.functional.avg_pool2d(x.float(), factor).round().to(torch.uint8)
    edits = edit(model, small, steps, task="super-resolution", factor=factor)
    means = torch.nn.functional.avg_pool2d(edits.float(), factor)
    repeated = small.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return Edited(repeated, repeated, edits, float((means - small.float()).abs().max()))


def colourise(model: Model, x: Pictures, mean: Tensor, steps: int) -> Edited:
    """Draw each picture from its brightness."""
    row = Grey().row / Grey().row.sum()
    brightness = torch.einsum("c,nchw->nhw", row.float(), x.float())[:, None]
    grey = brightness.round().to(torch.uint8).expand_as(x)
    edits = edit(model, grey, steps, task="colourise")
    made = torch.einsum("c,nchw->nhw", row.float(), edits.float())[:, None]
    return Edited(grey, grey, edits, float((made - grey[:, :1].float()).abs().max()))


def grid(rows: list[Pictures], path: Path, scale: int = 2) -> None:
    """Write rows of pictures as one."""
    whole = torch.cat([torch.cat(list(row[:SHOWN]), 2) for row in rows], 1)
    pixels = np.kron(whole.permute(1, 2, 0).numpy(), np.ones((scale, scale, 1), np.uint8))
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(path, optimize=True)


def held_out(run: Path, count: int) -> Sequence[int]:
    """Return the pictures that a run on this data did not train on."""
    config = read_config(run, TrainConfig)
    return run_split(count, config.held_out, config.seed)[1]


def main() -> None:
    """Edit, print the table, write pictures and the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", type=Path, help="a consistency model")
    parser.add_argument("--data", required=True, help="pictures of its kind, as reverie train takes them")
    parser.add_argument("--count", type=int, default=64, help="how many are edited (default: 64)")
    parser.add_argument("--held-out", action="store_true", help="those that the model's run kept from its training")
    parser.add_argument("--steps", type=int, default=16, help="rounds of each edit (default: 16)")
    parser.add_argument("--name", default="zero-shot", help="what the pictures' names begin with")
    parser.add_argument("--out", type=Path, help="write pictures into this folder")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = rv.load(options.model)
    data = open_dataset(options.data, size=model.card.shape[1], channels=model.card.shape[0])
    rows = list(held_out(options.model, len(data)) if options.held_out else range(len(data)))
    rows = rows[:: max(1, math.ceil(len(rows) / options.count))][: options.count]
    x = data.images(rows)
    mean = data.images(list(range(0, len(data), max(1, len(data) // 500)))).float().mean(0).round().to(torch.uint8)
    tasks = {"inpaint": inpaint, "super-resolution": enlarge} | ({"colourise": colourise} if x.shape[1] == 3 else {})
    found, lines = {}, []
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    for task, do in tasks.items():
        done = do(model, x, mean, options.steps)
        got = {"psnr": psnr(done.edits, x), "psnr_naive": psnr(done.naive, x), "off_by_at_most": done.off}
        found[task] = got
        lines.append([task, f"{got['psnr']:.1f}", f"{got['psnr_naive']:.1f}", f"{got['off_by_at_most']:.2f}"])
        if options.out:
            grid([x, done.shown, done.edits], options.out / f"{options.name}-{task}.png")
    print(table(["task", "PSNR, dB", "naive fill", "off by at most, of 255"], lines))
    if options.out:
        ways = [model.interpolate(2 * k, 2 * k + 1, SHOWN, steps=1).uint8 for k in range(3)]
        grid(ways, options.out / f"{options.name}-interpolate.png")
    if options.json:
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        about = {"command": command, "machine": machine(), "versions": versions(PACKAGES)}
        options.json.write_text(json.dumps(about | {"pictures": len(x), "steps": options.steps, "tasks": found}) + "\n")


if __name__ == "__main__":
    main()
