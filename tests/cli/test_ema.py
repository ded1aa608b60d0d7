"""`reverie ema`: a model of any length from a run's snapshots, and which length is best."""

import io
import json

import pytest
import torch

from reverie.models.load import load
from reverie.training.config import TrainConfig
from reverie.training.snapshots import find_snapshots, reconstruct
from reverie.training.sweep import loss_judge, run_data, sweep
from reverie.training.trainer import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ema") / "run"
    config = TrainConfig(out=str(folder), network="edm2", widths=(8, 8), layers=1, batch_size=8, steps=12, limit=200,
                         held_out=0.2, snapshot_every=3, sample_every=0, validate_every=0, device="cpu",
                         dtype="float32")  # fmt: skip
    train(config, "no", io.StringIO())
    return folder


@pytest.fixture
def call(reverie):
    return lambda *words: reverie("ema", *(str(word) for word in words))


def test_a_length_becomes_a_model(run, tmp_path, call):
    done = call(run, "--sigma-rel", "0.08", "--out", tmp_path / "m")
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(tmp_path / "m")
    model = load(tmp_path / "m")
    want = reconstruct(find_snapshots(run), 0.08)
    for name, weight in want.items():
        assert torch.equal(model.denoiser.network.state_dict()[name], weight)
    assert model.sample(1, steps=2).uint8.shape == (1, 1, 8, 8)


def test_json_says_how_near_the_profile_is_and_the_place_is_the_run(run, call):
    made = json.loads(call(run, "--sigma-rel", "0.1", "--json").stdout)
    assert made["out"] == str(run / "model-ema-0.1")
    assert made["profile_error"] < 1e-5
    again = call(run, "--sigma-rel", "0.1")
    assert again.exit_code == 2  # nothing is overwritten


def test_an_earlier_update(run, tmp_path, call):
    call(run, "--sigma-rel", "0.1", "--updates", 6, "--out", tmp_path / "early")
    found = load(tmp_path / "early").denoiser.network.state_dict()["conv_in.weight"]
    kept = [s for s in find_snapshots(run) if (s.updates, s.sigma_rel) == (6, 0.1)]
    torch.testing.assert_close(found, reconstruct(kept, 0.1)["conv_in.weight"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("metric", "more"), [("loss", ()), ("frechet", ("--samples", 128, "--steps", 2))])
def test_a_sweep_finds_the_best_and_draws_it(run, tmp_path, metric, more, call):
    plot = tmp_path / "sweep.svg"
    done = call(run, "--sweep", "--lengths", "0.05,0.1,0.2", "--metric", metric, *more, "--plot", plot, "--out",
                tmp_path / "best", "--json", "--threads", 1)  # fmt: skip
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout)
    values = {point["sigma_rel"]: point["value"] for point in made["points"]}
    assert list(values) == [0.05, 0.1, 0.2]
    assert len(set(values.values())) == 3
    assert made["best"] == min(values, key=values.__getitem__) == made["sigma_rel"]
    assert plot.read_text().count("<circle") == 3
    assert load(tmp_path / "best").source == str(tmp_path / "best")


def test_a_sweeps_loss_is_that_of_the_model_it_writes(run, tmp_path, call):
    judge = loss_judge(*run_data(run))
    (point,) = sweep(run, judge, [0.07])
    call(run, "--sigma-rel", "0.07", "--out", tmp_path / "m")
    assert judge(load(tmp_path / "m")) == pytest.approx(point.value, rel=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give one of --sigma-rel"),
        (["--sigma-rel", "0.1", "--sweep"], "give one of --sigma-rel"),
        (["--sigma-rel", "0.1", "--metric", "loss"], "--metric would have no effect"),
        (["--sweep", "--samples", "200"], "--samples would have no effect on --metric loss"),
        (["--sigma-rel", "0.4"], "sigma-rel"),
        (["--sigma-rel", "0.1", "--updates", "99"], "update 99 is not one of 1 .. 12"),
        (["--sweep", "--plot", "x.png"], "is an SVG"),
    ],
)
def test_refusals(run, words, message, call):
    done = call(run, *words)
    assert done.exit_code == 2
    assert message in done.stderr


def test_a_run_without_snapshots_is_told_how_to_get_them(tmp_path, call):
    done = call(tmp_path, "--sigma-rel", "0.1")
    assert "--ema-lengths 0.1,0.05" in done.stderr
