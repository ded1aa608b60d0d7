"""Walks of a recipe: its numbers and back, its derivatives against differences of whole walks."""

import dataclasses
from itertools import pairwise

import pytest
import torch

from reverie.diffusion.denoisers import Denoiser
from reverie.diffusion.walking import Bounds, derivatives, follow, pack, unpack

F64 = torch.float64


pytestmark = pytest.mark.usefixtures("no_gradients")


class Plain(Denoiser):
    """A denoiser that does not say how its estimate changes."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.schedule = inner, inner.schedule

    def forward(self, x, t, condition=None):
        return self.inner(x, t)


def test_numbers_of_a_recipe_and_back(usual):
    recipe = usual("linear")
    assert unpack(pack(recipe), recipe, Bounds(-100.0, 100.0)) == recipe
    crossed = pack(recipe)
    crossed[3] = 9.0  # the second step's lambda, beyond all others
    lam = unpack(crossed, recipe, Bounds(-6.0, 5.0)).lam
    assert all(b - a >= 0.0199 for a, b in pairwise(lam))
    assert lam[-1] <= 5.0


@pytest.mark.parametrize("begins", ["at t = 1", "later"])
@pytest.mark.parametrize("name", ["linear", "cosine", "flow", "edm", "sub-vp"])
def test_derivatives_are_differences_of_walks(name, begins, some, usual, later):
    one, recipe = some(name), usual(name) if begins == "at t = 1" else later(name)
    found, size = derivatives(one, recipe, follow(one, recipe)), 1e-6
    plain = dataclasses.replace(one, denoiser=Plain(one.denoiser))
    torch.testing.assert_close(derivatives(plain, recipe, follow(one, recipe)), found, rtol=1e-3, atol=1e-3)
    for i, value in enumerate(pack(recipe).tolist()):
        if i == 0 and begins == "at t = 1":
            continue  # there is nothing before it
        ends = []
        for sign in (1, -1):
            theta = pack(recipe)
            theta[i] = value + sign * size
            ends.append(follow(one, unpack(theta, recipe, Bounds(-1e9, 1e9))).x[-1])
        want = (ends[0] - ends[1]) / (2 * size)
        torch.testing.assert_close(found[..., i], want, rtol=1e-3, atol=1e-4 * float(want.abs().max()) + 1e-8)
