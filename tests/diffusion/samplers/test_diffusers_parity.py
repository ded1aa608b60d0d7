"""Beside diffusers: the same trajectories where theirs are right; where they are not, the exact solution is the judge.

Their schedulers get their tables in double precision, and both sides the same network, start and noise. Those of
k-diffusion's descent walk x / alpha, and show their network alpha times that. DDIM's previous timestep is in
test_ddim.py. The differences are the rows of docs/solvers-peers.md.
"""

import math
import sys
from itertools import pairwise

import diffusers
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import nn

from reverie.base.randomness import Noise, normal
from reverie.diffusion import grids
from reverie.diffusion.denoisers import NetworkDenoiser
from reverie.diffusion.levels import levels
from reverie.diffusion.oracles import Mixture
from reverie.diffusion.samplers.adams import DEIS, LMS, PNDM
from reverie.diffusion.samplers.ancestral import DDPM
from reverie.diffusion.samplers.base import State, run
from reverie.diffusion.samplers.ddim import DDIM
from reverie.diffusion.samplers.dpmpp import DPMpp2M, DPMpp2MSDE, DPMpp2S, DPMpp3M, DPMpp3S
from reverie.diffusion.samplers.runge_kutta import DPM2, DPM2Ancestral, Euler, EulerAncestral, Heun
from reverie.diffusion.samplers.unipc import UniPC
from reverie.diffusion.schedules import EDM, VP, Flow, table

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # theirs

F64 = torch.float64
NOISE = Noise([3, 4])
LINEAR = table("linear")


class Net(nn.Module):
    """A fixed network, smooth in all that it is given."""

    def forward(self, x, time):
        return 0.3 * torch.tanh(x) + 0.1 * torch.cos(time / 200).reshape(-1, *[1] * (x.ndim - 1))


def start():
    return normal((2, 3, 4, 4), 0, "start").double()


def set_up(name, steps, **options):
    """Their scheduler after set_timesteps, reckoning in double precision."""
    scheduler = getattr(diffusers, name)(**options)
    if hasattr(scheduler, "alphas_cumprod"):
        scheduler.alphas_cumprod = (1 - LINEAR.betas).cumprod(0)
    if hasattr(scheduler, "final_alpha_cumprod") and options.get("set_alpha_to_one", True):
        scheduler.final_alpha_cumprod = torch.ones((), dtype=F64)
    scheduler.set_timesteps(steps)
    for name in ("sigmas", "sigmas_interpol", "sigmas_up", "sigmas_down"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())
    return scheduler


def theirs(scheduler, network, x, monkeypatch=None, **options):
    """Their x after each call of their step. With a monkeypatch, their noise is ours."""
    steps = [0]
    if monkeypatch is not None:

        def draw(shape, **_):
            steps[0] += 1
            return NOISE.like(x, [steps[0]] * 2)

        monkeypatch.setattr(sys.modules[type(scheduler).__module__], "randn_tensor", draw)
    found = []
    for t in scheduler.timesteps:
        shown = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = network(shown, t.double().expand(len(x)))
        x = scheduler.step(output, t, x, **options).prev_sample
        found.append(x)
    return found


def ours(sampler, denoiser, x, grid, state=None):
    """Our x after each step."""
    return [s.x for s in run(sampler, denoiser, state or sampler.init(x, grid[0].item()), grid, NOISE)]


def same(found, wanted):
    assert len(found) == len(wanted)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=1e-5, atol=1e-5 * want.abs().max().item())


def network():
    return NetworkDenoiser(Net(), LINEAR, "eps")


def trailing(scheduler):
    """Our trailing grid, which has to be theirs."""
    grid = grids.trailing(LINEAR, scheduler.num_inference_steps)
    assert LINEAR.timestep(grid[:-1]).tolist() == scheduler.timesteps.tolist()
    return grid


# One evaluation a step, x as ours -------------------------------------------------------------

PLUS = {"timestep_spacing": "trailing", "final_sigmas_type": "zero"}


