"""Training EDM2: what it is trained with, weights kept at length one, u beside the network, snapshots, resuming."""

import io
import math

import pytest
import torch
from pydantic import ValidationError

from reverie.base.errors import ModelFileError, StorageError, UsageError
from reverie.diffusion.schedules import EDM as EDM_SCHEDULE
from reverie.diffusion.schedules import Flow
from reverie.models.checkpoints import CheckpointStore
from reverie.models.load import load
from reverie.networks.edm2_layers import EPS, magnitude
from reverie.training import trainer
from reverie.training.config import EDM2, TrainConfig
from reverie.training.ema import PowerEMA
from reverie.training.metrics import Console
from reverie.training.power import Profile, combine
from reverie.training.snapshots import find_snapshots, rebuild, reconstruct
from reverie.training.trainer import Run, train
from reverie.training.validation import level_times

QUICK = {
    "network": "edm2", "widths": (8, 8), "layers": 1, "batch_size": 8, "save_every": 3, "sample_every": 0,
    "validate_every": 0, "limit": 60, "device": "cpu", "dtype": "float32", "snapshot_every": 2, "warmup": 2,
}  # fmt: skip


def go(folder, resume="no", **settings):
    report = io.StringIO()
    train(TrainConfig(out=str(folder), **(QUICK | settings)), resume, report)
    return report.getvalue()


def groups(folder):
    checkpoint = CheckpointStore(folder / "checkpoints").latest()
    return {group: checkpoint.tensors(group) for group in checkpoint.groups}


# What it is told -----------------------------------------------------------------------------------


def test_the_network_brings_what_it_is_trained_with():
    config = TrainConfig(out="x", network="edm2")
    assert {name: getattr(config, name) for name in EDM2} == EDM2
    assert config.decays == ()
    assert not set(EDM2) & config.model_fields_set
    assert TrainConfig(**config.model_dump(exclude_unset=True)) == config
    own = TrainConfig(out="x", network="edm2", schedule="vp", prediction="v", ema=(0.99,), uncertainty=False)
    assert (own.schedule, own.prediction, own.uncertainty, own.decays) == ("vp", "v", False, (0.99,))
    assert TrainConfig(out="x").decays == (0.999,)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"network": "edm2", "time_scale_shift": True}, "time_scale_shift"),
        ({"preset": "xs"}, "preset xs is edm2's"),
        ({"time_mean": -0.4}, "time_mean"),
        ({"decay_after": 5}, "decay_after"),
        ({"snapshot_every": 5}, "snapshot_every needs ema_lengths"),
        ({"ema_lengths": (0.3,)}, "less than 0.2886"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, words):
    with pytest.raises(ValidationError, match=words):
        TrainConfig(out="x", **settings)


def test_the_learning_rate_is_the_papers():
    """lr / sqrt(max(step / t_ref, 1)), with a ramp."""
    config = TrainConfig(out="x", network="edm2", steps=10_000, decay_after=400, warmup=9)
    assert config.rate(0, 0.01) == pytest.approx(0.001)
    assert config.rate(9, 0.01) == config.rate(400, 0.01) == 0.01
    assert config.rate(1600, 0.01) == pytest.approx(0.005)
    assert config.rate(10_000, 0.01) == pytest.approx(0.01 / math.sqrt(25))
    assert TrainConfig(out="x", network="edm2", steps=200).rate(400, 1.0) == pytest.approx(0.5)


def test_snapshots_are_due_a_32nd_of_the_run_apart():
    config = TrainConfig(out="x", network="edm2", steps=3200)
    assert [step for step in range(1, 401) if config.snapshot_due(step)] == [100, 200, 300, 400]
    assert not TrainConfig(out="x", steps=3200).snapshot_due(100)


def test_the_plan_says_edm2_and_where_it_attends(tmp_path):
    run = Run(TrainConfig(out=str(tmp_path / "r"), network="edm2", preset="tiny", device="cpu"), False,
              Console(io.StringIO()))  # fmt: skip
    card = run.plan.card
    assert (card.network.name, card.schedule.name, card.prediction) == ("edm2", "edm", "edm")
    assert card.network.config["attention"] == [False, True]
    assert (card.sampling.sampler, card.sampling.grid) == ("heun", "karras")
    assert any("network: EDM2, channels [16, 32]" in line for line in run.plan.lines())
    assert [type(ema) for ema in run.emas] == [PowerEMA, PowerEMA]


