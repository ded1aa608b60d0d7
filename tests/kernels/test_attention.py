"""Attention by the library, against equation (1) in float64 and against its twin."""

import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reverie.kernels.attention import attention, by_formula, plain, self_attention

room = sys.modules[attention.__module__]

SHAPES = st.tuples(
    st.integers(1, 3),  # samples
    st.integers(1, 4),  # heads
    st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 130]),  # queries
    st.sampled_from([1, 3, 16, 63, 64, 65, 77, 97, 129, 193]),  # keys
    st.sampled_from([1, 3, 8, 16, 17, 40, 64, 80]),  # channels of a head
)


def tokens(*shape, seed=0, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()


def inputs(samples, heads, queries, keys, dim, **settings):
    return [tokens(samples, n, heads * dim, seed=i, **settings) for i, n in enumerate((queries, keys, keys))]


def exact(qkv, heads, mask, dout):
    """The formula and its gradients in float64."""
    double = [x.detach().double().requires_grad_() for x in qkv]
    y = by_formula(*double, heads, None if mask is None else mask.double())
    return [y, *torch.autograd.grad(y, double, dout.double())]


def error(found, wanted):
    """The largest error, of the largest value, or of 1: a gradient may vanish whose terms, of that size, do not."""
    found, wanted = found.detach().double(), wanted.detach()
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1))


def compare(qkv, heads, mask=None, tolerance=3e-6):
    y = attention(*qkv, heads, mask)
    dout = tokens(*y.shape, seed=9).detach()
    found = [y, *torch.autograd.grad(y, qkv, dout.to(y.dtype))]
    for a, b in zip(found, exact(qkv, heads, mask, dout), strict=True):
        assert a.shape == b.shape
        assert error(a, b) < tolerance


@given(SHAPES)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_it_is_the_formula_with_its_gradients(level, shape):
    compare(inputs(*shape), shape[1])


def test_the_library_computes_and_not_the_twin(level):
    q, k, v = inputs(1, 2, 5, 7, 8)
    assert type(attention(q, k, v, 2).grad_fn).__name__ in ("AttendBackward", "ToCopyBackward0")


@given(SHAPES, st.sampled_from(["all", "samples", "heads", "keys"]), st.booleans())
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_masks_of_every_shape(level, shape, kind, boolean):
    samples, heads, queries, keys, _ = shape
    full = {
        "all": (samples, heads, queries, keys),
        "samples": (samples, 1, 1, keys),
        "heads": (1, heads, queries, keys),
        "keys": (1, 1, 1, keys),
    }[kind]
    noise = torch.randn(full, generator=torch.Generator().manual_seed(5))
    allowed = noise > -0.5
    allowed[..., 0] = True
    mask = allowed if boolean else noise.masked_fill(~allowed, -torch.inf)
    wanted = torch.zeros(full).masked_fill(~allowed, -torch.inf) if boolean else mask
    qkv = inputs(*shape)
    y, twin = attention(*qkv, heads, mask), plain(*qkv, heads, mask)
    assert error(y, twin.double()) < 3e-6
    dout = tokens(*y.shape, seed=9).detach()
    for a, b in zip(torch.autograd.grad(y, qkv, dout), exact(qkv, heads, wanted, dout)[1:], strict=True):
        assert error(a, b) < 3e-6


def test_who_may_look_at_nothing_sees_zero_and_has_no_gradient(level):
    q, k, v = inputs(2, 2, 70, 66, 8)
    mask = torch.ones(2, 1, 70, 66, dtype=torch.bool)
    mask[0, :, 3] = False
    mask[1, :, :, :64] = False  # nothing in the first block of keys, something after it
    y = attention(q, k, v, 2, mask)
    assert torch.equal(y[0, 3], torch.zeros(16))
    assert error(y, plain(q, k, v, 2, mask).double()) < 3e-6
    dq, dk, dv = torch.autograd.grad(y, (q, k, v), torch.ones_like(y))
    assert torch.equal(dq[0, 3], torch.zeros(16))
    assert dk.isfinite().all()
    assert dv.isfinite().all()


