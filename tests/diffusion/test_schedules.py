"""Schedules: their ends, their order, their inverses, their differentials, and the published tables."""

import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from reverie.base.errors import UsageError
from reverie.diffusion import schedules as module
from reverie.diffusion.registry import schedules
from reverie.diffusion.schedules import EDM, VE, VP, Cosine, Flow, SubVP, Table, table, zero_terminal_snr

F64 = torch.float64
ENDS = torch.tensor([0.0, 1.0], dtype=F64)


def close(got, want, rtol=1e-9, atol=0.0):
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=got.dtype).expand_as(got), rtol=rtol, atol=atol)


# Every schedule -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_at_time_zero_there_is_data_and_no_noise(schedule, dtype):
    zero = torch.zeros(1, dtype=dtype)
    assert schedule.alpha(zero).item() == 1
    assert schedule.sigma(zero).item() == 0
    assert schedule.log_snr(zero).item() == math.inf


def test_alpha_falls_sigma_rises_and_so_log_snr_falls(schedule):
    t = torch.cat([torch.logspace(-12, -3, 100, dtype=F64), torch.linspace(0.0011, 1, 5000, dtype=F64)])
    assert bool((schedule.alpha(t).diff() <= 0).all())
    assert bool((schedule.sigma(t).diff() > -1e-15).all())
    assert bool((schedule.log_snr(t).diff() < 0).all())
    assert bool(((schedule.alpha(t) >= 0) & (schedule.alpha(t) <= 1)).all())


def test_log_snr_is_that_of_alpha_and_sigma(schedule, times):
    t = times(schedule, end=0.999)
    close(schedule.log_snr(t), 2 * (schedule.alpha(t) / schedule.sigma(t)).log(), atol=1e-10)
    close(schedule.log_alpha(t), schedule.alpha(t).log(), atol=1e-12)
    close(schedule.variance(t), schedule.sigma(t).square(), rtol=1e-13)


def test_the_marginal_is_alpha_and_sigma(schedule):
    t = torch.cat([torch.zeros(1, dtype=F64), torch.rand(50, dtype=F64), torch.ones(1, dtype=F64)])
    marginal = schedule.marginal(t)
    close(marginal.alpha, schedule.alpha(t), rtol=1e-14)
    close(marginal.sigma, schedule.sigma(t), rtol=1e-14)


def test_time_is_the_inverse_of_log_snr(schedule):
    """Over the whole range, from 1e-9 on, table knots and both sides of them included."""
    t = torch.cat([torch.logspace(-9, -2, 200, dtype=F64), torch.linspace(0.01, 1, 3001, dtype=F64)])
    if isinstance(schedule, Table):
        knots = schedule.time_of_timestep(torch.arange(schedule.timesteps))
        t = torch.cat([t, knots, knots - 1e-7, (knots + 1e-7).clamp(max=1)])
    back = schedule.time(schedule.log_snr(t))
    close(back, t, rtol=1e-9)
    assert bool((back <= 1).all())
    inner = schedule.log_snr(t).isfinite()
    close(schedule.log_snr(back)[inner], schedule.log_snr(t)[inner], rtol=1e-9, atol=1e-9)


def test_time_of_infinite_log_snr_is_zero(schedule):
    assert schedule.time(torch.tensor([math.inf], dtype=F64)).item() == 0


def test_time_of_no_signal_is_one(schedule):
    if schedule.zero_terminal_snr:
        assert schedule.alpha(ENDS)[1] == 0
        assert schedule.time(torch.tensor([-math.inf], dtype=F64)).item() == 1
    else:
        assert schedule.alpha(ENDS)[1] > 0


def test_the_dtype_and_the_shape_are_those_of_t(schedule):
    for dtype in (torch.float32, F64):
        t = torch.rand(2, 3, dtype=dtype) * 0.9 + 0.05
        for f in ("alpha", "sigma", "variance", "log_alpha", "log_snr", "drift", "diffusion", "timestep", "prior_std"):
            value = getattr(schedule, f)(t)
            assert value.dtype == dtype, f
            assert value.shape == t.shape, f
        assert schedule.time(schedule.log_snr(t)).dtype == dtype


def test_single_precision_agrees_with_double(schedule):
    t = torch.linspace(0.02, 0.98, 200)
    for f in ("alpha", "sigma", "log_snr"):
        got, want = getattr(schedule, f)(t).double(), getattr(schedule, f)(t.double())
        close(got, want, rtol=2e-5, atol=2e-5)
    close(schedule.time(schedule.log_snr(t)).double(), t.double(), rtol=1e-4, atol=1e-6)


