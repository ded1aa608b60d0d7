"""Guidance on its way from the request to the denoiser: what runs, how often, what is refused, what is recorded."""

import json
import math

import pytest
import torch

from reverie.api import save
from reverie.base.errors import ModelFileError, UsageError
from reverie.diffusion.registry import samplers
from reverie.models import guiding
from reverie.models.card import ScheduleSpec
from reverie.models.load import load
from reverie.models.model import Model
from reverie.models.pictures import write_pictures
from reverie.models.provenance import again
from reverie.models.sampling import prepared
from reverie.networks.attention import unmixed

CLASSES = {"classes": ("zero", "one", "two")}


@pytest.fixture
def worse(make):
    """A model of the same shape, schedule and classes as the one of three classes, with other weights."""
    return make({"num_class_embeds": 4}, seed=7, **CLASSES)


def counted(model: Model) -> list[int]:
    """Return the rows of each call of a model's network, as they come."""
    rows: list[int] = []
    model.denoiser.network.register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))
    return rows


def requests(worse):
    """Return requests for guidance of each kind, and of several at once."""
    return {
        "free": {"classes": "one", "guidance": 3.0},
        "perturbed": {"perturbed": 2.0},
        "perturbed of a class": {"classes": "one", "guidance": 1.0, "perturbed": 2.0},
        "perturbed of no class": {"classes": "one", "guidance": 0.0, "perturbed": 2.0},
        "both": {"classes": "one", "guidance": 3.0, "perturbed": 2.0, "guidance_rescale": 0.7},
        "auto": {"classes": "one", "bad": worse, "auto_guidance": 2.0},
        "auto of no class": {"bad": worse, "auto_guidance": 2.0, "guidance_rescale": 1.0},
        "auto and perturbed": {"classes": "one", "bad": worse, "auto_guidance": 2.0, "perturbed": 1.0},
    }


KINDS = [*requests(None)]


