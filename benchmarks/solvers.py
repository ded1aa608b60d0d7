r"""Error against the exact probability-flow ODE, by number of evaluations: ours beside diffusers and k-diffusion.

    python benchmarks/solvers.py --json solvers.json

solves the ODE of mixtures of Gaussians in 2, 64 and 3072 dimensions, under the linear table of 1000 betas, from some
hundred starts, in float64, with an exact denoiser. The truth is Dormand and Prince's rule at a tolerance of 1e-9 from
t = 1 to the table's first timestep, and the denoiser's estimate there. Every deterministic scheduler of diffusers and
every deterministic sampler of k-diffusion is run with every spacing that it has, with as many evaluations or fewer,
and the best of them in each column is what ours is set beside, whichever that is: one number for the median, one for
the root mean square, over the starts, of the error's norm divided by the root of the dimension.

k-diffusion takes part where `pip install --no-deps k-diffusion` has put it: only its module of samplers is read.

ours:   auto     what `--sampler auto` takes for a model that it knows nothing of
        tuned    `tune` on these mixtures, from other starts
        unseen   the same solver on mixtures that it was not tuned on
"""

import argparse
import json
import math
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
from report import machine, table, versions
from solver_peers import Solve, diffusers_solvers, k_diffusion_solvers
from torch import Tensor

from reverie.base.randomness import Noise, normal
from reverie.diffusion.denoisers import Denoiser
from reverie.diffusion.grids import uniform_log_snr
from reverie.diffusion.oracles import random_mixture
from reverie.diffusion.recipes import general
from reverie.diffusion.runge_kutta_pair import integrate
from reverie.diffusion.samplers.base import run
from reverie.diffusion.samplers.learned import Learned, Recipe
from reverie.diffusion.samplers.unipc import UniPC
from reverie.diffusion.schedules import table as make_table
from reverie.diffusion.tuning import trajectories, tune

PACKAGES = ("reverie", "torch", "numpy", "diffusers", "k-diffusion")
NFES = (4, 5, 6, 8, 10, 15, 20, 30, 50)
STARTS = {2: 512, 64: 512, 3072: 128}
TUNED_ON, UNSEEN = (0, 1), (100, 101)  # seeds of the mixtures
TRAINING = {2: 128, 64: 64, 3072: 16}  # starts that a solver is tuned from, for each mixture


class Case:
    """A mixture, its starts, and where the exact ODE takes them."""

    def __init__(self, dimension: int, seed: int, starts: int) -> None:
        self.denoiser = random_mixture(dimension, seed, make_table("linear"))
        self.dimension = dimension
        self.x = normal((starts, dimension), seed, "solvers").double()
        self.truth = exact(self.denoiser, self.x)

    def errors(self, end: Tensor) -> Tensor:
        """Return the error of each start (B,)."""
        return (end.double() - self.truth).square().mean(1).sqrt()


def exact(denoiser: Denoiser, x: Tensor) -> Tensor:
    """Return where the probability-flow ODE takes x from t = 1."""
    schedule = denoiser.schedule
    ends = torch.tensor([1.0, schedule.t_min], dtype=torch.float64)
    alpha, sigma = schedule.marginal(ends)
    log_rho = (sigma / alpha).log().tolist()

    def slope(u: Tensor, z: Tensor) -> Tensor:
        t = schedule.time(-2 * u).clamp(max=1)
        return u.exp()[:, None] * denoiser(schedule.alpha(t)[:, None] * z, t).eps

    z = integrate(slope, x / alpha[0], log_rho[0], log_rho[1], rtol=1e-9, atol=1e-9).y
    return denoiser(alpha[1] * z, ends[1:].expand(len(z))).x0


def fitted(recipe: Recipe) -> Solve:
    """Return a function that solves by a recipe."""

    def solve(denoiser: Denoiser, x: Tensor, evaluations: int) -> Tensor:
        sampler = Learned(recipe)
        *_, last = run(sampler, denoiser, sampler.init(x, 1.0), recipe.grid(denoiser.schedule), Noise(range(len(x))))
        return last.x

    return solve


def automatic(denoiser: Denoiser, x: Tensor, evaluations: int) -> Tensor:
    """Solve as `--sampler auto` does without tuning."""
    recipe = general(denoiser.schedule, evaluations, x[0].numel())
    if recipe is not None:
        return fitted(recipe)(denoiser, x, evaluations)
    sampler, grid = UniPC(), uniform_log_snr(denoiser.schedule, evaluations)
    *_, last = run(sampler, denoiser, sampler.init(x, 1.0), grid, Noise(range(len(x))))
    return last.x


def measure(cases: list[Case], solve: Solve, evaluations: int) -> tuple[float, float]:
    """Return the median and the root mean square of the errors, over all starts of all cases."""
    errors = torch.cat([case.errors(solve(case.denoiser, case.x, evaluations)) for case in cases])
    if not bool(errors.isfinite().all()):
        return math.inf, math.inf
    return errors.median().item(), errors.square().mean().sqrt().item()