@pytest.mark.parametrize("steps", [10, 20])
@pytest.mark.parametrize(
    ("name", "options", "sampler"),
    [
        ("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}, DDIM()),
        ("DPMSolverMultistepScheduler", PLUS | {"solver_order": 1}, DDIM()),
        ("DPMSolverMultistepScheduler", PLUS | {"solver_order": 2, "solver_type": "midpoint"}, DPMpp2M()),
        ("DPMSolverMultistepScheduler", PLUS | {"solver_order": 2, "solver_type": "heun"}, DPMpp2M(rule="exact")),
        ("UniPCMultistepScheduler", PLUS | {"solver_order": 1, "solver_type": "bh2"}, UniPC(order=1)),
        ("UniPCMultistepScheduler", PLUS | {"solver_order": 2, "solver_type": "bh2"}, UniPC(order=2)),
        ("UniPCMultistepScheduler", PLUS | {"solver_order": 3, "solver_type": "bh2"}, UniPC(order=3)),
    ],
)
def test_deterministic_multistep(name, options, sampler, steps):
    scheduler = set_up(name, steps, **options)
    same(ours(sampler, network(), start(), trailing(scheduler)), theirs(scheduler, Net(), start()))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_with_the_other_slope_up_to_the_last_step(order):
    """bh1, B(h) = h. Theirs has no last step then: to sigma = 0 it is infinity times 0. Ours goes to the data."""
    scheduler = set_up("UniPCMultistepScheduler", 12, **PLUS, solver_order=order, solver_type="bh1")
    found = ours(UniPC(order=order, rule="half-h"), network(), start(), trailing(scheduler))
    wanted = theirs(scheduler, Net(), start())
    same(found[:-1], wanted[:-1])
    assert found[-1].isfinite().all()
    assert wanted[-1].isnan().all()


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_up_to_the_last_steps(order):
    """Theirs is the variant in ln rho; in runs of fewer than 15 steps its order falls in the last two, ours stays."""
    scheduler = set_up("DEISMultistepScheduler", 12, solver_order=order, timestep_spacing="trailing")
    found = ours(DEIS(order=order, variable="lambda"), network(), start(), trailing(scheduler))
    same(found[:-2], theirs(scheduler, Net(), start())[:-2])


@pytest.mark.parametrize(("kind", "rule"), [("midpoint", "half"), ("heun", "exact")])
def test_the_sde_with_the_same_noise(kind, rule):
    options = PLUS | {"solver_order": 2, "solver_type": kind, "algorithm_type": "sde-dpmsolver++"}
    scheduler, x, wanted = set_up("DPMSolverMultistepScheduler", 20, **options), start(), []
    for k, t in enumerate(scheduler.timesteps, start=1):
        z = NOISE.like(x, [k] * 2)
        x = scheduler.step(Net()(x, t.double().expand(2)), t, x, variance_noise=z).prev_sample
        wanted.append(x)
    same(ours(DPMpp2MSDE(rule=rule), network(), start(), trailing(scheduler)), wanted)


@pytest.mark.parametrize(("kind", "variance"), [("fixed_small", "small"), ("fixed_large", "large")])
def test_ddpm_with_the_same_noise(kind, variance, monkeypatch):
    """Leading, whose last timestep is 0: from any other, theirs adds noise to the last step (below)."""
    options = {"variance_type": kind, "clip_sample": False, "timestep_spacing": "leading"}
    scheduler = set_up("DDPMScheduler", 20, **options)
    found = ours(DDPM(variance), network(), start(), grids.leading(LINEAR, 20))
    same(found, theirs(scheduler, Net(), start(), monkeypatch))


def test_plms_from_the_second_time_on():
    """Theirs takes the first step twice, Euler and then Heun, and so evaluates N + 1 times; from there, with its one
    past estimate, ours goes the same way."""
    scheduler = set_up("PNDMScheduler", 20, skip_prk_steps=True, set_alpha_to_one=True)
    wanted = theirs(scheduler, Net(), start())
    grid, sampler, denoiser = grids.leading(LINEAR, 20), PNDM(), network()
    assert LINEAR.timestep(grid[:-1]).tolist() == [*scheduler.timesteps[:2].tolist(), *scheduler.timesteps[3:].tolist()]
    assert len(scheduler.timesteps) == 21
    first, second = levels(LINEAR, grid[:2].tolist())
    e0 = Net()(start(), torch.full((2,), first.timestep, dtype=F64))
    e1 = Net()(wanted[0], torch.full((2,), second.timestep, dtype=F64))
    heun = second.alpha * (start() / first.alpha + (second.rho - first.rho) * (e0 + e1) / 2)
    same([heun], [wanted[1]])
    fresh = sampler.init(wanted[1], grid[1].item())
    memory = fresh.memory | {"past_0": e0, "lam_0": torch.full((2,), first.lam, dtype=F64)}
    state = State(fresh.x, fresh.t, fresh.k + 1, fresh.x0, memory)
    same(ours(sampler, denoiser, None, grid[1:], state), wanted[2:])


# x / alpha ------------------------------------------------------------------------------------


def scaled(found, grid):
    """Their x after each step, times alpha."""
    return [x * level.alpha for x, level in zip(found, levels(LINEAR, grid[1:].tolist()), strict=True)]


@pytest.mark.parametrize("steps", [10, 20])
@pytest.mark.parametrize(
    ("name", "sampler", "calls"),
    [
        ("EulerDiscreteScheduler", Euler(), 1),
        ("EulerAncestralDiscreteScheduler", EulerAncestral(), 1),
        ("LMSDiscreteScheduler", LMS(), 1),
        ("HeunDiscreteScheduler", Heun(), 2),
        ("KDPM2DiscreteScheduler", DPM2(), 2),
        ("KDPM2AncestralDiscreteScheduler", DPM2Ancestral(), 2),
    ],
)
def test_the_schedulers_of_k_diffusions_descent(name, sampler, calls, steps, monkeypatch):
    scheduler = set_up(name, steps, timestep_spacing="trailing")
    grid, x = grids.trailing(LINEAR, steps), start()
    begin = levels(LINEAR, grid[:1].tolist())[0]
    found = theirs(scheduler, Net(), x / begin.alpha, monkeypatch if sampler.stochastic else None)
    assert len(found) == sampler.count(LINEAR, grid)
    if calls == 2:
        found = [*found[1::2], found[-1]]
    same(ours(sampler, network(), x, grid), scaled(found, grid))


@pytest.mark.parametrize(
    ("name", "sampler"), [("EDMEulerScheduler", Euler()), ("EDMDPMSolverMultistepScheduler", DPMpp2M())]
)
def test_edm(name, sampler):
    scheduler, schedule = set_up(name, 20), EDM()
    grid = grids.karras(schedule, 20)
    torch.testing.assert_close(schedule.sigma(grid), scheduler.sigmas, rtol=1e-5, atol=0)  # theirs in float32
    denoiser = NetworkDenoiser(Net(), schedule, "edm")
    same(ours(sampler, denoiser, 80 * start(), grid), theirs(scheduler, Net(), 80 * start()))


def test_rectified_flow():
    scheduler = set_up("FlowMatchEulerDiscreteScheduler", 12)
    grid = grids.from_times(scheduler.sigmas.tolist())
    denoiser = NetworkDenoiser(Net(), Flow(), "velocity")
    same(ours(DDIM(), denoiser, start(), grid), theirs(scheduler, Net(), start()))


# Singlestep: one step, as their steps span two or three points of the grid --------------------------


@pytest.mark.parametrize("order", [2, 3])
def test_one_singlestep_step(order):
    """On three or four points evenly spaced in lambda. Their third order makes its second stage with the short cut of
    order 2 (midpoint), where ours has the exact weight, which is their heun."""
    ends = levels(LINEAR, [0.7, 0.4])
    lam = torch.linspace(ends[0].lam, ends[1].lam, order + 1, dtype=F64)
    times = LINEAR.time(2 * lam)
    scheduler = set_up("DPMSolverSinglestepScheduler", order, solver_order=order, lower_order_final=True)
    scheduler.sigmas, scheduler.order_list, scheduler._step_index = (-lam).exp(), [1, 2, 3][:order], 0
    x = start()
    for k, t in enumerate(LINEAR.timestep(times[:-1])):
        scheduler.register_to_config(solver_type="heun" if (order, k) == (3, 1) else "midpoint")
        x = scheduler.step(Net()(x, t.expand(2)), t, x).prev_sample
    sampler = DPMpp2S() if order == 2 else DPMpp3S()
    state = sampler.step(network(), sampler.init(start(), times[0].item()), times[-1].item(), NOISE)
    same([state.x], [x])


# Where theirs is wrong --------------------------------------------------------------------------


def test_plms_takes_the_wrong_neighbour_under_linspace(gaussian):
    """As its DDIM does: the step is T // N whatever the grid. Ours converges to the exact flow, theirs does not."""
    errors, oracle = [], gaussian(LINEAR)
    x = normal((16, 2), 1, "start").double()
    for steps in (75, 150):
        options = {"skip_prk_steps": True, "set_alpha_to_one": True, "timestep_spacing": "linspace"}
        scheduler = set_up("PNDMScheduler", steps, **options)
        grid = grids.linspace(LINEAR, steps)
        exact = oracle.flow(x, grid[:1].expand(16), torch.zeros(16, dtype=F64))
        eps = lambda x, t: oracle(x, LINEAR.time_of_timestep(t)).eps  # noqa: E731
        their, our = theirs(scheduler, eps, x)[-1], ours(PNDM(), oracle, x, grid)[-1]
        errors.append([((y - exact).norm() / exact.norm()).item() for y in (our, their)])
    assert errors[1][0] < 0.01
    assert errors[1][1] > 5 * errors[1][0], errors


def point(schedule):
    """Data that is one point."""
    return Mixture(torch.tensor([[0.3, -0.7]], dtype=F64), torch.zeros(1, dtype=F64), torch.ones(1).double(), schedule)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing", "set_alpha_to_one": False}),
        ("DPMSolverMultistepScheduler", PLUS | {"final_sigmas_type": "sigma_min"}),
    ],
)
def test_the_final_step_that_stops_at_the_first_timestep(name, options):
    """On data that is one point every step is exact, and ends there; theirs keeps the first timestep's noise."""
    oracle, x = point(LINEAR), normal((2, 2), 1, "start").double()
    eps = lambda x, t: oracle(x, LINEAR.time_of_timestep(t)).eps  # noqa: E731
    scheduler = set_up(name, 10, **options)
    if name == "DDIMScheduler":
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    found = ours(DDIM(), oracle, x, grids.trailing(LINEAR, 10))[-1]
    assert (found - oracle.means).abs().max() < 1e-12
    their = theirs(scheduler, eps, x)[-1]
    assert (their - oracle.means).abs().max() > 0.3 * LINEAR.sigma(torch.tensor([1e-3], dtype=F64)).item()


