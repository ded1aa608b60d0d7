"""Runs: the newest checkpoint that verifies, its averaged weights."""

import pytest
import torch

from reverie.base.errors import ModelFileError, UsageError
from reverie.models.checkpoints import CheckpointStore
from reverie.models.formats import recognise
from reverie.models.load import load


@pytest.fixture
def run(make, tmp_path):
    """Return a run with two checkpoints, each with weights and two averages; seeds say which is which."""
    folder = tmp_path / "run"
    store = CheckpointStore(folder / "checkpoints")
    store.prepare()
    (folder / "card.json").write_text(make().card.model_dump_json())
    for step in (5, 10):
        state = {name: make(seed=step + i).denoiser.network.state_dict() for i, name in enumerate(GROUPS)}
        record = {"averages": ["ema-0.99", "ema-0.9"], "training": {"steps": step, "seconds": 2.5}}
        store.save(step, state | {"optimizer": {"a/step": torch.ones(1)}}, record)
    return folder


GROUPS = ("model", "ema-0.9", "ema-0.99")


@pytest.mark.parametrize(("ema", "seed"), [(None, 12), ("ema-0.99", 12), ("0.99", 12), ("0.9", 11), ("none", 10)])
def test_the_newest_checkpoints_weights(run, make, ema, seed):
    """By default the averages that the run itself samples from, the first of its record."""
    model = load(run, ema=ema)
    assert recognise(run).name == "run"
    assert model.digest == make(seed=seed).digest
    assert model.origin == {"checkpoint": "step-00000010", "weights": GROUPS[seed - 10]}
    assert (model.card.training.steps, model.card.training.seconds) == (10, 2.5)
    assert model.sample(1, steps=1).record["model"]["checkpoint"] == "step-00000010"


def test_a_checkpoint_without_a_record_of_its_training(make, tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    store.prepare()
    (tmp_path / "card.json").write_text(make().card.model_dump_json())
    store.save(3, {"model": make().denoiser.network.state_dict()}, {"training": {"steps": -1}})
    assert load(tmp_path).card.training.steps == 3


def test_one_checkpoint_of_many(run, make):
    path = run / "checkpoints" / "step-00000005"
    assert recognise(path).name == "checkpoint"
    assert load(path).digest == make(seed=7).digest
    assert load(path, ema="none").digest == make(seed=5).digest


def test_averages_that_are_not_there(run):
    with pytest.raises(UsageError, match=r"no averaged weights '0\.5'.*known: ema-0\.9, ema-0\.99, none"):
        load(run, ema="0.5")


def flip(path):
    """Flip a bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "no manifest"])
def test_a_damaged_checkpoint_is_passed_over_aloud(run, make, damage):
    newest = run / "checkpoints" / "step-00000010"
    weights = newest / "ema-0.99.safetensors"
    if damage == "flipped":
        flip(weights)
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        (weights if damage == "missing" else newest / "manifest.json").unlink()
    with pytest.warns(RuntimeWarning, match=r"step-00000010 cannot be used: .*; step 5 was taken"):
        model = load(run)
    assert model.digest == make(seed=7).digest
    with pytest.raises(ModelFileError, match="cannot be used"):
        load(newest)
    assert newest.is_dir()


def test_none_that_can_be_used(run):
    for step in ("05", "10"):
        flip(run / "checkpoints" / f"step-000000{step}" / "model.safetensors")
    with pytest.raises(ModelFileError, match=r"no checkpoint in .* can be used") as caught:
        load(run)
    assert caught.value.exit_code == 4


def test_a_run_before_its_first_checkpoint(make, tmp_path):
    (tmp_path / "card.json").write_text(make().card.model_dump_json())
    with pytest.raises(ModelFileError, match=r"has no checkpoint yet: .* reverie train --out .* --resume"):
        load(tmp_path)


def test_a_card_of_another_network(run, make):
    (run / "card.json").write_text(make({"channels": [8, 24]}).card.model_dump_json())
    with pytest.raises(ModelFileError, match="tensors do not fit"):
        load(run)
    (run / "card.json").write_text("{")
    with pytest.raises(ModelFileError, match=r"card\.json is no card of a model"):
        load(run)


def test_a_checkpoint_without_its_run(run):
    (run / "card.json").unlink()
    with pytest.raises(ModelFileError, match=r"without its run: .*card\.json is missing"):
        load(run / "checkpoints" / "step-00000005")
