"""Layers that keep magnitudes, each against its equation in float64."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from reverie.networks.edm2_layers import (
    EPS,
    SILU_GAIN,
    CosineAttention,
    MPFourier,
    MPWeight,
    Uncertainty,
    magnitude,
    mp_cat,
    mp_silu,
    mp_sum,
    pixel_norm,
    unit,
)


def near(got: torch.Tensor, want: np.ndarray | torch.Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got.double(), torch.as_tensor(want).double(), rtol=tolerance, atol=tolerance)


def rms(x: torch.Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt())


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def test_the_gain_of_silu_is_its_magnitude_on_a_standard_normal():
    square, _ = quad(lambda z: (z / (1 + math.exp(-z))) ** 2 * math.exp(-z * z / 2) / math.sqrt(2 * math.pi), -30, 30)
    assert math.sqrt(square) == pytest.approx(SILU_GAIN, abs=5e-4)  # the paper's three digits
    x = normal(50)
    near(mp_silu(x), x.numpy() / (1 + np.exp(-x.numpy())) / 0.596)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_sum(t):
    a, b = normal(3, 4), normal(3, 4, seed=1)
    near(mp_sum(a, b, t), ((1 - t) * a.numpy() + t * b.numpy()) / np.sqrt((1 - t) ** 2 + t**2))


@pytest.mark.parametrize("t", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4, 5)])
def test_concatenation(t, shape):
    a, b = normal(*shape), normal(shape[0], 7, *shape[2:], seed=1)
    got = mp_cat(a, b, t)
    scale = np.sqrt(10 / ((1 - t) ** 2 + t**2))
    near(got[:, :3], a.numpy() * scale / np.sqrt(3) * (1 - t))
    near(got[:, 3:], b.numpy() * scale / np.sqrt(7) * t)


def test_concatenation_keeps_the_magnitude_and_shares_it():
    a, b = unit(normal(4, 30, 6, 6), [1]), unit(normal(4, 90, 6, 6, seed=1), [1])
    got = mp_cat(a, b, 0.3)
    assert rms(got) == pytest.approx(1, abs=1e-3)
    first, second = float(got[:, :30].square().sum()), float(got[:, 30:].square().sum())
    assert second / first == pytest.approx(0.09 / 0.49, rel=1e-4)  # eps


def test_sums_and_concatenations_of_independent_parts_keep_the_magnitude():
    """20,000 numbers: the standard error of an rms is 0.005; 5 of it, so 1 in 10^6 seeds would fail."""
    a, b = normal(200, 100), normal(200, 100, seed=1)
    assert rms(mp_sum(a, b, 0.3)) == pytest.approx(1, abs=0.025)
    assert rms(mp_silu(a)) == pytest.approx(1, abs=0.025)


def test_fourier_features():
    layer, c = MPFourier(9).double(), normal(5)
    f, p = layer.frequencies.numpy(), layer.phases.numpy()
    near(layer(c), np.sqrt(2) * np.cos(2 * np.pi * (np.outer(c.numpy(), f) + p)))


def test_fourier_features_are_of_magnitude_one_at_every_clock_and_not_trained():
    torch.manual_seed(0)
    layer = MPFourier(20_000)
    for clock in (-1.5, 0.0, 1.1):  # 2 cos^2 has variance 1/2: standard error 0.0025 of the rms; 5 of it
        assert rms(layer(torch.tensor([clock]))) == pytest.approx(1, abs=0.0125)
    assert not list(layer.parameters())
    assert len(layer.state_dict()) == 2
    assert float(layer.frequencies.std()) == pytest.approx(1, abs=0.03)
    assert 0 <= float(layer.phases.min()) < 0.01 < 0.99 < float(layer.phases.max()) <= 1


def test_fourier_features_stay_in_float32():
    layer = MPFourier(16)
    want, got = layer(torch.tensor([1.0])), layer.to(torch.bfloat16)(torch.tensor([1.0]))
    assert got.dtype == torch.float32
    assert (got - want).abs().max() < 0.2  # the frequencies themselves were rounded


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_pixel_norm(scale):
    x = scale * normal(2, 6, 3, 3)
    want = x.numpy() / (1e-4 + np.sqrt((x.numpy() ** 2).mean(1, keepdims=True)))
    near(pixel_norm(x), want)


def test_what_is_zero_stays_zero():
    assert not pixel_norm(torch.zeros(1, 4, 2, 2)).any()


def test_magnitude_is_accumulated_in_float32():
    x = torch.ones(1, 4096, dtype=torch.bfloat16)
    assert magnitude(x, [1]).dtype == torch.float32
    assert float(magnitude(x, [1])) == pytest.approx(1, abs=1e-6)
    assert unit(x, [1]).dtype == torch.bfloat16


@pytest.mark.parametrize("kernel", [None, 1, 3])
def test_a_weighted_layer(kernel):
    torch.manual_seed(0)
    layer = MPWeight(5, 7, kernel).double()
    with torch.no_grad():
        layer.weight.mul_(3).add_(0.2)
    w = layer.weight.detach().numpy()
    flat = w.reshape(7, -1)
    n = flat.shape[1]
    flat = flat / (EPS * np.sqrt(n) + np.linalg.norm(flat, axis=1, keepdims=True))
    near(layer.effective(), flat.reshape(w.shape))
    if kernel is None:
        x = normal(4, 5)
        near(layer(x, 0.7), 0.7 * x.numpy() @ flat.T)
        return
    x, pad = normal(2, 5, 6, 4), kernel // 2
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    want = np.zeros((2, 7, 6, 4))
    for i in range(kernel):
        for j in range(kernel):
            want += np.einsum("oc,bchw->bohw", flat.reshape(w.shape)[:, :, i, j], padded[:, :, i : i + 6, j : j + 4])
    near(layer(x), want)


def test_weights_are_of_length_one_and_stored_with_magnitude_one():
    layer = MPWeight(20, 11, 3)
    assert torch.allclose(magnitude(layer.weight, [1, 2, 3]), torch.ones(1), atol=1.5 * EPS)
    assert torch.allclose(layer.effective().flatten(1).norm(dim=1), torch.ones(11), atol=1.5 * EPS)


def test_after_an_update_weights_have_magnitude_one_again_in_the_same_direction():
    layer = MPWeight(6, 4).double()
    with torch.no_grad():
        layer.weight.mul_(torch.tensor([[0.5], [3.0], [10.0], [1.0]]))
    before, output = layer.weight.clone(), layer(normal(3, 6))
    layer.after_update()
    assert torch.allclose(magnitude(layer.weight, [1]), torch.ones(1).double(), atol=2.5 * EPS)
    assert torch.allclose(torch.cosine_similarity(before, layer.weight), torch.ones(4).double(), atol=1e-12)
    near(layer(normal(3, 6)), output.detach(), tolerance=3 * EPS)


@pytest.mark.parametrize("scale", [0.5, 2.0, 100.0])
def test_the_output_does_not_depend_on_a_weights_scale(scale):
    """But for eps, which a layer of the paper's has too."""
    layer, x = MPWeight(6, 4, 3).double(), normal(2, 6, 5, 5)
    before = layer(x)
    with torch.no_grad():
        layer.weight.mul_(scale)
    near(layer(x), before.detach(), tolerance=5 * EPS)