def test_ddpm_adds_noise_to_the_last_step_unless_it_starts_at_timestep_0(monkeypatch):
    """With the large variance, on the trailing grid: its test is t > 0, where the end of the grid is meant."""
    oracle, x = point(LINEAR), normal((2, 2), 1, "start").double()
    eps = lambda x, t: oracle(x, LINEAR.time_of_timestep(t)).eps  # noqa: E731
    options = {"variance_type": "fixed_large", "clip_sample": False, "timestep_spacing": "trailing"}
    their = theirs(set_up("DDPMScheduler", 10, **options), eps, x, monkeypatch)[-1]
    found = ours(DDPM("large"), oracle, x, grids.trailing(LINEAR, 10))[-1]
    assert (found - oracle.means).abs().max() < 1e-12
    assert (their - oracle.means).abs().max() > 0.1


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_zero_terminal_snr_is_patched_with_a_little_signal(name):
    """Where alpha is 0 the start holds nothing of the data, and v-prediction gives it exactly: x_0 = -v. Theirs puts
    alpha = 2^-12 there (2^-24 is its square), and its first estimate of a point is off by that times the noise."""
    schedule = table("scaled-linear", zero_snr=True)
    oracle, x = point(schedule), normal((2, 2), 1, "start").double()
    options = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    options |= {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(10)
    t = scheduler.timesteps[0]
    first = x * scheduler.init_noise_sigma
    shown = scheduler.scale_model_input(first, t)
    estimate = oracle(x, torch.ones(2, dtype=F64))
    v = -estimate.x0
    if name == "EulerDiscreteScheduler":
        guess = scheduler.step(v, t, first).pred_original_sample
    else:
        scheduler._init_step_index(t)
        guess = scheduler.convert_model_output(v, sample=shown)
    assert (estimate.x0 - oracle.means).abs().max() < 1e-12
    torch.testing.assert_close(guess.double() - oracle.means, 2**-12 * shown.double(), rtol=0.05, atol=1e-5)


def test_karras_timesteps_are_rounded(gaussian):
    """The network is told of another noise level than x has, up to half a timestep away, and the error is larger."""
    oracle, x = gaussian(LINEAR), normal((16, 2), 1, "start").double()
    options = {"use_karras_sigmas": True, "final_sigmas_type": "zero", "solver_order": 2}
    scheduler = set_up("DPMSolverMultistepScheduler", 40, **options)
    grid = grids.from_times(LINEAR.time(-2 * scheduler.sigmas[:-1].log()).clamp(max=1).tolist())
    assert (LINEAR.timestep(grid[:-1]) - scheduler.timesteps).abs().max() > 0.4
    exact = oracle.flow(x, grid[:1].expand(16), torch.zeros(16, dtype=F64))
    eps = lambda x, t: oracle(x, LINEAR.time_of_timestep(t)).eps  # noqa: E731
    found, their = ours(DPMpp2M(), oracle, x, grid)[-1], theirs(scheduler, eps, x)[-1]
    assert (their - exact).norm() > 1.02 * (found - exact).norm()


def third(lam, x, past, k):
    """Their third-order update from node k of a grid in lambda, x (B, D) and the last three estimates of the data."""
    scheduler = diffusers.DPMSolverMultistepScheduler(solver_order=3)
    scheduler.sigmas, scheduler._step_index = (-lam).exp(), k
    return scheduler.multistep_dpm_solver_third_order_update(past, sample=x)


def exact(oracle, lam, x):
    """The probability-flow ODE dz / d rho = E of z = x / alpha, solved to 1e-9 at some lambdas: x (n, B, D)."""
    schedule = oracle.schedule

    def slope(rho, z):
        t = schedule.time(torch.tensor([-2 * math.log(rho)], dtype=F64)).expand(len(x))
        return oracle(schedule.alpha(t)[:, None] * torch.from_numpy(z).view_as(x), t).eps.flatten().numpy()

    rho, alpha = (-lam).exp(), schedule.alpha(schedule.time(2 * lam))
    z = (x / alpha[0]).flatten().numpy()
    ends = (rho[0].item(), rho[-1].item())
    found = solve_ivp(slope, ends, z, "DOP853", rho.tolist(), rtol=1e-9, atol=1e-10).y
    return torch.from_numpy(found.T).reshape(len(lam), *x.shape) * alpha[:, None, None]


def test_third_order_multistep_is_of_second_order():
    """Their second difference has half the weight that the integral gives it, as in the form that is in circulation.
    Both start from exact past estimates. With steps of half the length, error falls by 8 for order 3, by 4 for 2."""
    schedule, errors, solver = VP(), [], DPMpp3M()
    means = torch.tensor([[-0.8, 0.3], [0.9, -0.5]], dtype=F64)
    oracle = Mixture(means, torch.tensor([0.5, 0.6], dtype=F64), torch.tensor([0.6, 0.4], dtype=F64), schedule)
    begin, end = (level.lam for level in levels(schedule, [0.4, 0.1]))
    start = normal((8, 2), 5, "start").double()
    for count in (20, 40, 80):
        lam = torch.linspace(begin, end, count + 1, dtype=F64)
        at, truth = schedule.time(2 * lam), exact(oracle, lam, start)
        estimate = lambda x, k, at=at: oracle(x, at[k : k + 1].expand(8)).x0  # noqa: E731
        past = [estimate(truth[j], j) for j in (0, 1)]
        fresh = solver.init(truth[2], at[2].item())
        memory = {"past_0": past[1], "past_1": past[0], "lam_0": lam[1].expand(8), "lam_1": lam[0].expand(8)}
        state, their = State(fresh.x, fresh.t, fresh.k + 2, fresh.x0, memory), truth[2]
        for k in range(2, count):
            past = [*past[-2:], estimate(their, k)]
            their = third(lam, their, past, k)
            state = solver.step(oracle, state, at[k + 1].item(), NOISE)
        errors.append([(x - truth[-1]).norm().item() for x in (state.x, their)])
    ratios = [[a / b for a, b in zip(coarse, finer, strict=True)] for coarse, finer in pairwise(errors)]
    assert all(7 < r < 9 for r, _ in ratios), (errors, ratios)
    assert all(3 < r < 5 for _, r in ratios), (errors, ratios)
    assert errors[-1][0] < errors[-1][1] / 10
