"""The likelihood by the probability flow: equal to the truth on every schedule, with error bars that hold."""

import math
from functools import lru_cache

import numpy as np
import pytest
import torch
from scipy import stats

from reverie.base.errors import NonFiniteError, UsageError
from reverie.base.randomness import Noise
from reverie.diffusion.denoisers import Denoiser, Estimate, NetworkDenoiser
from reverie.diffusion.dequantisation import log_cell, spread
from reverie.diffusion.flow_likelihood import (
    Likelihood,
    ProbabilityFlow,
    discrete_log_likelihood,
    draw_probes,
    log_likelihood,
    walk,
)
from reverie.diffusion.likelihood import bound
from reverie.diffusion.oracles import Gaussian, Mixture
from reverie.diffusion.probability_flow import angle, time_of_angle
from reverie.diffusion.registry import schedules
from reverie.diffusion.schedules import EDM, VE, VP, table

F64 = torch.float64
QUICK = ["linear", "cosine", "cosine-continuous", "vp", "ve", "edm", "flow"]
SLOW = ["scaled-linear", "sigmoid", "sigmoid-in-beta", "sub-vp", "scaled-linear-zero-snr", "cosine-10-zero-snr"]
NAMES = pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
SPECIAL = {
    "scaled-linear-zero-snr": lambda: table("scaled-linear", zero_snr=True),
    "cosine-10-zero-snr": lambda: table("cosine", 10, zero_snr=True),
}


def make(name):
    return SPECIAL[name]() if name in SPECIAL else schedules[name]()


def triangle(schedule):
    """Three components in the plane, of mean 0 and covariance 1, as the prior of VP supposes."""
    turn = torch.arange(3, dtype=F64) * 2 * math.pi / 3
    means = 1.2 * torch.stack([turn.cos(), turn.sin()], 1)
    return Mixture(means, torch.full((3,), 0.28**0.5, dtype=F64), torch.ones(3, dtype=F64), schedule)


def cross(schedule, dimensions=8):
    """Four components on two axes of a space, of mean 0, their widths uneven."""
    means = torch.zeros(4, dimensions, dtype=F64)
    means[0, 0], means[1, 0], means[2, 1], means[3, 1] = 1.4, -1.4, 1.1, -1.1
    stds = torch.linspace(0.4, 1.1, 4 * dimensions, dtype=F64).reshape(4, dimensions).flip(1)
    return Mixture(means, stds, torch.tensor([0.3, 0.3, 0.2, 0.2], dtype=F64), schedule)


def correlated(schedule, dimensions=64):
    """A Gaussian in many dimensions whose trace depends on the probe."""
    rows = torch.randn(dimensions, 2 * dimensions, dtype=F64, generator=torch.Generator().manual_seed(0))
    return Gaussian(torch.zeros(dimensions, dtype=F64), rows @ rows.T / (2 * dimensions), schedule)


def blurred(oracle, x, t):
    """ln p (B,) of x_0 + rho eps, exact."""
    times = torch.full((len(x),), t, dtype=F64)
    alpha, _ = oracle.schedule.marginal(times)
    return oracle.log_prob(alpha[:, None] * x, times) + x.shape[1] * alpha.log()


@lru_cache
def walked(name):
    """The plane's mixture on a schedule: points, the first time, and all that went into ln p."""
    oracle = triangle(make(name))
    x, t = oracle.draw(8), oracle.schedule.t_min
    with torch.no_grad():
        return oracle, x, t, walk(oracle, x, t, None, None, 1e-5, 1e-5, 1000)


# Against the truth ------------------------------------------------------------------------------


@NAMES
def test_the_flow_is_exact_on_every_schedule(name):
    """With the exact density at t = 1 in the place of the prior, what is left is the integrator's error alone."""
    oracle, x, t, terms = walked(name)
    one = torch.ones(len(x), dtype=F64)
    size = torch.hypot(*oracle.schedule.marginal(one))
    last = oracle.log_prob(size[:, None] * terms.y, one) + 2 * size.log()
    nats = last + terms.integral[:, 0] + terms.volume
    assert ((nats - blurred(oracle, x, t)).abs() / 2).max() < 2e-4


