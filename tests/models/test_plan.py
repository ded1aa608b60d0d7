"""Plans: what is None comes from the card; what is wrong, unknown or without effect is refused."""

import math

import pytest
import torch

from reverie.base.errors import UsageError
from reverie.base.randomness import MAX_SEED
from reverie.diffusion.samplers.ancestral import DDPM
from reverie.diffusion.samplers.ddim import DDIM
from reverie.models.card import SamplingDefaults, ScheduleSpec

# Where the card decides -----------------------------------------------------------------------------


def test_what_is_not_said_comes_from_the_card(make):
    sampling = SamplingDefaults(
        sampler="ddpm", options={"variance": "large", "offset": 3}, grid="leading", steps=7, clip=2.0
    )
    plan = make(sampling=sampling).plan(2)
    assert (plan.sampler, plan.sampler_name, plan.grid_name, plan.steps) == (DDPM("large"), "ddpm", "leading", 7)
    assert (plan.clip, plan.threshold, plan.guidance, plan.labels, plan.dtype) == (2.0, None, None, None, None)
    assert plan.grid_options == {"offset": 3}
    assert plan.grid[-2].item() * 40 - 1 == pytest.approx(3)
    other = make(sampling=sampling).plan(2, sampler="ddim", grid="trailing")
    assert (other.sampler, other.grid_options) == (DDIM(0.0), {})  # another sampler's and grid's options are not theirs


def test_what_is_said_comes_first(make):
    sampling = SamplingDefaults(sampler="ddpm", options={"variance": "large"}, threshold=0.9)
    plan = make(sampling=sampling).plan(1, variance="small", steps=3, clip=False)
    assert (plan.sampler, plan.steps, plan.clip, plan.threshold) == (DDPM("small"), 3, None, None)


def test_points_are_not_clipped_unless_asked(make):
    model = make()
    model.card = model.card.model_copy(update={"kind": "points", "shape": (2,)})
    assert model.plan(1).clip is None
    assert model.plan(1, clip=3).clip == 3.0
    assert make().plan(1).clip == 1.0


def test_a_table_shorter_than_the_default_is_walked_whole(make):
    assert make(schedule=ScheduleSpec(options={"timesteps": 12})).plan(1).steps == 12


def test_a_learned_variance_is_used(make):
    model = make({"out_channels": 2}, learned_variance=True)
    assert model.plan(1, sampler="ddpm").sampler == DDPM("learned")
    assert model.plan(1, sampler="ddpm", variance="small").sampler == DDPM("small")
    model.sample(1, sampler="ddpm", steps=2)


def test_the_class_brings_the_cards_guidance(make):
    model = make({"num_class_embeds": 3}, classes=("a", "b"), sampling=SamplingDefaults(guidance=3.0))
    assert model.plan(2, classes="b").guidance == 3.0
    assert model.plan(2, classes="b", guidance=0.5).guidance == 0.5
    assert model.plan(2).guidance is None
    assert model.plan(2).labels == (2, 2)


def test_a_class_is_its_name_first_and_its_index_then(make):
    model = make({"num_class_embeds": 4}, classes=("1", "zero", "two"))
    assert model.plan(3, classes=["1", 1, "two"]).labels == (0, 1, 2)
    assert model.plan(1, classes="2").labels == (2,)


def test_a_model_without_a_label_for_no_class(make):
    model = make({"num_class_embeds": 2}, classes=("a", "b"), unconditional=False)
    assert model.plan(1, classes="a").guidance == 1.0
    model.sample(1, classes="a", steps=1)
    with pytest.raises(UsageError, match="needs a class, one of a, b"):
        model.plan(1)
    with pytest.raises(UsageError, match=r"guidance is 2\.0.*no label for no class"):
        model.plan(1, classes="a", guidance=2)


# Refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"steps": 0}, r"steps is 0; it must be a whole number in 1\.\.40"),
        ({"steps": -1}, "steps is -1"),
        ({"steps": 10**9}, r"steps is 1000000000; .* 1\.\.40"),
        ({"steps": 3, "grid": [1.0, 0.5]}, "steps is 3, but the grid has 2"),
        ({"sampler": "ddmi"}, "no sampler .ddmi., did you mean dd"),
        ({"grid": "traling"}, "no grid 'traling', did you mean trailing"),
        ({"eta": 2.0}, r"eta is 2\.0; it must lie in \[0, 1\]"),
        ({"eta": math.nan}, "eta is nan"),
        ({"sampler": "ddpm", "eta": 0.5}, r"eta has no effect here: it belongs to ddim, .*dpm2.* \(sampler ddpm takes"),
        ({"variance": "small"}, "variance has no effect here: it belongs to ddpm"),
        ({"sampler": DDIM(0.5), "eta": 0.1}, "eta is given beside a sampler that has its own"),
        ({"sampler": "ddpm", "variance": "huge"}, "variance.*huge"),
        ({"sampler": "ddpm", "variance": "learned"}, "this model learned none"),
        ({"offset": 1}, "offset has no effect here"),
        ({"grid": "leading", "rho": 3.0}, "rho has no effect here .*grid leading offset"),
        ({"guidence": 2.0}, "guidence has no effect here, did you mean guidance"),
        ({"classes": "seven"}, "no classes"),
        ({"guidance": 2.0}, "no classes to guide to"),
        ({"clip": 0.0}, r"clip is 0\.0; it must be positive"),
        ({"clip": math.inf}, "clip is inf"),
        ({"threshold": 0.0}, r"threshold is 0\.0; .* quantile"),
        ({"threshold": 1.5}, r"threshold is 1\.5"),
        ({"threshold": 0.9, "clip": False}, "clip is off"),
        ({"dtype": "float7"}, "dtype is 'float7'; it must be one of float32, bfloat16, float16"),
        ({"dtype": torch.int64}, "dtype is 'int64'"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"seed": MAX_SEED - 1}, "with n = 3 it must be at most 9223372036854775805"),
        ({"seed": [1, 2]}, "2 seeds for 3 samples"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"intermediates": 41}, "intermediates is 41"),
        ({"intermediates": [0]}, "a step in intermediates is 0"),
    ],
)
def test_what_is_wrong_is_refused_by_name(model, request_, words):
    with pytest.raises(UsageError, match=words) as caught:
        model.sample(3, **request_)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("n", [0, -3, 10**12])
def test_n_is_bounded(model, n):
    with pytest.raises(UsageError, match=f"n, the number of samples, is {n}"):
        model.sample(n)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"classes": "thre"}, r"no class 'thre', did you mean three\? \(known: one, two, three\)"),
        ({"classes": 3}, "no class 3"),
        ({"classes": -1}, "no class -1"),
        ({"classes": ["one"]}, "1 classes for 2 samples"),
        ({"classes": "one", "guidance": math.nan}, "guidance is nan; it must be a finite number"),
        ({"classes": "one", "guidance": math.inf}, "guidance is inf"),
        ({"guidance": 2.0}, "no class is asked for"),
    ],
)
def test_classes_are_refused_by_name(make, request_, words):
    model = make({"num_class_embeds": 4}, classes=("one", "two", "three"))
    with pytest.raises(UsageError, match=words):
        model.plan(2, **request_)


def test_one_step_is_a_step(model):
    assert model.sample(1, steps=1).images.isfinite().all()


# The rest -------------------------------------------------------------------------------------------


def test_it_says_what_will_run(classy):
    said = classy.plan(16, classes="one", guidance=2.0, steps=20, eta=0.5).sentence()
    assert said == "16 samples of 1x8x8: ddim (eta 0.5), 20 steps on trailing, guidance 2.0: 40 evaluations each"
    assert classy.plan(1, steps=1, sampler="ddpm").sentence().endswith("1 step on trailing: 1 evaluation each")
