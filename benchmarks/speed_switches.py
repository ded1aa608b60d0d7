"""What each switch of `--speed fast` costs and gains on a trained model: pictures beside those of exact sampling.

    python benchmarks/speed_switches.py MODEL --steps 20 --guidance 2 --json switches.json

The same seeds, classes and steps for all. The difference is of the finished pictures, as uint8: the root of its mean
square and its 99th percentile, in levels of 255; and the same for exact sampling of half the steps, as a measure of
what such a difference is. Seconds are of `--rounds` turns in alternation, medians.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from report import machine, table, versions

import reverie as rv

FAST: dict[str, Any] = {"speed": "fast"}
SWITCHES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "exact": ({}, {}),
    "exact, half the steps": ({}, {"half": True}),
    "fast, float32": ({**FAST, "dtype": "float32"}, {}),
    "fast": (FAST, {}),
    "fast, 8-bit weights": ({**FAST, "weights": "int8"}, {}),
    "fast, lower levels every 2": (FAST, {"cache_every": 2}),
    "fast, lower levels every 3": (FAST, {"cache_every": 3}),
    "fast, lower levels every 5": (FAST, {"cache_every": 5}),
}


def main() -> None:
    """Run, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("-n", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=None)
    parser.add_argument("--prompts", default="", help="what to draw, with semicolons")
    parser.add_argument("--classes", action="store_true", help="each class in turn")
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    models = {name: rv.load(options.model, **how) for name, (how, _) in SWITCHES.items()}
    ask: dict[str, Any] = {"seed": 0, "sampler": options.sampler}
    ask |= {} if options.guidance is None else {"guidance": options.guidance}
    prompts = [text.strip() for text in options.prompts.split(";") if text.strip()]
    ask |= {"prompt": [prompts[i % len(prompts)] for i in range(options.n)]} if prompts else {}
    known = models["exact"].card.classes
    ask |= {"classes": [known[i % len(known)] for i in range(options.n)]} if options.classes else {}
    seconds: dict[str, list[float]] = {name: [] for name in SWITCHES}
    pictures = {}
    for _ in range(options.rounds):
        for name, (_, told) in SWITCHES.items():
            steps = options.steps // 2 if told.get("half") else options.steps
            switch = {key: value for key, value in told.items() if key != "half"}
            began = time.perf_counter()
            pictures[name] = models[name].sample(options.n, steps=steps, **ask, **switch).uint8.float()
            seconds[name].append(time.perf_counter() - began)
    wanted, found = pictures["exact"], {}
    for name, picture in pictures.items():
        off = (picture - wanted).abs()
        found[name] = {
            "seconds": statistics.median(seconds[name]),
            "times": statistics.median(a / b for a, b in zip(seconds["exact"], seconds[name], strict=True)),
            "rms": float(off.square().mean().sqrt()),
            "p99": float(off.flatten().quantile(0.99)),
            "weights": models[name].speed.packing._asdict() if models[name].speed.packing else None,
        }
    rows = [
        [name, f"{one['seconds']:.2f}", f"{one['times']:.2f}", f"{one['rms']:.2f}", f"{one['p99']:.0f}"]
        for name, one in found.items()
    ]
    print(table(["switch", "seconds", "times as fast", "RMS difference", "99th percentile"], rows))
    if options.json:
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        about = {"command": command, "machine": machine(), "versions": versions(("reverie", "torch"))}
        options.json.write_text(json.dumps(about | {"found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