@NAMES
def test_the_likelihood_is_within_a_hundredth_of_a_nat_per_dimension(name):
    """Of that of the data: the prior's error and the blur of the first time are in it. The short table begins late."""
    oracle, x, t, terms = walked(name)
    truth = blurred(oracle, x, t) if name == "cosine-10-zero-snr" else oracle.log_prob(x)
    nats = terms.prior + terms.integral[:, 0] + terms.volume
    assert ((nats - truth).abs() / 2).max() < 0.01


@NAMES
def test_wrong_variants_are_far_off(name):
    """A hundred times what is tolerated: the wrong sign of the integral, no prior, no integral."""
    oracle, x, _, terms = walked(name)
    truth, integral = oracle.log_prob(x), terms.integral[:, 0]
    for wrong in (terms.prior - integral + terms.volume, integral + terms.volume, terms.prior + terms.volume):
        assert ((wrong - truth).abs() / 2).mean() > 0.25
    # The prior's width: of x_1, where y_1 has it divided by the size of x_1.
    size = torch.hypot(*oracle.schedule.marginal(torch.ones(1, dtype=F64))).item()
    if size > 2:
        prior = -0.5 * (terms.y / size).square().sum(1) - math.log(2 * math.pi * size**2)
        assert ((prior + integral - truth).abs() / 2).mean() > 1


def test_the_first_times_jacobian_counts():
    """Where half of the data is noise already, ln alpha is no longer small."""
    oracle = triangle(VP())
    x = oracle.draw(8)
    with torch.no_grad():
        terms = walk(oracle, x, 0.3, None, None, 1e-5, 1e-5, 1000)
    nats = terms.prior + terms.integral[:, 0]
    assert ((nats + terms.volume - blurred(oracle, x, 0.3)).abs() / 2).max() < 1e-3
    assert ((nats - blurred(oracle, x, 0.3)).abs() / 2).min() > 0.3
    assert ((nats - terms.volume - blurred(oracle, x, 0.3)).abs() / 2).min() > 0.6


@pytest.mark.parametrize("name", ["linear", "edm", "flow"])
def test_eight_dimensions(name):
    oracle = cross(make(name))
    x = oracle.draw(8)
    got = log_likelihood(oracle, x, rtol=1e-4, atol=1e-4)
    assert (got.nats_per_dim - oracle.log_prob(x) / 8).abs().max() < 0.01
    assert got.dimensions == 8
    assert bool((got.standard_error == 0).all())
    assert got.own_error == 0


@pytest.mark.parametrize("scale", [0.3, 4.0])
def test_data_in_other_units_has_another_density(scale):
    """ln p(c x) = ln p(x) - dims ln c: the schedule stays, and so the flow is another one."""
    schedule = VE(sigma_min=1e-3)
    one, other = triangle(schedule), triangle(schedule)
    other.means, other.stds = scale * one.means, scale * one.stds
    x = one.draw(6)
    before, after = (log_likelihood(who, y, rtol=1e-4, atol=1e-4).nats for who, y in ((one, x), (other, scale * x)))
    shift = after - before
    assert ((shift + 2 * math.log(scale)).abs() / 2).max() < 0.01


def test_pictures_and_single_precision():
    """Any shape of data; float32 data of an oracle is computed in float32 and comes back in float64."""
    oracle = cross(make("flow"))
    x, how = oracle.draw(4), {"trace": "hutchinson", "probes": 1, "rtol": 1e-4, "atol": 1e-4}
    flat = log_likelihood(oracle, x, **how)
    oracle.shape = (2, 2, 2)
    shaped = log_likelihood(oracle, x.reshape(4, 2, 2, 2), **how)
    torch.testing.assert_close(shaped.nats, flat.nats, rtol=0, atol=1e-9)
    single = log_likelihood(oracle, x.float(), **how)
    assert single.nats.dtype == F64
    torch.testing.assert_close(single.nats, flat.nats, rtol=0, atol=8e-3)
    assert not torch.equal(single.nats, flat.nats)


def test_the_error_falls_with_the_tolerance():
    oracle = triangle(EDM())
    x = oracle.draw(6)
    t = oracle.schedule.t_min
    exact = log_likelihood(oracle, x, rtol=1e-6, atol=1e-6)
    errors, calls = [], []
    for tolerance in (1e-2, 1e-4):
        got = log_likelihood(oracle, x, rtol=tolerance, atol=tolerance)
        errors.append((got.nats - exact.nats).abs().max().item())
        calls.append(got.evaluations.double().mean().item())
    assert errors[1] < errors[0] / 20 < 0.05
    assert calls[0] < calls[1] < exact.evaluations.double().mean()
    assert (exact.nats - blurred(oracle, x, t)).abs().max() < 0.02  # the prior's


