"""What the objectives of few steps are judged by: a Gaussian, whose probability-flow map is known."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from reverie.diffusion.denoisers import Denoiser, Estimate
from reverie.diffusion.predictions import per_sample
from reverie.diffusion.schedules import EDM, Schedule

F64 = torch.float64
STD = 0.5


class Power(Denoiser):
    """For data N(0, d^2): x_0 = z (d^2 / (d^2 + s^2))^power; 1/2 is the probability-flow map, 1 the posterior mean."""

    def __init__(self, power: float, schedule: Schedule | None = None) -> None:
        super().__init__()
        self.schedule = schedule or EDM()
        self.power = nn.Parameter(torch.tensor(power, dtype=F64))

    def forward(self, x, t, condition=None):
        alpha, sigma = (per_sample(value, x) for value in self.schedule.marginal(t))
        x0 = x / alpha * (STD**2 / (STD**2 + (sigma / alpha) ** 2)) ** self.power
        return Estimate(x0, (x - alpha * x0) / sigma)


@pytest.fixture
def power() -> type[Power]:
    return Power


@pytest.fixture
def normal_pairs() -> Callable[[int], tuple[Tensor, Tensor, Tensor]]:
    """Data and noise (N, 1) at the nodes of Gauss and Hermite, and their weights (N,): expectations without chance."""

    def make(count: int) -> tuple[Tensor, Tensor, Tensor]:
        # Golub and Welsch: the nodes are the eigenvalues of the recurrence's matrix.
        beta = torch.arange(1, count, dtype=F64).sqrt()
        nodes, vectors = torch.linalg.eigh(torch.diag(beta, 1) + torch.diag(beta, -1))
        weights = vectors[0].square()
        x0, eps = (axis.reshape(-1, 1) for axis in torch.meshgrid(STD * nodes, nodes, indexing="ij"))
        return x0, eps, torch.outer(weights, weights).flatten()

    return make


@pytest.fixture
def slope(power, normal_pairs) -> Callable[..., float]:
    """The slope of an objective's expectation over Gaussian data, at a power and a noise level."""

    def measure(objective, at: float, sigma: float, schedule: Schedule | None = None) -> float:
        denoiser = power(at, schedule)
        x0, eps, weights = normal_pairs(8)
        t = denoiser.schedule.time(torch.tensor([-2 * math.log(sigma)], dtype=F64)).expand(len(x0))
        (weights * objective(denoiser, x0, t, eps)).sum().backward()
        return denoiser.power.grad.item()

    return measure
