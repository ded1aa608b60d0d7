"""Embedded pairs: their order, their error, each sample at its own step, and clean refusals."""

import math
from itertools import pairwise

import pytest
import torch
from scipy.integrate import solve_ivp

from reverie.base.errors import NonFiniteError, UsageError
from reverie.diffusion.runge_kutta_pair import (
    BOGACKI_SHAMPINE,
    DORMAND_PRINCE,
    growth,
    integrate,
    severity,
    trial,
)

F64 = torch.float64
PAIRS = pytest.mark.parametrize("pair", [DORMAND_PRINCE, BOGACKI_SHAMPINE], ids=["5(4)", "3(2)"])


def pendulum(u, y):
    """A driven pendulum: neither linear nor autonomous."""
    return torch.stack([y[:, 1], -y[:, 0].sin() + 0.3 * (1.7 * u).cos()], 1)


def start(count=1):
    return torch.tensor([[1.0, -0.5]], dtype=F64).repeat(count, 1)


def reference(y, a, b):
    field = lambda u, y: [y[1], -math.sin(y[0]) + 0.3 * math.cos(1.7 * u)]  # noqa: E731
    return torch.from_numpy(solve_ivp(field, (a, b), y, method="DOP853", rtol=1e-13, atol=1e-13).y[:, -1])


@PAIRS
def test_stages_are_consistent(pair):
    """c_i = sum_j a_ij, sum b = 1, and the two results agree on a constant."""
    assert [len(row) for row in pair.rows] == list(range(1, len(pair.nodes) + 1))
    assert [sum(row) for row in pair.rows] == pytest.approx(pair.nodes, abs=1e-14)
    assert sum(pair.error) == pytest.approx(0, abs=1e-15)
    assert len(pair.error) == len(pair.nodes) + 1


@PAIRS
def test_the_order_is_as_told_and_that_of_the_estimate_is_one_less(pair):
    """Of the error of one step: h^(p + 1), and of its estimate h^p."""
    missed, estimated, zero = [], [], torch.zeros(1, dtype=F64)
    lengths = (0.4, 0.2, 0.1)
    for length in lengths:
        step = trial(pair, pendulum, zero, start(), zero + length, pendulum(zero, start()))
        missed.append((step.y[0] - reference([1.0, -0.5], 0, length)).norm().item())
        estimated.append(step.error.norm().item())
    for errors, order in ((missed, pair.order + 1), (estimated, pair.order)):
        found = [math.log2(a / b) for a, b in pairwise(errors)]
        assert found[-1] == pytest.approx(order, abs=0.35), found


@PAIRS
@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-7])
def test_the_error_is_of_the_size_of_the_tolerance(pair, tolerance):
    got = integrate(pendulum, start(), 0.0, 6.0, tolerance, tolerance, pair=pair)
    error = (got.y[0] - reference([1.0, -0.5], 0, 6)).abs().max().item()
    assert tolerance / 1000 < error < 30 * tolerance


def test_there_and_back_again():
    there = integrate(pendulum, start(), -1.0, 2.0, 1e-8, 1e-8).y
    back = integrate(pendulum, there, 2.0, -1.0, 1e-8, 1e-8).y
    torch.testing.assert_close(back, start(), rtol=0, atol=1e-6)
    assert (there - start()).norm() > 0.5


def test_each_sample_has_its_own_interval_and_its_own_steps():
    """Rows are what they are alone; a row that is to stay does, and fast ones take more evaluations."""
    speed = torch.tensor([1.0, 30.0, 1.0, 1.0], dtype=F64)
    a, b = torch.tensor([0.0, 0.0, 2.0, 1.0], dtype=F64), torch.tensor([1.0, 1.0, -1.0, 1.0], dtype=F64)
    y = torch.ones(4, 1, 2, dtype=F64)
    f = lambda speed: lambda u, y: (speed * (speed * u).cos())[:, None, None].expand_as(y)  # noqa: E731
    together = integrate(f(speed), y, a, b, 1e-7, 1e-7)
    want = 1 + (speed * b).sin() - (speed * a).sin()
    torch.testing.assert_close(together.y, want[:, None, None].expand(4, 1, 2), rtol=0, atol=3e-6)
    assert bool((together.y[3] == 1).all())
    for i in range(4):
        alone = integrate(f(speed[i : i + 1]), y[:1], a[i : i + 1], b[i : i + 1], 1e-7, 1e-7)
        torch.testing.assert_close(alone.y[0], together.y[i], rtol=0, atol=1e-14)
        assert alone.evaluations.item() == together.evaluations[i]
    assert together.evaluations[1] > 3 * together.evaluations[0]
    assert together.evaluations[3] == 2


