"""What a path holds."""

import json

import pytest
import torch
from safetensors.torch import save_file

from reverie.base.errors import DataError, ModelFileError, UsageError
from reverie.models.card import DataRecord, TrainingRecord
from reverie.models.checkpoints import CheckpointStore
from reverie.models.formats import write_model
from reverie.models.inspect import describe, describe_text
from reverie.models.load import load
from reverie.models.pictures import write_pictures


@pytest.mark.parametrize("kind", ["diffusers", "native", "single-file"])
def test_a_model(make, tmp_path, kind):
    model = make(
        {"num_class_embeds": 3}, classes=("a", "b"), data=DataRecord(name="digits", fingerprint="f00", count=9),
        training=TrainingRecord(steps=77),
    )  # fmt: skip
    found = describe(write_model(model, tmp_path / "m", kind=kind))
    assert (found["kind"], found["parameters"], found["sha256"]) == (kind, model.parameters, model.digest)
    assert (found["shape"], found["classes"], found["predicts"]) == ([1, 8, 8], ["a", "b"], "eps")
    assert (found["schedule"], found["training"]["steps"]) == ({"name": "linear", "timesteps": 40}, 77)
    assert found["data"]["fingerprint"] == "f00"
    json.dumps(found)
    said = describe_text(found)
    assert all(word in said for word in (kind, f"{model.parameters:,}", model.digest, "digits", "77"))


@pytest.fixture
def run(make, tmp_path):
    """Return a run with two checkpoints."""
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    store.prepare()
    (tmp_path / "run" / "card.json").write_text(make().card.model_dump_json())
    for step in (5, 10):
        store.save(step, {"model": make(seed=step).denoiser.network.state_dict()}, {})
    return tmp_path / "run"


def test_a_run_and_whether_its_checkpoints_verify(run, make):
    found = describe(run)
    assert found["kind"] == "run"
    assert found["checkpoints"] == {"step-00000010": "verified", "step-00000005": "verified"}
    assert (found["sha256"], found["training"]["steps"]) == (make(seed=10).digest, 10)
    weights = run / "checkpoints" / "step-00000010" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    found = describe(run)
    assert "damaged" in found["checkpoints"]["step-00000010"]
    assert found["sha256"] == make(seed=5).digest
    assert "step 5 was taken" in found["warnings"][0]
    broken = describe(run / "checkpoints" / "step-00000010")
    assert (broken["kind"], "damaged" in broken["verified"], "cannot be used" in broken["problem"]) == (
        "checkpoint",
        True,
        True,
    )
    assert describe(run / "checkpoints" / "step-00000005")["verified"] == "yes"


def test_a_damaged_model_is_described_as_far_as_it_goes(model, tmp_path):
    write_model(model, tmp_path / "m")
    (tmp_path / "m" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"<html>")
    found = describe(tmp_path / "m")
    assert found["pipeline"] == "DDPMPipeline"
    assert "problem" in found
    assert "problem" in describe_text(found)


def test_a_file_of_another_kind(tmp_path):
    save_file({"lora_unet_a.lora_up.weight": torch.zeros(1)}, tmp_path / "w.safetensors")
    found = describe(tmp_path / "w.safetensors")
    assert found["layout"].startswith("a LoRA")
    assert "no card in its header" in found["problem"]
    (tmp_path / "w.txt").write_text("hello")
    assert "no safetensors file" in describe(tmp_path / "w.txt")["problem"]


def test_a_picture(model, tmp_path):
    write_model(model, tmp_path / "m")
    path = write_pictures(load(tmp_path / "m").sample(1, seed=3, steps=1), tmp_path / "out")[0]
    found = describe(path)
    assert (found["kind"], found["program"], found["settings"]["seeds"]) == ("picture", "reverie", [3])
    assert model.digest in describe_text(found)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(DataError):
        describe(path)


def test_nothing_and_nothing_known(tmp_path):
    with pytest.raises(UsageError, match="there is no"):
        describe(tmp_path / "none")
    with pytest.raises(ModelFileError, match="is no model"):
        describe(tmp_path)
