"""Wrong formulas that are printed in texts about these systems: each is written out here, and its judge rejects it.

A judge knows nothing of formulas, only of exact answers: the data is N(0.3, 0.5^2), whose noise estimate is known in
closed form; under it each sampling step is affine in its input and its noise, so that the mean and the variance of
the samples follow exactly from any step function, without sampling. The same judges accept what this package does.
"""

import math
from collections.abc import Callable

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from reverie.base.randomness import Noise
from reverie.diffusion.denoisers import Denoiser, Estimate
from reverie.diffusion.grids import from_timesteps, trailing
from reverie.diffusion.guidance.classifier_free import ClassifierFree
from reverie.diffusion.oracles import Mixture
from reverie.diffusion.process import transition
from reverie.diffusion.samplers.ancestral import DDPM
from reverie.diffusion.samplers.ddim import DDIM
from reverie.diffusion.schedules import Cosine, Flow, cosine_betas, table

F64 = torch.float64
MEAN, STD = 0.3, 0.5
TABLE = table("linear", 100, first=1e-3, last=0.2)
BETA = TABLE.betas.tolist()
ALPHA = [1 - beta for beta in BETA]
BAR = [*(1 - TABLE.betas).cumprod(0).tolist(), 1.0]  # BAR[-1] is the data's
FULL = list(range(99, -1, -1))
TWENTY = list(range(99, -1, -5))

Step = Callable[[Tensor, int, int, Tensor], Tensor]  # (x at timestep i, i, the next timestep j or -1, noise) -> x at j


def exact_eps(x: Tensor, i: int) -> Tensor:
    """E[eps | x_i] for data N(MEAN, STD^2)."""
    return math.sqrt(1 - BAR[i]) * (x - math.sqrt(BAR[i]) * MEAN) / (BAR[i] * STD**2 + 1 - BAR[i])


def package(sampler, schedule=TABLE) -> Step:
    """This package's sampler as a step function."""
    one = torch.ones(1, dtype=F64)
    oracle = Mixture(MEAN * one[None], STD * one, one, schedule)

    class Given(Noise):
        def __call__(self, shape, draws):
            return given[:, None]

    given = torch.zeros(3)

    def step(x, i, j, z):
        nonlocal given
        given = z
        t, s = schedule.time_of_timestep(torch.tensor([i, j])).tolist()
        return sampler.step(oracle, sampler.init(x[:, None], t), s, Given([0] * len(x))).x[:, 0]

    return step


def response(step: Step, i: int, j: int) -> tuple[float, float, float]:
    """What an affine step does: to x, to the noise, and to nothing."""
    x, z = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=F64)
    still, moved, shaken = step(x, i, j, z).tolist()
    return moved - still, shaken - still, still


def moments(step: Step, timesteps: list[int], mean: float, variance: float) -> tuple[float, float]:
    """The mean and variance of the samples of a chain, exactly."""
    for i, j in zip(timesteps, [*timesteps[1:], -1], strict=True):
        a, b, c = response(step, i, j)
        mean, variance = a * mean + c, a**2 * variance + b**2
    return mean, variance


def judge_samples(step: Step, timesteps: list[int], tolerance: float = 0.04) -> None:
    """From pure noise, samples have the data's mean and standard deviation, up to the steps' coarseness."""
    mean, variance = moments(step, timesteps, 0.0, 1.0)
    assert abs(mean - MEAN) < tolerance
    assert abs(math.sqrt(variance) - STD) < tolerance


def rejects(judge: Callable[..., None], *arguments) -> None:
    """Assert that a judge rejects: by a failed assertion or by numbers that cannot be computed."""
    with pytest.raises((AssertionError, OverflowError, ValueError, ZeroDivisionError)):
        judge(*arguments)


# 'DDIM with alpha_t or beta_t where the cumulative product belongs' --------------------------------------


