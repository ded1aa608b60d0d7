"""Editing: what is known stays to the last bit, and strength means what it says."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from reverie.base.errors import DataError, UsageError
from reverie.models.builders import build
from reverie.models.card import Card, CodecSpec, NetworkSpec, SamplingDefaults
from reverie.models.codec import build_codec
from reverie.models.editing import as_pixels, read_original
from reverie.models.model import Model
from reverie.models.pictures import write_pictures
from reverie.models.provenance import again


def make(codec=False, fills=False, seed=0):
    torch.manual_seed(seed)
    channels = 4 if codec else 3
    network = {"in_channels": 2 * channels + 1 if fills else channels, "out_channels": channels, "channels": [8, 16]}
    spec = CodecSpec(config={"channels": [8, 8], "latent_channels": 4}) if codec else None
    card = Card(shape=(channels, 8, 8), network=NetworkSpec(config=network), codec=spec,
                sampling=SamplingDefaults(steps=3, clip=False))  # fmt: skip
    made = Model(build(card), card, codec=None if spec is None else build_codec(spec).freeze())
    for p in made.denoiser.network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return made


def picture(height=8, width=8, seed=1):
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def half(height=8, width=8):
    mask = torch.zeros(1, height, width, dtype=torch.uint8)
    mask[:, :, width // 2 :] = 255
    return mask


@pytest.mark.parametrize("codec", [False, True])
@pytest.mark.parametrize("fills", [False, True])
def test_what_the_mask_leaves_is_the_picture_to_the_last_bit(codec, fills):
    image, mask = picture(11, 13), half(11, 13)
    made = make(codec, fills).edit(image, 2, mask=mask, seed=3).uint8
    assert made.shape == (2, 3, 11, 13)
    assert torch.equal(made[:, :, :, :6], image[None, :, :, :6].expand(2, -1, -1, -1))
    assert not torch.equal(made[0, :, :, 6:], image[:, :, 6:])
    assert not torch.equal(made[0], made[1])


def test_strength_nothing_is_the_picture_and_strength_is_time():
    model, image = make(), picture()
    assert torch.equal(model.edit(image, strength=0).uint8[0], image)
    plan = model.plan_edit(model.original(image), 1, strength=0.6, steps=4)
    assert plan.grid[0] == 0.6
    assert plan.steps == plan.calls == 4
    assert "from t = 0.6" in plan.sentence()


def test_the_start_is_the_picture_at_that_time():
    """x_t = alpha_t x_0 + sigma_t eps with the seed's own noise, seen by the first call of the network."""
    from reverie.base.randomness import Noise

    model, image, seen = make(), picture(), []
    model.denoiser.network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0]), with_kwargs=True
    )
    model.edit(image, strength=0.5, seed=7, exact=False)
    alpha, sigma = model.denoiser.schedule.marginal(torch.tensor([0.5], dtype=torch.float64))
    wanted = alpha.float() * (image / 127.5 - 1) + sigma.float() * Noise([7])((3, 8, 8), [0])[0]
    torch.testing.assert_close(seen[0][0], wanted)


def test_a_weaker_edit_stays_nearer():
    model, image = make(), picture()
    off = [
        float((model.edit(image, strength=s, seed=2).uint8[0].float() - image).abs().mean()) for s in (0.05, 0.4, 0.9)
    ]
    assert off[0] < off[1] < off[2]


def test_a_picture_is_the_same_alone_and_among_others():
    model, image = make(codec=True), picture()
    alone = model.edit(image, mask=half(), seed=5).images
    among = model.edit(image, 3, mask=half(), seed=[4, 5, 9]).images
    assert torch.equal(alone[0], among[1])


def test_a_filling_network_sees_the_mask_and_what_it_leaves():
    model, image, seen = make(fills=True), picture(), []
    model.denoiser.network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["beside"]), with_kwargs=True
    )
    model.edit(image, mask=half(), exact=False)
    mask, left = seen[0][0, :1], seen[0][0, 1:]
    assert torch.equal(mask, (half() == 255).float())
    torch.testing.assert_close(left, (image / 127.5 - 1) * (1 - mask))


def test_files_with_transparency_and_the_record_that_makes_it_again(tmp_path):
    image = Image.fromarray(picture().permute(1, 2, 0).numpy(), "RGB").convert("RGBA")
    image.putalpha(Image.fromarray(255 - half()[0].numpy()))
    image.save(tmp_path / "clear.png")
    model = make()
    samples = model.edit(tmp_path / "clear.png", seed=1)
    assert torch.equal(samples.uint8[0, :, :, :4], picture()[:, :, :4])
    (path,) = write_pictures(samples, tmp_path / "out")
    assert torch.equal(again(path, model).uint8, samples.uint8)
    Image.fromarray(picture(seed=9).permute(1, 2, 0).numpy(), "RGB").save(tmp_path / "clear.png")
    with pytest.raises(UsageError, match="pixels differ"):
        again(path, model)


