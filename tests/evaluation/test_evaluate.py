"""The evaluation as a whole: who is compared with whom, what a figure carries, what is refused, what is exact."""

import json
import math

import pytest
import torch

from reverie.base.errors import UsageError
from reverie.base.randomness import normal
from reverie.data import open_dataset
from reverie.data.arrays import ArrayImages
from reverie.data.options import Options
from reverie.evaluation import evaluate as module
from reverie.evaluation.evaluate import evaluate
from reverie.evaluation.figures import Evaluation
from reverie.evaluation.spaces import ClassifierSpace, Pixels, cache_folder
from reverie.models.builders import build
from reverie.models.card import Card, DataRecord, NetworkSpec, ScheduleSpec, TrainingRecord
from reverie.models.model import Model
from reverie.training.config import TrainConfig


def gaussian(count, mean, std, *key, name="set"):
    """Grey pictures of 2x2 whose pixels are Gaussian, as a data set."""
    pixels = (normal((count, 2, 2, 1), *key) * std + mean).round().clamp(0, 255).to(torch.uint8).numpy()
    made = ArrayImages(name, pixels, Options(), None)
    made.name = name
    return made


def small(classes=(), data=None, unconditional=True):
    """Return a tiny untrained model of 8x8 images."""
    config = {"in_channels": 1, "channels": [8, 8], "norm_num_groups": 4}
    config |= {"num_class_embeds": len(classes) + unconditional} if classes else {}
    training = TrainingRecord(steps=1, seed=0) if data else None
    card = Card(shape=(1, 8, 8), network=NetworkSpec(config=config), classes=classes, data=data, training=training,
                schedule=ScheduleSpec(options={"timesteps": 20}), unconditional=unconditional)  # fmt: skip
    return Model(build(card), card)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# Against the truth ------------------------------------------------------------------------------


def test_frechet_of_two_gaussians_is_the_closed_form():
    """Four pixels: d^2 = |m|^2 + 4 (s_a - s_b)^2 in units of 127.5, to five errors and its own bias."""
    a, b = gaussian(4000, 120, 20, "a"), gaussian(8000, 140, 30, "b")
    got = evaluate(a, b, metrics=["frechet"]).figures["frechet"]
    want = 4 * ((20 / 127.5) ** 2 + (10 / 127.5) ** 2)
    assert abs(got.value - got.details["bias"] - want) < 5 * got.standard_error
    assert got.standard_error < 0.1 * want


def test_pictures_of_the_same_kind_are_as_far_as_chance():
    a, b = gaussian(2000, 120, 20, "a"), gaussian(2000, 120, 20, "b")
    found = evaluate(a, b).figures
    assert abs(found["kid"].value) < 5 * found["kid"].standard_error
    assert found["precision"].value > 0.9
    assert abs(found["density"].value - 1) < 0.1


def test_copies_of_the_training_images_are_told():
    training, others = gaussian(300, 120, 40, "t"), gaussian(100, 120, 40, "h")
    copies = evaluate(training, training, metrics=["nearest"], n=100, held_out=others).figures["nearest"]
    fresh = evaluate(gaussian(100, 120, 40, "f"), training, metrics=["nearest"], held_out=others).figures["nearest"]
    assert copies.value > 0.95
    assert copies.details["least"] == 0
    assert abs(fresh.details["z"]) < 4.4


# What a figure carries --------------------------------------------------------------------------


def test_every_figure_carries_its_settings():
    model = small(data=DataRecord(name="digits", fingerprint=open_dataset("digits").fingerprint))
    found = evaluate(model, open_dataset("digits"), metrics=["frechet", "kid", "prdc", "nearest"], n=60, real=80,
                     features="pixels", steps=1, sampler="ddim", seed=7)  # fmt: skip
    assert set(found.figures) == {"frechet", "kid", "precision", "recall", "density", "coverage", "nearest"}
    for name, figure in found.to_json()["metrics"].items():
        assert figure["n"] == 60
        assert {"sampler", "steps", "seed", "evaluations", "seconds", "sampling_seconds"} <= set(figure)
        assert (figure["sampler"], figure["steps"], figure["seed"], figure["evaluations"]) == ("ddim", 1, 7, 1)
        if name != "nearest":
            assert figure["real_n"] == 80
            assert (figure["features"], figure["fingerprint"]) == ("pixels", "pixels-1x8x8")
            assert name in found.to_text()
    assert found.figures["nearest"].details["held_out_n"] == 89  # the run's own, a twentieth of 1797
    assert json.loads(json.dumps(found.to_json()))["subject"]["sha256"] == model.digest


def test_the_samples_do_not_depend_on_the_batch_and_their_number_is_theirs():
    digits, model = open_dataset("digits"), small()
    one, other = (
        evaluate(model, digits, metrics=["frechet"], n=64, features="pixels", steps=1, batch_size=size)
        for size in (7, 64)
    )
    assert one.figures["frechet"].value == other.figures["frechet"].value
    assert one.figures["frechet"].n == 64


def test_parts_are_the_whole(monkeypatch):
    digits, model = open_dataset("digits"), small()
    want = evaluate(model, digits, metrics=["frechet"], n=70, features="pixels", steps=1)
    monkeypatch.setattr("reverie.evaluation.subjects.PART", 32)
    got = evaluate(model, digits, metrics=["frechet"], n=70, features="pixels", steps=1)
    assert got.figures["frechet"].value == want.figures["frechet"].value


