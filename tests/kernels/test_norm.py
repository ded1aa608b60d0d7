"""Group norm by the library, against its twin in float64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reverie.kernels.norm import group_norm, plain

SHAPES = st.tuples(
    st.integers(1, 3),  # samples
    st.sampled_from([1, 2, 5, 16, 17]),  # groups
    st.sampled_from([1, 2, 3, 10]),  # channels of a group
    st.sampled_from([1, 2, 5, 8, 13]),  # height
    st.sampled_from([1, 3, 8, 33]),  # width
)


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def image(*shape, seed=0, factor=1.0, offset=0.0, dtype=torch.float32):
    x = (factor * numbers(*shape, seed=seed) + offset).to(dtype)
    return x.to(memory_format=torch.channels_last).requires_grad_()


def modulations(samples, channels, which="scale shift add"):
    made = {}
    for seed, name in enumerate(("weight", "bias")):
        made[name] = numbers(channels, seed=10 + seed).requires_grad_()
    for seed, name in enumerate(which.split()):
        made[name] = numbers(samples, channels, 1, 1, seed=20 + seed).requires_grad_()
    return made


def both(x, groups, given, act, eps=1e-5):
    """The library's output and gradients, and the twin's in float64."""
    results = []
    for function, dtype in ((group_norm, None), (plain, torch.float64)):
        use = [y.detach().to(dtype or y.dtype).requires_grad_() for y in (x, *given.values())]
        named = dict(zip(given, use[1:], strict=True))
        y = function(use[0], groups, named.pop("weight"), named.pop("bias"), eps, act, **named)
        dy = numbers(*y.shape, seed=99).to(y.dtype).to(memory_format=torch.channels_last)
        results.append([y, *torch.autograd.grad(y, use, dy)])
    return results


def close(found, wanted, tolerance):
    size = wanted.abs().max().clamp(min=1e-30)
    return float((found.double() - wanted).abs().max() / size) < tolerance


@given(SHAPES, st.sampled_from(["", "add", "scale shift", "scale shift add"]), st.sampled_from([None, "silu", "gelu"]))
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_it_is_the_twin_with_its_gradients(level, shape, which, act):
    samples, groups, width, height, wide = shape
    channels = groups * width
    x = image(samples, channels, height, wide)
    # eps is large: where a group has a single value, or two, the derivative by x vanishes but for it.
    found, wanted = both(x, groups, modulations(samples, channels, which), act, eps=0.1)
    size = max(float(wanted[1].detach().abs().max()), 1.0)  # of dx, or of its terms
    for index, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert a.shape == b.shape
        a, b = a.detach(), b.detach()
        error = float((a.double() - b).abs().max())
        assert error < 4e-6 * max(float(b.abs().max()), size * (height * wide if index > 1 else 1))
    assert found[0].is_contiguous(memory_format=torch.channels_last)


def test_the_library_computes_and_not_the_twin(level):
    y = group_norm(image(2, 8, 4, 4), 4, torch.ones(8), torch.zeros(8), 1e-5)
    assert type(y.grad_fn).__name__ == "NormaliseBackward"


@pytest.mark.parametrize(("factor", "offset"), [(1.0, 1000.0), (1e-4, 1.0), (1e12, 0.0), (1e-12, 0.0), (1.0, -3e4)])
def test_values_of_any_size(level, factor, offset):
    x = image(2, 32, 16, 16, factor=factor, offset=offset)
    found = group_norm(x, 8, torch.ones(32), torch.zeros(32), 1e-5, "silu")
    wanted = plain(x.detach().double(), 8, torch.ones(32).double(), torch.zeros(32).double(), 1e-5, "silu")
    # x - mean is as good as x's own digits; the twin in float32 is no nearer
    assert close(found.detach(), wanted, 2e-6 + 2e-7 * abs(offset) / factor)


@pytest.mark.parametrize("kind", ["ramp", "outlier", "step"])
def test_a_mean_that_wanders_over_the_image(level, kind):
    # Moments are taken as distances from the mean of the rows before: it may lie far from what comes.
    x = numbers(1, 20, 40, 40)
    if kind == "ramp":
        x = x + torch.linspace(0, 1e3, 1600).view(40, 40)
    elif kind == "outlier":
        x[..., 0, 0] = 1e4
    else:
        x[..., 17:, :] += 1e4
    x = x.to(memory_format=torch.channels_last)
    found, wanted = (f(y, 5, None, None, 1e-5) for f, y in ((group_norm, x), (plain, x.double())))
    assert close(found, wanted, 3e-6)


def test_not_a_number_stays_within_its_group(level):
    x = image(2, 8, 4, 4).detach()
    x[0, 5, 1, 1] = torch.nan
    y = group_norm(x, 4, None, None, 1e-5, "silu")
    assert y[0, 4:6].isnan().all()
    assert int(y.isnan().sum()) == 32


def test_large_numbers_into_silu(level):
    weight = torch.tensor([1.0, 100.0, 1e4, 1e30])
    x = image(1, 4, 8, 8)
    y = group_norm(x, 4, weight, torch.zeros(4), 1e-5, "silu")
    assert y.isfinite().all()
    assert close(
        y.detach(), plain(x.detach().double(), 4, weight.double(), torch.zeros(4).double(), 1e-5, "silu"), 1e-6
    )
    assert torch.autograd.grad(y[:, :3].sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_images(level, dtype):
    x = image(2, 32, 9, 9, dtype=torch.bfloat16)
    given = {name: y.detach().to(dtype) for name, y in modulations(2, 32).items()}
    found, wanted = both(x, 8, given, "silu")
    assert {found[0].dtype, found[1].dtype} == {torch.bfloat16}
    for a, b in zip(found, wanted, strict=True):
        assert close(a, b, 0.02)
    assert close(found[0], wanted[0], 2**-8)


def test_layouts_that_the_library_does_not_take_are_the_twins(level):
    x = numbers(2, 8, 4, 4)
    weight, bias = torch.ones(8), torch.zeros(8)
    for other in (x, x[:, :, ::2], x.transpose(2, 3), x[:, :, 0], x[:, :, 0, 0], x[:0], x.double()):
        kind = other.dtype
        wanted = plain(other, 4, weight.to(kind), bias.to(kind), 1e-5, "silu")
        assert torch.equal(group_norm(other, 4, weight.to(kind), bias.to(kind), 1e-5, "silu"), wanted)
    full = numbers(2, 8, 4, 4, seed=1)  # a scale for every pixel
    last = x.to(memory_format=torch.channels_last)
    assert torch.equal(
        group_norm(last, 4, weight, bias, 1e-5, None, full, full), plain(last, 4, weight, bias, 1e-5, None, full, full)
    )


def test_unaligned_memory(level):
    base = numbers(2 * 4 * 4 * 8 + 1)
    x = base[1:].view(2, 4, 4, 8).permute(0, 3, 1, 2)
    aligned = x.clone(memory_format=torch.channels_last)
    assert torch.equal(group_norm(x, 4, None, None, 1e-5), group_norm(aligned, 4, None, None, 1e-5))


def test_a_gradient_of_the_gradient(level):
    given = modulations(2, 6)
    seconds = []
    for function, dtype in ((group_norm, torch.float32), (plain, torch.float64)):
        x = image(2, 6, 3, 3).detach().to(dtype).requires_grad_()
        named = {name: y.detach().to(dtype).requires_grad_() for name, y in given.items()}
        inputs = [x, *named.values()]
        y = function(x, 3, named.pop("weight"), named.pop("bias"), 1e-2, "silu", **named)
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))
    for a, b in zip(*seconds, strict=True):
        assert close(a, b, 1e-4)


def test_a_samples_bits_are_its_own(level):
    x, given = image(5, 96, 7, 7).detach(), modulations(5, 96)
    weight, bias = given.pop("weight"), given.pop("bias")
    y = group_norm(x, 32, weight, bias, 1e-5, "silu", **given)
    for count in (1, 2, 3):
        some = {name: m[-count:] for name, m in given.items()}
        assert torch.equal(group_norm(x[-count:], 32, weight, bias, 1e-5, "silu", **some), y[-count:])


def test_and_do_not_depend_on_the_threads(level):
    x = image(1, 96, 7, 7)
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            y = group_norm(x, 32, torch.ones(96), torch.zeros(96), 1e-5, "silu")
            results.append((y, torch.autograd.grad(y.square().sum(), x)[0]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
