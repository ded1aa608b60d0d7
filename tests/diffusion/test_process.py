"""The forward process by Gaussian algebra: steps compose, the closed form is all of them, Bayes gives the posterior."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from reverie.base.randomness import normal
from reverie.diffusion.process import diffuse, diffuse_further, posterior, transition
from reverie.diffusion.schedules import table

F64 = torch.float64


def triples(schedule, count=50):
    """Times r < s < t, at random over the schedule's range."""
    u = torch.rand(count, 3, dtype=F64, generator=torch.Generator().manual_seed(1)).sort(1).values
    return (schedule.t_min + u * (0.9999 - schedule.t_min)).unbind(1)


def test_two_steps_are_one(schedule):
    """Scales multiply, variances add: alpha_{t|r} = alpha_{t|s} alpha_{s|r}, and the first variance scaled."""
    r, s, t = triples(schedule)
    first, second, both = transition(schedule, r, s), transition(schedule, s, t), transition(schedule, r, t)
    torch.testing.assert_close(first.alpha * second.alpha, both.alpha, rtol=1e-11, atol=0)
    variance = second.alpha.square() * first.variance + second.variance
    torch.testing.assert_close(variance, both.variance, rtol=1e-9, atol=1e-12)


def test_a_step_from_the_data_is_the_closed_form(schedule, times):
    t = times(schedule)
    step = transition(schedule, torch.zeros_like(t), t)
    torch.testing.assert_close(step.alpha, schedule.alpha(t), rtol=0, atol=0)
    torch.testing.assert_close(step.variance, schedule.variance(t), rtol=1e-14, atol=0)


def test_a_tables_step_has_its_beta(a_table):
    i = torch.arange(a_table.timesteps)
    s, t = a_table.time_of_timestep(i - 1), a_table.time_of_timestep(i)
    step = transition(a_table, s, t)
    torch.testing.assert_close(step.variance, a_table.betas, rtol=1e-8, atol=1e-13)
    torch.testing.assert_close(step.alpha.square(), 1 - a_table.betas, rtol=1e-9, atol=1e-15)


def test_walking_the_table_reaches_the_closed_forms_mean_and_variance(a_table):
    """Exactly: mean and variance of x_t pushed through each step of the chain."""
    i = torch.arange(a_table.timesteps)
    steps = transition(a_table, a_table.time_of_timestep(i - 1), a_table.time_of_timestep(i))
    mean, variance, walked = 1.0, 0.0, []
    for alpha, added in zip(steps.alpha.tolist(), steps.variance.tolist(), strict=True):
        mean, variance = alpha * mean, alpha**2 * variance + added
        walked.append((mean, variance))
    t = a_table.time_of_timestep(i)
    closed = torch.stack([a_table.alpha(t), a_table.variance(t)], 1)
    torch.testing.assert_close(torch.tensor(walked, dtype=F64), closed, rtol=1e-8, atol=1e-14)


def test_step_by_step_and_closed_form_have_one_distribution():
    """20,000 chains of 50 steps against the closed form's mean and variance, false alarms 1e-5 each."""
    schedule, count = table("linear", 50, last=0.2), 20_000
    x = x0 = torch.full((count, 1), 0.7, dtype=F64)
    for i in range(50):
        s, t = (schedule.time_of_timestep(torch.full((count,), k)) for k in (i - 1, i))
        x = diffuse_further(schedule, x, s, t, normal((count, 1), 0, "chain", i).double())
    mean, std = 0.7 * schedule.alpha(t[:1]).item(), schedule.sigma(t[:1]).item()
    z = stats.norm.isf(0.5e-5)
    assert abs(x.mean().item() - mean) < z * std / math.sqrt(count)
    assert abs(x.var().item() / std**2 - 1) < z * math.sqrt(2 / count)
    direct = diffuse(schedule, x0, t, normal((count, 1), 1, "direct").double())
    assert abs(direct.mean().item() - mean) < z * std / math.sqrt(count)
    assert abs(direct.var().item() / std**2 - 1) < z * math.sqrt(2 / count)


