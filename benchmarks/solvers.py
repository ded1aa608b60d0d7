r"""Error against the exact probability-flow ODE, by number of evaluations: ours beside diffusers and k-diffusion.

    python benchmarks/solvers.py --peers FOLDER --json solvers.json

solves the ODE of mixtures of Gaussians in 2, 64 and 3072 dimensions, under the linear table of 1000 betas, from 8192
starts of each of eight mixtures, in float64, with an exact denoiser. Many dimensions are folded: estimates are sums of
the means and of x, so that a dozen coordinates hold all that a solver does, to rounding (RoundMixture.folded). The
truth is Dormand and Prince's rule at a tolerance of 1e-9 from t = 1 to the table's first timestep, and the denoiser's
estimate there. Every deterministic scheduler of diffusers and sampler of k-diffusion is run with every
spacing that it has, with as many evaluations or fewer, and the best of them in each column, on the same starts, is what
ours is set beside, whichever that is: one number for the median, one for the root mean square, over the starts, of the
error's norm divided by the root of the dimension. Beside each ratio stands the interval in which nine of ten lie that
are drawn from the same starts anew: the root mean square is that of the few starts in a thousand that end in the wrong
mode.

k-diffusion takes part where `pip install --no-deps k-diffusion` has put it: only its module of samplers is read.

ours:   auto     what `--sampler auto` takes for a model that it knows nothing of
        tuned    `tune` on the first four mixtures, from other starts
        unseen   the same solver on the other four, which it was not tuned on

With `--schedule flow`, or another, the peers are the published solvers of reverie itself: UniPC 2 and 3 and
DPM-Solver++ 2M and 3M, each uniform in log-SNR, on Karras' grid and even in time; diffusers' stay with their table.
"""

import argparse
import dataclasses
import functools
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
from report import machine, table, versions
from solver_peers import Solve, diffusers_solvers, k_diffusion_solvers
from torch import Tensor

from reverie.diffusion.denoisers import Denoiser
from reverie.diffusion.grids import uniform_log_snr
from reverie.diffusion.hopping import Jury, hopped
from reverie.diffusion.lengthening import lengthened
from reverie.diffusion.oracle_stack import random_circles, random_stack
from reverie.diffusion.polish import Aim
from reverie.diffusion.recipes import general
from reverie.diffusion.registry import schedules
from reverie.diffusion.runge_kutta_pair import integrate
from reverie.diffusion.samplers.learned import Recipe, as_recipe
from reverie.diffusion.samplers.unipc import UniPC
from reverie.diffusion.schedules import Schedule, Table
from reverie.diffusion.shortening import shortened
from reverie.diffusion.starts import MANY as MANY_STEPS
from reverie.diffusion.starts import beside_borders, solved, stages, two_ends
from reverie.diffusion.trajectories import Trajectories, trajectories
from reverie.diffusion.tuning import published, tune
from reverie.diffusion.walking import follow

PACKAGES = ("reverie", "torch", "numpy", "diffusers", "k-diffusion")
NFES = (4, 5, 6, 8, 10, 15, 20, 30, 50)
KNOWN, UNSEEN = (0, 1, 2, 3), (100, 101, 102, 103)  # seeds of the mixtures
TUNED_ON = (*KNOWN, 4, 5, 6, 7, 8, 9, 10, 11)  # of those that solvers are fitted to
TRAINING, STAGES = 172, 4  # evenly drawn starts of each mixture in a stage, and as many at borders; stages
# Of each solver that is made: for how much the mean error counts, and starts at borders.
WAYS = ((0.5, 30.0), (0.9, 30.0))
TRIED = 4  # of so many starts one is used to try which step is left out
LEAPS = 480  # over N^2, leaps from a solver of N steps at most
AFTER_LEAPS = 12  # rounds of polishing in each of two stages; and after a step is left out
CHOICE = 0.8  # for how much the root mean square counts beside the typical error when one of them is chosen
CHOOSING = 512, 2048  # other starts of each mixture by which one of them is chosen: drawn evenly, beside borders
EXACT, MANY = 300, 1000  # steps of their exact solution; of the truth where a schedule begins with noise alone
DRAWS = 100  # of the starts, for an interval


