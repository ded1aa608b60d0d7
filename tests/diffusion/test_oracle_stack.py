"""Several mixtures at once: each as it is alone, and the derivative that differences have."""

import pytest
import torch

from reverie.base.errors import UsageError
from reverie.base.randomness import normal
from reverie.diffusion.oracle_stack import MixtureStack, random_stack
from reverie.diffusion.oracles import random_mixture
from reverie.diffusion.registry import schedules

F64 = torch.float64


def parts(dimension, seeds=(0, 1, 2), schedule="linear"):
    return [random_mixture(dimension, seed, schedules[schedule]()) for seed in seeds]


@pytest.mark.parametrize("dimension", [2, 40])
def test_each_part_is_what_it_is_alone(dimension):
    x, t = normal((12, dimension), 0, "stack").double(), torch.linspace(0.05, 1, 12, dtype=F64)
    alone, mixtures = [], parts(dimension)
    for i, mixture in enumerate(mixtures):
        alone.append(mixture(x[4 * i : 4 * i + 4], t[4 * i : 4 * i + 4]))
    found = MixtureStack(mixtures)(x, t)
    for name in ("x0", "eps"):
        want = torch.cat([getattr(one, name) for one in alone])
        torch.testing.assert_close(getattr(found, name), want, rtol=1e-10, atol=1e-10)


def test_one_time_for_all_is_that_time_for_each():
    x, stack = normal((6, 2), 0, "stack").double(), MixtureStack(parts(2))
    one = torch.tensor([0.3], dtype=F64)
    torch.testing.assert_close(stack(x, one.expand(6)).x0, stack(x, one.repeat(6)).x0, rtol=0, atol=1e-13)


@pytest.mark.parametrize("time", [0.1, 0.5, 1.0])
def test_along_is_the_difference_of_two_estimates(time):
    x, moves = normal((9, 5), 0, "stack").double(), normal((9, 5, 4), 1, "stack").double()
    stack, t, size = MixtureStack(parts(5)), torch.full((9,), time, dtype=F64), 1e-5
    found = stack.along(x, t, moves)
    for p in range(4):
        ends = [stack(x + sign * size * moves[..., p], t).x0 for sign in (1, -1)]
        torch.testing.assert_close(found[..., p], (ends[0] - ends[1]) / (2 * size), rtol=1e-5, atol=1e-7)


def test_folded_keeps_each_estimate_and_distance():
    """In 200 dimensions, after a step that mixes x and its estimate, as samplers do."""
    schedule = schedules["linear"]()
    mixture, x = random_mixture(200, 3, schedule), normal((5, 200), 0, "folded").double()
    small, y = mixture.folded(x)
    t = torch.linspace(0.2, 1, 5, dtype=F64)
    assert y.shape == (5, 11)
    wide, narrow = (m(a, t) for m, a in ((mixture, x), (small, y)))
    for a, b in ((wide.x0, narrow.x0), (wide.eps, narrow.eps), (x - 2 * wide.x0, y - 2 * narrow.x0)):
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=1), rtol=1e-10, atol=0)
    second = [m(0.4 * a + 0.6 * e.x0, t / 2).x0 for m, a, e in ((mixture, x, wide), (small, y, narrow))]
    torch.testing.assert_close(second[0].norm(dim=1), second[1].norm(dim=1), rtol=1e-10, atol=0)
    assert random_mixture(2, 0, schedule).folded(x[:, :2])[1].shape == (5, 2)  # nothing to gain


def test_a_random_stack_starts_where_sampling_does():
    """With a schedule's own noise, of each mixture by its seed, whatever the others are."""
    schedule = schedules["edm"]()
    stack, x = random_stack(50, (3, 4), 400, schedule, "test stack")
    assert x.shape == (800, 11)
    size = (x.square().sum(1) / 50).sqrt()  # of the whole of it: folding keeps lengths
    assert size.mean().item() == pytest.approx(80, rel=0.01)
    alone, y = random_stack(50, (4,), 400, schedule, "test stack")
    assert torch.equal(y, x[400:])
    t = torch.full((400,), 0.5, dtype=F64)
    torch.testing.assert_close(alone(y, t).x0, stack(x, t.repeat(2)).x0[400:], rtol=1e-12, atol=1e-12)


def test_what_is_no_stack_is_refused():
    with pytest.raises(UsageError, match="as many components"):
        MixtureStack([*parts(2, (0,)), *parts(3, (0,))])
    with pytest.raises(UsageError, match="a batch of 4 can't be shared out to 3 mixtures"):
        MixtureStack(parts(2))(torch.zeros(4, 2, dtype=F64), torch.ones(4, dtype=F64))
