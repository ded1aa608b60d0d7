"""Fit the solvers that `--sampler auto` uses where a model has none of its own, and write them into the package.

    python tools/fit_recipes.py --schedules linear,cosine

They are fitted, by reverie.diffusion.tuning, to mixtures of Gaussians that are drawn by seeds which nothing else uses;
no network is among them. There are four for each schedule and number of steps: for samples of fewer than 16 numbers,
of fewer than 40, of fewer than 2048, and of more. As in `tune`, half of the starts lie at borders
(reverie.diffusion.starts). On mixtures that it was not fitted to, a new solver is set beside the one that the file has
and beside published ones, and the best of them is kept. What is not named stays as it is.

    python tools/fit_recipes.py --schedules linear --networks runs/digits,runs/mnist

keeps none that is much farther than UniPC on trained networks of that schedule, which are rougher than mixtures, and
beside fitted solvers tries some that were hardly moved from where they began: the less they were, the less of what
holds for mixtures alone they have learned. Where none is left, a row goes, and `auto` is UniPC.

    python tools/fit_recipes.py --schedules linear --teachers runs/digits --networks runs/digits,runs/mnist

also fits them to a trained network, which counts as much as all the mixtures together.

    python tools/fit_recipes.py --schedules linear --steps 20,15 --shortened 16

makes solvers of up to so many steps of those of more as well, by leaving steps out.
"""

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import chain, pairwise, product, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

import reverie as rv
from reverie.diffusion.grids import uniform_log_snr
from reverie.diffusion.lengthening import lengthened
from reverie.diffusion.levels import levels
from reverie.diffusion.oracle_stack import MixtureStack, random_circles, random_stack
from reverie.diffusion.polish import FLOOR, Aim, attempt, judged, polish, squares
from reverie.diffusion.recipes import FILE, of_row
from reverie.diffusion.registry import schedules
from reverie.diffusion.samplers.base import Sampler
from reverie.diffusion.samplers.exponential import step_weights
from reverie.diffusion.samplers.learned import Learned, Recipe
from reverie.diffusion.schedules import Schedule
from reverie.diffusion.shortening import shortened
from reverie.diffusion.starts import Circles, stages
from reverie.diffusion.trajectories import Trajectories, trajectories
from reverie.diffusion.tuning import PAST, published, tune
from reverie.models.tuning import teach

STEPS = (5, 10, 20, 15, 8, 6, 4, 3, 2, 1, 7, 9, 12, 11, 13, 14, 16, 18, 50, 30)
DIMENSIONS = {"points": (2, 4), "few": (16,), "small": (64,), "large": (768, 3072)}
GRIDS = 3  # of each published solver, the first uniform in lambda
UNIPC = "published 3"  # of order 3 on that: what `auto` is without a row
FIRST_SEED, TEST_SEED, MIXTURES = 1_000_000, 2_000_000, 6  # seeds of the mixtures; how many of them
FIRST, MORE, TEST = 64, 96, 500  # starts of each, drawn evenly: to walk along, to polish on in a stage, to judge by
EXACT = 300  # steps of the exact solutions
WALKS, ROUNDS, STAGES = 10, 12, 2
AIM = Aim(noise=0.3)  # (polish.py, 1): the networks that these serve have errors of their own
MEANS = (0.5, 0.9)  # for how much the mean error counts, of each solver that is fitted
BETWEEN = 0.7  # and of one that is made of one of more steps
# How much those errors count, and rounds, of solvers that are hardly moved.
CAREFUL = tuple(product((0.1, 0.3), (2, 4)))
SHARES = (0.25, 0.5, 0.75, 0.85)  # of the way from a solver that the file has to the one that was fitted
SAMPLES, FARTHER = 24, 1.2  # samples of a network; how many times as far as UniPC a solver may be on it
TAUGHT = 32  # samples of a network that is fitted to
TRIED, AFTER = 4, 4  # of so many starts one is used to try which step is left out; rounds after each
MANY = 20  # steps, above which published solvers are polished and no grids are walked