def test_an_uncertainty_without_a_clock_is_refused(tmp_path):
    with pytest.raises(UsageError, match="uncertainty needs a clock"):
        go(tmp_path / "r", schedule="cosine-continuous", prediction="v")


# A run ---------------------------------------------------------------------------------------------


def test_a_run_keeps_weights_at_length_one_and_u_beside_the_model(tmp_path):
    folder = tmp_path / "r"
    go(folder, steps=5)
    kept = groups(folder)
    assert set(kept) == {"model", "objective", "optimizer", "ema-power-0.1", "ema-power-0.05"}
    for name, weight in kept["model"].items():
        if weight.ndim > 1:
            assert (magnitude(weight, range(1, weight.ndim)) - 1).abs().max() < 2 * EPS, name
    assert set(kept["objective"]) == {"fourier.frequencies", "fourier.phases", "linear.weight"}
    assert any(name.startswith("objective/linear.weight/") for name in kept["optimizer"])
    model = load(folder)
    assert model.origin["weights"] == "ema-power-0.1"
    assert not any("objective" in name for name in model.denoiser.network.state_dict())
    assert model.sample(1, steps=2).uint8.shape == (1, 1, 8, 8)
    assert load(folder, ema="power-0.05").origin["weights"] == "ema-power-0.05"


def test_u_learns(tmp_path):
    run = Run(TrainConfig(out=str(tmp_path / "r"), **QUICK, steps=3), False, Console(io.StringIO()))
    before = {name: value.clone() for name, value in run.update.objective.learned.state_dict().items()}
    run.go()
    after = run.update.objective.learned.state_dict()
    assert not torch.equal(before["linear.weight"], after["linear.weight"])
    assert torch.equal(before["fourier.frequencies"], after["fourier.frequencies"])


@pytest.mark.parametrize("settings", [{}, {"dropout": 0.2, "accumulate": 2}, {"ema": (0.9,)}])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, settings):
    one, two = tmp_path / "one", tmp_path / "two"
    go(one, steps=8, **settings)
    go(two, steps=8, minutes=1e-9, **settings)  # ends after its first step
    (two / "snapshots" / "power-0.1-00000001.safetensors").unlink(missing_ok=True)
    (two / "snapshots" / "power-0.05-00000001.safetensors").unlink(missing_ok=True)
    train(TrainConfig(out=str(two), minutes=1), "yes", io.StringIO())
    for name, tensors in groups(one).items():
        others = groups(two)[name]
        assert set(tensors) == set(others)
        assert all(torch.equal(tensor, others[key]) for key, tensor in tensors.items()), name
    for path in (one / "snapshots").iterdir():
        assert path.read_bytes() == (two / "snapshots" / path.name).read_bytes()


def test_without_its_u_a_checkpoint_is_another_run(tmp_path):
    go(tmp_path / "r", steps=3, uncertainty=False)
    with pytest.raises(ModelFileError, match="uncertainty is False there, True here"):
        go(tmp_path / "r", "yes", steps=5, uncertainty=True)


def test_the_held_out_loss_looks_where_edm_trains():
    """The middles of ten parts, equally likely, of ln sigma ~ N(-1.2, 1.2^2); elsewhere parts of time."""
    levels = (80 * level_times(EDM_SCHEDULE())).log()
    assert float(levels.mean()) == pytest.approx(-1.2, abs=1e-6)
    assert float((levels < -1.2 + 1.2 * 0.6745).double().mean()) == pytest.approx(0.75, abs=0.06)
    assert level_times(Flow()).tolist() == pytest.approx([0.05 + 0.1 * k for k in range(10)])


# Snapshots -----------------------------------------------------------------------------------------


