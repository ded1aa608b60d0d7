"""The kernels of `reverie.kernels.gpu`, in Triton's Python. Nothing else imports this file, which needs Triton."""
# mypy: ignore-errors
# ruff: noqa: N803 - Triton's constants are written in capitals

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def moments(x, add, means, squares, pixels, channels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """The mean of a block of pixels, and the sum of squares about it, for each channel."""
    block, sample = tl.program_id(0), tl.program_id(2).to(tl.int64)
    p, c = block * PIXELS + tl.arange(0, PIXELS), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    there = (p < pixels)[:, None] & (c < channels)[None, :]
    start = x + sample * pixels * channels
    v = tl.load(start + p[:, None] * channels + c[None, :], there, 0).to(tl.float32)
    # About the first pixel: of the numbers themselves the squares would be all mean.
    first = tl.load(start + block * PIXELS * channels + c, c < channels, 0).to(tl.float32)
    off = tl.where(there, v - first[None, :], 0)
    count = tl.minimum(PIXELS, pixels - block * PIXELS)
    total, square = tl.sum(off, 0), tl.sum(off * off, 0)
    mean = first + total / count
    if add is not None:
        mean += tl.load(add + sample * channels + c, c < channels, 0).to(tl.float32)
    to = (sample * tl.num_programs(0) + block) * channels + c
    tl.store(means + to, mean, c < channels)
    tl.store(squares + to, square - total * total / count, c < channels)


@triton.jit
@no_type_check
def lines(
    means, squares, weight, bias, scale, shift, add, slopes, offsets, pixels, channels, each, eps,
    BLOCKS: tl.constexpr, PIXELS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A and B of (2) for the channels of one group of one sample, from the blocks' sums by (1)."""
    group, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    j = tl.arange(0, WIDTH)
    c, inside = group * each + j, j < each
    start, number = sample * BLOCKS * channels, (pixels * each).to(tl.float32)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(0, BLOCKS, ROWS):
        i = first + tl.arange(0, ROWS)
        there = (i < BLOCKS)[:, None] & inside[None, :]
        count = tl.minimum(PIXELS, pixels - i * PIXELS).to(tl.float32)[:, None]
        total += count * tl.load(means + start + i[:, None] * channels + c[None, :], there, 0)
    mu = tl.sum(tl.sum(tl.where(inside[None, :], total, 0), 0), 0) / number
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(0, BLOCKS, ROWS):
        i = first + tl.arange(0, ROWS)
        there = (i < BLOCKS)[:, None] & inside[None, :]
        count = tl.minimum(PIXELS, pixels - i * PIXELS).to(tl.float32)[:, None]
        off = tl.load(means + start + i[:, None] * channels + c[None, :], there, 0) - mu
        within = tl.load(squares + start + i[:, None] * channels + c[None, :], there, 0)
        total += tl.where(there, within + count * off * off, 0)
    slope = tl.zeros([WIDTH], tl.float32) + 1 / tl.sqrt(tl.sum(tl.sum(total, 0), 0) / number + eps)
    if weight is not None:
        slope *= tl.load(weight + c, inside, 0).to(tl.float32)
    offset = -mu * slope
    if add is not None:
        offset += tl.load(add + sample * channels + c, inside, 0).to(tl.float32) * slope
    if bias is not None:
        offset += tl.load(bias + c, inside, 0).to(tl.float32)
    if scale is not None:
        more = 1 + tl.load(scale + sample * channels + c, inside, 0).to(tl.float32)
        slope *= more
        offset = offset * more + tl.load(shift + sample * channels + c, inside, 0).to(tl.float32)
    tl.store(slopes + sample * channels + c, slope, inside)
    tl.store(offsets + sample * channels + c, offset, inside)


@triton.jit
@no_type_check
def apply(
    x, slopes, offsets, y, pixels, channels, SILU: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """y = act(x A + B)."""
    sample = tl.program_id(2).to(tl.int64)
    p = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    there = (p < pixels)[:, None] & (c < channels)[None, :]
    at = sample * pixels * channels + p[:, None] * channels + c[None, :]
    slope = tl.load(slopes + sample * channels + c, c < channels, 0)
    offset = tl.load(offsets + sample * channels + c, c < channels, 0)
    v = tl.load(x + at, there, 0).to(tl.float32) * slope[None, :] + offset[None, :]
    if SILU:
        v = v / (1 + tl.exp(-v))
    tl.store(y + at, v.to(y.dtype.element_ty), there)


@triton.jit
@no_type_check
def whole(
    x, weight, bias, scale, shift, add, y, pixels, channels, each, eps,
    SILU: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """All of it for one group of one sample, which is held at once."""
    group, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    p, j = tl.arange(0, PIXELS), tl.arange(0, WIDTH)
    c, inside = group * each + j, j < each
    there = (p < pixels)[:, None] & inside[None, :]
    at = sample * pixels * channels + p[:, None] * channels + c[None, :]
    v = tl.load(x + at, there, 0).to(tl.float32)
    if add is not None:
        v += tl.load(add + sample * channels + c, inside, 0).to(tl.float32)[None, :]
    number = (pixels * each).to(tl.float32)
    mu = tl.sum(tl.sum(tl.where(there, v, 0), 0), 0) / number
    v = tl.where(there, v - mu, 0)
    slope = tl.zeros([WIDTH], tl.float32) + 1 / tl.sqrt(tl.sum(tl.sum(v * v, 0), 0) / number + eps)
    offset = tl.zeros([WIDTH], tl.float32)
    if weight is not None:
        slope *= tl.load(weight + c, inside, 0).to(tl.float32)
    if bias is not None:
        offset += tl.load(bias + c, inside, 0).to(tl.float32)
    if scale is not None:
        more = 1 + tl.load(scale + sample * channels + c, inside, 0).to(tl.float32)
        slope *= more
        offset = offset * more + tl.load(shift + sample * channels + c, inside, 0).to(tl.float32)
    v = v * slope[None, :] + offset[None, :]
    if SILU:
        v = v / (1 + tl.exp(-v))
    tl.store(y + at, v.to(y.dtype.element_ty), there)


@triton.jit
@no_type_check
def layer(x, weight, bias, y, rows, width, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows, each less its mean and over its deviation."""
    i, j = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = j < width
    there = (i < rows)[:, None] & inside[None, :]
    at = i[:, None].to(tl.int64) * width + j[None, :]
    v = tl.load(x + at, there, 0).to(tl.float32)
    v = tl.where(there, v - tl.sum(v, 1)[:, None] / width, 0)
    v /= tl.sqrt(tl.sum(v * v, 1)[:, None] / width + eps)
    if weight is not None:
        v *= tl.load(weight + j, inside, 0).to(tl.float32)[None, :]
    if bias is not None:
        v += tl.load(bias + j, inside, 0).to(tl.float32)[None, :]
    tl.store(y + at, v.to(y.dtype.element_ty), there)


@triton.jit
@no_type_check
def gate(x, y, numbers, width, NUMBERS: tl.constexpr):
    """h * gelu(g), where h and g lie side by side."""
    i = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    there = i < numbers
    at = i // width * 2 * width + i % width
    h = tl.load(x + at, there, 0).to(tl.float32)
    g = tl.load(x + at + width, there, 0).to(tl.float32)
    v = h * g * 0.5 * (1 + tl.erf(g * 0.7071067811865476))
    tl.store(y + i, v.to(y.dtype.element_ty), there)