def tuned_recipe(dimension: int, evaluations: int, walks: int | None, cache: dict[int, Any]) -> Recipe:
    """Return the recipe that `tune` finds on the mixtures, from starts that are judged nowhere."""
    if dimension not in cache:
        mixtures = [random_mixture(dimension, seed, make_table("linear")) for seed in TUNED_ON]
        shape = (TRAINING[dimension], dimension)
        starts = [normal(shape, seed, "tuning").double() for seed in TUNED_ON]
        cache[dimension] = [trajectories(m, x) for m, x in zip(mixtures, starts, strict=True)]
    return tune(cache[dimension], evaluations, walks or max(60, 10 * evaluations))[0]


def column(
    dimension: int, nfe: int, cases: dict[str, list[Case]], walks: int | None, cache: dict[int, Any]
) -> dict[str, Any]:
    """Return one column of a table: the best peers and ours."""
    peers: dict[str, tuple[float, float]] = {}
    for name, solve in [*diffusers_solvers(), *k_diffusion_solvers()]:
        try:
            peers[name] = measure(cases["known"], solve, nfe)
        except Exception as error:  # a scheduler that cannot do so few steps, or with this spacing
            peers[name] = (math.inf, math.inf)
            print(f"  {dimension}-D, {nfe}: {name}: {str(error).splitlines()[0][:90]}", file=sys.stderr)
    unseen_peers = {name: measure(cases["unseen"], solve, nfe) for name, solve in best_solvers(peers)}
    recipe = tuned_recipe(dimension, nfe, walks, cache)
    ours = {
        "auto": measure(cases["known"], automatic, nfe),
        "tuned": measure(cases["known"], fitted(recipe), nfe),
        "unseen": measure(cases["unseen"], fitted(recipe), nfe),
        "auto unseen": measure(cases["unseen"], automatic, nfe),
    }
    found: dict[str, Any] = {"dimension": dimension, "evaluations": nfe, "ours": ours, "peers": peers}
    for i, word in enumerate(("median", "rms")):
        best = min(peers, key=lambda name: peers[name][i])
        found[word] = {
            "best peer": best,
            "peer": peers[best][i],
            "peer unseen": min(row[i] for row in unseen_peers.values()),
        } | {name: row[i] for name, row in ours.items()}
    return found


def best_solvers(peers: dict[str, tuple[float, float]], keep: int = 8) -> list[tuple[str, Solve]]:
    """Return the peers among the best few in either number."""
    names = {name for i in (0, 1) for name in sorted(peers, key=lambda name: peers[name][i])[:keep]}
    return [(name, solve) for name, solve in [*diffusers_solvers(), *k_diffusion_solvers()] if name in names]


def show(rows: list[dict[str, Any]], word: str) -> str:
    """Return a table of one number, a line for each column."""
    head = ["dim", "evaluations", "best peer", "peer", "auto", "x", "tuned", "x", "peer, unseen", "unseen", "x"]
    lines = []
    for row in rows:
        found = row[word]
        ratio = lambda peer, own: f"{peer / own:.1f}" if own else "inf"  # noqa: E731
        lines.append([
            row["dimension"], row["evaluations"], found["best peer"].replace("Scheduler", ""), f"{found['peer']:.5f}",
            f"{found['auto']:.5f}", ratio(found["peer"], found["auto"]),
            f"{found['tuned']:.5f}", ratio(found["peer"], found["tuned"]),
            f"{found['peer unseen']:.5f}", f"{found['unseen']:.5f}", ratio(found["peer unseen"], found["unseen"]),
        ])  # fmt: skip
    return table(head, [[str(cell) for cell in line] for line in lines])


def main() -> None:
    """Run, print two tables, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--dimensions", default="2,64,3072", help="with commas")
    parser.add_argument("--evaluations", default=",".join(map(str, NFES)), help="with commas")
    parser.add_argument("--walks", type=int, help="candidate grids that tune may try (default: as reverie tune)")
    parser.add_argument("--starts", type=int, help="starts of each mixture (default: 512; 128 in 3072 dimensions)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    began, rows, cache = time.perf_counter(), [], {}
    for dimension in map(int, options.dimensions.split(",")):
        starts = options.starts or STARTS[dimension]
        cases = {
            "known": [Case(dimension, seed, starts) for seed in TUNED_ON],
            "unseen": [Case(dimension, seed, starts) for seed in UNSEEN],
        }
        for nfe in map(int, options.evaluations.split(",")):
            rows.append(column(dimension, nfe, cases, options.walks, cache))
            found = rows[-1]
            word = f"{dimension}-D, {nfe} evaluations, {time.perf_counter() - began:.0f} s"
            print(f"{word}: median {brief(found['median'])}; rms {brief(found['rms'])}", file=sys.stderr)
            if options.json:
                write(options.json, rows, options)
    for word in ("median", "rms"):
        print(f"\n{word} error\n\n{show(rows, word)}")


def brief(found: dict[str, Any]) -> str:
    """Return a column in a few words."""
    return " ".join(f"{name} {found[name]:.5f}" for name in ("peer", "auto", "tuned", "unseen"))


def write(path: Path, rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Write everything so far."""
    about = {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "machine": machine(),
        "versions": versions(PACKAGES),
    }
    path.write_text(json.dumps(about | {"columns": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
