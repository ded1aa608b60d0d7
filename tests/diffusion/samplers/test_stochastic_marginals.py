"""Whether stochastic samplers have the right distribution at every noise level, not at the end alone.

With the denoiser of a Gaussian in one dimension a run is affine in where it starts and in every noise that it draws.
A batch whose rows differ in one of these shows each one's weight, and with them the mean and variance at each time of
the grid, exactly and with no sampling, whatever a sampler remembers from step to step.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from reverie.base.randomness import Noise, normal
from reverie.diffusion.oracles import Mixture
from reverie.diffusion.registry import grids, schedules
from reverie.diffusion.samplers.ancestral import DDPM
from reverie.diffusion.samplers.base import Sampler
from reverie.diffusion.samplers.ddim import DDIM
from reverie.diffusion.samplers.dpmpp import DPMpp2M, DPMpp2MSDE, DPMpp3MSDE
from reverie.diffusion.samplers.langevin import AnnealedLangevin, EulerMaruyama, PredictorCorrector
from reverie.diffusion.samplers.restart import Restart
from reverie.diffusion.samplers.runge_kutta import DPM2, DPM2Ancestral, EDMHeun, EulerAncestral

F64 = torch.float64
MEAN, VARIANCE = 0.3, 0.25  # of the fixture `line`


@dataclass(frozen=True)
class Drawn(Noise):
    """No noise, and, in place of the seeds, a list of the draws that were asked for."""

    def __call__(self, shape, draws):
        self.seeds.extend(draw for draw in dict.fromkeys(draws) if draw not in self.seeds)
        return torch.zeros(len(draws), *shape)


@dataclass(frozen=True)
class Impulses(Noise):
    """A unit of noise for each row at the one draw that is its own, its seed."""

    def __call__(self, shape, draws):
        own = torch.tensor([float(a == b) for a, b in zip(self.seeds, draws, strict=True)])
        return own.reshape(-1, *[1] * len(shape)).expand(-1, *shape)


def along(sampler: Sampler, oracle: Mixture, grid: Tensor) -> list[tuple[float, float]]:
    """The mean and variance after each step of a run that starts as it should."""
    drawn: list[int] = []
    walked(sampler, oracle, grid, torch.zeros(1, 1, dtype=F64), Drawn(drawn))
    starts = torch.zeros(len(drawn) + 2, 1, dtype=F64)
    starts[1] = 1
    alpha, sigma = (v.item() for v in oracle.schedule.marginal(grid[0]))
    found = []
    for x in walked(sampler, oracle, grid, starts, Impulses([-1, -1, *drawn])):
        still, unit, *impulses = x[:, 0].tolist()
        mean = still + (unit - still) * alpha * MEAN
        variance = (unit - still) ** 2 * (alpha**2 * VARIANCE + sigma**2)
        found.append((mean, variance + sum((z - still) ** 2 for z in impulses)))
    return found


def walked(sampler: Sampler, oracle: Mixture, grid: Tensor, x: Tensor, noise: Noise) -> list[Tensor]:
    state, found = sampler.init(x, grid[0].item()), []
    for k, s in enumerate(grid[1:].tolist()):
        state = sampler.step(oracle, state, s, noise, len(grid) - 2 - k)
        found.append(state.x)
    return found


def wrong(sampler: Sampler, oracle: Mixture, grid: Tensor) -> list[float]:
    """How far mean and variance are from the true ones, in units of these, at some levels along the grid."""
    found = along(sampler, oracle, grid)
    alphas, sigmas = (v.tolist() for v in oracle.schedule.marginal(grid[1:]))
    errors, stride = [], (len(grid) - 1) // 4
    for (mean, variance), alpha, sigma in list(zip(found, alphas, sigmas, strict=True))[stride - 1 :: stride]:
        right = alpha**2 * VARIANCE + sigma**2
        errors += [abs(mean - alpha * MEAN) / math.sqrt(right), abs(variance / right - 1)]
    return errors


def levels_of(schedule, steps: int, ends: tuple[float, float] = (0.9, 0.1)) -> Tensor:
    """A grid even in log SNR between two times."""
    first, last = schedule.log_snr(torch.tensor(ends, dtype=F64)).tolist()
    return schedule.time(torch.linspace(first, last, steps + 1, dtype=F64))


ENDS = {"vp": (0.9, 0.05), "edm": (0.1, 0.001), "flow": (0.95, 0.05)}
WEAK_ORDER = [
    *((lambda n: DDPM(), 1), (lambda n: DDPM("large"), 1), (lambda n: EulerMaruyama(), 1)),
    *((lambda n: DDIM(1.0), 1), (lambda n: DDIM(0.5), 1), (lambda n: EulerAncestral(), 1)),
    *((lambda n: DPM2Ancestral(), 2), (lambda n: DPM2(0.5), 2)),
    *((lambda n: DPMpp2MSDE(), 2), (lambda n: DPMpp2MSDE(rule="exact"), 2), (lambda n: DPMpp2M(eta=0.5), 2)),
    (lambda n: DPMpp3MSDE(), 2),
    (lambda n: EDMHeun(churn=6.0, churn_noise=1.0), 2),
    (lambda n: Restart(low=0.3, high=1.0, times=3, inner=n // 4), 2),
]


def label(value) -> str | None:
    return str(value(4)).replace(" ", "") if callable(value) else None


@pytest.mark.parametrize("name", ["vp", "edm", pytest.param("flow", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("make", "order"), WEAK_ORDER, ids=label)
def test_the_marginals_are_right_at_every_level_in_the_limit_of_small_steps(make, order, name, line):
    """And the error falls with the step's first or second power at least: the order in the distribution's sense."""
    oracle = line(schedules[name]())
    coarse, fine = (max(wrong(make(n), oracle, levels_of(oracle.schedule, n, ENDS[name]))) for n in (16, 32))
    assert fine < (0.35 if order == 1 else 0.03)
    assert math.log2(coarse / fine) > order - 0.5


def test_edms_own_noise_is_louder_than_the_marginals_allow(line):
    """S_noise = 1.003, which is in its authors' settings, widens them, and more steps do not help."""
    oracle = line(schedules["edm"]())
    coarse, fine = (levels_of(oracle.schedule, n, ENDS["edm"]) for n in (32, 64))
    quiet, loud = (
        [max(wrong(EDMHeun(churn=6.0, churn_noise=scale), oracle, grid)) for grid in (coarse, fine)]
        for scale in (1.0, 1.05)
    )
    assert quiet[1] < 0.01
    assert loud[1] > 0.8 * loud[0] > 0.08