def test_calls_are_counted():
    calls = []

    def counted(u, y):
        calls.append(u.item())
        return pendulum(u, y)

    got = integrate(counted, start(), 0.0, 20.0, first=5.0)
    assert got.evaluations.item() == len(calls)
    assert got.rejected.item() > 0
    assert max(calls) == 20.0
    calls.clear()
    assert integrate(counted, start(), 0.0, 20.0).evaluations.item() == len(calls)


def test_single_precision_stays_single_and_keeps_its_times_in_double():
    seen = []

    def f(u, y):
        seen.append(u.dtype)
        return pendulum(u.to(y), y)

    got = integrate(f, start().float(), 0.0, 6.0, 1e-5, 1e-5).y
    assert got.dtype == torch.float32
    assert set(seen) == {F64}
    torch.testing.assert_close(got[0].double(), reference([1.0, -0.5], 0, 6), rtol=0, atol=3e-4)


def test_a_step_is_judged_by_its_error_in_units_of_what_is_tolerated():
    y = torch.tensor([[1.0, -2.0]], dtype=F64)
    zero = torch.zeros(1, dtype=F64)
    step = trial(DORMAND_PRINCE, pendulum, zero, y, zero + 0.7, pendulum(zero, y))
    scale = 1e-3 + 1e-2 * torch.maximum(y.abs(), step.y.abs())
    want = ((step.error / scale) ** 2).mean().sqrt()
    assert severity(y, step, 1e-2, 1e-3).item() == pytest.approx(want.item(), rel=1e-12)
    assert growth(torch.tensor([32.0, 1e9, 1e-9]), 5).tolist() == pytest.approx([0.45, 0.2, 5.0])


def test_what_can_not_be_solved_is_refused_by_row():
    def rows(*fields):
        return lambda u, y: torch.cat([f(u[i : i + 1], y[i : i + 1]) for i, f in enumerate(fields)])

    calm, y = (lambda u, y: -y), torch.ones(2, 1, dtype=F64)
    blow_up = lambda u, y: y.square()  # noqa: E731  infinite at u = 1
    with pytest.raises(UsageError, match=r"steps became too small .*sample 1 at u = 1\b.*; loosen rtol"):
        integrate(rows(calm, blow_up), y, 0.0, 2.0)
    with pytest.raises(UsageError, match=r"7 steps did not reach the end; raise max_steps \(sample 0 at u = "):
        integrate(lambda u, y: (50 * u).cos()[:, None], y[:1], 0.0, 20.0, max_steps=7)
    with pytest.raises(NonFiniteError, match=r"not finite at u = 0.2.* in sample 1, and 0 others"):
        integrate(rows(calm, lambda u, y: (0.25 - u).sqrt()[:, None]), y, 0.0, 1.0)
    with pytest.raises(NonFiniteError, match="at u = 0 in sample 0, and 1 others"):
        integrate(lambda u, y: y * torch.nan, y, 0.0, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rtol": 1e-8}, r"in torch.float32 rtol is at least 1.2e-06"),
        ({"atol": 0.0}, "atol positive"),
        ({"rtol": math.nan}, "rtol is nan"),
        ({"max_steps": 0}, "max_steps 0"),
        ({"first": -1.0}, "first is -1.0"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        integrate(pendulum, start().float(), 0.0, 1.0, **options)