@pytest.mark.parametrize("scale", [1e-3, 30.0, 300.0, 1e18])
def test_scores_of_any_size(level, scale):
    # In float32 a score s is known to s 2^-24 (times some roundings), and so is the logarithm of its weight.
    q, k, v = inputs(2, 2, 40, 150, 16, scale=scale)
    q, k = (x if scale < 1e10 else (x / 1e18 * 1e9).detach().requires_grad_() for x in (q, k))
    y = attention(q, k, v, 2)
    double = [x.detach().double() for x in (q, k, v)]
    size = float((double[0].abs().max() * double[1].abs().max()) * 4)
    assert y.isfinite().all()
    if size < 1e6:
        assert error(y, by_formula(*double, 2)) < 1e-6 + size * 2**-20
    else:  # one key has all the weight, and the twin finds the same one, unless two are as good within rounding
        close = (y - plain(q, k, v, 2)).abs().amax(-1) < 1e-5 * scale
        assert close.float().mean() > 0.95


def test_not_a_number_stays_one(level):
    q, k, v = (x.detach() for x in inputs(2, 1, 20, 20, 8))
    q[0, 3, 2] = torch.nan
    y = attention(q, k, v, 1)
    assert y[0, 3].isnan().all()
    assert int(y.isnan().sum()) == 8
    k[1, 5, 0] = torch.nan
    assert attention(q, k, v, 1)[1].isnan().all()


def test_any_strides_and_unaligned_memory(level):
    base = tokens(2, 30, 3 * 24 + 1).detach()
    wanted = [base[..., 1 + 24 * i : 25 + 24 * i].clone() for i in range(3)]
    y = attention(*wanted, 3)
    assert torch.equal(attention(*(base[..., 1 + 24 * i : 25 + 24 * i] for i in range(3)), 3), y)
    across = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in wanted]  # channels are not side by side
    assert torch.equal(attention(*across, 3), y)
    backwards = [x.flip(1)[:, ::2] for x in wanted]
    assert error(attention(*backwards, 3), plain(*backwards, 3).double()) < 3e-6
    expanded = wanted[0][:1].expand(2, -1, -1)
    assert torch.equal(attention(expanded, expanded, expanded, 3)[0], attention(expanded, expanded, expanded, 3)[1])


def test_side_by_side_is_the_same_and_so_is_its_gradient(level):
    qkv = tokens(2, 70, 3 * 24)
    y, apart = self_attention(qkv, 3), attention(*qkv.chunk(3, -1), 3)
    assert torch.equal(y, apart)
    dout = torch.randn_like(y)
    both = [torch.autograd.grad(x, qkv, dout)[0] for x in (y, apart)]
    assert torch.equal(*both)


def test_a_gradient_of_the_gradient(level):
    double = [x.detach().double().requires_grad_() for x in inputs(1, 2, 4, 5, 3)]
    single = [x.detach().float().requires_grad_() for x in double]
    seconds = []
    for qkv, function in ((single, attention), (double, by_formula)):
        first = torch.autograd.grad(function(*qkv, 2).square().sum(), qkv, create_graph=True)
        seconds.append(torch.autograd.grad(sum(x.square().sum() for x in first), qkv))
    for a, b in zip(*seconds, strict=True):
        assert error(a, b) < 1e-5
    qkv = tokens(1, 6, 24)
    (first,) = torch.autograd.grad(self_attention(qkv, 2).square().sum(), qkv, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), qkv)[0].isfinite().all()


def rounded_in_between(level):
    """Whether weights are rounded to bfloat16 too, and not the result alone."""
    return level == "avx512bf16"


@given(SHAPES)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bfloat16_is_the_formula_with_its_gradients(level, shape):
    # Half a unit of the last place is 2^-9: the result's, and where weights and their gradients are rounded, theirs.
    qkv = inputs(*shape, dtype=torch.bfloat16)
    y = attention(*qkv, shape[1])
    dout = tokens(*y.shape, seed=9, dtype=torch.bfloat16).detach()
    found = [y, *torch.autograd.grad(y, qkv, dout)]
    for a, b in zip(found, exact(qkv, shape[1], None, dout), strict=True):
        assert (a.shape, a.dtype) == (b.shape, torch.bfloat16)
        assert error(a, b) < (2**-6 if rounded_in_between(level) else 2**-7)


def test_bfloat16_loses_little_more_than_pytorchs(level):
    # Two roundings of the same size, of weights and of the result, where the twin has one at this length: sqrt(2).
    qkv = inputs(2, 4, 300, 500, 40, dtype=torch.bfloat16)
    with torch.no_grad():
        wanted = by_formula(*(x.double() for x in qkv), 4)
        ours, theirs = ((f(*qkv, 4).double() - wanted).norm() for f in (attention, plain))
    assert ours < 1.5 * theirs