# The trace --------------------------------------------------------------------------------------


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_hutchinsons_trace_is_the_exact_one_on_average(probe):
    """100 probes on 16 points: a chi-square test of all z-scores together, false alarms 1e-5, and no bias."""
    oracle = cross(make("flow"))
    y, phi = 1.3 * oracle.draw(16), torch.linspace(0.2, 1.4, 16, dtype=F64)
    probes = draw_probes((8,), range(16), 100, probe).double()
    assert probes.square().mean().item() == pytest.approx(1, abs=0.06)
    assert probe == "gaussian" or bool((probes.abs() == 1).all())
    velocity, exact = ProbabilityFlow(oracle, None, (8,), F64, None).slope_and_traces(y, phi)
    same, parts = ProbabilityFlow(oracle, None, (8,), F64, probes).slope_and_traces(y, phi)
    assert torch.equal(velocity, same)
    z = (parts.mean(1) - exact[:, 0]) / (parts.std(1) / 10)
    low, high = stats.chi2(16).ppf([5e-6, 1 - 5e-6])
    assert low < z.square().sum() < high
    # Numerical derivatives agree with the exact trace.
    flow, h = ProbabilityFlow(oracle, None, (8,), F64, probes[:1]), 1e-5
    steps = [
        (flow.slope_and_traces(y + h * e, phi)[0] - flow.slope_and_traces(y - h * e, phi)[0]) for e in torch.eye(8)
    ]
    numeric = torch.stack([step[:, i] for i, step in enumerate(steps)]).sum(0) / (2 * h)
    torch.testing.assert_close(exact[:, 0], numeric, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "make_oracle"), [("linear", correlated), ("edm", lambda s: cross(s, 64))])
def test_error_bars_cover_the_truth_in_64_dimensions(name, make_oracle):
    """48 points, 8 probes: the mean by a z-test and the scores' spread by Student's law with 7 degrees of freedom,
    whose 2.5 standard errors hold 95.9 %: at least 38 of 48 in 1 - 4e-5."""
    oracle = make_oracle(make(name))
    x, t = oracle.draw(48), oracle.schedule.t_min
    got = log_likelihood(oracle, x, trace="hutchinson", probes=8, rtol=1e-3, atol=1e-4)
    miss = got.nats - blurred(oracle, x, t)
    assert abs(miss.mean()) < 4.5 * got.own_error
    assert 0 < got.own_error / 64 < 0.01
    assert abs(miss.mean() / 64) < 0.01
    assert (miss.abs() < 2.5 * got.standard_error).sum() >= 38
    assert (miss.abs() < 0.25 * got.standard_error).sum() < 24  # 19 % are to be; the bars are not too long either


def test_probes_belong_to_their_sample_and_stay_the_same_all_the_way():
    oracle = cross(make("flow"))
    x = oracle.draw(4)
    how = {"trace": "hutchinson", "probes": 2, "rtol": 1e-3, "atol": 1e-3}
    together = log_likelihood(oracle, x, noise=Noise([5, 6, 7, 8]), **how)
    alone = log_likelihood(oracle, x[2:3], noise=Noise([7]), **how)
    assert alone.nats.item() == pytest.approx(together.nats[2].item(), abs=1e-9)
    other = log_likelihood(oracle, x[2:3], noise=Noise([9]), **how)
    assert abs(other.nats.item() - alone.nats.item()) > 1e-3
    default = log_likelihood(oracle, x, **how)
    assert torch.equal(default.nats, log_likelihood(oracle, x, noise=Noise(range(4)), **how).nats)
    single = log_likelihood(oracle, x, trace="hutchinson", probes=1, rtol=1e-3, atol=1e-3)
    assert bool(single.standard_error.isnan().all())
    assert math.isfinite(single.sampling_error)


# Bounds -----------------------------------------------------------------------------------------


