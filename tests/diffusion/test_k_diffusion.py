"""k-diffusion's denoisers as ours and ours as theirs: one oracle both ways, and their Heun beside ours."""

import pytest
import torch
from torch import nn

from reverie.base.errors import UsageError
from reverie.base.randomness import Noise, normal
from reverie.diffusion import grids
from reverie.diffusion.k_diffusion import from_k_diffusion, to_k_diffusion
from reverie.diffusion.registry import schedules
from reverie.diffusion.samplers.base import run
from reverie.diffusion.samplers.runge_kutta import EDMHeun, Heun
from reverie.diffusion.schedules import EDM, VP

F64 = torch.float64
KEEP = ["linear", "scaled-linear", "vp", "sub-vp", "ve", "edm"]


@pytest.mark.parametrize("name", KEEP)
@pytest.mark.parametrize("other", ["edm", "vp"])
def test_an_oracle_there_and_back(name, other, mixture):
    """Through their form and on to another schedule, the estimate is that of the oracle on that schedule."""
    there = to_k_diffusion(mixture(schedules[name]()))
    schedule = schedules[other]()
    back, oracle = from_k_diffusion(there, schedule), mixture(schedule)
    reach = schedules[name]().log_snr(torch.ones(1, dtype=F64))
    t = schedule.time(torch.tensor([6.0, 1.0, -2.0, -4.0], dtype=F64).clamp(min=reach.item()))
    x = normal((4, 2), 0, "x").double()
    found, want = back(x, t), oracle(x, t)
    torch.testing.assert_close(found.x0, want.x0, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(found.eps, want.eps, rtol=1e-7, atol=1e-9)


def test_the_model_sees_x_and_sigma_where_the_data_is_not_shrunk():
    seen = []

    def model(x, sigma, label):
        seen.append((x, sigma, label))
        return 0 * x

    t, x, label = torch.tensor([0.3, 0.8], dtype=F64), torch.ones(2, 3), torch.tensor([1, 2])
    from_k_diffusion(model, VP())(x, t, {"label": label})
    alpha, sigma = VP().marginal(t)
    torch.testing.assert_close(seen[0][0], (1 / alpha)[:, None].expand(2, 3).float())
    torch.testing.assert_close(seen[0][1], (sigma / alpha).float())
    assert seen[0][1].dtype == torch.float32
    assert torch.equal(seen[0][2], label)


def heun(model, x, sigmas, noise, churn=0.0, low=0.0, high=float("inf"), scale=1.0):
    """Algorithm 2 of Karras et al. 2022, as the paper writes it; x after each step."""
    found = []
    for i, (t, s) in enumerate(zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True)):
        gamma = min(churn / (len(sigmas) - 1), 2**0.5 - 1) if low <= t <= high else 0.0
        hat = t * (1 + gamma)
        x = x + (hat**2 - t**2) ** 0.5 * scale * noise.like(x, [i + 1] * len(x))
        d = (x - model(x, torch.full((len(x),), hat, dtype=x.dtype))) / hat
        ahead = x + (s - hat) * d
        if s:
            after = (ahead - model(ahead, torch.full((len(x),), s, dtype=x.dtype))) / s
            ahead = x + (s - hat) * (d + after) / 2
        x = ahead
        found.append(x)
    return found


@pytest.mark.parametrize("churn", [False, True])
def test_their_heun_on_our_denoiser_is_our_heun_on_theirs(churn, mixture):
    schedule, noise = EDM(), Noise(range(4))
    oracle = mixture(schedule)
    model = to_k_diffusion(oracle)
    grid = grids.karras(schedule, 18)
    grid = torch.cat([torch.tensor([0.9], dtype=F64), grid[1:]])  # room for churn below sigma_max
    sigmas = schedule.sigma(grid)
    x = 72 * normal((4, 2), 0, "start").double()
    options = {"churn": 40.0, "low": 0.05, "high": 50.0, "scale": 1.003} if churn else {}
    sampler = EDMHeun() if churn else Heun()
    steps = run(sampler, from_k_diffusion(model), sampler.init(x, 0.9), grid, noise)
    wanted = heun(model, x, sigmas, noise, **options)
    for state, want in zip(steps, wanted, strict=True):
        torch.testing.assert_close(state.x, want, rtol=1e-6, atol=1e-7)


def test_a_module_keeps_its_parameters_and_a_float_is_a_sigma_for_all(mixture):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x, sigma):
            return x * self.scale

    assert len(list(from_k_diffusion(Model()).parameters())) == 1
    model, x = to_k_diffusion(mixture(EDM())), torch.ones(3, 2, dtype=F64)
    assert torch.equal(model(x, 2.0), model(x, torch.full((3,), 2.0)))


def test_refusals(mixture):
    with pytest.raises(UsageError, match="infinite at the end of this schedule"):
        from_k_diffusion(lambda x, sigma: x, schedules["flow"]())
    with pytest.raises(UsageError, match=r"gives .2, 1. for noisy data .2, 3."):
        from_k_diffusion(lambda x, sigma: x[:, :1])(torch.ones(2, 3), torch.tensor([0.5, 0.5], dtype=F64))
    model = to_k_diffusion(mixture(EDM()))
    assert model(torch.ones(1, 2), torch.tensor([80.0])).isfinite().all()
    for sigma in (0.0, 81.0, float("nan")):
        with pytest.raises(UsageError, match=r"on this schedule it must lie in \(0, 80\]"):
            model(torch.ones(1, 2), sigma)