@pytest.mark.parametrize("kind", ["all", "keys", "transposed"])
def test_masks_in_bfloat16(level, kind):
    qkv = inputs(2, 2, 70, 133, 40, dtype=torch.bfloat16)
    mask = torch.randn(2, 2, 70, 133, generator=torch.Generator().manual_seed(5))
    mask = {"all": mask, "keys": mask[:1, :1, :1], "transposed": mask.mT.contiguous().mT}[kind]
    mask = mask.masked_fill(mask < -0.5, -torch.inf)
    mask[..., :100] = -torch.inf  # nothing in the first block of keys
    y = attention(*qkv, 2, mask)
    dout = torch.ones_like(y)
    for a, b in zip([y, *torch.autograd.grad(y, qkv, dout)], exact(qkv, 2, mask, dout), strict=True):
        assert error(a, b) < 2**-6


def test_scores_that_rise_along_the_keys(level):
    # The level that weights are taken from has to be raised at almost every tile of keys.
    q, k, v = (x.detach() for x in inputs(1, 1, 20, 400, 8))
    q[:], k[:] = 1, torch.linspace(0, 300, 400)[None, :, None]
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 2**-7)):
        given_ = [x.to(dtype) for x in (q, k, v)]
        assert error(attention(*given_, 1), by_formula(*(x.double() for x in given_), 1)) < tolerance


def test_a_rows_bits_in_bfloat16_are_its_own_on_any_threads(level):
    q, k, v = inputs(5, 2, 200, 90, 24, dtype=torch.bfloat16)
    before, results = torch.get_num_threads(), []
    try:
        for count, rows in ((1, slice(None)), (2, slice(None)), (3, slice(3, 5)), (2, slice(4, 5))):
            torch.set_num_threads(count)
            given_ = [x[rows].detach().requires_grad_() for x in (q, k, v)]
            y = attention(*given_, 2)
            results.append([y[-1:], *(g[-1:] for g in torch.autograd.grad(y, given_, torch.ones_like(y)))])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_not_a_number_stays_one_in_bfloat16(level):
    q, k, v = (x.detach() for x in inputs(2, 1, 20, 20, 8, dtype=torch.bfloat16))
    q[0, 3, 2] = torch.nan
    y = attention(q, k, v, 1)
    assert y[0, 3].isnan().all()
    assert int(y.isnan().sum()) == 8
    v[1, 5, 0] = torch.nan
    y = attention(q, k, v, 1)
    assert y[1, :, 0].isnan().all()
    assert y[1, :, 1:].isfinite().all()


def test_a_library_without_its_products_multiplies_bfloat16_in_float32(monkeypatch):
    monkeypatch.setattr(room, "has", lambda name: False)
    qkv = inputs(1, 2, 9, 9, 8, dtype=torch.bfloat16)
    y = attention(*qkv, 2)
    assert torch.equal(y, attention(*(x.float() for x in qkv), 2).bfloat16())
    assert y.dtype == torch.bfloat16


def test_a_rows_bits_are_its_own(level):
    q, k, v = (x.detach() for x in inputs(7, 2, 100, 90, 24))
    y = attention(q, k, v, 2)
    for count in (1, 2, 3, 5):
        assert torch.equal(attention(q[-count:], k[-count:], v[-count:], 2), y[-count:])
    assert torch.equal(attention(q, k, v, 2), y)


@pytest.mark.parametrize("threads", [2, 3])
def test_and_do_not_depend_on_the_threads(level, threads):
    q, k, v = inputs(1, 2, 200, 90, 24)
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            y = attention(q, k, v, 2)
            results.append([y, *torch.autograd.grad(y, (q, k, v), torch.ones_like(y))])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)])
def test_nothing(level, shape):
    x = torch.zeros(shape)
    assert attention(x, x, x, 2).shape == shape
    assert self_attention(torch.zeros(*shape[:2], 24), 2).shape == shape


def test_the_twin_is_the_formula():
    qkv = inputs(2, 3, 20, 30, 8)
    assert error(plain(*qkv, 3), by_formula(*(x.double() for x in qkv), 3)) < 3e-6
