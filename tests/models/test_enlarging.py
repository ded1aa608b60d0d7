"""The second pass: larger, from the first one's picture, at the strength that was asked for, and made again."""

import pytest
import torch
import torch.nn.functional as F

from reverie.base.errors import UsageError
from reverie.base.randomness import Noise
from reverie.models.formats import write_model
from reverie.models.load import load
from reverie.models.pictures import write_pictures
from reverie.models.provenance import again

HOW = {"steps": 3, "sampler": "ddim"}


def test_the_second_pass_starts_from_the_first_at_that_time(model):
    """x_t = alpha U(x_0) + sigma eps, with noise of the sample's seed: looked at where the network sees it."""
    seen = []
    small = model.sample(1, seed=5, **HOW).images
    model.denoiser.network.register_forward_pre_hook(lambda net, given: seen.append(given[0][0]))
    model.sample(1, seed=5, upscale=2, upscale_strength=0.4, **HOW)
    assert [tuple(x.shape[-2:]) for x in seen] == [(8, 8)] * 3 + [(16, 16)] * 3
    alpha, sigma = (value.float() for value in model.denoiser.schedule.marginal(torch.tensor([0.4]).double()))
    start = F.interpolate(small, (16, 16), mode="bicubic", align_corners=False)
    assert torch.allclose(seen[3], (alpha * start + sigma * Noise([5])((1, 16, 16), [0]))[0], atol=1e-5)


def test_a_picture_is_the_same_alone_and_among_others(classy):
    how = {**HOW, "guidance": 2.0, "upscale": 2}
    together = classy.sample(3, classes=[0, 1, 2], seed=7, **how)
    assert together.images.shape == (3, 1, 16, 16)
    assert torch.equal(classy.sample(1, classes=1, seed=8, **how).images[0], together.images[1])


def test_the_plan_counts_and_says_both_passes(classy):
    plan = classy.plan(1, classes=0, guidance=2.0, upscale=3, guidance_interval=(0.6, 1.0), **{**HOW, "steps": 6})
    assert plan.second.size == (24, 24)
    assert plan.second.guided_calls == 0
    assert plan.evaluations == 6 + plan.guided_calls + 6
    assert "and again at 24x24 from t = 0.5" in plan.sentence()
    settings = plan.settings()
    assert (settings["size"], settings["upscale"], settings["upscale_strength"]) == ([8, 8], 3, 0.5)


def test_it_is_made_again(model, tmp_path):
    path = write_model(model, tmp_path / "model", "native")
    made = load(path).sample(1, seed=2, upscale=2, upscale_strength=0.7, **HOW)
    file = write_pictures(made, tmp_path / "out")[0]
    assert torch.equal(again(file).images, made.images)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"upscale": 1}, "whole number in 2..8"),
        ({"upscale": 2, "upscale_strength": 0.0}, r"must be in \(0, 1\]"),
        ({"upscale_strength": 0.5}, "without upscale"),
    ],
)
def test_what_is_out_of_range_or_without_effect_is_refused(model, how, said):
    with pytest.raises(UsageError, match=said):
        model.plan(1, **how)


def test_an_edit_has_no_second_pass(model):
    with pytest.raises(UsageError, match="drawn from noise"):
        model.edit(torch.zeros(1, 8, 8, dtype=torch.uint8), upscale=2)