def test_the_variational_bound_lies_above(mixture):
    """In bits/dim: bound > flow, which is the truth. Of 20 steps the gap is beyond 4.5 of its standard errors."""
    oracle = mixture(table("linear", 20, last=0.5))
    x = oracle.draw(300)
    flow = log_likelihood(oracle, x, rtol=1e-4, atol=1e-4).bits_per_dim
    assert abs((flow + blurred(oracle, x, 1 / 20) / 2 / math.log(2)).mean()) < 0.01
    gap = bound(oracle, x, Noise(range(300)), variance="large", levels=None).total - flow
    assert 4.5 * gap.std() / math.sqrt(300) < gap.mean() < 1


def test_a_noised_start_is_a_bound_whose_gap_is_known():
    """N(0, s^2) at rho = s: the true posterior has half the decoder's variance, 0.0966 nats of KL; 4.5 errors."""
    std, schedule = 0.5, EDM()
    one = Mixture(torch.zeros(1, 1, dtype=F64), torch.full((1,), std, dtype=F64), torch.ones(1, dtype=F64), schedule)
    x = one.draw(600)
    t = std / schedule.sigma_max
    got = log_likelihood(one, x, start="noised", t=t, rtol=1e-4, atol=1e-4)
    gap = one.log_prob(x) - got.nats
    want, error = 0.5 * (0.5 - 1 - math.log(0.5)), gap.std().item() / math.sqrt(600)
    assert error < want / 4.5
    assert abs(gap.mean().item() - want) < 4.5 * error
    assert got.bound
    assert bool(got.standard_error.isnan().all())  # of one draw
    # Less noise, a narrower gap; and as it is, no gap but the blur.
    less = log_likelihood(one, x[:50], start="noised", t=t / 50, rtol=1e-4, atol=1e-4)
    assert (one.log_prob(x[:50]) - less.nats).mean() < 0.02
    assert not log_likelihood(one, x[:2], t=t).bound


def test_a_noised_start_bounds_the_probability_of_levels():
    """One pixel of 9 levels, ln P(k) = ln int p(z) p(k | z) dz by quadrature: below it, and near; 4.5 errors."""
    schedule, std, rho, repeats = EDM(), 0.4, 0.1, 100
    one = Mixture(torch.zeros(1, 1, dtype=F64), torch.full((1,), std, dtype=F64), torch.ones(1, dtype=F64), schedule)
    levels = torch.linspace(-1, 1, 9, dtype=F64)
    x = levels.repeat_interleave(repeats)[:, None]
    got = log_likelihood(one, x, start="noised", levels=9, t=rho / schedule.sigma_max, rtol=1e-4, atol=1e-4)
    z = np.linspace(-4, 4, 8001)
    mean = z * std**2 / (std**2 + rho**2)
    edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]).numpy() / 2, [np.inf]])
    mass = np.diff(stats.norm.cdf((edges[:, None] - mean) / rho), axis=0)
    truth = np.log(np.trapezoid(stats.norm.pdf(z, 0, math.hypot(std, rho)) * mass, z))
    assert np.exp(truth).sum() == pytest.approx(1, abs=1e-6)
    found = got.nats.reshape(9, repeats)
    gap, error = torch.from_numpy(truth) - found.mean(1), found.std(1) / math.sqrt(repeats)
    assert bool((gap > -4.5 * error).all())
    assert bool((gap[1:-1] < 0.6).all())


def pixels(std):
    """Two by two pixels, each N(128, std^2) in levels, hardly blurred."""
    mean = torch.full((1, 1, 2, 2), 128 / 127.5 - 1, dtype=F64)
    return Mixture(mean, torch.full((1,), std / 127.5, dtype=F64), torch.ones(1, dtype=F64), EDM(sigma_min=1e-4))


def test_uniform_dequantisation_bounds_a_discrete_gaussian():
    """P(k) is known, and so is the bound's expected value: its mean is below the one and equal to the other, by 4.5
    standard errors over what was drawn."""
    std, oracle = 0.6, pixels(0.6)
    images = (127.5 * (oracle.draw(80) + 1)).round().to(torch.uint8)
    got = discrete_log_likelihood(oracle, images, draws=3, rtol=1e-3, atol=1e-4)
    k = images.double().numpy() - 128
    truth = torch.from_numpy(np.log(stats.norm.cdf((k + 0.5) / std) - stats.norm.cdf((k - 0.5) / std)).sum((1, 2, 3)))
    want = torch.from_numpy((stats.norm.logpdf(k, 0, std) - 1 / 24 / std**2).sum((1, 2, 3)))
    assert got.bound
    assert abs((got.nats - want).mean()) < 4.5 * got.own_error
    assert 4.5 * got.own_error < (truth - got.nats).mean() < 1.2
    # Without the cell's width it would be no bound at all.
    assert (got.nats - 4 * log_cell() - truth).mean() / 4 > 4


