r"""A solver of fewer steps made from one of more: steps are left out, one after the other, and what is left polished.

Polishing moves the times of a solver, and hardly finds those that are wanted where a solver began with others; of many
steps, some are where they are wanted. Step k is left out so that the estimate after it stands for its own,

    c_(j,k+1) + c_(j,k) in place of c_(j,k+1)    for all later steps j,

and the step before it goes on to where step k ended: (1) of learned.py with a number of each kind less. That step is
left out without which polishing comes farthest in a few rounds.
"""

from collections.abc import Sequence

from reverie.base.errors import NonFiniteError
from reverie.diffusion.polish import AIM, Aim, judged, polish
from reverie.diffusion.samplers.learned import Recipe
from reverie.diffusion.trajectories import Trajectories
from reverie.diffusion.tuning import padded

FEW = 2  # rounds of polishing after which steps are compared


def shortened(
    tried: Sequence[Trajectories],
    stages: Sequence[Sequence[Trajectories]],
    recipe: Recipe,
    steps: int,
    rounds: int,
    aim: Aim = AIM,
) -> Recipe:
    """Return a recipe of so many steps made of one of as many or more.

    Arguments:
        tried: What it is tried on which step is left out: a few starts, as N steps take some 7 N^3 evaluations of each.
        stages: What it is polished on after each, in turn.
        recipe: The recipe.
        steps: The steps, at least 1.
        rounds: Rounds of polishing after each.
        aim: What polishing aims at.

    Raises:
        NonFiniteError: There is no step without which it stays within what numbers can hold.
    """
    while recipe.steps > steps:
        shorter = [padded(without(recipe, k)) for k in range(recipe.steps)]
        found = [polish(tried, one, FEW, aim=aim) for one, _ in judged(tried, shorter, aim)]
        if not found:
            raise NonFiniteError("without any one of its steps this solver leaves what numbers can hold")
        best = min(found, key=lambda one: one[1])[0]
        recipe, _ = polish(stages[recipe.steps % len(stages)], best, rounds, aim=aim)
    return recipe


def without(recipe: Recipe, k: int) -> Recipe:
    """Return a recipe with step k left out.

    Example:
        >>> without(Recipe((-4.0, -2.0, 0.0), ((1.0,), (1.5, -0.5), (2.0, -0.75, -0.25)), (1.0, 0.9)), 1)
        Recipe(lam=(-4.0, 0.0), weights=((1.0,), (1.25, -0.25)), kept=(1.0,))
    """
    rows, lam, kept = list(recipe.weights), list(recipe.lam), list(recipe.kept)
    for j in range(k + 1, len(rows)):
        row = list(rows[j])
        if j - k < len(row):
            row[j - k - 1] += row.pop(j - k)
        rows[j] = tuple(row)
    del rows[k], lam[k], kept[min(k, len(kept) - 1)]
    return Recipe(tuple(lam), tuple(rows), tuple(kept))