# What runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_denoiser_is_the_formula(classy, worse, kind):
    """Every kind's difference is taken from the estimate for what is asked for, outside of the interval no one's."""
    request = requests(worse)[kind]
    plan = classy.plan(2, steps=4, clip=False, **request, guidance_interval=(0.2, 0.8))
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((2,), 0.5).double()
    w, one = request.get("guidance"), torch.tensor([1, 1])
    none = torch.tensor([3, 3])
    asked = {"label": one if "classes" in request and w != 0 else none}
    with torch.no_grad():
        found = prepared(classy.denoiser, plan, range(2), torch.device("cpu"))
        plain = classy.denoiser(x, t, asked).x0
        want = plain.clone()
        if w not in (None, 0.0, 1.0):
            want += (w - 1) * (plain - classy.denoiser(x, t, {"label": none}).x0)
        if "bad" in request:
            want += plain - worse.denoiser(x, t, asked).x0
        if "perturbed" in request:
            network = classy.denoiser.network
            assert guiding.broken(network) == [network.mid_block.attentions[0]]
            with unmixed(guiding.broken(network)):
                want += request["perturbed"] * (plain - classy.denoiser(x, t, asked).x0)
        if (phi := request.get("guidance_rescale")) is not None:
            ratio = plain.flatten(1).std(1) / want.flatten(1).std(1)
            want *= (phi * ratio + 1 - phi)[:, None, None, None]
        assert (want - plain).abs().max() > 1e-3
        torch.testing.assert_close(found(x, t).x0, want, rtol=1e-4, atol=1e-4)
        late = torch.full((2,), 0.9).double()
        torch.testing.assert_close(found(x, late).x0, classy.denoiser(x, late, asked).x0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("interval", [None, (0.3, 0.7)])
def test_the_plan_counts_what_the_networks_are_asked(classy, worse, kind, interval):
    rows, further = counted(classy), counted(worse)
    request = requests(worse)[kind] | {"guidance_interval": interval, "sampler": "heun", "exact": False}
    samples = classy.sample(2, steps=5, **request)
    assert sum(rows) + sum(further) == 2 * classy.plan(2, steps=5, **request).evaluations
    assert samples.images.isfinite().all()


@pytest.mark.parametrize("sampler", [name for name in samplers if name != "mean-flow"])
def test_a_samplers_calls_within_an_interval_are_counted_as_they_are_made(make, sampler):
    """Two-stage samplers ask at times between the steps, too: these count where they lie."""
    model = make({"num_class_embeds": 4}, **CLASSES)
    rows = counted(model)
    request = {"classes": "two", "guidance": 2.0, "guidance_interval": (0.25, 0.75), "exact": False}
    plan = model.plan(1, steps=6, sampler=sampler, **request)
    if plan.sampler.adaptive:
        assert plan.evaluations == plan.calls  # the least: its way depends on what it meets
        return
    model.execute(plan)
    assert sum(rows) == plan.evaluations
    assert plan.calls < plan.evaluations < 2 * plan.calls
    assert guiding.count_within(plan.sampler, model.denoiser.schedule, plan.grid, (0.0, 1.0)) == plan.calls


def test_a_picture_is_the_same_in_any_company_whatever_guides_it(classy, worse):
    for kind in ("both", "auto and perturbed"):
        request = requests(worse)[kind] | {"guidance_interval": (0.1, 1.0), "steps": 2}
        alone = classy.sample(1, seed=5, **request).images
        among = classy.sample(5, seed=2, **request).images
        assert torch.equal(alone[0], among[3])


def test_each_of_them_changes_the_picture_and_none_does_by_default(classy, worse):
    plain = {"classes": "one", "guidance": 3.0, "steps": 4, "clip": False, "exact": False}
    first = classy.sample(1, **plain).images
    for change in ({"guidance_interval": (0.3, 0.7)}, {"guidance_rescale": 0.7}, {"perturbed": 1.0}):
        assert (classy.sample(1, **plain | change).images - first).abs().max() > 1e-4
    for nothing in ({"guidance_interval": (0, 1)}, {"guidance_rescale": 0.0}, {"perturbed": 0}):
        assert torch.equal(classy.sample(1, **plain | nothing).images, first)
        assert classy.plan(1, **plain | nothing).settings() == classy.plan(1, **plain).settings()


def test_a_network_without_a_middle_has_all_of_its_attention_broken(make):
    model = make({"middle": "none"})
    assert len(guiding.broken(model.denoiser.network)) == len(guiding.pixel_attentions(model.denoiser.network)) > 1
    assert not torch.equal(model.sample(1, steps=2, perturbed=2.0).images, model.sample(1, steps=2).images)


def test_dropout_is_off_in_the_worse_model_and_on_again_after(classy, worse):
    worse.denoiser.network.train()
    seen = []
    watch = lambda progress: seen.append(worse.denoiser.network.training)  # noqa: E731
    classy.sample(1, steps=1, bad=worse, auto_guidance=2.0, callback=watch)
    assert seen == [False]
    assert worse.denoiser.network.training


def test_it_says_what_will_run(classy, worse):
    said = classy.plan(1, steps=10, classes="one", guidance=2.0, perturbed=1.5, guidance_rescale=0.7,
                       guidance_interval=(0.2, 0.8)).sentence()  # fmt: skip
    assert said.endswith("guidance 2.0, perturbed 1.5, rescaled 0.7 for t in (0.2, 0.8]: 22 evaluations each")
    said = classy.plan(1, steps=10, bad=worse, auto_guidance=2.0).sentence()
    assert said.endswith("autoguidance 2: 20 evaluations each")


# What is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"guidance_interval": (0.2, 0.8)}, "guidance_interval has no effect at guidance None"),
        ({"classes": "one", "guidance": 1.0, "guidance_interval": (0.2, 0.8)}, "no effect at guidance 1.0"),
        ({"classes": "one", "guidance": 0.0, "guidance_rescale": 0.5}, "guidance_rescale has no effect"),
        ({"perturbed": 0.0, "guidance_rescale": 0.5}, "guidance_rescale has no effect"),
        ({"perturbed": 1.0, "guidance_interval": (0.8, 0.2)}, r"guidance_interval is 0.8,0.2; it must be two times"),
        ({"perturbed": 1.0, "guidance_interval": (0.2, 1.5)}, "two times"),
        ({"perturbed": 1.0, "guidance_interval": [0.2]}, "two times"),
        ({"perturbed": 1.0, "guidance_interval": (float("nan"), 0.5)}, "two times"),
        ({"perturbed": 1.0, "guidance_interval": (0.01, 0.02), "steps": 4}, "no step asks the model at a time"),
        ({"perturbed": float("inf")}, "perturbed is inf"),
        ({"perturbed": 1.0, "guidance_rescale": 1.5}, r"guidance_rescale is 1.5; it must lie in \[0, 1\]"),
        ({"perturbed": 1.0, "guidance_rescale": True}, "guidance_rescale is True"),
        ({"auto_guidance": 2.0}, "auto_guidance is given without bad"),
    ],
)
def test_what_is_wrong_or_without_effect_is_refused(classy, request_, words):
    with pytest.raises(UsageError, match=words) as caught:
        classy.plan(1, **request_)
    assert "\n" not in str(caught.value)


