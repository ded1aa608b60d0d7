r"""Fitting a solver to a model: the times and weights with which a few evaluations do best.

A few exact trajectories are the measure, computed once with many steps. A candidate set of times is walked
by the solver itself; at each step the weights c of learned.py (1) are the ridge regression of where the
exact trajectory is next,

    min_c | z*_(k+1) - (rho_(k+1)/rho_k) z_k - (1 - rho_(k+1)/rho_k) sum_j c_j D_j |^2 + ridge |c - e|^2,  (1)

so that each step also makes up for the errors before it; nothing is differentiated, and the network is not
trained. The times are chosen among those of the fine grid: first by dynamic programming over pairs of steps,
whose errors (1) on the exact trajectory need no evaluation at all, then by moving one time after another
while that lowers the error at the end. What was found so, and the published solvers, which are tables of the
same kind, are then polished (polish.py), the better ones for longer.

References:
    S4S: Solving for a Diffusion Model Solver (Frankel et al., 2025)
    https://arxiv.org/abs/2502.17423
    On the Trajectory Regularity of ODE-based Diffusion Sampling (Chen et al., 2024): GITS, dynamic programming
    https://arxiv.org/abs/2405.11326
    Align Your Steps: Optimizing Sampling Schedules in Diffusion Models (Sabour et al., 2024)
    https://arxiv.org/abs/2404.14507
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.diffusion.grids import karras, trailing, uniform_log_snr
from reverie.diffusion.lengthening import lengthened
from reverie.diffusion.levels import Level, levels
from reverie.diffusion.polish import AIM, Aim, judged, polish, squares
from reverie.diffusion.predictions import Data
from reverie.diffusion.samplers.base import Sampler, ask
from reverie.diffusion.samplers.dpmpp import DPMpp2M, DPMpp3M
from reverie.diffusion.samplers.learned import Recipe, as_recipe, factors
from reverie.diffusion.samplers.unipc import UniPC
from reverie.diffusion.trajectories import Trajectories
from reverie.diffusion.walking import begun

PAST = 4  # past estimates that a step may use
RIDGE = 1e-6  # of (1), relative to the mean square of the estimates
BEGINS = (-3.0, -2.0, -1.0)  # lambdas at which a solver may begin, beside that of t = 1
SIEVE = ((2, 4), (4, 2))  # rounds of polishing, and how many of the candidates have them
FLOOR = 1e-12  # added to squared errors before their logarithm is taken


# Walking a grid, fitting the weights --------------------------------------------------------------


@dataclass
class Walk:
    """A walk of the solver along some nodes of the fine grid, on each set of trajectories.

    Arguments:
        nodes: Indices into the fine grid.
        x: Where the samples are before each step: for each step, for each set.
        estimates: Their estimates there.
        weights: The fitted weights of each step, the current estimate's first.
        end: Where they end.
        loss: The error at the end: the mean over samples of ln |e|^2, and ln of the mean of |e|^2, averaged.
    """

    nodes: tuple[int, ...]
    x: list[list[Data]]
    estimates: list[list[Data]]
    weights: list[tuple[float, ...]]
    end: list[Data]
    loss: float


def walk(sets: Sequence[Trajectories], nodes: Sequence[int], before: Walk | None = None) -> Walk:
    """Walk the solver along some nodes, fitting its weights as it goes.

    Arguments:
        sets: Exact trajectories, of one model or of several, on one fine grid.
        nodes: Indices into it, rising; at the first is noise alone.
        before: An earlier walk: what both have in common is not evaluated again.
    """
    shared = common(before.nodes, nodes) if before else 0
    x = before.x[:shared] if before and shared else [[begun(one, one.known[nodes[0]].t) for one in sets]]
    estimates = before.estimates[:shared] if before else []
    weights: list[tuple[float, ...]] = before.weights[: max(shared - 1, 0)] if before else []
    for k in range(max(shared - 1, 0), len(nodes)):
        if k >= len(estimates):
            times = sets[0].known[nodes[k]].t
            estimates = [*estimates, [ask(s.denoiser, y, [times] * len(y)).x0 for s, y in zip(sets, x[k], strict=True)]]
        ahead, row = fit_step(sets, nodes, k, x[k], estimates)
        weights = [*weights[:k], row]
        x = [*x[: k + 1], ahead]
    *x, end = x
    return Walk(tuple(nodes), x, estimates, weights, end, loss(sets, end))


def common(nodes: Sequence[int], others: Sequence[int]) -> int:
    """Return how many nodes two walks begin with in common."""
    pairs = enumerate(zip(nodes, others, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(nodes), len(others)))


def fit_step(
    sets: Sequence[Trajectories], nodes: Sequence[int], k: int, x: list[Data], estimates: list[list[Data]]
) -> tuple[list[Data], tuple[float, ...]]:
    """Return where step k leads, and its weights: the regression (1)."""
    last = k + 1 == len(nodes)
    known = sets[0].known
    (data,) = levels(sets[0].denoiser.schedule, [0.0])
    keep, gain = factors(known[nodes[k]], data if last else known[nodes[k + 1]])
    used = range(k, max(k - PAST, 0) - 1, -1)
    # Each set counts the same, however many numbers it has.
    basis = [torch.cat([flat(one, estimates[j][i]) for i, one in enumerate(sets)]) for j in used]
    goals = [(s.end if last else s.x[nodes[k + 1]] - keep * y) / gain for s, y in zip(sets, x, strict=True)]
    goal = torch.cat([flat(one, part) for one, part in zip(sets, goals, strict=True)])
    row = ridge(torch.stack(basis), goal)
    moved = [
        keep * y + gain * sum(c * estimates[j][i] for c, j in zip(row, used, strict=True)) for i, y in enumerate(x)
    ]
    return moved, tuple(row)


def flat(one: Trajectories, x: Data) -> Float[Tensor, " n"]:
    """Return samples' numbers so that a sum of squares is the mean over samples and numbers."""
    return (one.even[:, None] * x.double().flatten(1)).flatten()