class Starts:
    """Starts of some mixtures of one dimension, and where the exact ODE takes them.

    Arguments:
        dimension: The dimension.
        seeds: The mixtures' seeds.
        count: Starts of each.
        purpose: What they are drawn for.
        folder: Where the truth is kept, and read again.
        schedule: Their schedule's name.
    """

    def __init__(
        self,
        dimension: int,
        seeds: tuple[int, ...],
        count: int,
        purpose: str,
        folder: Path | None = None,
        schedule: str = "linear",
    ) -> None:
        self.denoiser, self.x = random_stack(dimension, seeds, count, schedules[schedule](), purpose)
        self.dimension = dimension
        words = [purpose, dimension, len(self.x), *([] if schedule == "linear" else [schedule])]
        kept = None if folder is None else folder / f"truth-{'-'.join(map(str, words))}.pt"
        if kept is not None and kept.exists():
            self.truth = torch.load(kept, weights_only=True)
            return
        self.truth = exact(self.denoiser, self.x)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            torch.save(self.truth, kept)

    def errors(self, solve: Solve, evaluations: int) -> Tensor:
        """Return the error of each start (B,)."""
        end = solve(self.denoiser, self.x, evaluations).double()
        return ((end - self.truth).square().sum(1) / self.dimension).sqrt()

    def to_fit(self) -> Trajectories:
        """Return the trajectories, as `tune` takes them."""
        return dataclasses.replace(trajectories(self.denoiser, self.x), end=self.truth, numbers=self.dimension)


def exact(denoiser: Denoiser, x: Tensor) -> Tensor:
    """Return where the probability-flow ODE takes x from t = 1; of noise alone, by many steps."""
    schedule = denoiser.schedule
    if schedule.zero_terminal_snr:
        return solved(denoiser, x, MANY)
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
        return follow(Trajectories(denoiser, [], x[None], x[None], x), recipe).x[-1]

    return solve


def automatic(dimension: int) -> Solve:
    """Return a function that solves as `--sampler auto` does without tuning."""

    def solve(denoiser: Denoiser, x: Tensor, evaluations: int) -> Tensor:
        return fitted(general_recipe(denoiser.schedule, evaluations, dimension))(denoiser, x, evaluations)

    return solve


def general_recipe(schedule: Schedule, evaluations: int, dimension: int) -> Recipe:
    """Return the recipe that comes with the package; where there is none UniPC's, on which `auto` falls back."""
    ready = general(schedule, evaluations, dimension)
    return as_recipe(UniPC(), schedule, uniform_log_snr(schedule, evaluations)) if ready is None else ready


