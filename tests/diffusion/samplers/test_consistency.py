"""Consistency sampling of functions in closed form: exact in any number of steps."""

import math

import pytest
import torch

from reverie.base.errors import UsageError
from reverie.diffusion.denoisers import Denoiser, Estimate
from reverie.diffusion.few_step.exact import Exact
from reverie.diffusion.predictions import per_sample
from reverie.diffusion.registry import grids, schedules
from reverie.diffusion.samplers.base import sample
from reverie.diffusion.samplers.consistency import Consistency, MeanFlow

F64 = torch.float64
COUNT = 20_000


@pytest.mark.parametrize("name", ["edm", "cosine", "flow"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_samples_have_the_datas_mean_and_covariance(name, steps, gaussian, bulk):
    """20,000 samples: 4.5 standard errors of each of 5 moments, a false alarm in 25,000; what is left of the data at
    t = 1, which sampling begins without, is below 0.01."""
    oracle = gaussian(schedules[name]())
    grid = grids["trailing"](oracle.schedule, steps)
    x = sample(Consistency(), Exact(oracle), (2,), grid, bulk(range(COUNT))).double()
    covariance = (oracle.basis * oracle.values) @ oracle.basis.mT
    for i in range(2):
        assert abs(x[:, i].mean() - oracle.center[i]) < 0.01 + 4.5 * (covariance[i, i] / COUNT).sqrt()
        for j in range(i + 1):
            error = ((covariance[i, i] * covariance[j, j] + covariance[i, j] ** 2) / COUNT).sqrt()
            assert abs(x.T.cov()[i, j] - covariance[i, j]) < 0.01 + 4.5 * error


def test_one_step_is_the_function_itself(gaussian, constant):
    oracle = gaussian(schedules["flow"]())
    x = sample(Consistency(), Exact(oracle), (2,), grids["trailing"](oracle.schedule, 1), constant([0], 0.7))
    one = torch.ones(1, dtype=F64)
    torch.testing.assert_close(x, oracle.flow(torch.full((1, 2), 0.7), one, 0 * one).float())


def test_the_floor_is_taken_off_the_noise_that_is_added(gaussian, constant):
    schedule = schedules["edm"]()
    grid = torch.tensor([1.0, 0.5 / 80, 0.0], dtype=F64)
    oracle, seen = gaussian(schedule), []

    class Watched(Exact):
        def forward(self, x, t, condition=None):
            seen.append(x)
            return super().forward(x, t, condition)

    sample(Consistency(floor=0.3), Watched(oracle), (2,), grid, constant([0], 1.0))
    x0 = Exact(oracle)(seen[0], torch.ones(1, dtype=F64)).x0
    torch.testing.assert_close(seen[1], x0 + math.sqrt(0.5**2 - 0.3**2))


def test_it_asks_once_a_step():
    schedule = schedules["edm"]()
    assert Consistency().count(schedule, grids["karras"](schedule, 3)) == 3


@pytest.mark.parametrize("floor", [-0.1, math.nan, math.inf])
def test_a_floor_that_is_none_is_refused(floor):
    with pytest.raises(UsageError, match="floor"):
        Consistency(floor=floor)


class Average(Denoiser):
    """The average velocity of a Gaussian's probability flow on the flow schedule, in closed form."""

    def __init__(self, oracle):
        super().__init__()
        self.oracle, self.schedule = oracle, oracle.schedule

    def forward(self, x, t, condition=None):
        r = t - condition["span"]
        u = (x - self.oracle.flow(x, t, r)) / per_sample(condition["span"], x)
        return Estimate(x - per_sample(t, x) * u, x + per_sample(1 - t, x) * u)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_average_velocity_is_exact_in_any_number_of_steps(steps, gaussian, constant):
    oracle = gaussian(schedules["flow"]())
    x = sample(MeanFlow(), Average(oracle), (2,), grids["trailing"](oracle.schedule, steps), constant([0], 0.7))
    one = torch.ones(1, dtype=F64)
    torch.testing.assert_close(x, oracle.flow(torch.full((1, 2), 0.7), one, 0 * one).float(), rtol=1e-5, atol=1e-5)
