"""LoRA: the adapter alone is trained, the base with the adapter is the run's model, and a resumed run is the same."""

import pytest
import torch

from reverie.models.load import load
from reverie.models.lora import Loras
from reverie.training.config import TrainConfig
from tests.training.test_start import QUICK, assert_same, go, killed, made

RICH = {"widths": (8, 8), "layers": 1, "attention": (True, False)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "run"
    go(folder, steps=3, **QUICK, **RICH)
    return str(folder)


def test_the_base_with_the_adapter_is_the_runs_model(tmp_path, base):
    settings = QUICK | {"sample_every": 3, "sample_steps": 2, "sample_count": 4}
    report = go(tmp_path / "run", start=base, lora=2, lora_alpha=4.0, steps=4, learning_rate=0.1, **settings)
    assert "no samples" not in report
    plain = load(base).denoiser.network
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    with_adapter = Loras({"unet": plain})
    told = with_adapter.add(tmp_path / "run" / "lora.safetensors")
    assert not told.unused
    for path in (tmp_path / "run", tmp_path / "run" / "model"):
        trained = load(path).denoiser.network.state_dict()
        assert trained.keys() == before.keys()
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(trained[name], value, rtol=0, atol=1e-6)
    changed = [name for name, value in plain.state_dict().items() if (value - before[name]).abs().max() > 1e-4]
    assert changed
    assert all(".to_" in name for name in changed)


def test_only_the_adapter_is_trained(tmp_path, base):
    run = made(tmp_path / "run", start=base, lora=2, steps=1, **QUICK)
    trained = [name for name, p in run.network.named_parameters() if p.requires_grad]
    assert trained
    assert all(name.endswith((".lora_A", ".lora_B")) for name in trained)
    assert len(run.update.parameters) == len(trained)
    x, time, label = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 500.0]), torch.tensor([1, 10])
    due = load(base).denoiser.network(x, time, label=label)  # B is zero: it starts as the model
    torch.testing.assert_close(run.network.eval()(x, time, label=label), due, rtol=0, atol=1e-6)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, base):
    settings = {"start": base, "lora": 2, "ema": (0.9, 0.99), **QUICK}
    go(tmp_path / "whole", steps=4, **settings)
    go(tmp_path / "twice", steps=4, **settings)
    killed(tmp_path / "twice")
    go(tmp_path / "twice", "yes")
    assert_same(tmp_path / "whole", tmp_path / "twice")
    one, other = (tmp_path / name / "lora.safetensors" for name in ("whole", "twice"))
    assert one.read_bytes() == other.read_bytes()


def test_what_does_not_go_together_is_refused():
    for settings, words in (
        ({"lora": 4}, "lora needs a model"),
        ({"start": "m", "lora_alpha": 2.0}, "without lora"),
        ({"start": "m", "lora": 4, "fill": True}, "adapter alone"),
    ):
        with pytest.raises(ValueError, match=words):
            TrainConfig(out="x", **settings)
