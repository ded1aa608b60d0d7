"""DDIM against exact flows, DDPM, and diffusers where that is right; and its inversion."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

from reverie.base.errors import UsageError
from reverie.base.randomness import Noise, normal
from reverie.diffusion.denoisers import NetworkDenoiser
from reverie.diffusion.oracles import Mixture
from reverie.diffusion.registry import grids, schedules
from reverie.diffusion.samplers.ancestral import DDPM
from reverie.diffusion.samplers.base import run, sample
from reverie.diffusion.samplers.ddim import DDIM, DDIMInversion
from reverie.diffusion.schedules import Flow, Table, table

F64 = torch.float64


def final(sampler, denoiser, x, grid, noise=None):
    *_, last = run(sampler, denoiser, sampler.init(x, grid[0].item()), grid, noise or Noise(range(len(x))))
    return last.x


def test_one_step_is_equation_12():
    """With alpha_bar, as the paper writes it alpha: predicted x_0, direction, noise."""
    schedule = table("linear")
    bar = (1 - schedule.betas).cumprod(0)
    x, noise = torch.randn(3, 2, dtype=F64), Noise([4, 5, 6])

    class Net(nn.Module):
        def forward(self, x, time):
            return torch.sin(3 * x)

    i, j = torch.tensor([50, 300, 999]), torch.tensor([3, 250, 899])
    a_t, a_s = bar[i][:, None], bar[j][:, None]
    for eta in (0.0, 0.3, 1.0):
        std = eta * ((1 - a_s) / (1 - a_t)).sqrt() * (1 - a_t / a_s).sqrt()
        eps = torch.sin(3 * x)
        want = a_s.sqrt() * (x - (1 - a_t).sqrt() * eps) / a_t.sqrt() + (1 - a_s - std**2).sqrt() * eps
        want = want + std * noise((2,), [1, 1, 1])
        sampler = DDIM(eta)
        state = sampler.init(x, schedule.time_of_timestep(i))
        got = sampler.step(NetworkDenoiser(Net(), schedule, "eps"), state, schedule.time_of_timestep(j), noise)
        torch.testing.assert_close(got.x, want, rtol=1e-8, atol=1e-8)


# Exact solutions ------------------------------------------------------------------------------


def test_on_a_point_mass_one_step_is_exact(schedule):
    point = Mixture(torch.tensor([[0.3, -0.7]], dtype=F64), torch.zeros(1, dtype=F64), torch.ones(1).double(), schedule)
    x = torch.randn(4, 2, dtype=F64)
    middle = DDIM().step(point, DDIM().init(x, 0.9), 0.4, Noise(range(4)))
    alpha, sigma = schedule.marginal(torch.tensor([0.9, 0.4], dtype=F64))
    eps = (x - alpha[0] * point.means) / sigma[0]
    torch.testing.assert_close(middle.x, alpha[1] * point.means + sigma[1] * eps, rtol=1e-9, atol=1e-9)
    for eta in (0.0, 0.5, 1.0):
        assert torch.equal(final(DDIM(eta), point, x, grids["trailing"](schedule, 5)), point.means.expand(4, 2))


def test_it_converges_to_the_exact_flow_with_order_one(schedule, gaussian):
    """On every schedule: halving the steps halves the distance to the Gaussian's probability-flow map."""
    if isinstance(schedule, Table) and schedule.timesteps < 1000:
        return
    oracle, x = gaussian(schedule), torch.randn(6, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    x = x * schedule.prior_std(torch.ones(1, dtype=F64))
    exact = oracle.flow(x, torch.ones(6, dtype=F64), torch.zeros(6, dtype=F64))
    errors = [(final(DDIM(), oracle, x, grids["log-snr"](schedule, n)) - exact).norm() for n in (20, 40, 80)]
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert all(0.7 < order < 1.4 for order in orders), (errors, orders)
    assert errors[-1] < 0.05 * exact.norm()


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_its_moments_converge_to_the_datas_on_every_schedule(schedule, eta, line, moments):
    mean, errors = 0.0, []
    for steps in (10,) if isinstance(schedule, Table) and schedule.timesteps < 40 else (24, 48):
        mean, spread = moments(DDIM(eta), line(schedule), grids["log-snr"](schedule, steps), 0.3, 0.25)
        errors.append(spread - 0.25)
    assert mean == pytest.approx(0.3, abs=0.02)
    assert abs(errors[-1]) < 0.25 * (0.35 if len(errors) == 2 else 0.7)
    if len(errors) == 2:
        assert errors[0] / errors[1] == pytest.approx(2, abs=0.5)


@pytest.mark.parametrize(
    ("name", "eta"), [("linear", 0.0), ("linear", 0.5), ("linear", 1.0), ("edm", 0.0), ("flow", 0.0)]
)
def test_samples_have_the_mixtures_distribution(name, eta, walk, judge, mixture):
    oracle = mixture(schedules[name]())
    judge(walk(DDIM(eta), oracle, oracle, grids["log-snr"](oracle.schedule, 150), 600), oracle)


@pytest.mark.slow
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_samples_have_the_mixtures_distribution_on_every_schedule(schedule, eta, walk, judge, mixture):
    if isinstance(schedule, Table) and schedule.timesteps < 1000:
        pytest.skip("too short a table for so fine a grid")
    oracle = mixture(schedule)
    judge(walk(DDIM(eta), oracle, oracle, grids["log-snr"](schedule, 600), 3000), oracle)


@pytest.mark.parametrize("steps", [300, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["linear", "flow"])
def test_fifty_steps_are_close_to_a_thousand(name, steps, mixture):
    """From the same starts, all but those near a border of two modes end in the same place."""
    schedule = schedules[name]()
    oracle, x = mixture(schedule), normal((200, 2), 3, "start").double()
    few, many = (final(DDIM(), oracle, x, grids["trailing"](schedule, n)) for n in (50, steps))
    distance = (few - many).norm(dim=1)
    assert distance.median() < 0.05
    assert (distance < 0.5).double().mean() > 0.95


# DDPM -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", grids)
def test_eta_one_is_ddpm_with_the_small_variance_on_the_same_grid(schedule, spacing, mixture):
    oracle, noise = mixture(schedule), Noise(range(4))
    grid = grids[spacing](schedule, 4)
    x = normal((4, 2), 1, "start").double() * schedule.prior_std(grid[:1])
    pairs = zip(*(run(s, oracle, s.init(x, grid[0].item()), grid, noise) for s in (DDIM(1.0), DDPM())), strict=True)
    for ddim, ddpm in pairs:
        torch.testing.assert_close(ddim.x, ddpm.x, rtol=1e-8, atol=1e-8)


def test_eta_one_is_not_ddpm_with_the_large_variance(mixture):
    oracle, noise = mixture(table("linear")), Noise(range(4))
    grid = grids["trailing"](oracle.schedule, 9)
    small, large = (sample(s, oracle, (2,), grid, noise) for s in (DDIM(1.0), DDPM("large")))
    assert not torch.allclose(small, large, atol=1e-3)


# Determinism ----------------------------------------------------------------------------------


def test_without_eta_no_noise_is_drawn(mixture):
    class Refusing(Noise):
        def __call__(self, shape, draws):
            raise AssertionError("noise was drawn")

    oracle = mixture(table("linear"))
    final(DDIM(), oracle, torch.randn(2, 2, dtype=F64), grids["trailing"](oracle.schedule, 5), Refusing([0, 1]))
    assert not DDIM().stochastic
    assert DDIM(0.1).stochastic
    assert DDPM().stochastic


@pytest.mark.parametrize("eta", [-0.1, 1.1, 2.0, math.nan])
def test_eta_out_of_range_is_refused(eta):
    with pytest.raises(UsageError, match=f"eta is {eta}; it must lie in"):
        DDIM(eta)


# Inversion ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "edm", "flow"])
def test_inversion_undoes_ddim(name, gaussian):
    """To the fixed point's precision, and better with more iterations."""
    schedule = schedules[name]()
    oracle = gaussian(schedule)
    grid = grids["log-snr"](schedule, 40)
    grid = torch.cat([torch.tensor([0.98], dtype=F64), grid[grid < 0.98]])  # where the signal is not yet lost
    x = torch.randn(5, 2, dtype=F64, generator=torch.Generator().manual_seed(0)) * schedule.sigma(grid[:1])
    data = final(DDIM(), oracle, x, grid)
    errors = []
    for iterations in (1, 4, 20):
        back = final(DDIMInversion(iterations), oracle, data, grid.flip(0))
        errors.append(((back - x).norm() / x.norm()).item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-4
    assert errors[1] < 0.05
    again = final(DDIM(), oracle, back, grid)
    torch.testing.assert_close(again, data, rtol=1e-4, atol=1e-4)


def test_inversion_goes_to_the_noise_of_the_exact_flow(gaussian):
    oracle = gaussian(table("linear"))
    data = oracle.draw(8)
    grid = grids["trailing"](oracle.schedule, 200)
    exact = oracle.flow(data, torch.zeros(8, dtype=F64), torch.ones(8, dtype=F64))
    got = final(DDIMInversion(2), oracle, data, grid.flip(0))
    assert (got - exact).norm() < 0.05 * exact.norm()


def test_inversion_asks_the_model_where_ddim_does_and_says_how_often(mixture):
    oracle, asked = mixture(table("linear")), []
    oracle.register_forward_pre_hook(lambda _, args: asked.append(args[1][0].item()))
    grid = grids["trailing"](oracle.schedule, 4)
    final(DDIMInversion(3), oracle, torch.randn(1, 2, dtype=F64), grid.flip(0))
    assert asked == [t for t in grid.flip(0)[1:].tolist() for _ in range(3)]
    assert DDIMInversion(3).count(Flow(), torch.tensor([0.0, 0.5, 1.0]).double()) == 6
    assert not DDIMInversion().stochastic


def test_inversion_goes_up_and_not_beyond(mixture):
    oracle, state = mixture(table("linear")), DDIMInversion().init(torch.zeros(1, 2, dtype=F64), 0.5)
    for s in (0.5, 0.4, 1.1):
        with pytest.raises(UsageError, match="inversion goes from t to a later time, at most 1"):
            DDIMInversion().step(oracle, state, s, Noise([0]))
    with pytest.raises(UsageError, match="iterations is 0"):
        DDIMInversion(0)


# Beside diffusers -----------------------------------------------------------------------------


class Toy(nn.Module):
    """A fixed network with nothing to learn."""

    def forward(self, x, time):
        return torch.tanh(x + torch.cos(time / 200).reshape(-1, 1, 1, 1))


def in_double(scheduler):
    """Their scheduler with its table in double precision."""
    scheduler.alphas_cumprod = (1 - table("linear").betas).cumprod(0)
    scheduler.final_alpha_cumprod = torch.ones((), dtype=F64)
    return scheduler


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("prediction", "name", "spacing", "steps"),
    [
        ("eps", "epsilon", "leading", 50),
        ("v", "v_prediction", "leading", 10),
        ("x0", "sample", "leading", 10),
        ("eps", "epsilon", "trailing", 20),
    ],
)
def test_the_same_trajectory_as_diffusers(eta, prediction, name, spacing, steps):
    """Where theirs is right: the steps divide 1000, so that all strides are the one that it assumes."""
    scheduler = in_double(DDIMScheduler(prediction_type=name, clip_sample=False, timestep_spacing=spacing))
    scheduler.set_timesteps(steps)
    schedule, network = table("linear"), Toy()
    denoiser, sampler, noise = NetworkDenoiser(network, schedule, prediction), DDIM(eta), Noise([0, 1])
    x = normal((2, 3, 4, 4), 0, "start").double()
    grid = grids[spacing](schedule, steps)
    for t, state in zip(
        scheduler.timesteps, run(sampler, denoiser, sampler.init(x, grid[0].item()), grid, noise), strict=True
    ):
        z = noise.like(x, state.k)
        x = scheduler.step(network(x, t.double().expand(2)), t, x, eta=eta, variance_noise=z).prev_sample
        torch.testing.assert_close(state.x, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_where_diffusers_takes_the_wrong_neighbour_the_exact_solution_is_the_judge(spacing, gaussian):
    """It takes the previous timestep as t - 1000 // steps, which is not the one that it visits next
    (huggingface/diffusers#12633, #11347); a step here is handed both of its ends. The exact flow of a Gaussian
    from the first timestep to the data tells who is right: our error falls with the steps, theirs stays."""
    schedule, errors = table("linear"), []
    oracle = gaussian(schedule)
    start = torch.randn(16, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    for steps in (75, 150):
        scheduler = in_double(DDIMScheduler(clip_sample=False, timestep_spacing=spacing))
        scheduler.set_timesteps(steps)
        grid = grids[spacing](schedule, steps)
        assert schedule.timestep(grid[:-1]).tolist() == scheduler.timesteps.tolist()
        theirs = start
        for t in scheduler.timesteps:
            eps = oracle(theirs, schedule.time_of_timestep(t).expand(16)).eps
            theirs = scheduler.step(eps, t, theirs).prev_sample
        exact = oracle.flow(start, grid[:1].expand(16), torch.zeros(16, dtype=F64))
        ours = final(DDIM(), oracle, start, grid)
        errors.append([((x - exact).norm() / exact.norm()).item() for x in (ours, theirs)])
    (ours_75, _), (ours_150, theirs_150) = errors
    assert ours_75 / ours_150 == pytest.approx(2, abs=0.3)
    assert ours_150 < 0.02
    assert theirs_150 > 2 * ours_150
