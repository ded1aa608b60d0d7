"""Runs of score matching: their objective, their noise, what is refused, and that each trains and resumes."""

import json

import pytest
import torch
from pydantic import ValidationError

import reverie as rv
from reverie.base.errors import UsageError
from reverie.data import open_dataset
from reverie.diffusion.objectives import Simple
from reverie.diffusion.oracles import Mixture
from reverie.diffusion.schedules import VE
from reverie.diffusion.score_matching import LEVEL_WEIGHTS, Denoising, Implicit, Sliced
from reverie.training.config import SCORES, TrainConfig
from reverie.training.scores import LANGEVIN, largest_noise, make_score

TINY = {"widths": (8, 8), "layers": 1, "batch_size": 4, "sample_every": 0, "validate_every": 0, "labels": False}


def config(objective, **more):
    return TrainConfig(out="x", objective=objective, **more)


@pytest.mark.parametrize(
    ("settings", "kind", "weight"),
    [
        ({"objective": "denoising-score"}, Denoising, "edm"),
        ({"objective": "denoising-score", "prediction": "score"}, Denoising, "variance"),
        ({"objective": "denoising-score", "level_weight": "likelihood"}, Denoising, "likelihood"),
        ({"objective": "sliced-score", "slices": 3}, Sliced, "variance"),
        ({"objective": "implicit-score", "level_weight": "uniform"}, Implicit, "uniform"),
    ],
)
def test_the_objective_is_the_one_that_is_named(settings, kind, weight):
    made = make_score(TrainConfig(out="x", **settings))
    assert type(made) is kind
    assert made.weight is LEVEL_WEIGHTS[weight]
    assert getattr(made, "slices", 1) == settings.get("slices", 1)


def test_it_is_an_ncsn_where_nothing_is_said():
    assert (config("sliced-score").schedule, config("sliced-score").prediction) == ("ve", "edm")
    assert config("sliced-score", schedule="cosine").schedule == "cosine"
    assert TrainConfig(out="x").schedule == "cosine"


def test_edms_weight_makes_the_errors_of_its_output_count_alike():
    """Half of L_simple in the space of EDM's output, whose sigma_data is 1/2, at every level."""
    bell = Mixture(torch.zeros(1, 3).double(), torch.tensor([0.7]).double(), torch.ones(1).double(), VE())
    x0, eps = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0)).double()
    t = torch.linspace(0.1, 1, 8, dtype=torch.float64)
    assert torch.allclose(Denoising("edm")(bell, x0, t, eps), Simple("edm")(bell, x0, t, eps) / 2, rtol=1e-9)


def test_the_largest_noise_is_the_largest_distance():
    digits = open_dataset("digits", limit=40)
    points = (digits.images(range(40)) / 127.5 - 1).flatten(1)
    want = max(float((a - b).norm()) for a in points for b in points)
    assert largest_noise(config("denoising-score"), digits)["sigma_max"] == pytest.approx(want, rel=5e-3)
    assert largest_noise(config("denoising-score", schedule="vp"), digits) == {}


def test_an_exact_trace_of_many_elements_is_refused():
    with pytest.raises(UsageError, match="768, more than 256"):
        largest_noise(config("implicit-score"), open_dataset("shapes:16,count=20"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"level_weight": "edm"}, "level_weight has no effect on objective simple"),
        ({"objective": "denoising-score", "slices": 2}, "it is for sliced-score"),
        ({"objective": "sliced-score", "distance": "l1"}, "distance: without effect"),
        (
            {"objective": "sliced-score", "weight": "min-snr", "uncertainty": True},
            "weight, uncertainty: without effect",
        ),
        ({"objective": "implicit-score", "compile": True}, "second derivatives"),
        ({"objective": "denoising-score", "learned_variance": True}, "says nothing of the variance"),
    ],
)
def test_what_has_no_effect_is_refused(settings, words):
    with pytest.raises(ValidationError, match=words):
        TrainConfig(out="x", **settings)


@pytest.mark.parametrize("objective", SCORES)
def test_each_trains_and_is_sampled_by_langevin(objective, tmp_path):
    run = rv.train(data="digits", out=str(tmp_path / "run"), objective=objective, steps=2, log_every=1, **TINY)
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(abs(loss) < 1e6 for loss in losses)
    model = rv.load(run)
    assert model.card.sampling == LANGEVIN
    assert model.card.schedule.name == "ve"
    assert 5 < model.card.schedule.options["sigma_max"] < 20
    drawn = rv.sample(model, 2, steps=3)
    assert drawn.record["sampler"] == "langevin"
    assert drawn.images.isfinite().all()


def test_a_sliced_run_that_is_resumed_is_the_one_that_was_not(tmp_path):
    settings = {"data": "digits", "objective": "sliced-score", "save_every": 1, **TINY}
    whole = rv.train(out=str(tmp_path / "whole"), steps=3, **settings)
    rv.train(out=str(tmp_path / "parts"), steps=1, **settings)
    parts = rv.train(out=str(tmp_path / "parts"), steps=3, resume=True)
    assert rv.load(parts).digest == rv.load(whole).digest
