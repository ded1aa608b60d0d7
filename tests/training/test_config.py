"""The configuration: what is refused, in which words, and what the learning rate does."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from reverie.training.config import FIXED, TrainConfig


def test_all_errors_are_told_at_once():
    with pytest.raises(ValidationError) as caught:
        TrainConfig(out="x", learning_rate=-1.0, batch_size=0, steps=0, dropout=float("nan"))
    assert {error["loc"][0] for error in caught.value.errors()} == {"learning_rate", "batch_size", "steps", "dropout"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_size": 10, "accumulate": 3}, "must divide"),
        ({"learned_variance": True}, "needs objective hybrid or vlb"),
        ({"objective": "hybrid"}, "add learned_variance"),
        ({"objective": "vlb", "distance": "l1"}, "no distance"),
        ({"distance": "l1", "weight": "min-snr"}, "defined for distance l2"),
        ({"decay": "cosine", "minutes": 1}, "needs steps"),
        ({"widths": (8, 8), "attention": (True,)}, "names 1 levels, widths 2"),
        ({"schedule": "linaer"}, "must be one of linear"),
        ({"sample_every": 0, "sample_count": 4}, "sample_count: without effect where sample_every is 0"),
        ({"held_out": 0.0, "validate_every": 5}, "validate_every: without effect where held_out is 0"),
        ({"labels": False, "label_dropout": 0.5}, "label_dropout: without effect where labels is False"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, words):
    with pytest.raises(ValidationError, match=words):
        TrainConfig(out="x", **settings)


def test_unknown_keys_are_refused():
    with pytest.raises(ValidationError, match="learing_rate"):
        TrainConfig(out="x", learing_rate=1e-3)


def test_the_learning_rate_rises_and_stays():
    config = TrainConfig(out="x", warmup=4)
    assert [config.rate(step, 1.0) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_the_cosine_ends_at_zero():
    config = TrainConfig(out="x", warmup=0, decay="cosine", steps=10)
    assert config.rate(0, 1.0) == pytest.approx(1.0)
    assert config.rate(5, 1.0) == pytest.approx(0.5)
    assert config.rate(10, 1.0) == pytest.approx(0.0, abs=1e-12)


def test_without_an_end_it_is_2000_steps_and_minutes_stand_alone():
    assert TrainConfig(out="x").total_steps == 2000
    assert TrainConfig(out="x", minutes=1).total_steps is None
    assert TrainConfig(out="x", minutes=1, steps=5).total_steps == 5


def test_fixed_settings_exist():
    assert set(FIXED) <= set(TrainConfig.model_fields)


def test_every_field_has_a_group_and_help():
    for name, field in TrainConfig.model_fields.items():
        assert field.description, name
        assert isinstance(field.json_schema_extra, dict), name
        assert "group" in field.json_schema_extra, name


def test_the_configuration_needs_no_torch():
    code = "import sys, reverie.training.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
