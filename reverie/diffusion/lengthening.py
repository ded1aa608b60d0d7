r"""A solver of more steps that does what one of fewer does: what the one is fitted from, where the other is at hand.

A step of learned.py (1) is the same as two, through any rho between, of which the second has the first's estimates,

    z_m = f_k (rho_m / rho_k) z_k + (1 - rho_m / rho_k) S,
    z_(k+1) = (rho_(k+1) / rho_m) z_m + (1 - rho_(k+1) / rho_m) S,

S = sum_j c_kj D_j: what the model says at m counts for nothing yet. Polishing begins there, and so at no more than the
error of fewer steps, while solvers that were made for many may be stuck in a worse place.
"""

from collections.abc import Sequence

from reverie.diffusion.polish import AIM, Aim, judged
from reverie.diffusion.samplers.learned import Recipe
from reverie.diffusion.trajectories import Trajectories
from reverie.diffusion.walking import GAP, Bounds

ROOM = 12  # past estimates for all of which there is room, for some cuts


def lengthened(
    sets: Sequence[Trajectories], recipe: Recipe, steps: int, past: int = ROOM, aim: Aim = AIM
) -> Recipe | None:
    """Return a recipe of so many steps made of one of as many or fewer, each new step put where it does least harm.

    None where no step is long enough to be cut.

    Arguments:
        sets: What harm is measured on.
        recipe: The recipe.
        steps: The steps.
        past: How many past estimates a step may use: older ones are left out, which is what does harm.
        aim: How harm is measured: a and b of polish.py (1).
    """
    bounds = Bounds.of(sets[0])
    while recipe.steps < steps:
        tried = [split(recipe, k, bounds, past) for k in range(recipe.steps)]
        found = judged(sets, [one for one in tried if one is not None], aim)
        if not found:
            return None
        recipe = found[0][0]
    return recipe


def split(recipe: Recipe, k: int, bounds: Bounds, past: int) -> Recipe | None:
    """Return a recipe with step k in two, half-way in lambda; None where it is too short for that.

    Arguments:
        recipe: The recipe.
        k: The step.
        bounds: What lambdas lie between.
        past: How many past estimates a step may use.

    Example:
        >>> split(Recipe((-4.0, 0.0), ((1.0,), (1.5, -0.5))), 0, Bounds(-4.0, 4.0), past=2)
        Recipe(lam=(-4.0, -2.0, 0.0), weights=((1.0,), (0.0, 1.0), (1.5, 0.0, -0.5)), kept=(1.0, 1.0))
    """
    lam, rows, kept = list(recipe.lam), recipe.weights, list(recipe.kept)
    begins, ahead = max(lam[k], bounds.least), [*lam, bounds.most][k + 1]
    if ahead - begins < 4 * GAP:
        return None
    lam.insert(k + 1, (begins + ahead) / 2)
    kept.insert(k + 1, 1.0)
    later = [(*row[: j - k], 0.0, *row[j - k :]) for j, row in enumerate(rows[k + 1 :], k + 1)]
    rows = (*rows[: k + 1], (0.0, *rows[k]), *later)
    return Recipe(tuple(lam), tuple(row[: past + 1] for row in rows), tuple(kept))