def ridge(basis: Float[Tensor, "k n"], goal: Float[Tensor, " n"]) -> list[float]:
    """Return the weights of some rows that come nearest to a goal, drawn towards the first row alone."""
    gram, rest = basis @ basis.mT, goal - basis[0]
    penalty = RIDGE * gram.diagonal().mean() * torch.eye(len(basis), dtype=gram.dtype)
    found: list[float] = torch.linalg.solve(gram + penalty, basis @ rest).tolist()
    return [found[0] + 1, *found[1:]]


def loss(sets: Sequence[Trajectories], end: Sequence[Data], mean: float = 0.5) -> float:
    """Return the error at the end: ln of the mean of squares, for so much, and the mean of their ln; of all sets."""
    total = 0.0
    for one, x in zip(sets, end, strict=True):
        e = squares(one, x) + FLOOR
        total += (1 - mean) * (one.share * e.log()).sum().item() + mean * (one.share * e).sum().log().item()
    return total / len(sets)


# Choosing the times -------------------------------------------------------------------------------


def plan_nodes(sets: Sequence[Trajectories], steps: int, first: int = 0) -> list[int]:
    """Return nodes by dynamic programming: the sum of the squared errors (1) of steps through two estimates, each
    made on the exact trajectory and shrunk by what the flow does to it later, as for Gaussian data of that spread.

    Arguments:
        sets: Exact trajectories.
        steps: How many nodes.
        first: The first of them.
    """
    if first:
        rest = [replace(one, known=one.known[first:], x=one.x[first:], x0=one.x0[first:]) for one in sets]
        return [first + node for node in plan_nodes(rest, steps)]
    fine = sets[0].known
    n = len(fine)
    gram, cross, moved = products(sets)
    spread = max(float(torch.cat([s.end.flatten() for s in sets]).std()), 1e-6)
    shrink = torch.tensor([spread**2 / (spread**2 + level.rho**2) for level in fine], dtype=torch.float64)
    # cost[h, i, j]: from i to j with the estimates at h < i and i (h = i: that at i alone).
    best = torch.full((n, n), math.inf, dtype=torch.float64)  # best[h, i]: the least to be at i, from h
    trace: list[Tensor] = []
    best[0, 0] = 0
    errors = pair_errors(gram, cross, moved) * shrink
    for _ in range(steps - 1):
        total = best[:, :, None] + errors  # [h, i, j]
        best, back = total.min(0)
        trace.append(back)
    i, j = divmod(int((best + finish(sets, gram)).argmin()), n)
    nodes = [j, i]
    for back in reversed(trace[1:]):
        nodes.append(int(back[nodes[-1], nodes[-2]]))
    return sorted(set(nodes)) if steps > 1 else [0]


