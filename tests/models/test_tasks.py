"""Tasks of consistency models: the result agrees with what is known, and an interpolation's ends are its samples."""

import pytest
import torch
from PIL import Image

from reverie.base.errors import DataError, UsageError
from reverie.models.builders import build
from reverie.models.card import Card, NetworkSpec, SamplingDefaults
from reverie.models.model import Model
from reverie.models.pictures import write_pictures
from reverie.models.provenance import again, interpolated
from reverie.models.tasks import agreement, known_of, within

FEW = SamplingDefaults(sampler="consistency", grid="angle", steps=2)


def make(channels=3, sampling=FEW, seed=0):
    torch.manual_seed(seed)
    network = NetworkSpec(config={"in_channels": channels, "channels": [8, 16]})
    made = Model(build(card := Card(shape=(channels, 8, 8), network=network, sampling=sampling)), card)
    for p in made.denoiser.network.parameters():
        torch.nn.init.normal_(p, std=0.02)
    return made


def picture(*shape, seed=1):
    # Neither black nor white, so that what is put back stays within the range of pictures.
    return torch.randint(64, 192, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize("factor", [None, 2])
def test_the_means_of_blocks_are_those_of_the_small_picture(factor):
    small = picture(3, 4, 4)
    made = make().edit(small, 2, task="super-resolution", factor=factor, seed=3, steps=4)
    assert made.images.shape == (2, 3, 8, 8)
    assert not torch.equal(made.images[0], made.images[1])
    inside = (made.images.abs() < 1).all(1, keepdim=True)
    assert inside.float().mean() > 0.1  # a network of noise leaves the range; where it does not, the means hold
    whole = torch.nn.functional.avg_pool2d(inside.float(), 2)[:, 0] == 1
    due = (small / 127.5 - 1).expand(2, -1, -1, -1)
    means = torch.nn.functional.avg_pool2d(made.images, 2)
    torch.testing.assert_close(means.movedim(1, -1)[whole], due.movedim(1, -1)[whole], rtol=0, atol=1e-5)


def test_the_brightness_is_that_of_the_picture():
    grey = picture(1, 8, 8).expand(3, 8, 8)
    model = make()
    made = model.edit(grey, task="colourise", seed=3, steps=4)
    given = model.original(grey, task="colourise")
    known = known_of("colourise", given.pixels / 127.5 - 1, 1)
    inside = (made.images.abs() < 1).all(1)
    off = (known.measurement.measure(made.images) - known.y)[:, 0].abs()
    assert inside.any()
    assert float(off[inside].max()) < 1e-5
    assert agreement(known, known.picture[None]) < 1e-6


def test_a_picture_that_leaves_the_range_is_brought_back_and_still_agrees():
    known = known_of("super-resolution", torch.full((1, 2, 2), -0.97), 4)
    made = within(known, known.measurement.put(torch.randn(3, 1, 8, 8), known.y))
    assert float(made.min()) == -1
    assert agreement(known, made) < 0.25 / 127.5
    assert agreement(known, known.measurement.put(torch.randn(3, 1, 8, 8), known.y).clamp(-1, 1)) > 0.1


def test_inpainting_keeps_what_the_mask_leaves():
    image, mask = picture(3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.uint8)
    mask[:, :, 4:] = 255
    made = make().edit(image, task="inpaint", mask=mask, seed=3)
    assert torch.equal(made.uint8[0, :, :, :4], image[:, :, :4])
    assert made.record["steps"] == 16


def test_an_interpolation_goes_from_one_sample_to_the_other():
    model = make()
    made = model.interpolate(5, 9, 5)
    for end, seed in ((0, 5), (-1, 9)):
        torch.testing.assert_close(made.images[end], model.sample(1, seed=seed).images[0], rtol=0, atol=1e-6)
    steps = (made.images[1:] - made.images[:-1]).flatten(1).norm(dim=1)
    whole = (made.images[-1] - made.images[0]).norm()
    assert float(steps.min()) > 0
    assert float(steps.max()) < float(whole)  # no jump


def test_pictures_of_tasks_are_made_again(tmp_path):
    model = make()
    ends = write_pictures(model.sample(2, seed=4), tmp_path / "ends")
    Image.fromarray(picture(3, 4, 4).permute(1, 2, 0).numpy()).save(tmp_path / "small.png")
    larger = model.edit(tmp_path / "small.png", task="super-resolution", seed=2)
    (file,) = write_pictures(larger, tmp_path / "larger")
    assert torch.equal(again(file, model).uint8, larger.uint8)
    way = interpolated(model, *ends, 3)
    files = write_pictures(way, tmp_path / "way")
    assert torch.equal(again(files[1], model).uint8[0], way.uint8[1])
    with pytest.raises(UsageError, match="is not one sample from noise"):
        interpolated(model, files[1], ends[1], 3)
    with pytest.raises(UsageError, match="by another model"):
        interpolated(make(seed=1), *ends, 3)
    with pytest.raises(DataError, match="holds no record"):
        interpolated(model, tmp_path / "small.png", ends[1], 3)
    (other,) = write_pictures(model.sample(1, seed=5, steps=3), tmp_path / "other")
    with pytest.raises(UsageError, match=r"other ways \(steps\)"):
        interpolated(model, ends[0], other, 3)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"task": "inpaint"}, "needs a mask"),
        ({"task": "colourise", "mask": torch.zeros(1, 8, 8, dtype=torch.uint8)}, "takes no mask"),
        ({"task": "colourise", "strength": 0.5}, "strength has no effect on a task"),
        ({"task": "colourise", "factor": 2}, "factor is 2, which has no effect"),
        ({"task": "super-resolution"}, "is no multiple"),
        ({"task": "super-resolution", "factor": 1}, "at least 2"),
        ({"task": "interpolate"}, "between two samples"),
        ({"task": "paint"}, "it must be one of"),
    ],
)
def test_what_is_refused(request_, said):
    with pytest.raises(UsageError, match=said):
        make().edit(picture(3, 8, 8), **request_)


def test_models_of_many_steps_and_grey_ones_are_refused():
    many = make(sampling=SamplingDefaults())
    with pytest.raises(UsageError, match="is for consistency models"):
        many.edit(picture(3, 8, 8), task="colourise")
    with pytest.raises(UsageError, match="--mask alone inpaints with any model"):
        many.edit(picture(3, 8, 8), task="inpaint", mask=torch.zeros(1, 8, 8, dtype=torch.uint8))
    with pytest.raises(UsageError, match="is for consistency models"):
        many.interpolate(1, 2)
    with pytest.raises(UsageError, match="have 1 channels"):
        make(channels=1).edit(picture(1, 8, 8), task="colourise")
    with pytest.raises(UsageError, match="at least 2 pictures"):
        make().interpolate(1, 2, 1)