class Lessons(NamedTuple):
    """What solvers of one size are fitted to and judged by: one of each for each dimension."""

    walked: list[Trajectories]
    stages: list[list[Trajectories]]
    judging: list[Trajectories]

    @staticmethod
    def of(schedule: Schedule, dimensions: Sequence[int], teachers: Sequence[rv.Model]) -> "Lessons":
        """Return those of a schedule, and of trained networks."""
        walked, fitting, judging = [], [], []
        for d in dimensions:
            walked.append(replace(trajectories(*drawn(schedule, d, FIRST_SEED, FIRST, "walking")[:2]), numbers=d))
            starts = drawn(schedule, d, FIRST_SEED, MORE * STAGES, "recipes")
            fitting.append(stages(*starts, MIXTURES, d, [MORE] * STAGES, EXACT))
            judging += stages(*drawn(schedule, d, TEST_SEED, TEST, "recipes"), MIXTURES, d, [TEST], EXACT)[0]
        taught = [taught_by(model, sum(one.part for stage in fitting for one in stage[0])) for model in teachers]
        fitting += [stage for _, stage in taught]
        return Lessons(
            [*walked, *(even for even, _ in taught)],
            [list(chain(*stage)) for stage in zip(*fitting, strict=True)],
            judging,
        )


def taught_by(model: rv.Model, part: float) -> tuple[Trajectories, list[list[Trajectories]]]:
    """Return a network's trajectories to walk along, and those to polish on in each stage, which count for `part`."""
    found = [teach(model, TAUGHT, stage, None, None).both for stage in range(STAGES)]
    whole = sum(one.part for one in found[0])
    return found[0][0], [[replace(one, part=one.part * part / whole) for one in stage] for stage in found]


def drawn(
    schedule: Schedule, dimension: int, seed: int, count: int, purpose: str
) -> tuple[MixtureStack, Float[Tensor, "b d"], Circles]:
    """Return some mixtures, and so many starts of each, drawn evenly and on circles."""
    what = dimension, range(seed, seed + MIXTURES), count, schedule, purpose
    return *random_stack(*what), random_circles(*what)


def fit(lessons: Lessons, steps: int, known: Sequence[Recipe], mean: float) -> Recipe:
    """Return a solver fitted to some starts, then polished on others; of many steps, the best of those known is."""
    aim = AIM._replace(mean=mean)
    if steps <= MANY:
        return tune(lessons.walked, steps, WALKS, ROUNDS, more=known, stages=lessons.stages, aim=aim)[0]
    return polished(lessons.stages, judged(lessons.stages[0], list(known), aim)[0][0], ROUNDS, aim)


def made_of_more(lessons: Lessons, longer: Recipe, steps: int) -> Recipe:
    """Return a solver of so many steps made of one of more."""
    tried = [one.rows(range(0, len(one.end), TRIED)) for one in lessons.stages[0]]
    return shortened(tried, lessons.stages, longer, steps, AFTER, AIM._replace(mean=BETWEEN))


def polished(stages: Sequence[Sequence[Trajectories]], recipe: Recipe, rounds: int, aim: Aim) -> Recipe:
    """Return a solver that was polished in each stage in turn."""
    for stage in stages:
        recipe, _ = polish(stage, recipe, rounds, aim=aim)
    return recipe


def careful(lessons: Lessons, steps: int) -> dict[str, Recipe]:
    """Return solvers that are hardly moved from published ones on the grid that is uniform in lambda."""
    first, (begun, *further), found = published(lessons.judging, steps)[::GRIDS], lessons.stages, {}
    for noise, rounds in CAREFUL:
        aim = AIM._replace(noise=noise)
        recipe, _ = min((polish(begun, one, rounds, aim=aim) for one in first), key=lambda one: one[1])
        found[f"careful {noise} {rounds}"] = polished(further, recipe, rounds, aim)
    return found


