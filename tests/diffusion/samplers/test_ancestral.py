"""DDPM against its own formulas, exact moments, a mixture's distribution, and diffusers."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers import scheduling_ddpm
from torch import nn

from reverie.base.errors import UsageError
from reverie.base.randomness import Noise, normal
from reverie.diffusion.denoisers import Clipped, Denoiser, NetworkDenoiser, Thresholded
from reverie.diffusion.process import posterior
from reverie.diffusion.registry import grids, samplers, schedules
from reverie.diffusion.samplers.ancestral import DDPM
from reverie.diffusion.samplers.base import run, sample
from reverie.diffusion.schedules import Table, table

F64 = torch.float64


def test_one_step_is_algorithm_2():
    """With eps and beta_t: x_(t-1) = (x_t - beta_t / sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_t) + sqrt(variance) z."""
    schedule = table("linear")
    beta, bar = schedule.betas, (1 - schedule.betas).cumprod(0)

    class Net(nn.Module):
        def forward(self, x, time):
            return torch.sin(3 * x)

    x, noise = torch.randn(3, 2, dtype=F64), Noise([4, 5, 6])
    i = torch.tensor([5, 300, 999])
    t, s = schedule.time_of_timestep(i), schedule.time_of_timestep(i - 1)
    beta, bar, before = beta[i][:, None], bar[i][:, None], bar[i - 1][:, None]
    mean = (x - beta / (1 - bar).sqrt() * torch.sin(3 * x)) / (1 - beta).sqrt()
    z = noise((2,), [1, 1, 1]).double()
    for variance, want in (("small", beta * (1 - before) / (1 - bar)), ("large", beta)):
        sampler = DDPM(variance)
        got = sampler.step(NetworkDenoiser(Net(), schedule, "eps"), sampler.init(x, t), s, noise)
        torch.testing.assert_close(got.x, mean + want.sqrt() * z, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_its_moments_converge_to_the_datas_on_every_schedule(schedule, variance, line, moments):
    """Exactly, with no sampling: the error in the variance is small, and halves with the step."""
    mean, errors = 0.0, []
    for steps in (10,) if isinstance(schedule, Table) and schedule.timesteps < 40 else (24, 48):
        mean, spread = moments(DDPM(variance), line(schedule), grids["log-snr"](schedule, steps), 0.3, 0.25)
        errors.append(spread - 0.25)
    assert mean == pytest.approx(0.3, abs=0.02)
    assert abs(errors[-1]) < 0.25 * (0.35 if len(errors) == 2 else 0.7)
    if len(errors) == 2:
        assert errors[0] / errors[1] == pytest.approx(2, abs=0.5)


@pytest.mark.parametrize(("name", "variance"), [("linear", "small"), ("linear", "large"), ("edm", "small")])
def test_samples_have_the_mixtures_distribution(name, variance, walk, judge, mixture):
    oracle = mixture(schedules[name]())
    judge(walk(DDPM(variance), oracle, oracle, grids["log-snr"](oracle.schedule, 150), 600), oracle)


@pytest.mark.slow
@pytest.mark.parametrize("variance", ["small", "large"])
def test_samples_have_the_mixtures_distribution_on_every_schedule(schedule, variance, walk, judge, mixture):
    if isinstance(schedule, Table) and schedule.timesteps < 1000:
        pytest.skip("too short a table for so fine a grid")
    oracle = mixture(schedule)
    judge(walk(DDPM(variance), oracle, oracle, grids["log-snr"](schedule, 600), 3000), oracle)


@pytest.mark.slow
def test_the_whole_table_gives_the_mixture(walk, judge, mixture):
    """All 1000 timesteps of the linear table, as in the paper, from pure noise."""
    oracle = mixture(table("linear"))
    x = sample(DDPM(), oracle, (2,), grids["trailing"](oracle.schedule, 1000), Noise(range(1000)))
    judge(x.double(), oracle)


def test_the_judge_sees_a_wrong_variance(walk, judge, mixture):
    """The power of the test: a chain whose noise is a fifth too large is refused."""

    class Loud(DDPM):
        def std(self, q, estimate):
            return 1.2 * super().std(q, estimate)

    oracle = mixture(table("linear"))
    with pytest.raises(AssertionError):
        judge(walk(Loud(), oracle, oracle, grids["log-snr"](oracle.schedule, 150), 600), oracle)


# Noise ----------------------------------------------------------------------------------------


def test_no_noise_at_the_last_step_and_at_no_other(schedule, line, constant):
    """The only step that forgets its noise is the one that ends at t = 0, even where others of the batch go on."""
    sampler, oracle = DDPM(), line(schedule)
    x = torch.randn(3, 1, dtype=F64)
    t = torch.tensor([schedule.t_min, 0.5, 0.9], dtype=F64)
    s = torch.tensor([0.0, 0.0, 0.4], dtype=F64)
    quiet, loud = (sampler.step(oracle, sampler.init(x, t), s, constant([0, 0, 0], z)).x for z in (0.0, 1.0))
    assert torch.equal(quiet[:2], loud[:2])
    torch.testing.assert_close(quiet[:2], oracle(x, t).x0[:2], rtol=1e-12, atol=1e-12)
    std = posterior(schedule, s[2:], t[2:]).small.sqrt()
    torch.testing.assert_close(loud[2] - quiet[2], std, rtol=1e-6, atol=1e-9)


def test_a_step_that_ends_at_zero_draws_nothing(line):
    class Refusing(Noise):
        def __call__(self, shape, draws):
            raise AssertionError("noise was drawn")

    sampler = DDPM()
    sampler.step(line(table("linear")), sampler.init(torch.zeros(1, 1, dtype=F64), 0.1), 0.0, Refusing([0]))


# Learned variance -----------------------------------------------------------------------------


class Learned(Denoiser):
    """An oracle that also claims to have learned the variance."""

    def __init__(self, oracle, fraction):
        super().__init__()
        self.oracle, self.schedule, self.fraction = oracle, oracle.schedule, fraction

    def forward(self, x, t, condition=None):
        return self.oracle(x, t)._replace(fraction=torch.full_like(x, self.fraction))


@pytest.mark.parametrize(("fraction", "variance"), [(0.0, "small"), (1.0, "large")])
def test_at_its_ends_the_learned_variance_is_the_fixed_ones(schedule, fraction, variance, mixture):
    oracle = mixture(schedule)
    grid, noise = grids["trailing"](schedule, 7), Noise(range(5))
    got = sample(DDPM("learned"), Learned(oracle, fraction), (2,), grid, noise)
    want = sample(DDPM(variance), oracle, (2,), grid, noise)
    assert bool(got.isfinite().all())
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_between_them_it_is_their_blend_in_log(schedule, line, constant):
    sampler, t, s = DDPM("learned"), torch.tensor([0.7], dtype=F64), torch.tensor([0.3], dtype=F64)
    q = posterior(schedule, s, t)
    state = sampler.init(torch.zeros(1, 1, dtype=F64), t)
    quiet, loud = (sampler.step(Learned(line(schedule), 0.25), state, s, constant([0], z)).x.item() for z in (0.0, 1.0))
    want = math.exp((0.25 * q.large.log() + 0.75 * q.small.log()).item() / 2)
    assert loud - quiet == pytest.approx(want, rel=1e-6)


def test_a_variance_that_was_not_learned_is_refused(line):
    sampler = DDPM("learned")
    with pytest.raises(UsageError, match="this model learned none; use small or large"):
        sampler.step(line(table("linear")), sampler.init(torch.zeros(1, 1, dtype=F64), 0.5), 0.2, Noise([0]))


def test_unknown_variances_are_refused(unchecked):
    with pytest.raises(UsageError, match="variance is 'fixed'"):
        DDPM("fixed")
    with pytest.raises(UsageError, match="did you mean ddpm"):
        samplers["ddmp"]


# Beside diffusers -----------------------------------------------------------------------------


class Toy(nn.Module):
    """A fixed network with nothing to learn."""

    def __init__(self, channels=1):
        super().__init__()
        self.channels = channels

    def forward(self, x, time):
        mean = torch.tanh(x + torch.cos(time / 200).reshape(-1, 1, 1, 1))
        return mean if self.channels == 1 else torch.cat([mean, torch.sin(5 * x)], 1)


def trajectory(theirs, steps, monkeypatch, x, learned=False):
    """Their samples after each step, with our noise, their tables in double precision."""
    theirs.betas = table(OURS[theirs.config.beta_schedule]).betas
    theirs.alphas = 1 - theirs.betas
    theirs.alphas_cumprod = theirs.alphas.cumprod(0)
    theirs.set_timesteps(steps)
    network, states = Toy(2 if learned else 1), []
    for k, t in enumerate(theirs.timesteps, start=1):
        z = Noise([0, 1]).like(x, [k, k])
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, z=z, **__: z)
        x = theirs.step(network(x, t.double().expand(2)), t, x).prev_sample
        states.append(x)
    return states


OURS = {"linear": "linear", "scaled_linear": "scaled-linear", "squaredcos_cap_v2": "cosine"}
NAMES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def ours(prediction, variance, steps, x, spacing="leading", name="linear", wrap=lambda d: d):
    schedule = table(name)
    network = Toy(2 if variance == "learned" else 1)
    denoiser = wrap(NetworkDenoiser(network, schedule, prediction, variance == "learned"))
    sampler, grid = DDPM(variance), grids[spacing](schedule, steps)
    return [state.x for state in run(sampler, denoiser, sampler.init(x, grid[0].item()), grid, Noise([0, 1]))]


X = normal((2, 3, 4, 4), 0, "start").double()


@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize(("variance", "theirs"), [("small", "fixed_small"), ("large", "fixed_large")])
def test_the_same_trajectory_as_diffusers(prediction, variance, theirs, monkeypatch):
    """Where theirs is right: leading timesteps, a number of steps that divides 1000."""
    scheduler = DDPMScheduler(
        prediction_type=NAMES[prediction], variance_type=theirs, clip_sample=False, beta_schedule="scaled_linear"
    )
    want = trajectory(scheduler, 50, monkeypatch, X)
    got = ours(prediction, variance, 50, X, name="scaled-linear")
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_the_trajectory_of_diffusers_clipped(steps, monkeypatch):
    scheduler = DDPMScheduler(clip_sample=True)
    want = trajectory(scheduler, steps, monkeypatch, X)
    got = ours("eps", "small", steps, X, wrap=Clipped)
    torch.testing.assert_close(torch.stack(got), torch.stack(want), rtol=1e-6, atol=1e-6)


def test_dynamic_thresholding_of_diffusers(monkeypatch):
    scheduler = DDPMScheduler(thresholding=True, clip_sample=False, sample_max_value=1e9)
    want = trajectory(scheduler, 50, monkeypatch, 3 * X)
    got = ours("eps", "small", 50, 3 * X, wrap=Thresholded)
    torch.testing.assert_close(torch.stack(got), torch.stack(want), rtol=1e-6, atol=1e-6)


def test_the_learned_variance_of_diffusers(monkeypatch):
    scheduler = DDPMScheduler(variance_type="learned_range", clip_sample=False)
    want = trajectory(scheduler, 50, monkeypatch, X, learned=True)
    got = ours("eps", "learned", 50, X)
    torch.testing.assert_close(torch.stack(got), torch.stack(want), rtol=1e-6, atol=1e-6)