def test_real_images_and_those_of_the_classifier_are_apart():
    digits = open_dataset("digits")
    job = made(small(), digits)
    compared, others = job.halves
    assert not set(compared) & set(others)
    assert sorted(compared + others) == list(range(1797))


def made(model, against, **more):
    """Return a job that has not run."""
    found = []
    original = module.Job.run
    module.Job.run = lambda self: found.append(self) or Evaluation({}, {}, None, None, {}, None, 0.0)
    try:
        evaluate(model, against, **more)
    finally:
        module.Job.run = original
    return found[0]


def test_classes_are_drawn_in_the_real_images_shares():
    digits = open_dataset("digits")
    model = small(digits.classes)
    job = made(model, digits, classes=["3", "5"], features="pixels", n=500, steps=1)
    labels = digits.labels(job.real_rows)
    assert set(labels.tolist()) == {3, 5}
    job.settle()
    assert list(job.subject.plan(0, 40).labels) == labels[:40].tolist()
    assert made(model, digits, features="pixels").wanted is None  # it knows no class, too
    assert made(small(digits.classes, unconditional=False), digits).wanted == digits.classes


def test_the_share_that_a_run_holds_out_is_the_configurations():
    assert TrainConfig(out="x").held_out == module.HELD_OUT


# Feature spaces ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_classifier_is_trained_once_said_and_kept(monkeypatch):
    monkeypatch.setattr("reverie.evaluation.spaces.UPDATES", 30)
    digits, said = open_dataset("digits"), []
    one, other = (
        evaluate(small(), digits, metrics=["frechet"], n=60, steps=1, say=said.append, report=lambda *_: None)
        for _ in range(2)
    )
    assert one.figures["frechet"].value == other.figures["frechet"].value
    assert one.features["fingerprint"].startswith("classifier-")
    (kept,) = cache_folder().iterdir()
    assert sum("training a classifier" in line and str(kept) in line for line in said) == 1
    assert one.features["accuracy"] > 0.3
    kept.write_bytes(b"cut off")
    again = evaluate(small(), digits, metrics=["frechet"], n=60, steps=1, say=said.append)
    assert any("not a readable safetensors file" in line for line in said)
    assert again.features["fingerprint"] == one.features["fingerprint"]


def test_a_classifiers_features_have_a_mean_variance_of_one(monkeypatch):
    monkeypatch.setattr("reverie.evaluation.spaces.UPDATES", 30)
    digits = open_dataset("digits")
    space = made(small(), digits).space
    assert isinstance(space, ClassifierSpace)
    features = space(digits.images(range(1797)))
    assert float(features.double().var(0).mean()) == pytest.approx(1, rel=0.1)


def test_large_pictures_are_averaged_in_the_space_of_pixels():
    space = Pixels((3, 64, 32))
    image = torch.zeros(1, 3, 64, 32, dtype=torch.uint8)
    image[:, :, ::2] = 255
    assert space(image).shape == (1, 3 * 16 * 16)
    assert space(image).abs().max() < 1e-6
    assert space.about["dimensions"] == 768


# What models alone have -------------------------------------------------------------------------


def test_gap_and_likelihood_are_of_the_runs_held_out_images():
    digits = open_dataset("digits")
    model = small(data=DataRecord(name="digits", fingerprint=digits.fingerprint))
    told = []
    found = evaluate(model, digits, metrics=["gap", "likelihood"], images=4, probes=1, tolerance=0.1,
                     report=lambda stage, done, total: told.append((stage, done, total)))  # fmt: skip
    assert set(found.figures) == {"gap", "bits_ode", "bits_bound"}
    assert found.samples is None
    gap, bits = found.figures["gap"], found.figures["bits_ode"].to_json()
    assert gap.n == gap.real_n == 89
    assert bits["held_out_images"] is True
    assert bits["n"] == 4
    assert bits["dequantisation"].startswith("uniform")
    assert math.isfinite(bits["value"])
    assert found.figures["bits_bound"].details["evaluations"] == 20
    assert ("bits by the ODE", 4, 4) in told


# What is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"metrics": ["fid"]}, "there is no metric 'fid'"),
        ({"metrics": []}, "no metric is asked for"),
        ({"metrics": ["gap"]}, "gap needs images that the model was not trained on"),
        ({"metrics": ["nearest"], "features": "pixels"}, "features has no effect on nearest"),
        ({"metrics": ["frechet"], "picture": "x.png"}, "picture has no effect on frechet"),
        ({"n": 10}, "distances need 50 of each"),
        ({"real": 5000}, "there are 898 real images"),
        ({"features": "inception"}, "there is no feature space 'inception'"),
        ({"classes": ["7"]}, "this model has no classes"),
        ({"sampler": "ddmi"}, "did you mean"),
        ({"nonsense": 1}, "nonsense has no effect"),
    ],
)
def test_refusals_of_a_model(more, words):
    with pytest.raises(UsageError, match=words):
        evaluate(small(), open_dataset("digits"), **more)


def test_refusals_of_pictures():
    pictures = gaussian(60, 120, 20, "a", name="folder/")
    with pytest.raises(UsageError, match="likelihood is of a model, and folder/ holds pictures"):
        evaluate(pictures, pictures, metrics=["likelihood"])
    with pytest.raises(UsageError, match="steps: of no effect on pictures"):
        evaluate(pictures, pictures, steps=3)
    with pytest.raises(UsageError, match="n is 61, and folder/ holds 60"):
        evaluate(pictures, pictures, n=61)
    with pytest.raises(UsageError, match=r"the samples are 2x2 \(1 channel\), the images of digits 8x8"):
        evaluate(pictures, open_dataset("digits"))
