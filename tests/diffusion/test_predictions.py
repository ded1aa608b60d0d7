"""The one conversion: every prediction inverts the 2 x 2 system, anywhere and at both ends where it means something."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reverie.base.errors import UsageError
from reverie.diffusion.predictions import X0, EDMOutput, Eps, Prediction, Score, V, Velocity, per_sample
from reverie.diffusion.registry import predictions
from reverie.diffusion.schedules import EDM, Flow, table

F64 = torch.float64
EVERY: list[Prediction] = [predictions[name]() for name in predictions] + [EDMOutput(2.0)]
level = st.floats(-6, 6)  # ln(alpha / sigma)
size = st.floats(0.1, 3)
number = st.floats(-3, 3)


def values(*numbers):
    return torch.tensor(numbers, dtype=F64)


@pytest.mark.parametrize("prediction", EVERY, ids=lambda p: p.name)
@given(level, size, number, number)
def test_decoding_inverts_encoding(prediction, level, size, x0, eps):
    """At any alpha and sigma, variance-preserving or not."""
    alpha, sigma = values(size * math.exp(level / 2)), values(size * math.exp(-level / 2))
    x0, eps = values(x0)[:, None], values(eps)[:, None]
    x = alpha * x0 + sigma * eps
    got = prediction.decode(prediction.encode(x0, eps, alpha, sigma), x, alpha, sigma)
    scale = (x.abs() + 1) * (1 + math.exp(abs(level)))
    assert bool(((got.x0 - x0).abs() < 1e-13 * scale).all())
    assert bool(((got.eps - eps).abs() < 1e-13 * scale).all())


@pytest.mark.parametrize("prediction", EVERY, ids=lambda p: p.name)
@given(level, size)
def test_the_coefficients_solve_the_system(prediction, level, size):
    """Equation (2) with the class's own p and q, and decode with the coefficients that it states."""
    alpha, sigma = values(size * math.exp(level / 2)), values(size * math.exp(-level / 2))
    p, q = prediction.blend(alpha, sigma)
    determinant = alpha * q - sigma * p
    stated = torch.cat(prediction.decoding(alpha, sigma))
    solved = torch.cat([q, -sigma, -p, alpha]) / determinant
    torch.testing.assert_close(stated, solved, rtol=1e-12, atol=1e-12)
    x, output = values(0.7)[:, None], values(-1.3)[:, None]
    got = prediction.decode(output, x, alpha, sigma)
    torch.testing.assert_close(got.x0, stated[0] * x + stated[1] * output, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(got.eps, stated[2] * x + stated[3] * output, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("a", EVERY, ids=lambda p: p.name)
@pytest.mark.parametrize("b", EVERY, ids=lambda p: p.name)
def test_each_converts_to_each(a, b):
    alpha, sigma = values(0.8, 0.3, 1.0), values(0.6, 0.9, 40.0)
    x, output = torch.randn(2, 3, 2, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    pair = a.decode(output, x, alpha, sigma)
    there = b.encode(pair.x0, pair.eps, alpha, sigma)
    back = b.decode(there, x, alpha, sigma)
    torch.testing.assert_close(a.encode(back.x0, back.eps, alpha, sigma), output, rtol=1e-9, atol=1e-9)


X0_AND_EPS = torch.tensor([[1.5]], dtype=F64), torch.tensor([[-0.5]], dtype=F64)


@pytest.mark.parametrize("prediction", EVERY, ids=lambda p: p.name)
@pytest.mark.parametrize("end", ["data", "noise"])
def test_at_both_ends_it_inverts_wherever_it_means_something(prediction, end):
    """At alpha = 0 only what says so loses x_0; at sigma = 0 (no sampler asks there) x_0 is known to all, and finite
    eps to all but x0 and score, which say nothing of it."""
    x0, eps = X0_AND_EPS
    alpha, sigma = (values(1.0), values(0.0)) if end == "data" else (values(0.0), values(1.0))
    x = x0 if end == "data" else eps
    if end == "data" and prediction.name == "score":
        return  # -eps / sigma: the target itself is infinite
    got = prediction.decode(prediction.encode(x0, eps, alpha, sigma), x, alpha, sigma)
    if end == "data":
        assert got.x0.item() == pytest.approx(1.5, rel=1e-15)
        assert got.eps.isfinite().item() == (prediction.name != "x0")
        assert prediction.name == "x0" or got.eps.item() == pytest.approx(-0.5, rel=1e-15)
    else:
        assert got.eps.item() == pytest.approx(-0.5, rel=1e-15)
        if prediction.name in ("eps", "score"):
            assert not got.x0.isfinite().item()
            assert not prediction.at_zero_signal
        else:
            assert got.x0.item() == pytest.approx(1.5, rel=1e-15)


def test_what_each_is():
    alpha, sigma = values(0.8), values(0.6)
    x0, eps = torch.tensor([[1.0]], dtype=F64), torch.tensor([[2.0]], dtype=F64)
    want = {"eps": 2.0, "x0": 1.0, "v": 0.8 * 2 - 0.6 * 1, "score": -2 / 0.6, "velocity": 2.0 - 1.0}
    for name, value in want.items():
        assert predictions[name]().encode(x0, eps, alpha, sigma).item() == pytest.approx(value, rel=1e-14)
        assert predictions[name]().name == name


@given(st.floats(-4, 4), st.floats(0.1, 2), number, number)
def test_edm_is_its_papers_table(log_s, sd, x, f):
    """D = c_skip x + c_out F(c_in x, c_noise), on EDM's own schedule (alpha = 1)."""
    prediction, s = EDMOutput(sd), math.exp(log_s)
    alpha, sigma = values(1.0), values(s)
    c_skip, c_out = sd**2 / (s**2 + sd**2), s * sd / math.sqrt(s**2 + sd**2)
    got = prediction.decode(values(f)[:, None], values(x)[:, None], alpha, sigma)
    assert got.x0.item() == pytest.approx(c_skip * x + c_out * f, rel=1e-10, abs=1e-12)
    assert prediction.input_scale(alpha, sigma).item() == pytest.approx(1 / math.sqrt(s**2 + sd**2), rel=1e-12)
    inputs = prediction.inputs(values(x)[:, None], alpha, sigma)
    assert inputs.item() == pytest.approx(x / math.sqrt(s**2 + sd**2), rel=1e-12)
    t = EDM(sigma_max=100).time(values(-2 * log_s))
    assert prediction.clock(EDM(sigma_max=100), t).item() == pytest.approx(log_s / 4, rel=1e-9, abs=1e-12)


def test_edm_sees_any_schedule_as_noise_levels():
    """A VP model is a VE model in z = x / alpha at sigma / alpha: the same F, c_in and c_noise."""
    schedule, prediction = table("linear"), EDMOutput(0.5)
    t = torch.linspace(0.01, 1, 7, dtype=F64)
    alpha, sigma = schedule.marginal(t)
    x, f = torch.randn(2, 7, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    one = torch.ones_like(alpha)
    here = prediction.decode(f, x, alpha, sigma)
    there = prediction.decode(f, x / alpha[:, None], one, sigma / alpha)
    torch.testing.assert_close(here, there, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        prediction.inputs(x, alpha, sigma), prediction.inputs(x / alpha[:, None], one, sigma / alpha)
    )
    torch.testing.assert_close(prediction.clock(schedule, t), (sigma / alpha).log() / 4)


def test_edms_target_has_unit_variance():
    """F = p x_0 + q eps with p^2 d^2 + q^2 = 1, and so has its input c_in x."""
    alpha, sigma = values(1.0, 0.8, 0.1), values(0.002, 0.6, 80.0)
    for d in (0.5, 2.0):
        p, q = EDMOutput(d).blend(alpha, sigma)
        torch.testing.assert_close(p**2 * d**2 + q**2, torch.ones(3, dtype=F64), rtol=1e-13, atol=0)
        scale = EDMOutput(d).input_scale(alpha, sigma)
        torch.testing.assert_close(scale**2 * (alpha**2 * d**2 + sigma**2), torch.ones(3, dtype=F64))


@pytest.mark.parametrize("prediction", [Eps(), X0(), V(), Score(), Velocity()], ids=lambda p: p.name)
def test_the_others_see_x_as_it_is_and_the_schedules_timestep(prediction):
    x, t = torch.randn(2, 3), values(0.5, 1.0)
    assert prediction.inputs(x, t, t) is x
    assert prediction.input_scale(t, t).tolist() == [1, 1]
    assert prediction.clock(table("linear"), t).tolist() == [499, 999]
    assert prediction.clock(Flow(), t).tolist() == [500, 1000]


@pytest.mark.parametrize("prediction", EVERY, ids=lambda p: p.name)
def test_the_data_keeps_its_dtype_and_shape(prediction):
    alpha, sigma = values(0.8, 0.1), values(0.6, 0.9)
    x = torch.randn(2, 3, 4, 5)
    got = prediction.decode(x, x, alpha, sigma)
    assert got.x0.dtype == got.eps.dtype == prediction.encode(x, x, alpha, sigma).dtype == torch.float32
    assert got.x0.shape == got.eps.shape == x.shape


def test_per_sample_numbers_meet_their_rows():
    x = torch.ones(2, 3, 4)
    assert (per_sample(values(2.0, 5.0), x) * x)[:, 0, 0].tolist() == [2, 5]
    assert per_sample(values(2.0, 5.0), x).dtype == torch.float32


@pytest.mark.parametrize("sigma_data", [0.0, -1.0, math.nan])
def test_sigma_data_is_positive(sigma_data):
    with pytest.raises(UsageError, match=f"sigma_data is {sigma_data}"):
        EDMOutput(sigma_data)