class Network:
    """A trained network, and where its samples end."""

    def __init__(self, path: str) -> None:
        self.model = rv.load(path)
        self.truth = self.draw("dpmpp-3m", grid="log-snr", steps=EXACT)
        self.unipc = cache(lambda steps: self.distance("unipc", grid="log-snr", steps=steps))

    def draw(self, sampler: str | Sampler, **how: Any) -> Tensor:
        """Return samples, always of the same noise."""
        names = self.model.card.classes
        how |= {"classes": [names[i % len(names)] for i in range(SAMPLES)]} if names else {}
        return self.model.sample(
            SAMPLES, sampler=sampler, seed=TEST_SEED, exact=False, batch_size=SAMPLES, **how
        ).images

    def distance(self, sampler: str | Sampler, **how: Any) -> float:
        """Return the root mean square distance from where they end."""
        return float((self.draw(sampler, **how) - self.truth).double().square().mean().sqrt())

    def farther(self, recipe: Recipe) -> float:
        """Return how many times as far as UniPC's a solver's samples end."""
        return self.distance(Learned(recipe)) / self.unipc(recipe.steps)


def between(first: Recipe, second: Recipe, share: float) -> Recipe:
    """Return a solver on the way from one to another."""
    mixed = [
        tuple((1 - share) * a + share * b for a, b in zip_longest(*rows, fillvalue=0.0))
        for rows in zip(first.weights, second.weights, strict=True)
    ]
    lam, kept = (
        tuple((1 - share) * a + share * b for a, b in zip(*pair, strict=True))
        for pair in ((first.lam, second.lam), (first.kept, second.kept))
    )
    return Recipe(lam, tuple(mixed), kept)


class Judged(NamedTuple):
    """How far a solver is.

    Arguments:
        error: The measure of polish.py (1) on mixtures, the logarithm of a square.
        typical, mean: The logarithms of the typical and of the root mean square error on those drawn evenly.
        farther: How many times as far as UniPC it is on each network.
    """

    error: float
    typical: float
    mean: float
    farther: Sequence[float]

    @property
    def total(self) -> float:
        """Its error, in which a distance on all the networks together counts as much as one on the mixtures."""
        return self.error + 2 * sum(map(math.log, self.farther)) / max(len(self.farther), 1)

    @staticmethod
    def of(lessons: Lessons, recipe: Recipe, networks: Sequence[Network]) -> "Judged | None":
        """Judge a solver; None of one that leaves what numbers can hold."""
        if (tried := attempt(lessons.judging, recipe, AIM)) is None:
            return None
        pairs = zip(lessons.judging[::2], tried[0][::2], strict=True)  # without those at borders
        squared = [squares(one, path.x[-1]) + FLOOR for one, path in pairs]
        typical = sum(float(e.log().mean()) for e in squared) / len(squared) / 2
        mean = sum(float(e.mean().log()) for e in squared) / len(squared) / 2
        return Judged(tried[1], typical, mean, [network.farther(recipe) for network in networks])


def chosen(found: Mapping[str, Judged]) -> str:
    """Return the best of some solvers, UniPC where none is left.

    Those too far on a network are not among them; nor, where there are others, those that on mixtures are farther than
    a published one, be it by the typical error or by the mean.
    """
    allowed = {word: one for word, one in found.items() if max(one.farther, default=0.0) <= FARTHER}
    known = [one for word, one in found.items() if word.startswith("published")]
    ahead = {
        word: one
        for word, one in allowed.items()
        if all(one.typical <= other.typical and one.mean <= other.mean for other in known)
    }
    return min(ahead or allowed, key=lambda word: allowed[word].total, default=UNIPC)


def adams(schedule: Schedule, grid: Float[Tensor, " n"], order: int) -> Recipe:
    """Return the exponential Adams-Bashforth rule of an order (exponential.py, 1 and 3) as a recipe."""
    lam = [level.lam for level in levels(schedule, grid.tolist())]
    rows = []
    for k, (here, there) in enumerate(pairwise(lam)):
        past = lam[max(k - order + 1, 0) : k] if there < math.inf else []
        weights = step_weights(here, there, tuple(reversed(past)), 0.0, "exact")
        rows.append(tuple(weight / -math.expm1(here - there) for weight in weights))
    return Recipe(tuple(lam[:-1]), tuple(rows))