def ddim_written_with(keep: list[float], noise: list[float]) -> Step:
    """DDIM with any two lists in the places of alpha_bar and 1 - alpha_bar."""

    def step(x, i, j, z):
        eps = exact_eps(x, i)
        x0 = (x - math.sqrt(noise[i]) * eps) / math.sqrt(keep[i])
        return math.sqrt(keep[j]) * x0 + math.sqrt(noise[j]) * eps

    return step


def test_ddim_takes_the_cumulative_product():
    alpha, beta, noise = [*ALPHA, 1.0], [*BETA, 0.0], [1 - bar for bar in BAR]
    for timesteps, tolerance in ((FULL, 0.02), (TWENTY, 0.08)):
        judge_samples(package(DDIM()), timesteps, tolerance)
        judge_samples(ddim_written_with(BAR, noise), timesteps, tolerance)
        rejects(judge_samples, ddim_written_with(alpha, beta), timesteps, tolerance)
        rejects(judge_samples, ddim_written_with(BAR, beta), timesteps, tolerance)
        rejects(judge_samples, ddim_written_with(alpha, noise), timesteps, tolerance)


# 'A DDPM step that divides by sqrt(alpha_bar_t) and adds sqrt(1 - alpha_bar_t) z' -------------------------


def ddpm_written_with(divisor: list[float], eps_factor: Callable[[int], float], spread: list[float]) -> Step:
    """DDPM's step with any divisor, factor of eps and variance of the noise."""

    def step(x, i, j, z):
        mean = (x - eps_factor(i) * exact_eps(x, i)) / math.sqrt(divisor[i])
        return mean + (math.sqrt(spread[i]) * z if j >= 0 else 0 * z)

    return step


def test_ddpm_divides_by_the_root_of_alpha_and_adds_beta():
    def right(i):
        return BETA[i] / math.sqrt(1 - BAR[i])

    noise = [1 - bar for bar in BAR]
    for variance in ("small", "large"):
        judge_samples(package(DDPM(variance)), FULL)
    judge_samples(ddpm_written_with(ALPHA, right, BETA), FULL)
    rejects(judge_samples, ddpm_written_with(BAR, right, noise), FULL)
    rejects(judge_samples, ddpm_written_with(BAR, right, BETA), FULL)
    rejects(judge_samples, ddpm_written_with(ALPHA, right, noise), FULL)
    rejects(judge_samples, ddpm_written_with(ALPHA, lambda i: 1 - ALPHA[i] ** 0.5, BETA), FULL)
    rejects(judge_samples, ddpm_written_with(ALPHA, lambda i: math.sqrt(BETA[i]), BETA), FULL)


# 'The cosine schedule as cos(t/T pi/2) over cos(pi/2)' ----------------------------------------------------


def judge_cosine(betas: torch.Tensor) -> None:
    """A table that runs from almost all data to almost none, with betas that are ones, and its published entries."""
    assert bool(((betas > 0) & (betas <= 0.999)).all())
    bar = (1 - betas).cumprod(0)
    assert 0.999 < bar[0] < 1
    assert bar[-1] < 1e-6
    published = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2").betas
    torch.testing.assert_close(betas.float(), published, rtol=1e-4, atol=1e-6)


def betas_of(curve: Callable[[torch.Tensor], torch.Tensor], most: float = 0.999) -> torch.Tensor:
    bar = curve(torch.linspace(0, 1, 1001, dtype=F64))
    return (1 - bar[1:] / bar[:-1]).clamp(max=most)


def test_the_cosine_schedule_is_squared_shifted_and_clipped():
    def angle(t, s=0.008):
        return (t + s) / (1 + s) * torch.pi / 2

    judge_cosine(cosine_betas(1000))
    judge_cosine(betas_of(lambda t: angle(t).cos() ** 2))
    rejects(judge_cosine, betas_of(lambda t: angle(t).cos()))
    rejects(judge_cosine, betas_of(lambda t: angle(t, 0.0).cos() ** 2))
    rejects(judge_cosine, betas_of(lambda t: angle(t).cos() ** 2, most=1.0))


