"""Runs that start from a model: its weights, its card, its digest; and those that learn to fill in."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from reverie.base.errors import ModelFileError, UsageError
from reverie.cli.main import cli
from reverie.data import open_dataset
from reverie.models.builders import build
from reverie.models.card import Card, NetworkSpec, SamplingDefaults, ScheduleSpec
from reverie.models.checkpoints import CheckpointStore
from reverie.models.formats import write_model
from reverie.models.load import load
from reverie.models.model import Model
from reverie.training.config import TrainConfig
from reverie.training.metrics import Console
from reverie.training.trainer import Run, train

QUICK = {
    "batch_size": 4, "save_every": 2, "sample_every": 0, "log_every": 2, "limit": 40, "device": "cpu",
    "dtype": "float32",
}  # fmt: skip
SMALL = {"widths": (8, 8), "layers": 1}


def go(folder, resume="no", **settings):
    report = io.StringIO()
    train(TrainConfig(out=str(folder), **settings), resume, report)
    return report.getvalue()


def made(folder, **settings):
    return Run(TrainConfig(out=str(folder), **settings), False, Console(io.StringIO()))


def state(folder):
    checkpoint = CheckpointStore(folder / "checkpoints").latest()
    return checkpoint.step, {
        (group, name): value for group in checkpoint.groups for name, value in checkpoint.tensors(group).items()
    }


def killed(folder):
    """Leave a run of 4 steps as if it had been killed after step 2."""
    store = CheckpointStore(folder / "checkpoints")
    shutil.rmtree(store.latest().path)
    shutil.rmtree(folder / "model", ignore_errors=True)
    assert store.latest().step == 2


def assert_same(one, other):
    (step, tensors), (other_step, others) = state(one), state(other)
    assert step == other_step
    assert tensors.keys() == others.keys()
    assert [key for key in tensors if not torch.equal(tensors[key], others[key])] == []


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model of digits after a few steps."""
    folder = tmp_path_factory.mktemp("base") / "run"
    go(folder, steps=3, schedule="linear", prediction="eps", timesteps=50, **QUICK, **SMALL)
    return str(folder)


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """A model of captioned shapes after a step."""
    folder = tmp_path_factory.mktemp("captioned") / "run"
    go(folder, data="shapes:16,count=40", captions=True, steps=1, **QUICK, **SMALL)
    return str(folder)


def test_it_starts_as_the_model_with_its_card(tmp_path, base):
    run, theirs = made(tmp_path / "run", start=base, steps=2, **QUICK), load(base)
    for name, value in theirs.denoiser.network.state_dict().items():
        assert torch.equal(run.network.state_dict()[name], value), name
    card = run.plan.card
    assert (card.schedule.options, card.prediction, card.classes) == ({"timesteps": 50}, "eps", theirs.card.classes)
    assert card.teacher == theirs.digest
    assert card.training is None
    assert run.update.objective.target.__class__.__name__ == "Eps"  # the model's, and not the flag's default
    assert all(p.requires_grad for p in run.network.parameters())


@pytest.mark.parametrize("fill", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, base, fill):
    settings = {"start": base, "fill": fill, "validate_every": 3, "dropout": 0.1, **QUICK}
    go(tmp_path / "whole", steps=4, **settings)
    go(tmp_path / "twice", steps=4, **settings)
    killed(tmp_path / "twice")
    go(tmp_path / "twice", "yes")
    assert_same(tmp_path / "whole", tmp_path / "twice")