def test_the_gradient_is_orthogonal_to_the_weight():
    torch.manual_seed(0)
    layer, x = MPWeight(6, 4, 3).double(), normal(2, 6, 5, 5)
    (layer(x) * normal(2, 4, 5, 5, seed=1)).sum().backward()
    w, g = layer.weight.detach().flatten(1), layer.weight.grad.flatten(1)
    cosine = torch.cosine_similarity(w, g)
    assert cosine.abs().max() < 2 * EPS  # 0 but for eps
    assert float(g.norm()) > 0.1
    longer = (w - 0.5 * g).norm(dim=1)
    assert (longer > w.norm(dim=1)).all()  # which is why it is brought back


def test_a_weighted_layer_keeps_the_magnitude():
    """8 x 12 x 12 x 64 numbers, correlated within a pixel's surroundings; weights of length one exactly do it."""
    torch.manual_seed(0)
    assert rms(MPWeight(64, 64, 3)(normal(8, 64, 12, 12).float())[:, :, 1:-1, 1:-1]) == pytest.approx(1, abs=0.02)
    assert rms(MPWeight(300, 200)(normal(100, 300).float())) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_cosine_attention(heads):
    torch.manual_seed(0)
    layer, x = CosineAttention(8, heads).double(), 5 * normal(2, 8, 3, 4)
    qkv = np.einsum("oc,bchw->bohw", layer.qkv.effective().detach().numpy()[:, :, 0, 0], x.numpy())
    qkv = qkv.reshape(2, 3, heads, 8 // heads, 12)
    qkv = qkv / (EPS + np.sqrt((qkv**2).mean(3, keepdims=True)))
    q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]
    logits = np.einsum("bhcq,bhck->bhqk", q, k) / np.sqrt(8 // heads)
    share = np.exp(logits)
    share /= share.sum(-1, keepdims=True)
    seen = np.einsum("bhqk,bhck->bhcq", share, v).reshape(2, 8, 3, 4)
    near(layer(x), np.einsum("oc,bchw->bohw", layer.out.effective().detach().numpy()[:, :, 0, 0], seen), 1e-10)


def test_cosine_attention_does_not_depend_on_the_magnitude_of_its_input():
    layer, x = CosineAttention(8, 2).double(), normal(1, 8, 3, 3)
    near(layer(1000 * x), layer(x).detach(), tolerance=1e-3)


def test_uncertainty_is_a_function_of_the_clock_and_learns_one():
    torch.manual_seed(0)
    u, clock = Uncertainty(64), torch.linspace(-1.5, 1.1, 50)
    assert u(clock).shape == (50,)
    optimizer = torch.optim.Adam(u.parameters(), 3e-2)
    error = torch.tensor(0.0)
    for _ in range(150):
        error = (u(clock) - (0.5 * clock)).square().mean()  # of the size that a weight of length one can give
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    assert float(error) < 1e-3
