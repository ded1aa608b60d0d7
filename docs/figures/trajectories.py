"""The figures of the solvers page: where each solver takes a few samples, beside where the flow takes them.

python docs/figures/trajectories.py
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

import reverie as rv
from reverie.diffusion.grids import from_times
from reverie.diffusion.samplers.base import Sampler, run

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "reverie"  # the same bytes each time
from matplotlib import pyplot as plt  # noqa: E402 - after the choice of what draws

FOLDER = Path(__file__).parent.parent / "images"
COLOURS = ["#d1495b", "#00798c", "#edae49", "#6a4c93", "#3d7a3a"]
STARTS = torch.tensor([[-1.3, -0.9], [-0.5, 1.6], [0.35, -1.5], [1.5, 0.9], [0.05, 0.35]], dtype=torch.float64)

# Of each family, by name and options, and in how many steps: seven evaluations where that is possible.
FAMILIES: dict[str, list[tuple[str, dict[str, Any], int]]] = {
    "ddim": [("ddim", {}, 7), ("ddim", {"eta": 0.5}, 7), ("ddpm", {}, 7)],
    "dpmpp": [("dpmpp-2m", {}, 7), ("dpmpp-3m", {}, 7), ("dpmpp-2s", {}, 4), ("dpmpp-3s", {}, 3)],
    "unipc": [("unipc", {"order": 2, "corrector": False}, 7), ("unipc", {"order": 2}, 7), ("unipc", {}, 7)],
    "adams": [("deis", {}, 7), ("lms", {}, 7), ("pndm", {}, 7)],
    "runge-kutta": [("euler", {}, 7), ("heun", {}, 4), ("dpm2", {}, 4)],
    "sde": [
        ("dpmpp-2m-sde", {}, 7),
        ("dpm2-ancestral", {}, 4),
        ("edm", {"churn": 1.0}, 4),
        ("restart", {"low": 0.3, "high": 1.0, "times": 1, "inner": 1}, 4),
    ],
    "langevin": [("euler-maruyama", {}, 20), ("predictor-corrector", {"snr": 0.1}, 10), ("langevin", {}, 10)],
}


def oracle(schedule: str) -> rv.Mixture:
    """Return the mixture that all of them sample."""
    means = torch.tensor([[-1.2, 0.7], [1.2, 0.5], [0.1, -1.1]], dtype=torch.float64)
    stds = torch.tensor([[0.25, 0.2], [0.2, 0.3], [0.3, 0.15]], dtype=torch.float64)
    return rv.Mixture(means, stds, torch.tensor([0.4, 0.3, 0.3], dtype=torch.float64), rv.schedules[schedule]())


def path(sampler: Sampler, denoiser: rv.Mixture, grid: Tensor) -> Tensor:
    """Return where a sampler takes each start (N + 1, 5, 2), as x over the standard deviation of x where alpha = 1."""
    first = grid[:1]
    state = sampler.init(STARTS * spread(denoiser, first), first.item())
    states = [state, *run(sampler, denoiser, state, grid, rv.Noise(range(len(STARTS))))]
    return torch.stack([s.x / spread(denoiser, s.t)[:, None] for s in states])


def times(denoiser: rv.Mixture, steps: int) -> Tensor:
    """Return the grid (steps + 1,) that a solver walks: EDM's spacing of sigma / alpha, 4 to 0.05, and then 0."""
    rho = torch.linspace(4 ** (1 / 7), 0.05 ** (1 / 7), steps, dtype=torch.float64) ** 7
    return from_times(denoiser.schedule.time(-2 * rho.log()).tolist())


def spread(denoiser: rv.Mixture, t: Tensor) -> Tensor:
    """Return sqrt(alpha^2 + sigma^2), so that a picture of exploding noise fits its frame."""
    alpha, sigma = denoiser.schedule.marginal(t)
    return (alpha.square() + sigma.square()).sqrt()


def panel(axes: Any, name: str, options: dict[str, Any], steps: int) -> None:
    """Draw one solver."""
    denoiser, sampler = oracle("ve" if name == "langevin" else "vp"), rv.samplers[name](**options)
    side = torch.linspace(-2.3, 2.3, 60, dtype=torch.float64)
    points = torch.cartesian_prod(side, side)
    density = denoiser.log_prob(points).exp().reshape(60, 60).T
    levels = [share * float(density.max()) for share in (0.03, 0.2, 0.6)]
    axes.contour(side, side, density, levels=levels, colors="#8899aa", linewidths=0.4, alpha=0.6)
    grid, fine = (times(denoiser, count) for count in (steps, 60))
    exact, found = path(rv.samplers["dpmpp-3s"](), denoiser, fine), path(sampler, denoiser, grid)
    for i, colour in enumerate(COLOURS[: 3 if sampler.stochastic else 5]):
        axes.plot(*exact[:, i].T, color="#999999", linewidth=1.0)
        axes.plot(*found[:, i].T, color=colour, linewidth=0.9, marker="o", markersize=2)
        axes.plot(*found[-1:, i].T, color=colour, marker="o", markersize=4)
    words = ", ".join([name, *(f"{option} {value:g}" for option, value in options.items() if name != "restart")])
    axes.set_title(f"{words}\n{sampler.count(denoiser.schedule, grid)} evaluations", fontsize=8)
    axes.set(xlim=(-2.3, 2.3), ylim=(-2.3, 2.3), xticks=[], yticks=[], aspect="equal")


def draw(panels: Iterable[tuple[str, dict[str, Any], int]], file: Path) -> None:
    """Draw one family."""
    panels = list(panels)
    figure, axes = plt.subplots(1, len(panels), figsize=(2.5 * len(panels), 2.8), layout="constrained", squeeze=False)
    for place, (name, options, steps) in zip(axes[0], panels, strict=True):
        panel(place, name, options, steps)
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)


def main() -> None:
    """Draw all of them."""
    for family, panels in FAMILIES.items():
        draw(panels, FOLDER / f"trajectories-{family}.svg")


if __name__ == "__main__":
    main()