def test_coefficients_have_the_same_bits_in_any_batch(schedule):
    """What a sample gets must not depend on its neighbours' times: vectorised and scalar loops round alike."""
    t = torch.rand(67, dtype=F64, generator=torch.Generator().manual_seed(0)) * 0.998 + 0.001
    whole = torch.stack([*schedule.marginal(t), schedule.timestep(t), schedule.log_snr(t)])
    for size in (1, 3, 8):
        parts = [t[i : i + size] for i in range(0, len(t), size)]
        split = [torch.stack([*schedule.marginal(u), schedule.timestep(u), schedule.log_snr(u)]) for u in parts]
        assert torch.equal(torch.cat(split, 1), whole)


def within(schedule, count=60):
    """Times that keep clear of a table's entries, where its slope jumps."""
    if isinstance(schedule, Table):
        entries = torch.linspace(0, schedule.timesteps - 1, count).floor().unique().to(F64)
        return (entries + 0.37) / schedule.timesteps
    return torch.linspace(0.01, 0.99, count, dtype=F64)


def test_drift_and_diffusion_by_finite_differences(schedule):
    """dx = f x dt + g dw: the mean obeys alpha' = f alpha, the variance (sigma^2)' = 2 f sigma^2 + g^2."""
    t = within(schedule)
    h = 1e-6 * t
    alpha = schedule.alpha(t)
    d_alpha = (schedule.alpha(t + h) - schedule.alpha(t - h)) / (2 * h)
    d_variance = (schedule.variance(t + h) - schedule.variance(t - h)) / (2 * h)
    f, g = schedule.drift(t), schedule.diffusion(t)
    scale = d_variance.abs() + d_alpha.abs()
    assert bool(((f * alpha - d_alpha).abs() < 1e-5 * scale + 1e-6).all())
    assert bool(((2 * f * schedule.variance(t) + g**2 - d_variance).abs() < 1e-5 * scale + 1e-6).all())


def test_gradients_with_respect_to_time(schedule):
    t = within(schedule)
    for f in ("alpha", "sigma", "log_snr", "variance"):
        leaf = t.clone().requires_grad_()
        (slope,) = torch.autograd.grad(getattr(schedule, f)(leaf).sum(), leaf)
        h = 1e-6 * t
        want = (getattr(schedule, f)(t + h) - getattr(schedule, f)(t - h)) / (2 * h)
        assert bool(((slope - want).abs() < 1e-5 * want.abs() + 1e-8).all()), f


def test_drift_is_differentiable_and_works_where_gradients_are_off(schedule):
    t = within(schedule)[5:9]
    want = schedule.drift(t)
    with torch.no_grad():
        close(schedule.drift(t), want, rtol=1e-14)
    with torch.inference_mode():
        close(schedule.drift(t.clone()).clone(), want, rtol=1e-14)
    leaf = t.clone().requires_grad_()
    schedule.drift(leaf).square().sum().backward()
    assert bool(leaf.grad.isfinite().all())


def test_gradients_are_finite_wherever_a_sampler_looks(schedule):
    """No NaN leaks out of a branch that was not taken."""
    t = torch.linspace(schedule.t_min, 0.9999, 500, dtype=F64, requires_grad=True)
    (schedule.alpha(t) + schedule.sigma(t)).sum().backward()
    assert bool(t.grad.isfinite().all())
    zero = torch.zeros(1, dtype=F64, requires_grad=True)
    schedule.alpha(zero).sum().backward()
    assert bool(zero.grad.isfinite().all())


def test_the_prior_is_the_noise_that_sampling_starts_from(schedule):
    one = torch.ones(1, dtype=F64)
    if isinstance(schedule, module.VariancePreserving):
        assert schedule.prior_std(torch.rand(3, dtype=F64)).tolist() == [1, 1, 1]
    else:
        assert schedule.prior_std(one) == schedule.sigma(one)


def test_each_name_of_the_registry_makes_a_schedule():
    assert len(schedules) == 11
    for name in schedules:
        assert isinstance(schedules[name](), module.Schedule)


# Closed forms ---------------------------------------------------------------------------------

T = torch.linspace(0.01, 0.99, 50, dtype=F64)


