"""Prompts: what reaches the network, what is refused, what is recorded."""

import pytest
import torch

from reverie.base.errors import UsageError
from reverie.models.builders import build
from reverie.models.card import Card, NetworkSpec, WordsSpec
from reverie.models.model import Model
from reverie.models.pictures import write_pictures
from reverie.models.provenance import again, parameters_text
from reverie.models.sampling import prepared


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    words = WordsSpec(entries=("a", "red", "star", "#x", "#y"), length=4)
    network = {
        "words": {"vocabulary": 6, "length": 4, "width": 16},
        "unet": {"channels": [8, 16], "attention": [False, True]},
    }
    card = Card(shape=(3, 8, 8), network=NetworkSpec(name="captioned", config=network), text=words)
    made = Model(build(card), card)
    for p in made.denoiser.network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return made


def draw(model, n=1, **request):
    return model.sample(n, steps=3, clip=False, **request).images


def test_a_prompt_draws_the_same_in_any_company(model):
    alone = draw(model, prompt="a red star", guidance=3.0, seed=5)
    among = draw(model, 3, prompt=["red", "a red star", "x"], guidance=3.0, seed=[1, 5, 2])
    assert torch.equal(alone[0], among[1])
    assert not torch.equal(alone[0], draw(model, prompt="red", guidance=3.0, seed=5)[0])


def test_guidance_one_is_the_prompt_alone_and_zero_none(model):
    assert torch.equal(draw(model, prompt="red", guidance=0.0), draw(model))
    between = draw(model, prompt="red", guidance=1.0)
    assert not torch.equal(between, draw(model, prompt="red", guidance=0.0))


def test_the_negative_prompt_is_the_other_end(model):
    """D_w = D_u + w (D_c - D_u): at w = 2 with equal prompts, the prompt alone."""
    same = draw(model, prompt="red", negative_prompt="red", guidance=2.0)
    torch.testing.assert_close(same, draw(model, prompt="red", guidance=1.0))
    assert not torch.equal(draw(model, prompt="red", negative_prompt="star", guidance=2.0),
                           draw(model, prompt="red", guidance=2.0))  # fmt: skip


@pytest.mark.parametrize(
    "prompt",
    ["", " ", "🐱 🐈‍⬛", "\u200fשלמ", "red " * 262_144],
    ids=["", "blank", "emoji", "right to left", "1 MB"],
)
def test_any_text_is_a_prompt(model, prompt):
    """RELIABILITY 6, case 24: the record says it too, and what doesn't fit is said with counts."""
    assert torch.equal(draw(model, prompt=prompt), draw(model, prompt=prompt))
    cut = [
        "the prompt has 1048576 characters; those after the first 65536 are passed over",
        "the prompt is 16384 pieces long, the model reads 4; the last 16380 are cut",
    ]
    remarks = model.conditioner.remarks(prompt)
    assert [remark for remark in remarks if "no caption had" not in remark] == (cut if len(prompt) > 100 else [])


def test_a_text_beyond_a_megabyte_is_refused(model):
    with pytest.raises(UsageError, match="1048576 characters at most"):
        draw(model, prompt="x" * (1 << 20) + "x")


def test_what_would_have_no_effect_is_refused(model):
    for request, said in (
        ({"negative_prompt": "red"}, "no effect"),
        ({"prompt": "red", "negative_prompt": "a", "guidance": 1.0}, "no effect"),
        ({"guidance": 3.0}, "no prompt"),
        ({"prompt": "a\0b"}, "NUL"),
        ({"prompt": ["a", "b"]}, "2 texts"),
        ({"classes": "red"}, "no classes"),
    ):
        with pytest.raises(UsageError, match=said):
            model.plan(1, **request)


def test_a_model_without_words_takes_no_prompt():
    card = Card(shape=(1, 8, 8), network=NetworkSpec(config={"in_channels": 1, "channels": [8, 8]}))
    with pytest.raises(UsageError, match="takes no prompts"):
        Model(build(card, "meta"), card).plan(1, prompt="a cat")


def test_remarks_say_what_does_not_arrive(model):
    said = " ".join(model.conditioner.remarks("a red star x q"))
    assert "'q'" in said
    assert model.conditioner.remarks("a red star") == []
    assert "the last 2 are cut" in " ".join(model.conditioner.remarks("a red star x y x"))


def test_the_picture_says_its_prompt_and_can_be_made_again(model, tmp_path):
    samples = model.sample(2, prompt=["red", "a\nstar"], negative_prompt="x", guidance=2.0, steps=2)
    path = write_pictures(samples, tmp_path)[1]
    text = parameters_text(samples.record_of(1), (8, 8))
    assert text.splitlines()[:2] == ["a star", "Negative prompt: x"]
    repeated = again(path, model)
    assert torch.equal(repeated.uint8[0], samples.uint8[1])
    assert repeated.record["prompts"] == ["a\nstar"]


def test_prompts_go_with_every_kind_of_guidance_and_a_worse_model_reads_them_itself(model, tmp_path):
    """Both networks have encoders of their own: the worse one is told what its own makes of the words."""
    torch.manual_seed(1)
    worse = Model(build(model.card), model.card)
    for p in worse.denoiser.network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, t = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3]).double()

    def estimate(which, **request):
        plan = which.plan(1, prompt="a red star", clip=False, **request)
        with torch.no_grad():
            return prepared(which.denoiser, plan, range(1), torch.device("cpu"), which.conditioner)(x, t).x0

    plain, bad = estimate(model, guidance=1.0), estimate(worse, guidance=1.0)
    found = estimate(model, bad=worse, auto_guidance=3.0)
    torch.testing.assert_close(found, bad + 3 * (plain - bad), rtol=1e-4, atol=1e-4)
    assert (found - plain).abs().max() > 1e-2
    request = {"prompt": "red", "guidance": 2.0, "perturbed": 1.0, "guidance_rescale": 0.5}
    samples = model.sample(1, steps=2, guidance_interval=(0.1, 0.9), **request)
    assert torch.equal(again(write_pictures(samples, tmp_path)[0], model).uint8, samples.uint8)
