"""Shapes: every scene can be read back from its picture."""

import pytest
import torch

from reverie.base.errors import UsageError
from reverie.data import open_dataset
from reverie.data.reading import read_scene


@pytest.mark.parametrize("size", [32, 64])
def test_what_is_drawn_can_be_read(size):
    """At least 99.5 % of 200 scenes; a figure without chance, as scene i is fixed."""
    shapes = open_dataset(f"shapes:{size},count=200")
    images = shapes.images(range(200))
    right = sum(read_scene(images[i]).scene.words == shapes.truth(i).words for i in range(200))
    assert right >= 199


def test_an_empty_picture_shows_nothing():
    white = torch.full((3, 32, 32), 255, dtype=torch.uint8)
    assert read_scene(white).scene.caption == "nothing"


def test_noise_is_no_scene():
    noise = torch.randint(0, 256, (3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    reading = read_scene(noise)
    assert not reading.scene.shapes or max(reading.misfits) > 0.3


def test_a_scene_is_a_function_of_its_seed_and_index():
    few, many = open_dataset("shapes:32,count=5,seed=3"), open_dataset("shapes:32,count=50,seed=3")
    assert torch.equal(few.images([4]), many.images([4]))
    assert few.caption(4) == many.caption(4)
    assert open_dataset("shapes:32,count=5,seed=4").caption(4) != few.caption(4)


def test_the_resolution_does_not_change_the_scene():
    small, large = open_dataset("shapes:32,count=9"), open_dataset("shapes:128,count=9")
    assert [small.caption(i) for i in range(9)] == [large.caption(i) for i in range(9)]


@pytest.mark.parametrize("spec", ["shapes:big", "shapes:32,count=0", "shapes:32,colour=red"])
def test_wrong_options_are_refused(spec):
    with pytest.raises(UsageError, match="shapes"):
        open_dataset(spec)


def test_the_splits_have_no_words_in_common():
    train, other = (open_dataset(f"shapes:16,count=400,split={split}") for split in ("train", "held-out"))
    groups = [{str(group) for i in range(400) for group in data.truth(i).groups} for data in (train, other)]
    assert len(groups[0]) > 300
    assert len(groups[1]) > 50
    assert not groups[0] & groups[1]
    assert train.fingerprint != other.fingerprint
    with pytest.raises(UsageError, match="split is 'test'"):
        open_dataset("shapes:32,split=test")
