"""Loss weights: each stated for one target, and equal for every other that says the same of x_0."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reverie.base.errors import UsageError
from reverie.diffusion.predictions import X0, EDMOutput, Eps, V
from reverie.diffusion.registry import predictions, weights
from reverie.diffusion.weights import P2, EDMWeight, MinSNR, Uniform

F64 = torch.float64
level = st.floats(-6, 6)


def preserving(log_snr):
    return torch.tensor([log_snr], dtype=F64).sigmoid().sqrt(), torch.tensor([-log_snr], dtype=F64).sigmoid().sqrt()


@given(level)
def test_min_snr(log_snr):
    (alpha, sigma), snr = preserving(log_snr), math.exp(log_snr)
    assert MinSNR()(Eps(), alpha, sigma).item() == pytest.approx(min(snr, 5) / snr, rel=1e-10)
    assert MinSNR()(V(), alpha, sigma).item() == pytest.approx(min(snr, 5) / (snr + 1), rel=1e-10)
    assert MinSNR()(X0(), alpha, sigma).item() == pytest.approx(min(snr, 5), rel=1e-10)
    assert MinSNR(1.0)(X0(), alpha, sigma).item() == pytest.approx(min(snr, 1), rel=1e-10)


@given(level)
def test_p2(log_snr):
    (alpha, sigma), snr = preserving(log_snr), math.exp(log_snr)
    assert P2()(Eps(), alpha, sigma).item() == pytest.approx(1 / (1 + snr), rel=1e-10)
    assert P2(0.5, 2.0)(Eps(), alpha, sigma).item() == pytest.approx((2 + snr) ** -0.5, rel=1e-10)
    assert P2(0.0)(Eps(), alpha, sigma).item() == pytest.approx(1, rel=1e-10)


@given(level, st.floats(0.1, 3))
def test_edms_weight_is_its_papers_and_uniform_on_its_output(log_snr, sd):
    s = math.exp(-log_snr / 2)
    alpha, sigma = torch.ones(1, dtype=F64), torch.tensor([s], dtype=F64)
    assert EDMWeight(sd)(X0(), alpha, sigma).item() == pytest.approx((s**2 + sd**2) / (s * sd) ** 2, rel=1e-10)
    for a, b in ((alpha, sigma), preserving(log_snr)):
        assert EDMWeight(sd)(EDMOutput(sd), a, b).item() == pytest.approx(1, rel=1e-10)


@pytest.mark.parametrize("weight", [MinSNR(), P2(), EDMWeight()], ids=lambda w: type(w).__name__)
@given(st.floats(-6, 6), st.floats(0.2, 3), st.floats(-2, 2))
def test_a_weighted_error_is_the_same_in_every_targets_space(weight, log_ratio, size, error):
    """At one x an error of x_0 is one of eps: alpha dx0 + sigma deps = 0."""
    alpha = torch.tensor([size * math.exp(log_ratio / 2)], dtype=F64)
    sigma = torch.tensor([size * math.exp(-log_ratio / 2)], dtype=F64)
    x0 = torch.tensor([[error]], dtype=F64)
    eps = -(alpha / sigma)[:, None] * x0
    losses = []
    for name in predictions:
        target = predictions[name]()
        losses.append((weight(target, alpha, sigma) * target.encode(x0, eps, alpha, sigma).square()).item())
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-9)


@pytest.mark.parametrize("name", predictions)
def test_without_signal_weights_are_finite_and_the_limits_from_above(name):
    """Zero terminal SNR: 0/0 is nowhere formed. EDM's weight on eps is infinite there, and is meant to be."""
    alpha = torch.tensor([0.0, 1e-9], dtype=F64)
    sigma = (1 - alpha.square()).sqrt()
    for weight in (Uniform(), MinSNR(), P2(), EDMWeight()):
        got = weight(predictions[name](), alpha, sigma)
        if isinstance(weight, EDMWeight) and name in ("eps", "score"):
            assert got[0] == math.inf
        else:
            assert got[0].item() == pytest.approx(got[1].item(), rel=1e-6, abs=1e-12)


def test_uniform_is_one_for_all():
    alpha, sigma = torch.rand(2, 5, dtype=F64)
    assert Uniform()(V(), alpha, sigma).tolist() == [1] * 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MinSNR(0.0), "gamma is 0.0"),
        (lambda: MinSNR(math.nan), "gamma is nan"),
        (lambda: P2(k=0.0), "k is 0.0"),
        (lambda: P2(gamma=-1.0), "gamma -1.0"),
        (lambda: EDMWeight(0.0), "sigma_data is 0.0"),
        (lambda: weights["minsnr"], "did you mean min-snr"),
    ],
)
def test_settings_without_meaning_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()
