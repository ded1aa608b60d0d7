r"""Emoji from their names: does a picture show what was asked for, by encoders that never saw the model's pictures?

    reverie train --data FOLDER --size 32 --captions --held-out 0.1 --out RUN --minutes 30
    python benchmarks/emoji.py RUN --data FOLDER --json emoji.json --grid emoji.png

trains encoders of pictures and words (reverie.evaluation.alignment) on the run's training split, and prints how often a
picture picks its caption among 100 that were held out from both: for real pictures, which is the ceiling, and for
drawn ones, by guidance; and the same for captions that the run was trained on. The grid has 32 prompts, the first half
held out. A run of latents (--codec) is judged in the same way.
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

import torch
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
    parser.add_argument("run", help="a run trained with --captions")
    parser.add_argument("--data", required=True, help="the folder that it was trained on")
    parser.add_argument("--guidance", default="1,2,3,5", help="with commas")
    parser.add_argument("--count", type=int, default=200, help="prompts of each kind")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=40, help="of the encoders' training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--grid", type=Path)
    options = parser.parse_args()
    config, model, began = read_config(Path(options.run), TrainConfig), rv.load(options.run), time.perf_counter()
    data = open_dataset(options.data, size=(model.codec.factor if model.codec else 1) * model.card.shape[1])
    captions = [data.caption(i) or "" for i in range(len(data))]
    seen, unseen = run_split(len(data), config.held_out, config.seed)
    pair = train_image_text(data.images(seen), [captions[i] for i in seen], options.seed, options.epochs)
    print(f"encoders: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    pool = [captions[i] for i in unseen]
    chosen = {"held out": unseen[: options.count], "trained on": seen[: options.count]}
    rows = [["real", kind, *measured(pair, data.images(index), [captions[i] for i in index], pool)]
            for kind, index in chosen.items()]  # fmt: skip
    for w in map(float, options.guidance.split(",")):
        for kind, index in chosen.items():
            prompts = [captions[i] for i in index]
            drawn = model.sample(len(index), prompt=prompts, guidance=w, steps=options.steps, seed=options.seed,
                                 exact=False).uint8  # fmt: skip
            rows.append([f"guidance {w:g}", kind, *measured(pair, drawn, prompts, pool)])
            print(f"{rows[-1]}, {time.perf_counter() - began:.0f} s", file=sys.stderr)
    shown = [[a, b, f"{100 * value:.1f}", f"{100 * error:.1f}"] for a, b, value, error in rows]
    print(table(["pictures", "captions", "right of 100, %", "+-"], shown))
    if options.grid:
        draw_grid(model, [*pool[:16], *(captions[i] for i in seen[:16])], options)
    if options.json:
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        about = {"command": command, "machine": machine(), "versions": versions(PACKAGES), "shape": data.shape}
        options.json.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


def measured(pair: ImageText, images: torch.Tensor, captions: list[str], pool: list[str]) -> list[float]:
    """Return the share of pictures that pick their caption among 100, and its standard error."""
    return list(retrieval(pair, images, captions, pool))


def draw_grid(model: rv.Model, prompts: list[str], options: argparse.Namespace) -> None:
    """Write a grid of a picture for each prompt, and print the prompts."""
    drawn = model.sample(len(prompts), prompt=prompts, steps=options.steps, seed=options.seed, exact=False).uint8
    grid_picture(drawn, columns=8).save(options.grid)
    for i in range(0, len(prompts), 8):
        print(f"row {i // 8 + 1}: {'; '.join(prompts[i : i + 8])}")


if __name__ == "__main__":
    main()
