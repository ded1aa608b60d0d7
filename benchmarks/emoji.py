r"""Emoji from their names: does a picture show what was asked for, by encoders that never saw the model's pictures?

    reverie train --data FOLDER --size 32 --captions --held-out 0.1 --out RUN --minutes 30
    python benchmarks/emoji.py RUN --data FOLDER --json emoji.json --grid emoji.png

trains encoders of pictures and words (reverie.evaluation.alignment) on the run's training split, and prints how often a
picture picks its caption among 100 that were held out from both: for real pictures, which is the ceiling, and for
drawn ones, by guidance; and the same for captions that the run was trained on. The grid has 32 prompts, the first half
held out. Several runs of one split, of latents (--codec) too, are judged by the same encoders, at the smallest size of
picture among them; each has a grid of its own, `emoji-NAME.png`.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as functional
from report import machine, table, versions

import reverie as rv
from reverie.data import open_dataset
from reverie.data.batches import run_split
from reverie.evaluation.alignment import ImageText, retrieval, train_image_text
from reverie.models.pictures import grid_picture
from reverie.training.config import TrainConfig
from reverie.training.setup import read_config

PACKAGES = ("reverie", "torch")


def main() -> None:
    """Train the judge, draw, measure, print tables, write the JSON and the grid."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("runs", nargs="+", help="runs trained with --captions")
    parser.add_argument("--data", required=True, help="the folder that they were trained on")
    parser.add_argument("--guidance", default="1,2,3,5", help="with commas")
    parser.add_argument("--count", type=int, default=200, help="prompts of each kind")
    parser.add_argument("--sampler", help="the model's own, if not said")
    parser.add_argument("--speed", choices=("exact", "fast"), default="exact")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=40, help="of the encoders' training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--grid", type=Path)
    parser.add_argument("--grid-guidance", type=float, default=2.0)
    options = parser.parse_args()
    began, models = time.perf_counter(), {Path(run).name: rv.load(run, speed=options.speed) for run in options.runs}
    splits = {
        (config.held_out, config.seed) for run in options.runs for config in [read_config(Path(run), TrainConfig)]
    }
    if len(splits) > 1:
        parser.error("the runs hold out other pictures: train them with the same --held-out and --seed")
    side = min(pixels(model) for model in models.values())
    data = open_dataset(options.data, size=side)
    captions = [data.caption(i) or "" for i in range(len(data))]
    seen, unseen = run_split(len(data), *splits.pop())
    pair = train_image_text(data.images(seen), [captions[i] for i in seen], options.seed, options.epochs)
    print(f"encoders: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    pool = [captions[i] for i in unseen]
    chosen = {"held out": spread(unseen, options.count), "trained on": spread(seen, options.count)}
    rows = [["real", "", kind, *measured(pair, data.images(index), [captions[i] for i in index], pool)]
            for kind, index in chosen.items()]  # fmt: skip
    for name, model in models.items():
        for w in map(float, options.guidance.split(",")):
            for kind, index in chosen.items():
                prompts = [captions[i] for i in index]
                drawn = reduced(draw(model, prompts, options, w), side)
                rows.append([name, f"{w:g}", kind, *measured(pair, drawn, prompts, pool)])
                print(f"{rows[-1]}, {time.perf_counter() - began:.0f} s", file=sys.stderr)
        if options.grid:
            draw_grid(model, [captions[i] for index in (unseen, seen) for i in spread(index, 16)], options, name)
    shown = [[*told, f"{100 * value:.1f}", f"{100 * error:.1f}"] for *told, value, error in rows]
    print(table(["pictures", "guidance", "captions", "right of 100, %", "+-"], shown))
    if options.json:
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        about = {"command": command, "machine": machine(), "versions": versions(PACKAGES), "side": side}
        options.json.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


def spread(indices: Sequence[int], count: int) -> list[int]:
    """Return so many, evenly spread over them, or all."""
    return [indices[i * len(indices) // count] for i in range(count)] if count < len(indices) else list(indices)


def pixels(model: rv.Model) -> int:
    """Return how many pixels a side a model's pictures have."""
    return int((model.codec.factor if model.codec else 1) * model.card.shape[1])


def draw(model: rv.Model, prompts: list[str], options: argparse.Namespace, guidance: float | None) -> torch.Tensor:
    """Return a picture for each prompt."""
    how = {"sampler": options.sampler, "steps": options.steps, "seed": options.seed, "exact": False}
    return model.sample(len(prompts), prompt=prompts, guidance=guidance, **how).uint8


def reduced(images: torch.Tensor, side: int) -> torch.Tensor:
    """Return pictures at a size that divides theirs, each pixel the mean of those that it stands for."""
    return functional.avg_pool2d(images.float(), images.shape[-1] // side).round().to(torch.uint8)


def measured(pair: ImageText, images: torch.Tensor, captions: list[str], pool: list[str]) -> list[float]:
    """Return the share of pictures that pick their caption among 100, and its standard error."""
    return list(retrieval(pair, images, captions, pool))


def draw_grid(model: rv.Model, prompts: list[str], options: argparse.Namespace, name: str) -> None:
    """Write a grid of a picture for each prompt, and print the prompts."""
    drawn = draw(model, prompts, options, options.grid_guidance)
    grid_picture(drawn, columns=8).save(options.grid.with_stem(f"{options.grid.stem}-{name}"))
    for i in range(0, len(prompts), 8):
        print(f"row {i // 8 + 1}: {'; '.join(prompts[i : i + 8])}")


if __name__ == "__main__":
    main()