class Middle:
    """A dequantiser that keeps to the middles, and claims some density there."""

    def __init__(self, log_q):
        self.log_q, self.keys = log_q, []

    def draw(self, images, keys):
        self.keys.extend(keys)
        return torch.full(images.shape, 0.5, dtype=F64), torch.full((len(images),), self.log_q, dtype=F64)


def test_a_dequantiser_of_ones_own():
    oracle = pixels(3.0)
    images = (127.5 * (oracle.draw(3) + 1)).round().to(torch.uint8)
    how = {"rtol": 1e-3, "atol": 1e-4}
    middle = Middle(2.5)
    got = discrete_log_likelihood(oracle, images, dequantiser=middle, **how)
    x = spread(images, torch.full(images.shape, 0.5, dtype=F64))
    want = log_likelihood(oracle, x, **how).nats + 4 * log_cell() - 2.5
    torch.testing.assert_close(got.nats, want, rtol=0, atol=1e-9)
    assert bool(got.standard_error.isnan().all())
    twice = discrete_log_likelihood(oracle, images, dequantiser=middle, draws=2, noise=Noise([0, 1, 2]), **how)
    assert len(set(middle.keys)) == 6  # the first draw's are drawn again, the second's are others
    assert bool((twice.evaluations == 2 * got.evaluations).all())
    with pytest.raises(UsageError, match="draws is 0"):
        discrete_log_likelihood(oracle, images, draws=0)


# Networks, gradients, modes -----------------------------------------------------------------------


