"""The plan: what is chosen from the data, and what does not fit it."""

import pytest
import torch

from reverie.base.errors import UsageError
from reverie.data import open_dataset
from reverie.training.config import TrainConfig
from reverie.training.plan import attending, make_plan


@pytest.fixture(scope="module")
def digits():
    return open_dataset("digits")


def plan(data, **settings):
    return make_plan(TrainConfig(out="x", **({"device": "cpu"} | settings)), data)


def test_the_networks_levels_follow_the_size(digits):
    assert plan(digits).card.network.config["channels"] == [32, 64]
    assert plan(open_dataset("shapes:32,count=4")).card.network.config["channels"] == [32, 64, 64]
    assert plan(open_dataset("shapes:64,count=4")).card.network.config["channels"] == [32, 64, 64, 128]


def test_attention_starts_at_sixteen_pixels():
    assert attending(3, 28) == (False, True, False)
    assert attending(2, 8) == (True, False)
    assert attending(4, 64) == (False, False, True, False)
    assert not any(attending(2, 512))


def test_the_classes_are_the_datas_and_one_label_more(digits):
    made = plan(digits)
    assert len(made.card.classes) == 10
    assert made.card.network.config["num_class_embeds"] == 11
    without = plan(digits, labels=False)
    assert without.card.classes == ()
    assert without.card.network.config["num_class_embeds"] is None


def test_a_learned_variance_doubles_the_output(digits):
    made = plan(digits, learned_variance=True, objective="hybrid")
    assert made.card.network.config["out_channels"] == 2
    assert made.card.learned_variance


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"schedule": "vp", "timesteps": 100}, "belong to a table"),
        ({"schedule": "edm", "zero_snr": True}, "belong to a table"),
        ({"schedule": "vp", "objective": "vlb"}, "needs a table"),
        ({"zero_snr": True, "prediction": "eps"}, "has no meaning"),
        ({"schedule": "flow", "prediction": "eps"}, "has no meaning"),
        ({"attention": (True, False, True)}, "names 3 levels"),
    ],
)
def test_what_does_not_fit_is_refused(digits, settings, words):
    with pytest.raises(UsageError, match=words):
        plan(digits, **settings)


def test_a_device_that_is_not_there_is_refused(digits):
    for name in ("tpu9", "meta", "cpu:1", *([] if torch.cuda.is_available() else ["cuda"])):
        with pytest.raises(UsageError, match=f"device {name} is not there"):
            plan(digits, device=name)


def test_the_plan_speaks(digits):
    assert any("1797 images of 8x8 grey, 10 classes" in line for line in plan(digits).lines())


def test_a_transformers_patches_follow_the_size(digits):
    made = plan(digits, network="dit", preset="tiny").card.network
    assert made.name == "dit"
    assert (made.config["patch"], made.config["width"], made.config["num_class_embeds"]) == (1, 128, 11)
    large = plan(open_dataset("shapes:64,count=4"), network="dit", layers=3, widths=(96,), head_dim=24).card.network
    assert [large.config[name] for name in ("patch", "width", "depth", "heads")] == [4, 96, 3, 4]
    assert any("patches of 1x1, width 128" in line for line in plan(digits, network="dit", preset="tiny").lines())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"attention": (True, False)}, "dit has neither"),
        ({"widths": (32, 64)}, "one width"),
        ({"preset": "xs"}, "edm2's"),
        ({"objective": "mean-flow", "schedule": "flow", "prediction": "velocity"}, "no place"),
        ({"network": "edm2", "patch": 2}, "edm2 has none"),
    ],
)
def test_what_a_transformer_has_not_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(out="x", **({"network": "dit"} | settings))


def test_a_transformer_reads_captions():
    network = plan(open_dataset("shapes:32,count=40"), network="dit", preset="tiny", captions=True).card.network
    assert network.name == "captioned"
    assert network.config["dit"]["patch"] == 2
    assert network.config["words"]["width"] == 128


def test_heads_that_do_not_divide_are_refused(digits):
    with pytest.raises(UsageError, match="do not divide into heads of 12"):
        plan(digits, network="dit", widths=(64,), head_dim=12)


def test_patches_leave_fewer_levels():
    """Of 32 pixels a side, 16 patches of two: two levels, not three, and attention where 16 or fewer are left."""
    shapes = open_dataset("shapes:32,count=40")
    unet = plan(shapes, patch=2).card.network.config
    assert (unet["patch"], len(unet["channels"])) == (2, 2)
    assert plan(shapes, patch=2, captions=True).card.network.config["unet"]["attention"] == [True, True]
    assert "patch" not in plan(shapes).card.network.config


def test_captions_bring_positions_and_a_scaling_time():
    """What a U-Net needs to put things where words say; a card from before has neither, and stays what it was."""
    shapes = open_dataset("shapes:32,count=40")
    network = plan(shapes, captions=True).card.network
    assert network.name == "captioned"
    assert network.config["unet"]["positions"]
    assert network.config["unet"]["resnet_time_scale_shift"] == "scale_shift"
    some = plan(shapes, captions=True, widths=(8, 16, 16), attention=(False, False, True)).card.network.config["unet"]
    assert some["attention"] == [False, False, True]  # what is asked for is what there is
    added = plan(shapes, captions=True, time_scale_shift=False).card.network.config["unet"]
    assert added["resnet_time_scale_shift"] == "default"
    alone = plan(shapes).card.network.config
    assert "positions" not in alone
    assert alone["resnet_time_scale_shift"] == "default"