# Langevin -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0.4, 0.2])
def test_langevins_bias_is_that_of_its_step(size, line):
    """x <- (1 - k) x + ..., k = size sigma^2 / 2C, has the variance C / (1 - k / 2) when it no longer changes."""
    oracle = line(schedules["ve"]())
    for t, s in ((0.6, 0.55), (0.4, 0.35)):
        sigma = oracle.schedule.sigma(torch.tensor(t, dtype=F64)).item()
        total = VARIANCE + sigma**2
        k = size * sigma**2 / (2 * total)
        moves = int(12 / k)
        ((mean, variance),) = along(AnnealedLangevin(moves, size), oracle, torch.tensor([t, s], dtype=F64))
        assert mean == pytest.approx(MEAN, abs=1e-3)
        assert variance == pytest.approx(total / (1 - k / 2), rel=1e-4)


def test_annealed_langevin_follows_the_levels_where_its_steps_are_small_and_many(line):
    """After a step x still has the marginal of the level that it made its moves at, but for a bias that halves with
    the size of the moves."""
    oracle = line(schedules["ve"]())
    grid = levels_of(oracle.schedule, 4, (0.75, 0.55))
    sigmas = oracle.schedule.sigma(grid[:-1]).tolist()
    worst = []
    for moves, size in ((40, 0.2), (80, 0.1)):
        found = along(AnnealedLangevin(moves, size), oracle, grid)
        worst.append(max(abs(v / (VARIANCE + s**2) - 1) for (_, v), s in zip(found, sigmas, strict=True)))
    assert worst[0] < 0.06
    assert worst[0] / worst[1] == pytest.approx(2, abs=0.2)