def rounded(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as the file has it."""
    return {
        "lam": [round(value, 6) for value in recipe.lam],
        "weights": [[round(value, 6) for value in row] for row in recipe.weights],
        "kept": [round(value, 6) for value in recipe.kept],
    }


Rows = Mapping[str, Mapping[str, Any]]


def at_hand(schedule: Schedule, lessons: Lessons, rows: Rows, steps: int) -> dict[str, Recipe]:
    """Return the solvers that need no fitting: published ones, the file's, and the file's of fewer steps lengthened."""
    found = {f"published {i}": recipe for i, recipe in enumerate(published(lessons.judging, steps))}
    if steps > MANY:
        found["adams"] = adams(schedule, uniform_log_snr(schedule, steps), PAST + 1)
    if str(steps) in rows:
        found["kept"] = of_row(rows[str(steps)])
    if fewer := max((n for n in map(int, rows) if n < steps), default=0):
        longer = lengthened(lessons.stages[0], of_row(rows[str(fewer)]), steps, aim=AIM)
        found |= {} if longer is None else {"lengthened": longer}
    return found


def made(
    lessons: Lessons,
    rows: Rows,
    steps: int,
    known: Mapping[str, Recipe],
    options: argparse.Namespace,
    gently: bool,
) -> dict[str, Recipe]:
    """Return the solvers that are made: fitted, made of more steps, hardly moved, and what lies on the way to the first
    two from the file's, or from UniPC; where none is fitted, on the way from UniPC to all that are known."""
    fitting = steps <= options.most
    ends = {f"fitted {mean}": fit(lessons, steps, list(known.values()), mean) for mean in MEANS if fitting}
    more = min((n for n in map(int, rows) if n > steps), default=0)
    if more and steps <= options.shortened:
        ends["shortened"] = made_of_more(lessons, of_row(rows[str(more)]), steps)
    found = careful(lessons, steps) if gently and fitting else {}
    before = known[UNIPC]
    if fitting:
        before = known.get("kept", before)
    else:
        ends = {word: recipe for word, recipe in known.items() if word != UNIPC} | ends
    for word, recipe in ends.items():
        found[word] = recipe
        found |= {f"{word}, between {share}": between(before, recipe, share) for share in SHARES}
    return found


def main() -> None:
    """Fit, and write after each number of steps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--schedules", default="linear,scaled-linear,cosine,vp,flow,edm", help="names, with commas")
    parser.add_argument("--sizes", default=",".join(DIMENSIONS), help="with commas")
    parser.add_argument("--steps", default=",".join(map(str, STEPS)), help="with commas")
    parser.add_argument("--networks", default="", help="trained models of the schedule, with commas")
    parser.add_argument("--teachers", default="", help="trained models of the schedule, with commas")
    parser.add_argument("--most", type=int, default=max(STEPS), help="steps up to which any are fitted")
    parser.add_argument("--shortened", type=int, default=0, help="steps up to which longer solvers are shortened, too")
    parser.add_argument("--out", type=Path, default=FILE, help="the file of recipes")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    networks = [Network(path) for path in options.networks.split(",") if path]
    teachers = [rv.load(path) for path in options.teachers.split(",") if path]
    for name, size in product(options.schedules.split(","), options.sizes.split(",")):
        began, schedule = time.perf_counter(), schedules[name]()
        lessons = Lessons.of(schedule, DIMENSIONS[size], teachers)
        for steps in map(int, options.steps.split(",")):
            table = json.loads(options.out.read_text()) if options.out.exists() else {}
            rows = table.setdefault(name, {}).setdefault(size, {})
            candidates = at_hand(schedule, lessons, rows, steps)
            candidates |= made(lessons, rows, steps, candidates, options, bool(networks and not teachers))
            tried = {word: Judged.of(lessons, recipe, networks) for word, recipe in candidates.items()}
            found = {word: one for word, one in tried.items() if one is not None}
            best = chosen(found)
            if best == UNIPC:
                rows.pop(str(steps), None)
            else:
                rows[str(steps)] = rounded(candidates[best])
            options.out.write_text(json.dumps(table, separators=(",", ":")) + "\n")
            others = {word: [round(x, 2) for x in (*one[:3], *one.farther)] for word, one in found.items()}
            print(f"{name} {size} {steps}: {best} of {others}, {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
