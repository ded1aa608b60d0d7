"""From what `reverie ema` was told to a model of that length, or to a table of lengths and a figure."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from reverie.base.errors import Stopped, UsageError
from reverie.base.storage import write_file
from reverie.cli.chart import line_chart
from reverie.cli.console import note
from reverie.models.formats import write_model
from reverie.models.load import find_device
from reverie.training import snapshots
from reverie.training.sweep import Point, frechet_judge, loss_judge, run_data
from reverie.training.sweep import sweep as judged

if TYPE_CHECKING:
    from reverie.cli.ema import EmaSettings

METRICS = {"loss": "held-out loss", "frechet": "Frechet distance"}


def rebuild(settings: "EmaSettings", run: str) -> dict[str, Any]:
    """Write the model of one length; return what was made, as JSON holds it."""
    prepare(settings)
    assert settings.sigma_rel is not None
    return write(settings, run, settings.sigma_rel)


def sweep(settings: "EmaSettings", run: str) -> dict[str, Any]:
    """Try several lengths, draw them, and write the best where a place was named; return what was found."""
    prepare(settings)
    snapshots.find_snapshots(run)  # a run without any is refused before its data is opened
    config, data = run_data(Path(run))
    if settings.metric == "loss":
        judge = loss_judge(config, data)
    else:
        judge = frechet_judge(config, data, settings.samples, settings.steps)
    try:
        points = judged(
            Path(run), judge, sorted(set(settings.lengths)), settings.updates, str(find_device(settings.device)), tell
        )
    except KeyboardInterrupt as stop:
        raise Stopped("stopped; nothing was written", 2) from stop
    best = min(points, key=lambda point: point.value)
    plot = Path(settings.plot or Path(run) / f"ema-sweep-{settings.metric}.svg")
    name = METRICS[settings.metric]
    chart = line_chart([(p.sigma_rel, p.value) for p in points], "relative length of the average", name)
    write_file(plot, chart.encode())
    rows = [p._asdict() for p in points]
    found = {"metric": name, "points": rows, "best": best.sigma_rel, "plot": str(plot)}
    return found | (write(settings, run, best.sigma_rel) if settings.out else {})


def prepare(settings: "EmaSettings") -> None:
    """Set the threads; refuse a place that is taken before anything is computed."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if settings.out and Path(settings.out).exists():
        raise UsageError(f"--out {settings.out} is there already; choose another place")
    if settings.plot and not settings.plot.endswith(".svg"):
        raise UsageError(f"--plot {settings.plot} is an SVG; give it that ending")


def write(settings: "EmaSettings", run: str, sigma_rel: float) -> dict[str, Any]:
    """Write the model of a length, and return where and how near its profile is."""
    error = snapshots.settle(snapshots.find_snapshots(run), sigma_rel, settings.updates).error
    model = snapshots.rebuild(run, sigma_rel, settings.updates)
    out = Path(settings.out or Path(run) / f"model-ema-{sigma_rel:g}")
    write_model(model, out)
    return {"run": run, "sigma_rel": sigma_rel, "updates": settings.updates, "profile_error": error, "out": str(out)}


def tell(point: Point) -> None:
    """Say what a length came to."""
    note(f"length {point.sigma_rel:g}: {point.value:.5g} (its profile is {100 * point.error:.2g} % off)")


def text(made: dict[str, Any]) -> str:
    """Return what was made, in lines."""
    lines = []
    if "points" in made:
        lines += [f"{p['sigma_rel']:<6g} {made['metric']} {p['value']:.5g}" for p in made["points"]]
        lines += [f"best: {made['best']:g}", made["plot"]]
    if "out" in made:
        lines.append(made["out"])
    return "\n".join(lines)
