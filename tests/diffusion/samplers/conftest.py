"""What the samplers are judged by."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from scipy import stats
from torch import Tensor

from reverie.base.randomness import Noise, normal
from reverie.diffusion.denoisers import Denoiser
from reverie.diffusion.oracles import Mixture
from reverie.diffusion.process import diffuse
from reverie.diffusion.samplers.base import Sampler, run
from reverie.diffusion.schedules import Schedule

RATE = 1e-5
ALIKE = ["scaled-linear", "cosine", "sigmoid", "sigmoid-in-beta", "linear-50", "cosine-without-offset"]
QUICK = [
    *("linear", "scaled-linear-zero-snr", "cosine-10-zero-snr", "cosine-continuous"),
    *("vp", "sub-vp", "ve", "edm", "flow"),
]


@pytest.fixture(params=[*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in ALIKE)])
def schedule(request, every) -> Schedule:
    """Each schedule in turn; those that differ from another in their numbers alone, among the slow tests."""
    assert sorted(every) == sorted([*QUICK, *ALIKE])
    return every[request.param]()


@dataclass(frozen=True)
class Bulk(Noise):
    """Noise for thousands of samples at once, which need not be told apart."""

    def __call__(self, shape, draws):
        return normal((len(draws), *shape), self.seeds[0], "bulk", draws[0])


@dataclass(frozen=True)
class Constant(Noise):
    """Noise that is the same number everywhere: a probe."""

    value: float = 0.0

    def __call__(self, shape, draws):
        return torch.full((len(draws), *shape), self.value)


@pytest.fixture
def bulk() -> type[Bulk]:
    return Bulk


@pytest.fixture
def constant() -> type[Constant]:
    return Constant


def p_values(x: Tensor, mixture: Mixture) -> dict[str, float]:
    """The p-values of samples (N, 2) under a mixture of well-separated components."""
    count, found = len(x), {}
    mean = mixture.weights @ mixture.means
    second = torch.diag(mixture.weights @ mixture.stds.square()) + torch.einsum(
        "k,ki,kj->ij", mixture.weights, mixture.means, mixture.means
    )
    # Moments by z-tests.
    outer = x[:, :, None] * x[:, None, :]
    for name, value, want in (("mean", x, mean), ("second moment", outer.flatten(1), second.flatten())):
        z = (value.mean(0) - want) / (value.std(0) / math.sqrt(count))
        found[name] = 2 * stats.norm.sf(z.abs().max().item())
    # How many came from each component by chi-square, and their spread within it.
    nearest = ((x[:, None] - mixture.means) / mixture.stds).square().sum(-1).argmin(1)
    observed = torch.bincount(nearest, minlength=len(mixture.weights))
    found["mode weights"] = stats.chisquare(observed.numpy(), (mixture.weights * count).numpy()).pvalue
    within = ((x - mixture.means[nearest]) / mixture.stds[nearest]).square().sum()
    found["spread"] = 2 * min(stats.chi2(2 * count).cdf(within.item()), stats.chi2(2 * count).sf(within.item()))
    # Kolmogorov and Smirnov on projections.
    for angle in (0.3, 1.4, 2.6):
        axis = torch.tensor([math.cos(angle), math.sin(angle)], dtype=x.dtype)
        parts = [
            (w.item(), stats.norm((m @ axis).item(), (s * axis).norm().item()))
            for w, m, s in zip(mixture.weights, mixture.means, mixture.stds, strict=True)
        ]
        cdf = lambda v, parts=parts: sum(w * part.cdf(v) for w, part in parts)  # noqa: E731
        found[f"projection {angle}"] = stats.kstest((x @ axis).numpy(), cdf).pvalue
    return found


@pytest.fixture
def judge() -> Callable[..., None]:
    """Assert that samples have a mixture's distribution: seven tests, each with a false-positive rate of 1e-5."""

    def check(x: Tensor, mixture: Mixture) -> None:
        found = p_values(x, mixture)
        assert all(p > RATE for p in found.values()), found

    return check


@pytest.fixture
def walk() -> Callable[..., Tensor]:
    """Samples (count, 2) that start at the exact noisy distribution of the grid's first time, so that what is judged
    is the sampler alone and not how much signal the schedule leaves at its end."""

    def go(sampler: Sampler, denoiser: Denoiser, oracle: Mixture, grid: Tensor, count: int) -> Tensor:
        t = grid[:1].expand(count)
        x = diffuse(denoiser.schedule, oracle.draw(count), t, normal((count, 2), 0, "start").double())
        *_, last = run(sampler, denoiser, sampler.init(x, t), grid, Bulk([0] * count))
        return last.x

    return go


@dataclass(frozen=True)
class Probe(Noise):
    """Three rows that show what an affine step does: nothing, a unit of x, and a unit of noise."""

    def __call__(self, shape, draws):
        return torch.tensor([0.0, 0.0, 1.0]).reshape(3, *[1] * len(shape)).expand(3, *shape)


@pytest.fixture
def moments() -> Callable[..., tuple[float, float]]:
    """The mean and variance of samples, with no sampling: with the denoiser of a Gaussian in one dimension each step
    is affine, x -> a x + b z + c, and carries a Gaussian's two moments exactly."""

    def go(sampler: Sampler, denoiser: Denoiser, grid: Tensor, mean: float, variance: float) -> tuple[float, float]:
        alpha, sigma = (value.item() for value in denoiser.schedule.marginal(grid[:1]))
        mean, variance = alpha * mean, alpha**2 * variance + sigma**2
        for t, s in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
            state = sampler.init(torch.tensor([[0.0], [1.0], [0.0]], dtype=grid.dtype), t)
            c, a, b = sampler.step(denoiser, state, s, Probe([0, 0, 0])).x[:, 0].tolist()
            mean, variance = c + (a - c) * mean, (a - c) ** 2 * variance + (b - c) ** 2
        return mean, variance

    return go


@pytest.fixture
def line() -> Callable[..., Mixture]:
    """N(0.3, 0.5^2), in one dimension."""

    def make(schedule) -> Mixture:
        one = torch.ones(1, dtype=torch.float64)
        return Mixture(0.3 * one[None], 0.5 * one, one, schedule)

    return make