def test_a_network_without_attention_has_none_to_break(make):
    model = make({"attention": [False, False], "middle": "none"})
    with pytest.raises(UsageError, match="no self-attention to perturb"):
        model.plan(1, perturbed=1.0)


def test_a_model_that_is_told_its_guidance_takes_no_other(classy):
    spec = classy.card.network
    card = classy.card.model_copy(
        update={"network": spec.model_copy(update={"config": {**spec.config, "numbers": ("guidance",)}})}
    )
    with pytest.raises(UsageError, match="told it as a number"):
        Model(classy.denoiser, card).plan(1, classes="one", guidance=2.0, perturbed=1.0)


def test_a_worse_model_must_be_alike(classy, worse, make):
    large = make({"num_class_embeds": 4}, shape=(1, 16, 16), **CLASSES)
    others = {
        "given without auto_guidance": (worse, {}),
        "auto_guidance is 1": (worse, {"auto_guidance": 1}),
        "guide by one of them": (worse, {"auto_guidance": 2.0, "classes": "one", "guidance": 2.0}),
        "bad is a model of 1x16x16": (large, {"auto_guidance": 2.0}),
        "other classes": (make(), {"auto_guidance": 2.0}),
        "different schedules": (
            make({"num_class_embeds": 4}, schedule=ScheduleSpec(name="cosine"), **CLASSES), {"auto_guidance": 2.0}
        ),
    }  # fmt: skip
    for words, (bad, request) in others.items():
        with pytest.raises(UsageError, match=words):
            classy.plan(1, bad=bad, **request)


# What is recorded ----------------------------------------------------------------------------------


def test_the_record_makes_the_picture_again_bit_for_bit(classy, worse, tmp_path):
    for kind in ("perturbed", "both"):
        samples = classy.sample(2, seed=3, steps=2, guidance_interval=(0.2, 1.0), **requests(worse)[kind])
        path = write_pictures(samples, tmp_path)[1]
        repeated = again(path, classy)
        assert torch.equal(repeated.uint8[0], samples.uint8[1])
        assert repeated.record == json.loads(json.dumps(samples.record_of(1)))


def test_the_worse_model_is_recorded_by_path_and_sha256(classy, worse, make, tmp_path):
    good, bad = save(classy, tmp_path / "good", "native"), save(worse, tmp_path / "bad", "native")
    samples = load(good).sample(1, steps=1, classes="one", bad=bad, auto_guidance=2.0)
    assert samples.record["bad"] == {"source": str(bad), "sha256": worse.digest}
    path = write_pictures(samples, tmp_path)[0]
    repeated = again(path)
    assert torch.equal(repeated.uint8, samples.uint8)
    assert repeated.record == json.loads(json.dumps(samples.record))
    moved = bad.rename(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=r"was guided by the model .*bad, which is not there"):
        again(path)
    assert torch.equal(again(path, bad=moved).uint8, samples.uint8)
    with pytest.raises(ModelFileError, match="not the model that guided"):
        again(path, bad=good)


@pytest.mark.parametrize("value", ["3", None, True, math.nan, math.inf])
def test_what_is_no_finite_number_is_refused(value):
    with pytest.raises(UsageError, match="guidance is"):
        guiding.finite("guidance", value)
