"""Schedules in diffusers' words and back."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from reverie.base.errors import ModelFileError
from reverie.models.builders import build_schedule
from reverie.models.card import Card, NetworkSpec, SamplingDefaults, ScheduleSpec
from reverie.models.formats.scheduler import read_scheduler, write_scheduler

SPECS = [
    ScheduleSpec(),
    ScheduleSpec(options={"timesteps": 100, "first": 0.001, "last": 0.1}),
    ScheduleSpec(name="scaled-linear"),
    ScheduleSpec(name="scaled-linear", options={"timesteps": 77, "zero_snr": True}),
    ScheduleSpec(name="cosine", options={"timesteps": 60}),
    ScheduleSpec(name="cosine", options={"timesteps": 60, "zero_snr": True}),
    ScheduleSpec(name="cosine", options={"timesteps": 60, "offset": 0.02}),
    ScheduleSpec(name="sigmoid", options={"timesteps": 60}),
    ScheduleSpec(name="sigmoid-in-beta", options={"timesteps": 60}),
    ScheduleSpec(name="table", betas=(0.1, 0.2, 0.3)),
]


def card(**values) -> Card:
    """Return a card of an 8x8 model."""
    return Card(shape=(1, 8, 8), network=NetworkSpec(config={}), **values)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.name}-{len(spec.options)}")
def test_their_table_is_our_table(spec):
    """The betas that diffusers makes of what is written are ours, to float32; read back, they are ours again."""
    config = write_scheduler(card(schedule=spec, prediction="v"))
    theirs = DDPMScheduler.from_config(config)
    ours = build_schedule(spec)
    torch.testing.assert_close(theirs.betas.double(), ours.betas, atol=3e-7, rtol=2e-4)
    back = build_schedule(read_scheduler(config).schedule)
    assert torch.equal(back.betas, ours.betas)
    assert len(theirs.timesteps) == ours.timesteps


def chain(**values) -> SamplingDefaults:
    """Return the defaults of a whole chain of DDPM."""
    return SamplingDefaults(
        **{"sampler": "ddpm", "options": {"variance": "small"}, "steps": 1000, "clip": 1.0} | values
    )


@pytest.mark.parametrize(
    "sampling",
    [
        chain(grid="trailing"),
        chain(grid="linspace", options={"variance": "large"}, clip=False),
        chain(grid="leading", options={"variance": "small", "offset": 1}, clip=2.0),
        chain(grid="leading", threshold=0.9),
    ],
)
def test_how_to_sample_comes_back(sampling):
    reading = read_scheduler(write_scheduler(card(sampling=sampling)))
    assert reading.sampling == sampling
    assert reading.warnings == ()


@pytest.mark.parametrize(("prediction", "theirs"), [("eps", "epsilon"), ("x0", "sample"), ("v", "v_prediction")])
def test_predictions(prediction, theirs):
    config = write_scheduler(card(prediction=prediction))
    assert config["prediction_type"] == theirs
    assert read_scheduler(config).prediction == prediction


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler])
def test_what_they_leave_out_is_their_default(kind):
    """An empty configuration is read as the class reads it."""
    reading, theirs = read_scheduler({"_class_name": kind.__name__}), kind()
    torch.testing.assert_close(build_schedule(reading.schedule).betas.float(), theirs.betas)
    assert reading.sampling.grid == theirs.config.timestep_spacing
    assert reading.sampling.clip == theirs.config.clip_sample_range
    assert reading.sampling.steps == (1000 if kind is DDPMScheduler else 50)
    assert reading.sampling.sampler == kind.__name__[:4].lower()


def test_thresholding_with_their_default_bound_is_a_clip():
    """sample_max_value is 1 unless set, and then no threshold exceeds it."""
    reading = read_scheduler({"thresholding": True})
    assert (reading.sampling.threshold, reading.sampling.clip) == (None, 1.0)
    bounded = read_scheduler({"thresholding": True, "sample_max_value": 1.5})
    assert bounded.sampling.threshold == 0.995
    assert any("bounds its threshold by 1.5" in line for line in bounded.warnings)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"_class_name": "CogVideoXDDIMScheduler"}, "CogVideoXDDIMScheduler; the ones that are read"),
        ({"_class_name": ["DDPMScheduler"]}, "DDPMScheduler"),
        ({"beta_schedule": "laplace"}, "beta_schedule is 'laplace'; it must be one of linear"),
        ({"beta_schedule": None}, "beta_schedule is 'None'"),
        ({"prediction_type": "flow"}, "prediction_type is 'flow'"),
        ({"variance_type": "learned"}, "variance_type is 'learned'"),
        ({"timestep_spacing": "karras"}, "timestep_spacing is 'karras'"),
        ({"num_train_timesteps": 2.5}, "timesteps"),
        ({"num_train_timesteps": 1}, "timesteps"),
        ({"beta_start": "low"}, "beta_start is 'low'; it must be a number"),
        ({"beta_start": -1}, "beta"),
        ({"beta_end": float("nan")}, "not sound"),
        ({"trained_betas": "x"}, "trained_betas is a str"),
        ({"trained_betas": [0.1, 3.0]}, "beta 1 is 3"),
        ({"trained_betas": [0.1] * 100_001}, "betas"),
        ({"trained_betas": [0.1, 0.2], "rescale_betas_zero_snr": True}, "only one is supported"),
        ({"clip_sample_range": None}, "clip_sample_range is 'None'"),
        ({"use_karras": True}, "unknown setting 'use_karras'"),
    ],
)
def test_what_is_not_sound_is_refused(config, words):
    with pytest.raises(ModelFileError, match=words) as caught:
        read_scheduler(config)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