def test_a_curve_over_cos_of_half_pi_is_no_schedule():
    def judge(curve):
        bar = curve(torch.linspace(0, 1, 1001, dtype=F64))
        assert bar[0] == pytest.approx(1)
        assert bool(((bar >= 0) & (bar <= 1)).all())
        assert bool((bar.diff() < 0).all())

    judge(lambda t: Cosine().alpha(t) ** 2)
    rejects(judge, lambda t: torch.cos(t * torch.pi / 2) / math.cos(math.pi / 2))


# 'Two Gaussians add by adding their means and variances', used as if noise scales added -------------------


def judge_composition(compose: Callable[[float, float, float], float]) -> None:
    """compose(std at s, alpha_{t|s}, the step's std) gives the closed form's std at t."""
    for schedule in (TABLE, Flow()):
        s, t = torch.tensor([0.3], dtype=F64), torch.tensor([0.7], dtype=F64)
        step = transition(schedule, s, t)
        composed = compose(schedule.sigma(s).item(), step.alpha.item(), step.variance.sqrt().item())
        assert composed == pytest.approx(schedule.sigma(t).item(), rel=1e-9)


def test_variances_add_and_standard_deviations_do_not():
    judge_composition(lambda std, alpha, added: math.sqrt((alpha * std) ** 2 + added**2))
    rejects(judge_composition, lambda std, alpha, added: alpha * std + added)
    rejects(judge_composition, lambda std, alpha, added: math.sqrt(std**2 + added**2))


# 'Sampling with timesteps 49..0 where the model was trained on 999..0' ------------------------------------


@pytest.mark.parametrize("sampler", [DDIM(), DDIM(1.0), DDPM()], ids=str)
def test_the_grid_spans_the_trained_range(sampler):
    trained = table("linear")
    right, wrong = trailing(trained, 50), from_timesteps(trained, list(range(49, -1, -1)))
    for grid, judge in ((right, judge_samples), (wrong, lambda *arguments: rejects(judge_samples, *arguments))):
        judge(package(sampler, trained), [round(i) for i in trained.timestep(grid[:-1]).tolist()], 0.07)


# 'eta = 1: DDIM degenerates to DDPM', without the subsequence ---------------------------------------------


def judge_same(step: Step, other: Step, timesteps: list[int]) -> None:
    """Two step functions do the same to x and to the noise, at every step."""
    for i, j in zip(timesteps, [*timesteps[1:], -1], strict=True):
        assert response(step, i, j) == pytest.approx(response(other, i, j), rel=1e-7, abs=1e-9)


def posterior_of_the_table(x: Tensor, i: int, j: int, z: Tensor) -> Tensor:
    """DDPM's step from i to i - 1 with the posterior's variance; it does not look at j."""
    before = BAR[i - 1] if i else 1.0
    mean = (x - BETA[i] / math.sqrt(1 - BAR[i]) * exact_eps(x, i)) / math.sqrt(ALPHA[i])
    return mean + math.sqrt(BETA[i] * (1 - before) / (1 - BAR[i])) * z


def test_eta_one_is_ddpm_on_the_full_chain_with_the_posteriors_variance():
    large = ddpm_written_with(ALPHA, lambda i: BETA[i] / math.sqrt(1 - BAR[i]), BETA)
    judge_same(package(DDIM(1.0)), posterior_of_the_table, FULL)
    judge_same(package(DDPM("large")), large, FULL)
    rejects(judge_same, package(DDIM(1.0)), large, FULL)
    rejects(judge_same, package(DDIM(0.0)), posterior_of_the_table, FULL)


def test_on_a_subsequence_it_is_ddpm_of_the_pair_not_of_the_table():
    judge_same(package(DDIM(1.0)), package(DDPM()), TWENTY)
    judge_samples(package(DDIM(1.0)), TWENTY, 0.15)
    rejects(judge_same, package(DDIM(1.0)), posterior_of_the_table, TWENTY)
    rejects(judge_samples, posterior_of_the_table, TWENTY, 0.15)