@pytest.mark.parametrize(("low", "high"), [(0.1, 20.0), (0.5, 3.0)])
def test_vp(low, high):
    schedule, beta = VP(low, high), low + T * (high - low)
    close(schedule.alpha(T), torch.exp(-0.25 * T**2 * (high - low) - 0.5 * T * low))
    close(schedule.drift(T), -beta / 2)
    close(schedule.diffusion(T), beta.sqrt())
    close(schedule.alpha(T) ** 2 + schedule.sigma(T) ** 2, 1, rtol=1e-14)


def test_sub_vp():
    schedule, vp, beta = SubVP(), VP(), 0.1 + T * 19.9
    integral = 0.1 * T + 19.9 * T**2 / 2
    close(schedule.alpha(T), vp.alpha(T), rtol=1e-14)
    close(schedule.sigma(T), 1 - torch.exp(-integral))
    close(schedule.drift(T), -beta / 2)
    close(schedule.diffusion(T), (beta * (1 - torch.exp(-2 * integral))).sqrt())
    assert bool((schedule.sigma(T) < vp.sigma(T)).all())


def test_ve():
    schedule = VE(0.01, 50)
    level = 0.01 * 5000.0**T
    close(schedule.sigma(T), (level**2 - 0.01**2).sqrt())
    close(schedule.diffusion(T), level * math.sqrt(2 * math.log(5000)))
    close(schedule.drift(T), 0, atol=0)
    assert schedule.sigma(torch.tensor([schedule.t_min], dtype=F64)).item() == pytest.approx(0.01, rel=1e-12)


def test_edm():
    schedule = EDM(0.002, 80)
    assert torch.equal(schedule.sigma(T), 80 * T)
    assert torch.equal(schedule.alpha(T), torch.ones_like(T))
    close(schedule.diffusion(T), 80 * (2 * T).sqrt())
    assert 80 * schedule.t_min == 0.002


def test_flow():
    schedule = Flow()
    assert torch.equal(schedule.alpha(T), 1 - T)
    assert torch.equal(schedule.sigma(T), T)
    close(schedule.drift(T), -1 / (1 - T))
    close(schedule.diffusion(T), (2 * T / (1 - T)).sqrt())


@pytest.mark.parametrize("offset", [0.0, 0.008, 0.3])
def test_cosine(offset):
    def curve(t):
        return torch.cos((t + offset) / (1 + offset) * torch.pi / 2) ** 2

    schedule = Cosine(offset)
    close(schedule.alpha(T) ** 2, curve(T) / curve(torch.zeros_like(T)))
    rate = math.pi / 2 / (1 + offset)
    close(schedule.drift(T), -rate * torch.tan(rate * (T + offset)))
    close(schedule.diffusion(T) ** 2, 2 * rate * torch.tan(rate * (T + offset)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VP(0, 1), "beta_min is 0"),
        (lambda: VP(2, 1), "beta_max 1"),
        (lambda: SubVP(2, 1), "beta_max 1"),
        (lambda: VE(1.0, 0.5), "sigma_max 0.5"),
        (lambda: EDM(0.0, 80), "sigma_min is 0"),
        (lambda: EDM(0.002, math.nan), "sigma_max nan"),
        (lambda: Cosine(-0.1), "offset is -0.1"),
        (lambda: table("linear", 1), "timesteps is 1"),
        (lambda: table("linaer"), "did you mean linear"),
        (lambda: schedules["cosin"], "did you mean cosine"),
    ],
)
def test_settings_without_meaning_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


# Tables ---------------------------------------------------------------------------------------


def alpha_bars(betas):
    """The table's own entries, by the product of equation (4) in high precision."""
    return np.cumprod((1 - betas.numpy()).astype(np.longdouble)).astype(np.float64)


@pytest.mark.parametrize("count", [10, 49, 50, 1000])
@pytest.mark.parametrize("name", module.BETAS)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_a_table_keeps_its_entries_at_its_integer_timesteps(name, count, zero_snr):
    schedule = table(name, count, zero_snr)
    want = torch.from_numpy(alpha_bars(schedule.betas))
    t = schedule.time_of_timestep(torch.arange(count))
    assert t[-1] == 1
    close(schedule.alpha(t).square(), want, rtol=2e-12)
    close(schedule.variance(t), 1 - want, rtol=2e-11)
    assert torch.equal(schedule.timestep(t), torch.arange(count, dtype=F64))
    single = t.float()
    close(schedule.alpha(single).square().double(), want, rtol=4e-6, atol=1e-12)
    assert torch.equal(schedule.timestep(single), torch.arange(count).float())
    assert schedule.zero_terminal_snr == zero_snr


