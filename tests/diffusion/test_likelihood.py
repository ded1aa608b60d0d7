"""The variational bound: above the truth and near it, term by term, in bits."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from reverie.base.errors import UsageError
from reverie.base.randomness import Noise
from reverie.diffusion.denoisers import Estimate
from reverie.diffusion.likelihood import (
    bound,
    first_small,
    gaussian_kl,
    gaussian_log_mass,
    log_normal_mass,
    log_variances,
    prior_term,
)
from reverie.diffusion.objectives import Variational
from reverie.diffusion.oracles import Mixture
from reverie.diffusion.process import posterior
from reverie.diffusion.schedules import Flow, Table, table

F64 = torch.float64


def line(schedule, means, stds):
    one = torch.ones(len(means), dtype=F64)
    return Mixture(torch.tensor(means, dtype=F64)[:, None], torch.tensor(stds, dtype=F64), one, schedule)


def quadrature(nodes):
    z, w = np.polynomial.hermite_e.hermegauss(nodes)
    a, b = np.meshgrid(z, z)
    weight = np.outer(w, w).flatten() / w.sum() ** 2
    return *(torch.from_numpy(v.flatten()[:, None]) for v in (a, b)), torch.from_numpy(weight)


def expected_bound(schedule, std, variance):
    """The bound of N(0, std^2) with its exact denoiser, expected over data and noise: exact, by quadrature."""
    oracle = line(schedule, [0.0], [std])
    a, b, weight = quadrature(3)
    i = torch.arange(schedule.timesteps).repeat_interleave(len(a))
    x0, eps = (std * a).repeat(schedule.timesteps, 1), b.repeat(schedule.timesteps, 1)
    terms = Variational(variance, None)(oracle, x0, schedule.time_of_timestep(i), eps)
    steps = (terms.reshape(-1, len(a)) * weight).sum(1).mean().item()
    return steps + (prior_term(schedule, std * a) * weight).sum().item()


@pytest.mark.parametrize("std", [0.2, 0.6, 1.0])
def test_the_bound_of_a_gaussian_is_above_its_entropy_and_near(std):
    """-E log2 p = log2(2 pi e std^2) / 2. At T = 1000 the gap in one dimension is under 0.02 bits with the large
    variance (it is exact where std = 1), and under 0.9 with the small: most of it comes from the first steps, whose
    true reverse variance is up to twice the posterior's."""
    truth = 0.5 * math.log2(2 * math.pi * math.e * std**2)
    assert -1e-12 < expected_bound(table("linear"), std, "large") - truth < 0.02
    assert 0 < expected_bound(table("linear"), std, "small") - truth < 0.9
    assert expected_bound(table("linear"), 1.0, "large") == pytest.approx(0.5 * math.log2(2 * math.pi * math.e))


def test_the_gap_falls_as_one_over_the_tables_length():
    truth = 0.5 * math.log2(2 * math.pi * math.e * 0.6**2)
    tables = [table("linear", n, first=0.1 / n, last=20 / n) for n in (500, 1000, 2000)]
    gaps = [expected_bound(each, 0.6, "large") - truth for each in tables]
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.05)
    assert gaps[1] / gaps[2] == pytest.approx(2, rel=0.05)


