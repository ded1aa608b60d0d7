"""From what `reverie tune` was told to a solver in the model's card, with a bar for each stage."""

import math
import sys
import time
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from reverie.base.errors import Stopped
from reverie.cli.console import interactive, note
from reverie.models.load import load
from reverie.models.rewrite import store_solvers
from reverie.models.tuning import tune_model
from reverie.training.metrics import Console

if TYPE_CHECKING:
    from reverie.cli.tune import TuneSettings


def tune(settings: "TuneSettings", path: str) -> dict[str, Any]:
    """Fit, judge and keep; return what was found, as JSON holds it."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    model = load(path, device=settings.device, ema=settings.ema)
    began, stages = time.monotonic(), Stages()
    try:
        found = tune_model(
            model, settings.steps, guidance=settings.guidance, samples=settings.samples, walks=settings.walks,
            rounds=settings.rounds, seed=settings.seed, report=stages,
        )  # fmt: skip
    except KeyboardInterrupt as stop:
        raise Stopped("stopped; nothing was stored", 2) from stop
    finally:
        stages.close()
    written = store_solvers(path, found) if settings.store else None
    note(f"{len(found)} solver{'s' * (len(found) != 1)} in {time.monotonic() - began:.0f} s")
    return {
        "model": model.source,
        "stored": str(written) if written else None,
        "solvers": [solver.model_dump() | {"steps": solver.steps} for solver in found],
        "seconds": round(time.monotonic() - began, 3),
    }


def text(made: dict[str, Any]) -> str:
    """Return what was found, a line for each number of steps."""
    lines = [
        f"{row['steps']} steps: {row['error']:.4f} from the exact solution; the best published solver here "
        f"{row['best_published']:.4f}, {row['best_published'] / max(row['error'], 1e-12):.1f} times as far"
        for row in made["solvers"]
    ]
    return "\n".join([*lines, f"kept in {made['stored']}; sample with --sampler auto"] if made["stored"] else lines)


class Stages:
    """A progress bar for each stage, on standard error."""

    def __init__(self) -> None:
        self.name, self.bar = "", None

    def __call__(self, name: str, done: int, total: int, error: float) -> None:
        if name != self.name:
            self.close()
            every = 0.2 if interactive() else 30.0
            self.bar = tqdm(total=total, desc=name, file=Console(sys.stderr), mininterval=every)
            self.name = name
        if self.bar is not None:
            if not math.isnan(error):
                self.bar.set_postfix_str(f"error {error:.4f}", refresh=False)
            self.bar.update(done - self.bar.n)

    def close(self) -> None:
        """End the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