@pytest.mark.parametrize("at", [0.0, 0.25, 0.9999])
def test_between_entries_log_snr_is_linear_and_before_the_first_beta_is_constant(a_table, at):
    i = torch.arange(a_table.timesteps - 2 if a_table.ends_at_zero else a_table.timesteps - 1, dtype=F64)
    low, high = a_table.time_of_timestep(i), a_table.time_of_timestep(i + 1)
    want = a_table.log_snr(low) * (1 - at) + a_table.log_snr(high) * at
    close(a_table.log_snr(low + at * (high - low)), want, rtol=1e-7, atol=1e-9)
    first = a_table.log_alpha_bar(torch.tensor([at / a_table.timesteps], dtype=F64))
    close(first, at * math.log1p(-a_table.betas[0].item()), rtol=1e-12)


def test_where_the_last_entry_is_zero_alpha_falls_to_it_linearly(a_table):
    if a_table.ends_at_zero:
        last = a_table.time_of_timestep(torch.tensor([a_table.timesteps - 2]))
        t = last + torch.linspace(0, 1, 11, dtype=F64) * (1 - last)
        close(a_table.alpha(t), a_table.alpha(last) * torch.linspace(1, 0, 11, dtype=F64), atol=1e-15)


NAMES_THERE = {
    "linear": ("linear", {}),
    "scaled-linear": ("scaled_linear", {"beta_start": 0.00085, "beta_end": 0.012}),
    "cosine": ("squaredcos_cap_v2", {}),
    "sigmoid-in-beta": ("sigmoid", {}),
}


@pytest.mark.parametrize("count", [50, 1000])
@pytest.mark.parametrize("name", NAMES_THERE)
def test_betas_are_those_of_diffusers(name, count):
    theirs, options = NAMES_THERE[name]
    betas = diffusers.DDPMScheduler(count, beta_schedule=theirs, **options).betas.double()
    close(table(name, count).betas, betas, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NAMES_THERE)
def test_zero_terminal_snr_is_that_of_diffusers(name):
    ours = table(name, zero_snr=True)
    close(ours.betas, rescale_zero_terminal_snr(table(name).betas), rtol=1e-9, atol=1e-12)
    assert ours.betas[-1] == 1
    assert ours.betas[0].item() == pytest.approx(table(name).betas[0].item(), rel=1e-9)
    assert torch.equal(zero_terminal_snr(ours.betas)[-1:], torch.ones(1, dtype=F64))


def test_the_sigmoid_table_is_the_papers_curve():
    """gamma(t) of https://arxiv.org/abs/2212.11972, algorithm 1, written out."""

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    start, end, tau = -3, 3, 0.9
    first, last = sigmoid(start / tau), sigmoid(end / tau)
    schedule = table("sigmoid", 100, tau=tau)
    for i in (0, 17, 98):
        t = (i + 1) / 100
        curve = (last - sigmoid((t * (end - start) + start) / tau)) / (last - first)
        assert schedule.alpha(torch.tensor([t], dtype=F64)).item() ** 2 == pytest.approx(curve, rel=1e-9)
    assert schedule.betas[-1] == 0.999


def test_the_cosine_tables_betas_are_clipped():
    assert table("cosine").betas.max() == 0.999
    assert table("cosine", most=0.5).betas.max() == 0.5


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ([0.1, 0.0, 0.1], "beta 1 is 0"),
        ([0.1, 0.1, -0.2], "beta 2 is -0.2"),
        ([0.1, 1.0, 0.1], "beta 1 is 1"),
        ([0.1, 0.1, 1.5], "beta 2 is 1.5"),
        ([math.nan, 0.1], "beta 0 is nan"),
        ([math.inf, 0.1], "beta 0 is inf"),
        ([0.1], r"its shape is \(1,\)"),
        ([], r"its shape is \(0,\)"),
    ],
)
def test_bad_betas_are_refused_with_their_index(betas, message):
    with pytest.raises(UsageError, match=message):
        Table(torch.tensor(betas, dtype=F64))


def test_any_table_of_betas_is_a_schedule_and_is_not_changed_from_outside():
    betas = torch.tensor([0.3, 0.1, 0.5, 0.2], dtype=F64)
    schedule = Table(betas)
    t = schedule.time_of_timestep(torch.arange(4))
    close(schedule.alpha(t) ** 2, [0.7, 0.63, 0.315, 0.252], rtol=1e-14)
    betas[0] = 0.9
    close(schedule.betas, [0.3, 0.1, 0.5, 0.2], rtol=0)