def bound_of(oracle, x0, draws, variance, levels=None):
    """The bound of each point (B,) with its error, over some draws of the noise: all timesteps in one call."""
    count, total = oracle.schedule.timesteps, len(x0) * draws
    i = torch.arange(count).repeat_interleave(total)
    rows = x0.repeat_interleave(draws, 0).repeat(count, 1)
    eps = torch.randn(rows.shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    terms = Variational(variance, levels)(oracle, rows, oracle.schedule.time_of_timestep(i), eps)
    each = terms.reshape(count, len(x0), draws).mean(0)
    return each.mean(1) + prior_term(oracle.schedule, x0), each.std(1) / math.sqrt(draws)


def test_the_bound_of_a_mixture_is_above_the_truth_at_every_point(mixture):
    """Within 4.5 standard errors over the noise, false alarms below 1e-5 each."""
    oracle = mixture(table("linear", 200, last=0.1))
    points = oracle.draw(6)
    total, error = bound_of(oracle, points, 64, "large")
    truth = -oracle.log_prob(points) / 2 / math.log(2)
    assert bool((total > truth - 4.5 * error).all())
    assert bool((total < truth + 0.2 + 4.5 * error).all())
    assert bool((error < 0.2).all())


def test_the_terms_of_the_bound_are_what_they_are(a_table, mixture):
    """KL terms are never negative; nor is the decoder's where it is a mass, not a density."""
    if a_table.timesteps > 100:
        return
    oracle = mixture(a_table)
    x0 = (oracle.draw(8).clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1
    whole = bound(oracle, x0, Noise(range(8)))
    for part in whole:
        assert part.shape == (8,)
        assert bool((part >= 0).all())
        assert bool(part.isfinite().all())
    torch.testing.assert_close(whole.total, whole.prior + whole.steps + whole.decoder)


def test_discrete_data_costs_its_entropy_and_the_decoders_width():
    """Two of 256 levels, each as likely: one bit to tell them apart, paid on the way, and the decoder's own price,
    for at the first timestep it is wider than a level."""
    schedule = table("linear")
    levels = (torch.tensor([102.0, 178.0], dtype=F64) / 127.5 - 1)[:, None]
    total, error = bound_of(line(schedule, levels[:, 0].tolist(), [0.0, 0.0]), levels, 32, "small", 256)
    std = first_small(schedule).sqrt().item()
    width = -math.log2(2 * stats.norm.cdf(1 / 255 / std) - 1)
    assert bool((total > 1 + width - 4.5 * error).all())
    assert bool((total < 1 + width + 0.05 + 4.5 * error).all())
    assert bool((error < 0.06).all())


def test_single_precision_gives_the_same_bound(mixture):
    schedule = table("linear", 50, last=0.2)
    oracle = mixture(schedule)
    x0 = (oracle.draw(4).clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1
    double, single = bound(oracle, x0, Noise(range(4))), bound(oracle, x0.float(), Noise(range(4)))
    for a, b in zip(double, single, strict=True):
        torch.testing.assert_close(b.double(), a, rtol=1e-3, atol=1e-6)


# Parts ----------------------------------------------------------------------------------------


def test_kl_of_gaussians():
    """The textbook's formula, and by integration."""
    m1, s1, m2, s2 = 0.3, 0.5, -0.4, 0.8
    got = gaussian_kl(*(torch.tensor(v, dtype=F64) for v in (m1, 2 * math.log(s1), m2, 2 * math.log(s2))))
    want = math.log(s2 / s1) + (s1**2 + (m1 - m2) ** 2) / (2 * s2**2) - 0.5
    assert got.item() == pytest.approx(want, rel=1e-12)
    x = np.linspace(-6, 6, 20001)
    p, q = stats.norm(m1, s1), stats.norm(m2, s2)
    assert got.item() == pytest.approx(np.trapezoid(p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), x), rel=1e-8)


def test_a_small_kl_is_not_negative_in_single_precision():
    gap = torch.logspace(-8, -2, 200)
    zero = torch.zeros_like(gap)
    assert bool((gaussian_kl(zero, -gap, zero, zero) >= 0).all())
    torch.testing.assert_close(gaussian_kl(zero, -gap, zero, zero)[100:], (gap**2 / 4)[100:], rtol=0.05, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("mean", [-1.7, -1.0, 0.0, 0.003, 0.9, 4.0])
@pytest.mark.parametrize("std", [1e-3, 0.01, 0.5, 3.0])
def test_the_decoders_masses_sum_to_one_over_the_levels(mean, std, dtype):
    x = torch.arange(256, dtype=dtype) / 127.5 - 1
    log_mass = gaussian_log_mass(x, torch.full_like(x, mean), torch.full_like(x, 2 * math.log(std)), 256)
    assert log_mass.logsumexp(0).item() == pytest.approx(0, abs=1e-9 if dtype == F64 else 1e-4)
    assert bool(log_mass.isfinite().all())


def test_the_mass_of_a_narrow_level_is_density_times_width():
    x, mean = torch.linspace(-0.9, 0.9, 7, dtype=F64), torch.zeros(7, dtype=F64)
    log_variance = torch.full((7,), -2.0, dtype=F64)
    mass, density = (gaussian_log_mass(x, mean, log_variance, n) for n in (2**14, None))
    torch.testing.assert_close(mass, density + math.log(2 / (2**14 - 1)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(density, torch.from_numpy(stats.norm(0, math.exp(-1)).logpdf(x.numpy())))


@pytest.mark.parametrize("at", [-300.0, -20.0, -1.0, 0.0, 1.0, 20.0, 300.0])
def test_a_mass_is_sound_in_both_tails(at):
    lower, upper = torch.tensor([at - 0.5], dtype=F64), torch.tensor([at + 0.5], dtype=F64)
    got = log_normal_mass(lower, upper).item()
    assert got == pytest.approx(log_normal_mass(-upper, -lower).item(), rel=1e-12)
    a, b = sorted((abs(at) - 0.5, abs(at) + 0.5))
    if abs(at) >= 20:  # the tail's leading term
        assert got == pytest.approx(stats.norm.logsf(a), rel=1e-6)
        assert got <= stats.norm.logsf(a)
    else:
        assert got == pytest.approx(math.log(stats.norm.sf(a) - stats.norm.sf(b)), rel=1e-12)


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_a_learned_variance_lies_between_the_two_in_log(fraction):
    schedule = table("linear", 50)
    t = schedule.time_of_timestep(torch.tensor([1, 10, 49]))
    q = posterior(schedule, schedule.time_of_timestep(torch.tensor([0, 9, 48])), t)
    x = torch.zeros(3, 2, dtype=F64)
    got = log_variances(q, Estimate(x, x, x + fraction), "learned", first_small(schedule))
    want = fraction * q.large.log() + (1 - fraction) * q.small.log()
    torch.testing.assert_close(got, want[:, None].expand(3, 2))


def test_a_table_whose_variances_fall_has_its_own_posterior_in_each_term():
    """Only the first timestep's variance, ln 0, is stood in for: with falling betas, later ones are smaller."""
    schedule = Table(torch.linspace(0.5, 0.01, 20, dtype=F64))
    oracle = line(schedule, [0.0], [0.6])
    i = torch.tensor([14, 19])
    t, s = schedule.time_of_timestep(i), schedule.time_of_timestep(i - 1)
    q = posterior(schedule, s, t)
    assert bool((q.small < first_small(schedule)).all())
    x0, eps = torch.tensor([[0.5], [-0.3]], dtype=F64), torch.tensor([[0.2], [1.0]], dtype=F64)
    x = schedule.alpha(t)[:, None] * x0 + schedule.sigma(t)[:, None] * eps
    want = (q.on_x0 * (x0 - oracle(x, t).x0)[:, 0]).square() / (2 * q.small) / math.log(2)
    torch.testing.assert_close(Variational("small", None)(oracle, x0, t, eps) / 20, want)


def test_the_prior_term_is_a_kl_against_what_sampling_starts_from(schedule):
    x0 = torch.randn(3, 4, dtype=F64)
    one = torch.ones(1, dtype=F64)
    m2 = (schedule.alpha(one) * x0).square().mean(1)
    v, p = schedule.variance(one).item(), schedule.prior_std(one).item() ** 2
    want = 0.5 * (v / p - 1 - math.log(v / p) + m2 / p) / math.log(2)
    torch.testing.assert_close(prior_term(schedule, x0), want, rtol=1e-6, atol=1e-12)


def test_the_bound_needs_a_table_and_known_options(mixture):
    x0 = torch.zeros(1, 2, dtype=F64)
    with pytest.raises(UsageError, match="needs a schedule that is a table"):
        bound(mixture(Flow()), x0, Noise([0]))
    with pytest.raises(UsageError, match="this model learned none"):
        bound(mixture(table("linear", 5)), x0, Noise([0]), variance="learned")
    with pytest.raises(UsageError, match="levels is 1"):
        bound(mixture(table("linear", 5)), x0, Noise([0]), levels=1)