def products(sets: Sequence[Trajectories]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the inner products (n, n) of the estimates, of z / rho with the estimates, and of z / rho."""
    x0 = torch.cat([torch.stack([flat(s, x) for x in s.x0]) for s in sets], dim=1)
    sigma = torch.tensor([level.sigma for level in sets[0].known], dtype=torch.float64)[:, None]
    y = torch.cat([torch.stack([flat(s, x) for x in s.x]) for s in sets], dim=1) / sigma
    return x0 @ x0.mT, y @ x0.mT, y @ y.mT


def pair_errors(gram: Tensor, cross: Tensor, moved: Tensor) -> Float[Tensor, "n n n"]:
    """Return the least squared error [h, i, j], in units of z / rho, of a step i to j through estimates h and i."""
    n = len(gram)
    size = moved.diagonal()[None, :] + moved.diagonal()[:, None] - 2 * moved  # [i, j] |y_j - y_i|^2
    on_i = (cross - cross.diagonal()[None, :]).mT  # [i, j] (y_j - y_i) . D_i
    on_h = cross.mT[:, None, :] - cross.mT[:, :, None]  # [h, i, j] (y_j - y_i) . D_h
    own = gram.diagonal() * (1 + RIDGE)
    determinant = own[:, None] * own[None, :] - gram.square()  # [h, i]
    safe = determinant.clamp(min=1e-12 * float(own.max()) ** 2)[:, :, None]
    a = (own[None, :, None] * on_h - gram[:, :, None] * on_i[None]) / safe
    b = (own[:, None, None] * on_i[None] - gram[:, :, None] * on_h) / safe
    both = size[None] - a * on_h - b * on_i[None]
    alone = size - on_i.square() / own[:, None]
    index = torch.arange(n)
    both[index, index] = alone
    both = both.clamp(min=0)
    forward = index[:, None, None] < index[None, :, None]
    start = (index[:, None, None] == 0) & (index[None, :, None] == 0)
    allowed = (forward | start) & (index[None, :, None] < index[None, None, :])
    return torch.where(allowed, both, math.inf)


def finish(sets: Sequence[Trajectories], gram: Tensor) -> Float[Tensor, "n n"]:
    """Return the squared error [h, i] of ending with the estimates at h and i."""
    x0 = torch.cat([torch.stack([flat(s, x) for x in s.x0]) for s in sets], dim=1)
    end = torch.cat([flat(s, s.end) for s in sets])
    on, size = x0 @ end, end.square().sum()
    own = gram.diagonal() * (1 + RIDGE)
    determinant = (own[:, None] * own[None, :] - gram.square()).clamp(min=1e-12 * float(own.max()) ** 2)
    a = (own[None, :] * on[:, None] - gram * on[None, :]) / determinant
    b = (own[:, None] * on[None, :] - gram * on[:, None]) / determinant
    error = (size - a * on[:, None] - b * on[None, :]).clamp(min=0)
    index = torch.arange(len(gram))
    return torch.where(index[:, None] < index[None, :], error, math.inf)


def tune(
    sets: Sequence[Trajectories],
    steps: int,
    walks: int = 60,
    rounds: int = 0,
    progress: Callable[[int, float], None] | None = None,
    more: Sequence[Recipe] = (),
    stages: Sequence[Sequence[Trajectories]] = (),
    aim: Aim = AIM,
) -> tuple[Recipe, float]:
    """Return the fitted solver of so many steps, and its error: the logarithm of what `loss` says, or `polish`.

    Arguments:
        sets: Exact trajectories, of one model or of several, on fine grids of the same lambdas.
        steps: Evaluations, at least 1 and below the fine grid's.
        walks: How many candidate grids may be walked, at least 1.
        rounds: How many rounds of polishing the best of all may have; 0 for none, and none but the grids.
        progress: Called with the number of walks, or of rounds, and the least error (its logarithm) after each.
        more: Solvers of as many steps, or fewer (lengthening.py), that may be polished as well.
        stages: What solvers are polished on instead of the sets: all of them on the first, the best on each of the
            others in turn, which are best drawn anew. Among them are starts at borders (starts.py).
        aim: What counts for how much: a and b of polish.py (1).

    Raises:
        UsageError: steps is out of range.
    """
    fine = len(sets[0].known)
    if not 1 <= steps < fine:
        raise UsageError(f"steps is {steps}; it must lie in 1..{fine - 1} to be fitted on trajectories of {fine} steps")
    first = [walk(sets, nodes) for nodes in first_nodes(sets, steps)[:walks]]
    best = search(sets, min(first, key=lambda one: one.loss), walks - len(first), progress)
    if not rounds:
        return recipe_of(sets, best), best.loss
    candidates = [recipe_of(sets, one) for one in {one.nodes: one for one in (*first, best)}.values()]
    measures = stages or [sets]
    given = [lengthened(measures[0], one, steps, PAST, aim) for one in more]
    candidates += [*published(sets, steps), *(padded(one) for one in given if one is not None)]
    found = sieve(measures[0], candidates, rounds, progress, aim)
    for measure in measures[1:]:
        found = polish(measure, found[0], rounds, progress, aim)
    return found


def search(sets: Sequence[Trajectories], best: Walk, walks: int, progress: Callable[[int, float], None] | None) -> Walk:
    """Return the best of some more walks, made by moving one time after another."""
    fine, steps, done = len(sets[0].known), len(best.nodes), 0
    stride = max(fine // (2 * steps), 1)
    while stride and done < walks:
        improved = False
        for k in range(steps - 1, -1, -1):
            for shift in (-stride, stride):
                nodes = [*best.nodes[:k], best.nodes[k] + shift, *best.nodes[k + 1 :]]
                if done >= walks or nodes[0] < 0 or nodes[-1] >= fine or any(b <= a for a, b in pairwise(nodes)):
                    continue
                tried = walk(sets, nodes, best)
                done += 1
                if tried.loss < best.loss:
                    best, improved = tried, True
                if progress:
                    progress(done, best.loss)
        if not improved:
            stride //= 2
    return best


def recipe_of(sets: Sequence[Trajectories], found: Walk) -> Recipe:
    """Return the recipe that a walk has followed."""
    # Where nothing of the data is left lambda is -inf; one before that of t = 1 means the same.
    return Recipe(tuple(max(sets[0].known[node].lam, -100.0) for node in found.nodes), tuple(found.weights))


def published(sets: Sequence[Trajectories], steps: int) -> list[Recipe]:
    """Return the recipes of some published solvers, each on usual grids."""
    schedule = sets[0].denoiser.schedule
    solvers: list[Sampler] = [UniPC(2), UniPC(3), DPMpp2M(), DPMpp3M()]
    made = [grid(schedule, steps) for grid in (uniform_log_snr, karras, trailing)]
    return [padded(as_recipe(sampler, schedule, grid)) for sampler in solvers for grid in made]


def padded(recipe: Recipe) -> Recipe:
    """Return a recipe whose steps have weights for as many past estimates as a step may use, some of them 0."""
    full = [(*row, *[0.0] * (min(k, PAST) + 1 - len(row))) for k, row in enumerate(recipe.weights)]
    return Recipe(recipe.lam, tuple(full), recipe.kept)


def sieve(
    sets: Sequence[Trajectories],
    candidates: Sequence[Recipe],
    rounds: int,
    progress: Callable[[int, float], None] | None,
    aim: Aim,
) -> tuple[Recipe, float]:
    """Polish some recipes a little, the better ones of them more, and the best one most; return that, and its error."""
    known = judged(sets, candidates, aim)
    for few, keep in SIEVE:
        if rounds > 2 * few:
            known = sorted((polish(sets, recipe, few, aim=aim) for recipe, _ in known[:keep]), key=lambda one: one[1])
    return polish(sets, known[0][0], rounds, progress, aim)


def first_nodes(sets: Sequence[Trajectories], steps: int) -> list[list[int]]:
    """Return sets of nodes to begin with: by dynamic programming, uniform in lambda, and next to usual grids, from
    t = 1; by dynamic programming from later times."""
    schedule, known = sets[0].denoiser.schedule, sets[0].known
    even = [round(i * (len(known) - 1) / max(steps - 1, 1)) for i in range(steps)]
    grids = [trailing(schedule, steps)[:-1], karras(schedule, steps)[:-1]]
    near = [nearest_nodes(known, [level.lam for level in levels(schedule, grid.tolist())]) for grid in grids]
    later = [i for i in (begins(known, lam) for lam in BEGINS) if 0 < i < len(known) - steps]
    tried = [plan_nodes(sets, steps), even, *near, *(plan_nodes(sets, steps, i) for i in later)]
    return [nodes for nodes in tried if len(nodes) == steps]


def begins(known: Sequence[Level], lam: float) -> int:
    """Return the first node that isn't before some lambda."""
    return next(i for i, level in enumerate(known) if level.lam >= lam or i == len(known) - 1)


def nearest_nodes(known: Sequence[Level], lam: Sequence[float]) -> list[int]:
    """Return the nodes nearest to some lambdas, the first 0; fewer than asked for where two are the same."""
    fine = torch.tensor([level.lam for level in known[1:]], dtype=torch.float64)
    found = [int((fine - value).abs().argmin()) + 1 for value in lam[1:]]
    return sorted({0, *found})