@dataclasses.dataclass(frozen=True)
class Lessons:
    """What a solver is tuned from: trajectories to walk along, stages to polish it on, and what to choose by."""

    walked: Trajectories
    stages: list[list[Trajectories]]
    jury: Jury

    @staticmethod
    def of(dimension: int, schedule: str, many: bool) -> "Lessons":
        """Return those of the mixtures that are tuned on."""
        walked = Starts(dimension, TUNED_ON, TRAINING // 2, "walking", schedule=schedule).to_fit()
        drawn = dimension, TUNED_ON, TRAINING * STAGES, schedules[schedule](), "tuning"
        starts = *random_stack(*drawn), random_circles(*drawn)
        fitting = stages(*starts, len(TUNED_ON), dimension, [TRAINING] * STAGES, EXACT, many)
        return Lessons(walked, fitting, Lessons.judges(dimension, schedule))

    @staticmethod
    @functools.cache
    def judges(dimension: int, schedule: str) -> Jury:
        """Return what solvers are chosen by."""
        even, beside = ((dimension, TUNED_ON, count, schedules[schedule](), "choosing") for count in CHOOSING)
        stack, x = random_stack(*even)
        near = beside_borders(stack, random_circles(*beside), CHOOSING[1] * len(TUNED_ON), dimension, EXACT)
        return Jury(two_ends(stack, x, steps=EXACT, numbers=dimension), near, CHOICE)

    def with_borders(self, part: float) -> list[list[Trajectories]]:
        """Return the stages, those at borders counting for so much."""
        return [[even, dataclasses.replace(border, part=part)] for even, border in self.stages]

    def ready(self, evaluations: int) -> Recipe:
        """Return what `auto` takes."""
        return general_recipe(self.walked.denoiser.schedule, evaluations, self.walked.numbers)

    def tuned(self, evaluations: int, more: list[Recipe], mean: float, border: float, options: Any) -> Recipe:
        """Return what `tune` finds, of some solvers among others."""
        stages = self.with_borders(border)
        return tune([self.walked], evaluations, options.walks, options.rounds, None, more, stages, Aim(mean))[0]


def from_most(lessons: Lessons, evaluations: list[int], options: argparse.Namespace) -> dict[int, Recipe]:
    """Return solvers of many steps: the one of most is tuned, and each of the others made of the one of more."""
    (mean, border), found = WAYS[-1], dict[int, Recipe]()
    stages = lessons.with_borders(border)
    tried = [one.rows(range(0, len(one.end), TRIED)) for one in stages[0]]
    recipe = lessons.tuned(max(evaluations), [lessons.ready(max(evaluations))], mean, border, options)
    for steps in sorted(evaluations, reverse=True):
        found[steps] = recipe = shortened(tried, stages, recipe, steps, AFTER_LEAPS, Aim(mean))
    return found


def tuned_recipe(
    lessons: Lessons, evaluations: int, fewer: Recipe | None, shorter: Recipe | None, options: argparse.Namespace
) -> Recipe:
    """Return the best of some recipes that are found, by the typical and the root mean square error of other starts.

    Arguments:
        lessons: What they are found from.
        evaluations: Their steps.
        fewer: The solver of fewer steps that was found before, where there is one.
        shorter: The solver that was made of one of more, where there is one.
        options: The script's.
    """
    more = [lessons.ready(evaluations), *([fewer] if fewer else [])]
    found = [lessons.tuned(evaluations, more, *way, options) for way in WAYS] if evaluations <= MANY_STEPS else []
    whole = [lengthened(lessons.stages[0], one, evaluations) for one in more]
    candidates = [one for one in (*whole, *found, shorter) if one is not None]
    best = min(candidates, key=lessons.jury.error)
    (mean, border), leaps = WAYS[-1], min(options.hops, LEAPS // evaluations**2)
    return hopped(best, lessons.with_borders(border), lessons.jury, leaps, AFTER_LEAPS, Aim(mean))


def peer_errors(starts: Starts, evaluations: int, folder: Path | None) -> dict[str, Tensor]:
    """Return the errors of each peer that can do so few evaluations, by name; from the folder where they are there."""
    kept = None if folder is None else folder / f"peers-{starts.dimension}-{evaluations}-{len(starts.x)}.pt"
    if kept is not None and kept.exists():
        known: dict[str, Tensor] = torch.load(kept, weights_only=True)
        return known
    if not isinstance(starts.denoiser.schedule, Table):
        return published_errors(starts, evaluations)
    found = {}
    for name, solve in [*diffusers_solvers(), *k_diffusion_solvers()]:
        try:
            errors = starts.errors(solve, evaluations)
        except Exception as error:  # a scheduler that cannot do so few steps, or with this spacing
            print(f"  {starts.dimension}-D, {evaluations}: {name}: {str(error).splitlines()[0][:90]}", file=sys.stderr)
            continue
        if bool(errors.isfinite().all()):
            found[name] = errors.float()
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(found, kept)
    return found


def published_errors(starts: Starts, evaluations: int) -> dict[str, Tensor]:
    """Return the errors of the published solvers that reverie has, by name."""
    recipes = published([starts.to_fit()], evaluations)
    names = [f"{solver} {grid}" for solver in ("UniPC 2", "UniPC 3", "2M", "3M") for grid in ("log", "karras", "even")]
    return {
        name: starts.errors(fitted(recipe), evaluations).float() for name, recipe in zip(names, recipes, strict=True)
    }


# Two numbers, and how sure they are -----------------------------------------------------------------


def rms(errors: Tensor) -> Tensor:
    """Return the root mean square (...) of errors (..., B)."""
    return errors.double().square().mean(-1).sqrt()


STATISTICS = {"median": lambda errors: errors.double().median(-1).values, "rms": rms}


def beside(word: str, peers: dict[str, Tensor], own: Tensor) -> dict[str, Any]:
    """Return ours beside the best peer by one number: both, how many times as far the peer is, and the interval."""
    statistic = STATISTICS[word]
    values = {name: statistic(errors).item() for name, errors in peers.items()}
    best = min(values, key=lambda name: values[name])
    index = torch.randint(len(own), (DRAWS, len(own)), generator=torch.Generator().manual_seed(0))
    drawn = statistic(peers[best][index]) / statistic(own[index])
    low, high = drawn.quantile(torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
    mine = statistic(own).item()
    return {"best peer": best, "peer": values[best], "own": mine, "ratio": values[best] / mine, "interval": [low, high]}


def column(starts: Starts, nfe: int, recipe: Recipe | None, folder: Path | None) -> dict[str, Any]:
    """Return one column of a table: ours beside the best peers, on the mixtures tuned on and on the others."""
    peers, half = peer_errors(starts, nfe, folder), len(starts.x) // 2
    parts = {"known": slice(0, half), "unseen": slice(half, None), "all": slice(None)}
    pairs = {"auto": (starts.errors(automatic(starts.dimension), nfe), "all")}
    if recipe is not None:
        tuned = starts.errors(fitted(recipe), nfe)
        pairs |= {"tuned": (tuned, "known"), "unseen": (tuned, "unseen")}
    found: dict[str, Any] = {"dimension": starts.dimension, "evaluations": nfe}
    found["recipe"] = None if recipe is None else dataclasses.asdict(recipe)
    for word in STATISTICS:
        found[word] = {
            name: beside(word, {peer: errors[parts[part]] for peer, errors in peers.items()}, own[parts[part]])
            for name, (own, part) in pairs.items()
        }
    return found


def show(rows: list[dict[str, Any]], word: str) -> str:
    """Return a table of one number, a line for each column."""
    head = ["dim", "evaluations", "best peer", "its error"]
    head += ["auto", "x", "tuned", "x", "unseen", "x"]
    lines = []
    for row in rows:
        found = row[word]
        line = [row["dimension"], row["evaluations"], short(found["auto"]["best peer"]), f"{found['auto']['peer']:.5f}"]
        for one in (found.get(name) for name in ("auto", "tuned", "unseen")):
            ratio = "{:.1f} ({:.1f}-{:.1f})".format(one["ratio"], *one["interval"]) if one else ""
            line += [f"{one['own']:.5f}" if one else "", ratio]
        lines.append([str(cell) for cell in line])
    return table(head, lines)


def short(name: str) -> str:
    """Return a peer's name as a table has room for it."""
    for long, word in {"Scheduler": "", "Multistep": "", "use_": "", "_sigmas": "", "_lambdas linspace": ""}.items():
        name = name.replace(long, word)
    return name


def main() -> None:
    """Run, print two tables, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--dimensions", default="2,64,3072", help="with commas")
    parser.add_argument("--evaluations", default=",".join(map(str, NFES)), help="with commas")
    parser.add_argument("--schedule", default="linear", help="by name")
    parser.add_argument("--walks", type=int, default=10, help="candidate grids that tune may try")
    parser.add_argument("--rounds", type=int, default=20, help="rounds of polishing")
    parser.add_argument(
        "--hops", type=int, default=12, help="leaps from the best solver of each column, fewer of many steps"
    )
    parser.add_argument("--starts", type=int, default=8192, help="starts of each mixture")
    parser.add_argument("--most", type=int, default=20, help="evaluations up to which a solver is tuned")
    parser.add_argument("--peers", type=Path, help="a folder where the truth and the peers' errors are kept, and read")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    began, rows = time.perf_counter(), []
    for dimension in map(int, options.dimensions.split(",")):
        starts = Starts(dimension, (*KNOWN, *UNSEEN), options.starts, "solvers", options.peers, options.schedule)
        nfes = [int(word) for word in options.evaluations.split(",")]
        lessons = functools.cache(functools.partial(Lessons.of, dimension, options.schedule))
        many = [nfe for nfe in nfes if MANY_STEPS <= nfe <= options.most]
        shorter, recipe = from_most(lessons(True), many, options) if many else {}, None
        for nfe in nfes:
            tuned = nfe <= options.most
            given = lessons(nfe >= MANY_STEPS) if tuned else None
            recipe = tuned_recipe(given, nfe, recipe, shorter.get(nfe), options) if given else None
            rows.append(column(starts, nfe, recipe, options.peers))
            print(f"{dimension}-D, {nfe}, {time.perf_counter() - began:.0f} s: {brief(rows[-1])}", file=sys.stderr)
            if options.json:
                write(options.json, rows, options)
    for word in STATISTICS:
        print(f"\n{word} error\n\n{show(rows, word)}")


def brief(row: dict[str, Any]) -> str:
    """Return a column in a few words."""
    words = [
        f"{word} " + " ".join(f"{name} {one['ratio']:.1f}" for name, one in row[word].items()) for word in STATISTICS
    ]
    return "; ".join(words)


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