def test_snapshots_are_the_averages_and_any_length_is_rebuilt_to_a_percent(tmp_path):
    """Against averages of those lengths that the same run tracked directly."""
    folder, lengths = tmp_path / "r", (0.1, 0.05, 0.075, 0.15)
    go(folder, steps=48, ema_lengths=lengths, learning_rate=0.02)
    snapshots = find_snapshots(folder)
    assert [s.updates for s in snapshots[::4]] == list(range(2, 49, 2))
    kept = groups(folder)
    weights = {name: value for name, value in kept["model"].items() if "fourier" not in name}
    last = [s for s in snapshots if s.updates == 48 and s.sigma_rel == 0.1]
    for name, value in reconstruct(last, 0.1).items():
        torch.testing.assert_close(value, kept["ema-power-0.1"][name])
    two = [s for s in snapshots if s.sigma_rel in (0.05, 0.1)]
    for length in (0.075, 0.15):
        rebuilt, tracked = reconstruct(two, length), kept[f"ema-power-{length}"]
        assert set(rebuilt) == set(weights)
        error = sum(float((rebuilt[n] - tracked[n]).square().sum()) for n in rebuilt)
        size = sum(float(tracked[n].square().sum()) for n in rebuilt)
        off = sum(float((kept["ema-power-0.1"][n] - tracked[n]).square().sum()) for n in rebuilt)
        assert error < 1e-4 * size
        assert error < 0.05 * off


def test_a_rebuilt_model_samples_and_the_checkpoint_is_untouched(tmp_path):
    folder = tmp_path / "r"
    go(folder, steps=6)
    before = groups(folder)
    model = rebuild(folder, 0.08)
    assert model.origin["weights"] == "ema-power-0.08, of 6 snapshots"
    assert not torch.equal(model.denoiser.network.conv_in.weight, before["model"]["conv_in.weight"])
    assert torch.equal(model.denoiser.network.fourier.phases, before["model"]["fourier.phases"])
    assert model.sample(2, steps=2).uint8.shape == (2, 1, 8, 8)
    after = groups(folder)
    assert all(torch.equal(before[g][n], after[g][n]) for g in before for n in before[g])
    at_4 = reconstruct(find_snapshots(folder), 0.05, updates=4)
    kept = reconstruct([find_snapshots(folder)[2]], 0.05)
    torch.testing.assert_close(at_4["conv_in.weight"], kept["conv_in.weight"], rtol=1e-4, atol=1e-4)


def test_a_unet_has_snapshots_too(tmp_path):
    go(tmp_path / "r", steps=4, network="unet", ema_lengths=(0.1, 0.05))
    assert len(find_snapshots(tmp_path / "r")) == 4
    assert rebuild(tmp_path / "r", 0.06).card.network.name == "unet"


def test_what_is_not_there_is_refused(tmp_path):
    go(tmp_path / "r", steps=4)
    snapshots = find_snapshots(tmp_path / "r")
    with pytest.raises(UsageError, match=r"update 9 is not one of 1 \.\. 4"):
        reconstruct(snapshots, 0.1, updates=9)
    with pytest.raises(UsageError, match="no snapshots"):
        find_snapshots(tmp_path)
    damaged = snapshots[0].path
    damaged.write_bytes(damaged.read_bytes()[:-8])
    with pytest.raises(ModelFileError, match="snapshots"):
        reconstruct(snapshots, 0.1)


def test_a_snapshot_that_fails_is_said_and_training_goes_on(tmp_path, monkeypatch):
    def full(*_):
        raise StorageError("the disk is full")

    monkeypatch.setattr(trainer, "write_snapshot", full)
    said = go(tmp_path / "r", steps=4)
    assert "no snapshot at step 2: the disk is full" in said
    assert "done: step 4" in said


def test_combination_of_what_a_run_leaves_by_default_is_near():
    """32 moments, two lengths: what the command tells as the profile's error."""
    kept = [Profile.of_length(s, 100 * k) for k in range(1, 33) for s in (0.1, 0.05)]
    errors = {s: combine(kept, Profile.of_length(s, 3200)).error for s in (0.03, 0.07, 0.12, 0.2, 0.25)}
    assert all(error < 0.05 for error in errors.values()), errors
    assert max(errors[0.07], errors[0.12], errors[0.2]) < 0.01