def test_what_does_not_go_together_is_refused(tmp_path):
    model, image = make(), picture()
    for request, said in (
        ({"strength": 1.5}, "strength is 1.5"),
        ({"strength": -0.1}, "strength"),
        ({"size": 16}, "size has no effect"),
        ({"mask": half(4, 8)}, "of the picture's size"),
        ({"prompt": "a cat"}, "takes no prompts"),
        ({"mask": 0 * half()}, "black everywhere"),
    ):
        with pytest.raises(UsageError, match=said):
            model.edit(image, **request)
    with pytest.raises(UsageError, match="give a mask"):
        make(fills=True).edit(image)
    with pytest.raises(UsageError, match="picture and a mask"):
        make(fills=True).sample(1)
    with pytest.raises(UsageError, match="no picture"):
        model.edit(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(DataError, match=r"text\.png is no picture"):
        model.edit(tmp_path / "text.png")


def test_pictures_of_every_mode_become_the_models():
    grey = Image.fromarray(picture()[0].numpy())
    assert as_pixels(grey, 3)[0].shape == (3, 8, 8)
    assert as_pixels(grey.convert("P"), 1)[0].shape == (1, 8, 8)
    original = read_original(picture(), None, 3)
    assert original.mask is None
    assert original.record()["mask"] is None


def test_sixteen_bits_become_eight(tmp_path):
    """A Pillow conversion would clip them to 255."""
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    Image.fromarray(deep).save(tmp_path / "deep.png")
    pixels, _, faded = as_pixels(tmp_path / "deep.png", 3)
    assert torch.equal(pixels, torch.from_numpy(np.rint(deep / 257).astype(np.uint8)).expand(3, 8, 8))
    assert not faded
    with pytest.raises(DataError, match="NaN or infinity"):
        as_pixels(Image.fromarray(np.full((2, 2), np.nan, np.float32)), 1)


def test_colour_on_a_grey_model_is_refused_where_it_would_have_to_come_back():
    colour = Image.new("RGB", (8, 8), (200, 10, 10))
    original = read_original(colour, None, 1)
    assert original.faded
    original.check_mask()  # all of it is made anew
    with pytest.raises(UsageError, match="make it grey first"):
        read_original(colour, half()[0, None], 1).check_mask()
    read_original(Image.new("RGB", (8, 8), (9, 9, 9)), half()[0, None], 1).check_mask()


@pytest.mark.parametrize("codec", [False, True])
@pytest.mark.parametrize("fills", [False, True])
def test_outpainting_keeps_the_picture_and_draws_around_it(codec, fills):
    image = picture(8, 10)
    made = make(codec, fills).edit(image, 2, outpaint=(4, 0, 3, 5), seed=3).uint8
    assert made.shape == (2, 3, 13, 17)
    assert torch.equal(made[:, :, :8, 4:14], image.expand(2, -1, -1, -1))
    continued = F.pad(image[None].float(), (4, 3, 0, 5), mode="replicate").to(torch.uint8)
    assert not torch.equal(made[0], continued[0])
    assert not torch.equal(made[0], made[1])


def test_outpainting_and_a_mask_go_together():
    image, mask = picture(), half()
    made = make().edit(image, mask=mask, outpaint=2, seed=1).uint8[0]
    assert torch.equal(made[:, 2:10, 2:6], image[:, :, :4])
    assert not torch.equal(made[:, 2:10, 6:10], image[:, :, 4:])


def test_an_outpainted_picture_is_made_again_from_its_record(tmp_path):
    Image.fromarray(picture().permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    model = make()
    made = model.edit(tmp_path / "a.png", outpaint=(0, 3, 0, 0), seed=4)
    assert made.record["edit"]["outpaint"] == [0, 3, 0, 0]
    file = write_pictures(made, tmp_path / "out")[0]
    assert torch.equal(again(file, model).images, made.images)


@pytest.mark.parametrize("sides", [0, (1, 2), (-1, 0, 0, 0), (0, 0, 0, 0), 10**6])
def test_an_outpainting_of_nothing_or_too_much_is_refused(sides):
    with pytest.raises(UsageError, match="outpaint"):
        make().edit(picture(), outpaint=sides)
    with pytest.raises(UsageError, match="draws nothing"):
        make().edit(picture(), outpaint=2, strength=0)
