"""The model and its samples: digests, records, bytes, pictures."""

import json
import math

import pytest
import torch

from reverie.base.errors import NonFiniteError, UsageError
from reverie.models.model import Samples, to_pil, to_uint8
from reverie.models.provenance import Record


def test_the_digest_names_the_weights_and_nothing_else(make):
    model, same, other = make(seed=1), make(seed=1), make(seed=2)
    assert model.digest == same.digest != other.digest
    with torch.no_grad():
        next(same.denoiser.network.parameters()).view(-1)[0].add_(1e-6)
    assert model.digest != same.digest  # though it was asked for before
    assert make({"dropout": 0.1}, seed=1).digest == model.digest


def test_the_digest_does_not_depend_on_the_layout(model):
    before = model.digest
    model.denoiser.network.to(memory_format=torch.channels_last)
    assert model.digest == before


def test_the_record_is_json_and_complete(classy):
    samples = classy.sample(3, seed=4, classes="one", guidance=2, eta=0.5, steps=2)
    record = json.loads(json.dumps(samples.record))
    assert record["model"]["sha256"] == classy.digest
    assert record["seeds"] == [4, 5, 6]
    assert record["options"] == {"eta": 0.5}
    Record.model_validate(record)
    assert samples.record_of(1) == record | {"n": 1, "seeds": [5], "classes": ["one"]}


@pytest.mark.parametrize(("guidance", "exact"), [(None, True), (None, False)])
def test_the_batch_size_is_recorded_where_it_matters(model, guidance, exact):
    record = model.sample(3, steps=1, exact=exact, batch_size=2).record
    assert record["batch_size"] == (None if exact else 2)


def test_bytes_are_rounded_and_kept_in_range():
    x = torch.tensor([-1.5, -1.0, -0.999, 0.0, 0.0039, 1.0, 7.0])
    assert to_uint8(x).tolist() == [0, 0, 0, 128, 128, 255, 255]
    every = torch.arange(256).float() / 127.5 - 1
    assert to_uint8(every).tolist() == list(range(256))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_no_byte_stands_for_what_is_no_number(bad):
    with pytest.raises(NonFiniteError, match="1 of the 2 numbers"):
        to_uint8(torch.tensor([0.0, bad]))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_pictures_have_their_mode(channels, mode):
    image = torch.randint(0, 256, (channels, 3, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    picture = to_pil(image)
    assert (picture.mode, picture.size) == (mode, (5, 3))
    pixel = picture.getpixel((4, 1))
    assert (list(pixel) if channels > 1 else [pixel]) == image[:, 1, 4].tolist()


def test_other_channels_are_no_picture():
    with pytest.raises(UsageError, match="5 channels"):
        to_pil(torch.zeros(5, 2, 2, dtype=torch.uint8))


def test_points_are_no_pictures():
    with pytest.raises(UsageError, match="points"):
        _ = Samples(torch.zeros(3, 2), torch.arange(3), None, {}).uint8


def test_samples_are_pictures(model):
    samples = model.sample(2, steps=1)
    assert len(samples) == 2
    assert [picture.size for picture in samples.pil()] == [(8, 8)] * 2
    assert samples.images.abs().max() <= 1
    assert "1x8x8" in repr(model)