class Attending(torch.nn.Module):
    """A layer of fused attention between the pixels, which has one derivative and no second."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lift, self.drop, self.out = torch.nn.Linear(2, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1)
        self.embedding = torch.nn.Embedding(3, 8)

    def forward(self, x, time, label):
        pixels = x.flatten(1)[..., None]
        h = self.lift(torch.cat([pixels, (time / 1000)[:, None, None].expand_as(pixels)], 2))
        h = (h + self.embedding(label)[:, None])[:, None]
        h = torch.nn.functional.scaled_dot_product_attention(h, h, h)[:, 0]
        return self.out(self.drop(h)).reshape(x.shape)


def attending():
    return NetworkDenoiser(Attending(), make("cosine"), "v")


def test_a_network_is_differentiated_whatever_the_caller_does():
    """Under no_grad, under inference_mode and with gradients on the result is the same, and nothing is left behind."""
    denoiser = attending().train()
    x, how = torch.randn(2, 1, 4, 4), {"trace": "hutchinson", "probes": 2, "rtol": 1e-2, "atol": 1e-2}
    label = {"label": torch.tensor([0, 2])}
    plain = log_likelihood(denoiser, x, label, **how)
    with torch.no_grad():
        quiet = log_likelihood(denoiser, x, label, **how)
    with torch.inference_mode():
        inferred = log_likelihood(denoiser, x.clone(), {"label": label["label"].clone()}, **how)
    assert torch.equal(plain.nats, quiet.nats)
    assert torch.equal(plain.nats, inferred.nats)
    assert plain.nats.dtype == F64
    assert not plain.nats.requires_grad
    assert denoiser.training
    assert all(parameter.grad is None for parameter in denoiser.parameters())
    swapped = log_likelihood(denoiser, x, {"label": torch.tensor([2, 0])}, **how)
    assert not torch.allclose(swapped.nats, plain.nats, rtol=0, atol=1e-4)


def test_pictures_data_goes_to_the_network_in_its_own_dtype():
    images = torch.randint(0, 256, (2, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    label = {"label": torch.tensor([0, 2])}
    how = {"trace": "hutchinson", "probes": 1, "rtol": 1e-2, "atol": 1e-2}
    assert bool(discrete_log_likelihood(attending(), images, label, **how).nats.isfinite().all())
    noised = log_likelihood(attending(), images / 127.5 - 1, label, start="noised", levels=256, **how)
    assert bool((noised.nats < 0).all())


class Odd(Denoiser):
    """Something that is no good denoiser."""

    def __init__(self, kind):
        super().__init__()
        self.schedule, self.kind = VE(), kind

    def forward(self, x, t, condition=None):
        if self.kind == "nan":
            return Estimate(x * torch.nan, x)
        with torch.no_grad():
            return Estimate(x + 0, 0 * x)


def test_a_denoiser_that_gives_no_numbers_or_no_gradients_is_refused():
    x = torch.ones(1, 2, dtype=F64)
    with pytest.raises(NonFiniteError, match="not finite at u = "):
        log_likelihood(Odd("nan"), x)
    with pytest.raises(UsageError, match="computes without gradients"):
        log_likelihood(Odd("still"), x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trace": "exakt"}, "trace is 'exakt'; it must be exact or hutchinson"),
        ({"probes": 3}, "probes are Hutchinson's"),
        ({"probe": "gaussian"}, "probes are Hutchinson's"),
        ({"trace": "hutchinson", "probe": "cauchy"}, "probe is 'cauchy'"),
        ({"trace": "hutchinson", "probes": 0}, "probes is 0"),
        ({"start": "clean"}, "start is 'clean'"),
        ({"levels": 256}, "has an effect with start='noised' alone"),
        ({"start": "noised", "levels": 1}, "levels is 1"),
        ({"t": 0.0}, r"the first time is 0.0; it must lie in \(0, 1\)"),
        ({"rtol": 1e-17}, "rtol is 1e-17"),
        ({"max_steps": 3}, "3 steps did not reach the end"),
    ],
)
def test_options_out_of_range_are_refused(options, message, unchecked):
    with pytest.raises(UsageError, match=message):
        log_likelihood(triangle(VP()), torch.zeros(1, 2, dtype=F64), **options)


def test_too_many_dimensions_for_the_exact_trace_are_refused():
    with pytest.raises(UsageError, match="have 4098, more than 4096; use trace='hutchinson'"):
        log_likelihood(Odd("still"), torch.zeros(1, 2, 2049))


def test_no_data_and_too_few_seeds_are_refused():
    with pytest.raises(UsageError, match="there is no sample"):
        log_likelihood(triangle(VP()), torch.zeros(0, 2, dtype=F64))
    with pytest.raises(UsageError, match="2 seeds for 3 samples"):
        log_likelihood(triangle(VP()), torch.zeros(3, 2, dtype=F64), noise=Noise([0, 1]))


@pytest.mark.parametrize("name", [*schedules, *SPECIAL])
def test_the_angle_and_its_time(name):
    schedule = make(name)
    t = torch.linspace(schedule.t_min, 1, 50, dtype=F64)
    phi = angle(schedule, t)
    assert bool((phi.diff() > 0).all())
    torch.testing.assert_close(time_of_angle(schedule, phi), t, rtol=1e-6, atol=1e-9)
    assert (phi[-1].item() == math.pi / 2) == schedule.zero_terminal_snr
    assert time_of_angle(schedule, phi[-1:]).item() == pytest.approx(1, abs=1e-12)


# The result -------------------------------------------------------------------------------------


def test_signs_units_and_errors():
    nats, error = torch.tensor([-4.0, -8.0, -6.0], dtype=F64), torch.tensor([0.3, 0.4, 0.0], dtype=F64)
    got = Likelihood(nats, error, torch.tensor([10, 20, 30]), 4, bound=True)
    assert got.nats_per_dim.tolist() == [-1.0, -2.0, -1.5]
    assert got.bits_per_dim.tolist() == pytest.approx([1.4427, 2.8854, 2.1640], abs=1e-4)
    assert got.own_error == pytest.approx(0.5 / 3)
    assert got.sampling_error == pytest.approx(2 / math.sqrt(3))
    assert str(got) == (
        "at most 2.1640 bits/dim +- 0.4165, -1.5000 nats/dim, 3 samples, whose own mean is +- 0.0601, 20 evaluations"
    )
    one = Likelihood(nats[:1], error[:1] * math.nan, torch.tensor([10]), 4)
    assert str(one) == "1.4427 bits/dim, -1.0000 nats/dim, 1 sample, 10 evaluations"
    joined = Likelihood.join([got, Likelihood(nats[:1], error[:1], torch.tensor([5]), 4, bound=True)])
    assert joined.nats.tolist() == [-4.0, -8.0, -6.0, -4.0]
    assert joined.evaluations.tolist() == [10, 20, 30, 5]
    assert joined.bound
    assert joined.dimensions == 4