def test_another_model_is_not_gone_on_with(tmp_path, base):
    go(tmp_path / "run", steps=2, start=base, **QUICK)
    shutil.copytree(base, tmp_path / "moved")
    go(tmp_path / "run", "yes", steps=3, start=str(tmp_path / "moved"))  # the same weights elsewhere
    go(tmp_path / "other", steps=1, start=base, seed=1, **QUICK)
    with pytest.raises(ModelFileError, match="teacher"):
        go(tmp_path / "run", "yes", steps=4, start=str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"fill": True}, "fill needs a model"),
        ({"start": "m", "widths": (8,)}, "widths: taken from the model"),
        ({"start": "m", "schedule": "flow", "prediction": "v"}, "schedule, prediction: taken from"),
        ({"start": "m", "objective": "consistency", "steps": 2}, "as --teacher, not as --from"),
    ],
)
def test_what_contradicts_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(out="x", **settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": 16}, r"is a model of \(1, 8, 8\); digits as it is read here is \(1, 16, 16\)"),
        ({"channels": 3}, "is a model of"),
        ({"labels": False}, "has 10 classes"),
        ({"data": "shapes:16,count=40"}, "as it is read here is"),
        ({"captions": True}, "reads no captions"),
        ({"learned_variance": True, "objective": "hybrid"}, "has no learned variance"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(tmp_path, base, settings, words):
    with pytest.raises(UsageError, match=words):
        made(tmp_path / "run", start=base, steps=1, **(QUICK | settings))
    assert not (tmp_path / "run").exists()


def test_a_model_that_training_cannot_go_on_with_is_refused(tmp_path):
    def saved(name, **card):
        network = NetworkSpec(name=card.pop("network", "mlp"), config=card.pop("config", {"in_channels": 2}))
        card = Card(network=network, **card)
        return str(write_model(Model(build(card), card), tmp_path / name))

    points = saved("points", kind="points", shape=(2,))
    with pytest.raises(UsageError, match="is a mlp of points"):
        made(tmp_path / "run", start=points, steps=1, **QUICK)
    unet = {"in_channels": 1, "channels": [8, 8], "num_class_embeds": 10}
    classes = tuple(str(i) for i in range(10))
    sure = saved("sure", network="unet", config=unet, shape=(1, 8, 8), classes=classes, unconditional=False)
    with pytest.raises(UsageError, match="add --label-dropout 0"):
        made(tmp_path / "run", start=sure, steps=1, **QUICK)
    assert go(tmp_path / "run", start=sure, steps=1, label_dropout=0.0, **QUICK)


def test_an_edm_model_is_trained_where_edm_trains(tmp_path):
    card = Card(
        shape=(1, 8, 8), network=NetworkSpec(config={"in_channels": 1, "channels": [8, 8]}), prediction="edm",
        schedule=ScheduleSpec(name="edm"), sigma_data=0.25, sampling=SamplingDefaults(sampler="consistency"),
    )  # fmt: skip
    path = str(write_model(Model(build(card), card), tmp_path / "edm"))
    run = made(tmp_path / "run", start=path, steps=1, **QUICK)
    assert type(run.update.times).__name__ == "LogNormalTimes"
    assert run.update.objective.target.sigma_data == 0.25
    assert run.plan.card.sampling.sampler == "ddim"


# Filling in -----------------------------------------------------------------------------------------


def told_of(model, count):
    if model.card.text is not None:
        return {"tokens": torch.randint(0, 5, (count, model.card.text.length))}
    return {"label": torch.arange(count)}


@pytest.mark.parametrize("kind", ["base", "captioned"])
def test_a_network_that_fills_in_starts_as_the_one_it_came_from(tmp_path, request, kind):
    start = request.getfixturevalue(kind)
    data = {"data": "shapes:16,count=40", "captions": True} if kind == "captioned" else {}
    run, theirs = made(tmp_path / "run", start=start, fill=True, steps=1, **QUICK, **data), load(start)
    channels = theirs.card.shape[0]
    side = theirs.card.shape[1]
    x, time = torch.randn(3, channels, side, side), torch.tensor([0.0, 20.0, 49.0])
    told = told_of(theirs, 3)
    due = theirs.denoiser.network(x, time, **told)
    run.network.eval()
    for other in (torch.zeros(3, channels + 1, side, side), torch.randn(3, channels + 1, side, side)):
        torch.testing.assert_close(run.network(x, time, beside=other, **told), due, rtol=0, atol=1e-6)
    entry = dict(run.network.named_parameters())["unet.conv_in.weight" if kind == "captioned" else "conv_in.weight"]
    assert entry.shape[1] == 2 * channels + 1
    assert not entry[:, channels:].any()


def test_each_example_has_a_mask_of_its_position(tmp_path, base):
    run = made(tmp_path / "run", start=base, fill=True, steps=1, label_dropout=1.0, **QUICK)
    examples = run.examples(run.batches.batch(3))
    mask, left = examples.condition["beside"].split([1, 1], 1)
    assert examples.condition["label"].tolist() == [10] * 4
    assert torch.equal(left, examples.x0 * (1 - mask))
    again = run.examples(run.batches.batch(3))
    assert torch.equal(again.condition["beside"], examples.condition["beside"])
    assert not torch.equal(run.examples(run.batches.batch(4)).condition["beside"], examples.condition["beside"])


@pytest.mark.parametrize("kind", ["base", "captioned"])
def test_the_run_edits_pictures_and_leaves_the_outside(tmp_path, request, kind):
    data = {"data": "shapes:16,count=40", "captions": True} if kind == "captioned" else {}
    settings = QUICK | {"sample_every": 2, "sample_count": 3, "sample_steps": 2, "validate_every": 2} | data
    report = go(tmp_path / "run", start=request.getfixturevalue(kind), fill=True, steps=3, **settings)
    assert "held-out loss" in report
    assert "no samples" not in report
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 2
    grey = kind == "base"
    image = open_dataset(data.get("data", "digits")).images([5])[0]
    pixels = image[0].numpy() if grey else image.permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(tmp_path / "pic.png")
    mask = np.zeros(pixels.shape[:2], dtype=np.uint8)
    mask[2:6, 3:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    asked = ["--class", "3"] if grey else ["--prompt", "a red circle"]
    for model in (tmp_path / "run", tmp_path / "run" / "model"):
        arguments = ["edit", str(model), str(tmp_path / "pic.png"), "--mask", str(tmp_path / "mask.png"), "--json",
                     "--steps", "2", "--out", str(tmp_path / f"out-{model.name}"), "--seed", "1", *asked]  # fmt: skip
        result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        (path,) = json.loads(result.stdout)["files"]
        drawn = np.asarray(Image.open(path))
        assert np.array_equal(drawn[mask == 0], pixels[mask == 0])
        assert not np.array_equal(drawn[mask > 0], pixels[mask > 0])


def test_one_that_fills_in_goes_on_filling_in(tmp_path, base):
    go(tmp_path / "fills", start=base, fill=True, steps=2, **QUICK)
    with pytest.raises(UsageError, match="fills in; add --fill"):
        made(tmp_path / "run", start=str(tmp_path / "fills"), steps=1, **QUICK)
    run = made(tmp_path / "run", start=str(tmp_path / "fills"), fill=True, steps=1, **QUICK)
    theirs = load(tmp_path / "fills").denoiser.network.conv_in.weight
    assert theirs[:, 1:].any()
    assert torch.equal(run.network.conv_in.weight, theirs)