def test_the_closed_form_is_equation_1(schedule):
    x0, eps = torch.randn(2, 4, 3, 2, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([schedule.t_min, 0.3, 0.9, 1.0], dtype=F64)
    want = schedule.alpha(t).reshape(4, 1, 1, 1) * x0 + schedule.sigma(t).reshape(4, 1, 1, 1) * eps
    torch.testing.assert_close(diffuse(schedule, x0, t, eps), want, rtol=1e-14, atol=0)
    assert diffuse(schedule, x0.float(), t, eps.float()).dtype == torch.float32


def test_the_posterior_is_bayes(schedule):
    """q(x_s | x_t, x_0) by conditioning the joint Gaussian of (x_s, x_t) given x_0."""
    _, s, t = triples(schedule)
    q = posterior(schedule, s, t)
    alpha_s, alpha_t = schedule.alpha(s), schedule.alpha(t)
    var_s, var_t = schedule.variance(s), schedule.variance(t)
    covariance = alpha_t / alpha_s * var_s  # of x_s and x_t
    gain = covariance / var_t
    torch.testing.assert_close(q.on_x, gain, rtol=1e-12, atol=0)
    torch.testing.assert_close(q.on_x0, alpha_s - gain * alpha_t, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(q.small, var_s - gain * covariance, rtol=1e-7, atol=1e-10)
    assert bool((q.small <= q.large).all())


@given(st.floats(0.02, 0.98), st.floats(0.01, 0.99), st.floats(-2, 2), st.floats(-2, 2))
def test_the_posterior_is_bayes_numerically(t, share, x0, x):
    """Prior times likelihood on a fine lattice of x_s, normalised: no formula but q(x_s | x_0) and q(x_t | x_s)."""
    schedule = table("linear", 50, last=0.2)
    t, s = torch.tensor([t], dtype=F64), torch.tensor([t * share], dtype=F64)
    q, step = posterior(schedule, s, t), transition(schedule, s, t)
    wide = schedule.sigma(s) * torch.linspace(-12, 12, 40001, dtype=F64)
    lattice = schedule.alpha(s) * x0 + wide
    log = -((x - step.alpha * lattice) ** 2) / (2 * step.variance) - wide**2 / (2 * schedule.variance(s))
    weight = log.softmax(0)
    mean = (weight * lattice).sum()
    point = torch.tensor([[x0]], dtype=F64), torch.tensor([[x]], dtype=F64)
    assert q.mean(*point).item() == pytest.approx(mean.item(), abs=1e-6)
    assert q.small.item() == pytest.approx((weight * (lattice - mean) ** 2).sum().item(), rel=1e-4)


def test_posterior_of_ddpms_own_formulas():
    """Ho et al., eq. 7, with the table's alpha and alpha_bar."""
    schedule = table("linear")
    beta = schedule.betas
    bar = (1 - beta).cumprod(0)
    before = torch.cat([torch.ones(1, dtype=F64), bar[:-1]])
    i = torch.arange(1000)
    q = posterior(schedule, schedule.time_of_timestep(i - 1), schedule.time_of_timestep(i))
    torch.testing.assert_close(q.on_x0, before.sqrt() * beta / (1 - bar), rtol=1e-8, atol=0)
    torch.testing.assert_close(q.on_x, (1 - beta).sqrt() * (1 - before) / (1 - bar), rtol=1e-8, atol=0)
    torch.testing.assert_close(q.small, beta * (1 - before) / (1 - bar), rtol=1e-8, atol=0)
    torch.testing.assert_close(q.large, beta, rtol=1e-8, atol=0)


def test_the_last_step_ends_at_the_estimate(schedule):
    """At s = 0 the posterior is x_0 itself, with no variance: no noise at the last step."""
    t = torch.tensor([schedule.t_min, 0.5, 1.0], dtype=F64)
    q = posterior(schedule, torch.zeros(3, dtype=F64), t)
    torch.testing.assert_close(q.on_x0, torch.ones(3, dtype=F64), rtol=1e-14, atol=0)
    assert q.on_x.tolist() == [0, 0, 0]
    assert q.small.tolist() == [0, 0, 0]


def test_from_no_signal_the_posterior_is_sound():
    """At zero terminal SNR x_1 tells nothing of x_0, and nothing divides by its alpha."""
    schedule = table("linear", zero_snr=True)
    s = schedule.time_of_timestep(torch.tensor([998]))
    q = posterior(schedule, s, torch.ones(1, dtype=F64))
    assert q.on_x.item() == 0
    torch.testing.assert_close(q.on_x0, schedule.alpha(s))
    torch.testing.assert_close(q.small, schedule.variance(s))