# Predictor and corrector ----------------------------------------------------------------------


def corrected(rows: int, dimensions: int, snr: float, moves: int) -> float:
    """The variance, in units of the true one, that many corrections at one level leave."""
    mean, std = torch.zeros(1, dimensions, dtype=F64), torch.full((1,), VARIANCE**0.5, dtype=F64)
    oracle = Mixture(mean, std, torch.ones(1, dtype=F64), schedules["ve"]())
    before, after = (VARIANCE + oracle.schedule.variance(torch.tensor([0.5, 0.499], dtype=F64))).tolist()
    sampler = PredictorCorrector(moves, snr)
    state = sampler.init(math.sqrt(before) * normal((rows, dimensions), 0, "start").double(), 0.5)
    return sampler.step(oracle, state, 0.499, Together([0] * rows)).x.square().mean().item() / after


@dataclass(frozen=True)
class Together(Noise):
    """Noise for many samples at once, which need not be told apart."""

    def __call__(self, shape, draws):
        return normal((len(draws), *shape), self.seeds[0], "together", draws[0])


@pytest.mark.parametrize("snr", [0.4, 0.25])
def test_in_many_dimensions_the_correctors_bias_is_that_of_its_step(snr):
    """Where the norms do not vary e = 2 r^2 C^2 / V, with C the true variance and V that of what there is, which
    stands still at V / C = 1 + r^2. Five standard errors: a false positive in 10^6."""
    dimensions = 40_000
    found = corrected(1, dimensions, snr, int(3 / snr**2))
    assert found == pytest.approx(1 + snr**2, abs=5 * math.sqrt(2 / dimensions) * (1 + snr**2))


@pytest.mark.parametrize("dimensions", [4, 8])
def test_in_few_dimensions_the_corrector_is_too_wide(dimensions):
    """The step depends on the very sample and noise that it multiplies: with many small corrections the variance of a
    Gaussian becomes ((d + 2) / d)^2 of what it is. Of 3072 dimensions that is a thousandth, of 4 a factor of 2.25."""
    found = corrected(4000 // dimensions, dimensions, 0.1, 200)
    assert found == pytest.approx((1 + 2 / dimensions) ** 2, rel=0.12)


# A mixture ------------------------------------------------------------------------------------

MIXTURE = [
    (DPMpp2MSDE(), "vp", 150),
    (EDMHeun(churn=20.0, churn_noise=1.0), "edm", 150),
    (Restart(low=0.1, high=0.6, inner=30), "edm", 100),
    pytest.param(DPMpp3MSDE(), "vp", 150, marks=pytest.mark.slow),
    pytest.param(DPM2Ancestral(), "vp", 150, marks=pytest.mark.slow),
    pytest.param(EulerMaruyama(), "vp", 300, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(
    ("sampler", "name", "steps"), MIXTURE, ids=lambda v: type(v).__name__ if isinstance(v, Sampler) else str(v)
)
def test_samples_have_the_mixtures_distribution(sampler, name, steps, walk, judge, mixture):
    """Seven tests, each with a false-positive rate of 1e-5."""
    oracle = mixture(schedules[name]())
    judge(walk(sampler, oracle, oracle, grids["log-snr"](oracle.schedule, steps), 600), oracle)


def test_annealed_langevin_has_the_mixtures_distribution(walk, judge, mixture):
    """From a level where the components are one, with moves enough at each of those that follow."""
    oracle = mixture(schedules["ve"]())
    sigma = torch.logspace(0, -1.7, 25, dtype=F64)
    grid = torch.cat([oracle.schedule.time(-2 * sigma.log()), torch.zeros(1, dtype=F64)])
    judge(walk(AnnealedLangevin(40, 0.2), oracle, oracle, grid, 600), oracle)
