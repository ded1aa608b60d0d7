"""What may be asked beside sampler and grid: whole numbers, sizes, buckets, what is kept."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reverie.base.errors import UsageError
from reverie.models.settling import bucket_rows, settle_kept, settle_size, whole


@pytest.mark.parametrize("value", [2.5, "3", None, True, 0, 11, math.nan])
def test_whole_numbers(value):
    with pytest.raises(UsageError, match="steps is"):
        whole("steps", value, 1, 10)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "size is 0; it must be a whole number in 1..65536"),
        (7, "size is 7x7; each side must be a multiple of 8: the nearest is 8x8"),
        ((513, 300), "size is 513x300; each side must be a multiple of 8: the nearest is 512x304"),
        (100_000, "size is 100000; it must be a whole number in 1..65536"),
    ],
)
def test_a_size_that_cannot_be_is_refused_with_the_nearest(make, size, words):
    """RELIABILITY 6, case 24."""
    card = make().card
    assert settle_size(card, 8, 8) == (8, 8)
    with pytest.raises(UsageError, match=words) as caught:
        settle_size(card, size, 8)
    assert caught.value.exit_code == 2


@given(st.lists(st.integers(1, 5000), min_size=2, max_size=2))
def test_a_bucket_is_a_power_of_two_within_its_bounds(size):
    rows = bucket_rows((3, *size))
    assert 1 <= rows <= 32
    assert rows & (rows - 1) == 0
    assert rows == 1 or rows * size[0] * size[1] <= 8192


@given(st.integers(1, 50), st.data())
def test_intermediates_are_spread_and_end_at_the_last_step(steps, data):
    count = data.draw(st.integers(1, steps))
    kept = settle_kept(count, steps)
    assert len(set(kept)) == count
    assert kept[-1] == steps
    assert kept[0] >= 1