# Guidance written in two ways -----------------------------------------------------------------------------


class Two(Denoiser):
    """A conditional estimate of 2 and an unconditional one of 1."""

    schedule = Flow()

    def forward(self, x, t, condition=None):
        eps = condition["label"].to(x).reshape(-1, 1).expand_as(x)
        return Estimate(x - eps, eps)


def judge_guidance(combine: Callable[[float], float]) -> None:
    """w = 0 is the unconditional estimate, w = 1 the conditional: no guidance; 2 goes as far again."""
    assert combine(0.0) == pytest.approx(1)
    assert combine(1.0) == pytest.approx(2)
    assert combine(2.0) == pytest.approx(3)


def test_guidance_of_one_is_none():
    def ours(w):
        condition, nothing = {"label": torch.tensor([2.0])}, {"label": torch.tensor([1.0])}
        return ClassifierFree(Two(), condition, nothing, w)(
            torch.zeros(1, 1), torch.full((1,), 0.5).double()
        ).eps.item()

    judge_guidance(ours)
    judge_guidance(lambda w: 1 + w * (2 - 1))
    rejects(judge_guidance, lambda w: 2 + w * (2 - 1))
    rejects(judge_guidance, lambda w: (1 + w) * 2 - w * 1)
    rejects(judge_guidance, lambda w: 2 + w * (1 - 2))


# 'Predict the mean at t = 0, so no noise is added' at the wrong step ---------------------------------------


def judge_noise(step: Step, timesteps: list[int]) -> None:
    """Noise enters every step, with the posterior's variance of its two ends, but for the one that ends at the data."""
    for i, j in zip(timesteps, [*timesteps[1:], -1], strict=True):
        step_variance = (1 - BAR[i]) - BAR[i] / BAR[j] * (1 - BAR[j])
        want = math.sqrt(step_variance * (1 - BAR[j]) / (1 - BAR[i]))
        assert (want == 0) == (j == -1)
        assert response(step, i, j)[1] == pytest.approx(want, rel=1e-6, abs=1e-12)


def quiet_when(silent: Callable[[int, int], bool], last: float = 0.0) -> Step:
    """This package's DDPM, made silent at other steps, or given noise at its last."""
    right = package(DDPM())

    def step(x, i, j, z):
        return right(x, i, j, 0 * z if silent(i, j) else z) + (last * z if j < 0 else 0 * z)

    return step


@pytest.mark.parametrize("timesteps", [TWENTY, FULL[-30:], [99, 50, 0]], ids=["twenty", "last thirty", "three"])
def test_no_noise_at_the_last_step_only(timesteps):
    judge_noise(package(DDPM()), timesteps)
    judge_noise(package(DDIM(1.0)), timesteps)
    judge_noise(quiet_when(lambda i, j: False), timesteps)
    rejects(judge_noise, quiet_when(lambda i, j: j == timesteps[-1]), timesteps)  # one step early
    rejects(judge_noise, quiet_when(lambda i, j: i == timesteps[0]), timesteps)  # at the first step
    rejects(judge_noise, quiet_when(lambda i, j: False, math.sqrt(BETA[0])), timesteps)  # noise at the last, too


def test_noise_at_the_last_step_shows_on_data_without_width():
    point = Mixture(torch.full((1, 1), 0.3, dtype=F64), torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64), TABLE)

    def judge(extra):
        sampler, end = DDPM(), []
        for seed in range(3):
            state = sampler.init(torch.randn(1, 1, dtype=F64), 1.0)
            for s in (0.5, 0.1, 0.0):
                state = sampler.step(point, state, s, Noise([seed]))
            end.append((state.x + extra * Noise([seed])((1,), [9])).item())
        assert end == [0.3] * 3

    judge(0.0)
    rejects(judge, math.sqrt(BETA[0]))
