"""Runs of few steps: the student begins as its teacher, is resumed bit for bit, and is sampled as its card says."""

import io
import shutil

import pytest
import torch

from reverie.base.errors import ModelFileError, UsageError
from reverie.data import open_dataset
from reverie.diffusion.few_step.consistency import Consistency
from reverie.diffusion.few_step.easy_consistency import EasyConsistency
from reverie.diffusion.times import LogNormalTimes, UniformTimes
from reverie.models.checkpoints import CheckpointStore
from reverie.models.load import load
from reverie.training.config import FEW_STEPS, TAUGHT, TrainConfig
from reverie.training.few_step import SAMPLING, read_teacher
from reverie.training.metrics import Console
from reverie.training.plan import make_plan
from reverie.training.setup import make_objective, make_times
from reverie.training.trainer import Run, train

QUICK = {
    "batch_size": 4, "save_every": 2, "sample_every": 0, "log_every": 2, "limit": 40, "device": "cpu",
    "dtype": "float32",
}  # fmt: skip
SMALL = {"widths": (8, 8), "layers": 1, "validate_every": 0}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A model of a few steps' training."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    return str(train(TrainConfig(out=str(folder), steps=3, **QUICK, **SMALL), "no", io.StringIO()))


def go(folder, resume="no", **settings):
    report = io.StringIO()
    train(TrainConfig(out=str(folder), **settings), resume, report)
    return report.getvalue()


def state(folder):
    checkpoint = CheckpointStore(folder / "checkpoints").latest()
    return checkpoint.step, {
        (group, name): value for group in checkpoint.groups for name, value in checkpoint.tensors(group).items()
    }


def settings_of(objective, teacher):
    own = {"teacher": teacher} if objective in TAUGHT else {"widths": (8, 8), "layers": 1}
    own |= {"schedule": "flow", "prediction": "velocity"} if objective == "mean-flow" else {}
    return {"objective": objective, **QUICK, **own}


EACH = [
    *((name, {}) for name in FEW_STEPS),
    ("easy-consistency", {"dropout": 0.2, "target_decay": 0.5, "accumulate": 2}),
]


@pytest.mark.parametrize(("objective", "more"), EACH)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, teacher, objective, more):
    settings = settings_of(objective, teacher) | more
    go(tmp_path / "whole", steps=4, **settings)
    go(tmp_path / "twice", steps=4, **settings)
    store = CheckpointStore(tmp_path / "twice" / "checkpoints")
    shutil.rmtree(store.latest().path)  # as if it had been killed after step 2
    shutil.rmtree(tmp_path / "twice" / "model", ignore_errors=True)
    assert store.latest().step == 2
    go(tmp_path / "twice", "yes")
    (step, one), (other_step, other) = state(tmp_path / "whole"), state(tmp_path / "twice")
    assert step == other_step == 4
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []
    assert any(group == "target" for group, _ in one) == ("target_decay" in more)


@pytest.mark.parametrize("objective", FEW_STEPS)
def test_it_is_sampled_as_its_card_says(tmp_path, teacher, objective):
    go(tmp_path / "run", steps=2, **settings_of(objective, teacher))
    model = load(tmp_path / "run")
    plan = model.plan(2)
    assert plan.sampler_name == SAMPLING[objective].sampler
    assert plan.steps == SAMPLING[objective].steps
    assert model.sample(2, steps=1).images.isfinite().all()


def test_the_student_begins_as_its_teacher(tmp_path, teacher):
    config = TrainConfig(out=str(tmp_path / "run"), **settings_of("easy-consistency", teacher), steps=2)
    run = Run(config, False, Console(io.StringIO()))
    theirs = load(teacher)
    for name, value in theirs.denoiser.network.state_dict().items():
        assert torch.equal(run.network.state_dict()[name], value), name
    assert run.plan.card.teacher == theirs.digest
    assert not any(p.requires_grad for p in run.teacher.denoiser.parameters())
    assert all(p.requires_grad for p in run.network.parameters())


def test_the_target_is_the_average(tmp_path, teacher):
    settings = settings_of("easy-consistency", teacher) | {"target_decay": 0.75}
    run = Run(TrainConfig(out=str(tmp_path / "run"), **settings, steps=2), False, Console(io.StringIO()))
    with torch.no_grad():
        before = [p.clone() for p in run.network.parameters()]
        for p in run.network.parameters():
            p.add_(1)
    run.target.average.update(0)
    for old, now in zip(before, run.update.objective.target.network.parameters(), strict=True):
        torch.testing.assert_close(now, old + 0.25)


def test_another_teacher_is_not_gone_on_with(tmp_path, teacher):
    shutil.copytree(teacher, tmp_path / "teacher")
    go(tmp_path / "run", steps=2, **settings_of("easy-consistency", str(tmp_path / "teacher")))
    shutil.move(tmp_path / "teacher", tmp_path / "moved")
    moved = {"objective": "easy-consistency", "teacher": str(tmp_path / "moved")}  # the same weights elsewhere
    go(tmp_path / "run", "yes", steps=3, **moved)
    go(tmp_path / "other", steps=1, **QUICK, **SMALL, seed=1)
    with pytest.raises(ModelFileError, match="teacher"):
        go(tmp_path / "run", "yes", steps=4, **(moved | {"teacher": str(tmp_path / "other")}))


def test_objectives_and_times_by_name(teacher):
    def config(objective, **more):
        return TrainConfig(out="x", objective=objective, **more)

    tuned = make_objective(config("easy-consistency", teacher="t", steps=7))
    assert isinstance(tuned, EasyConsistency)
    assert (tuned.steps, tuned.stages) == (7, 8)
    assert make_objective(config("easy-consistency", teacher="t", steps=7, stages=3)).stages == 3
    distilled = make_objective(config("consistency", teacher="t"), load(teacher).denoiser)
    assert isinstance(distilled, Consistency)
    assert distilled.count == 19
    assert make_objective(config("consistency")).count == 11
    schedule = load(teacher).denoiser.schedule
    times = make_times(config("consistency"), schedule)
    assert isinstance(times, LogNormalTimes)
    assert (times.mean, times.std) == (-1.1, 2.0)
    assert isinstance(make_times(config("consistency", times="uniform"), schedule), UniformTimes)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"teacher": "t"}, "teacher has no effect on objective simple"),
        ({"objective": "easy-consistency"}, "needs a teacher"),
        ({"objective": "easy-consistency", "teacher": "t", "widths": (8,)}, "widths: the teacher's is taken"),
        ({"objective": "consistency", "distance": "l1"}, "distance: without effect"),
        ({"objective": "consistency", "minutes": 1.0}, "needs steps"),
        ({"objective": "consistency", "prediction": "x0"}, "no boundary"),
        ({"objective": "mean-flow"}, "--schedule flow --prediction velocity"),
        (
            {"objective": "mean-flow", "schedule": "flow", "prediction": "velocity", "captions": True},
            "takes no captions",
        ),
        ({"objective": "reflow", "teacher": "t", "target_decay": 0.5}, "target_decay has no effect"),
        ({"objective": "consistency", "stages": 4}, "stages has no effect"),
        ({"objective": "reflow", "teacher": "t", "student_steps": 4}, "student_steps has no effect"),
        ({"objective": "consistency", "learned_variance": True}, "says nothing of the variance"),
    ],
)
def test_what_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(out="x", **settings)


def test_the_progressive_student_is_sampled_in_its_steps(tmp_path, teacher):
    go(tmp_path / "run", steps=1, student_steps=3, **settings_of("progressive", teacher))
    assert (
        load(tmp_path / "run").plan(1).sentence().startswith("1 sample of 1x8x8: ddim (eta 0.0), 3 steps on trailing")
    )


def test_mean_flow_goes_on_in_more_steps_guided_and_other_models_refuse_it(tmp_path, teacher):
    go(tmp_path / "run", steps=2, **settings_of("mean-flow", teacher))
    model = load(tmp_path / "run")
    assert model.sample(2, steps=3, classes=[1, 2], guidance=2.0).images.isfinite().all()
    assert model.sample(2, sampler="heun", steps=2).images.isfinite().all()  # without a span it is a velocity
    with pytest.raises(UsageError, match="trained by objective mean-flow"):
        load(teacher).plan(1, sampler="mean-flow")


def test_a_mean_flow_student_begins_as_a_flow(tmp_path, teacher):
    go(tmp_path / "flow", steps=3, schedule="flow", prediction="velocity", **QUICK, **SMALL)
    settings = {"objective": "mean-flow", "teacher": str(tmp_path / "flow"), "steps": 2, **QUICK}
    run = Run(TrainConfig(out=str(tmp_path / "run"), **settings), False, Console(io.StringIO()))
    x, time, label = torch.randn(3, 1, 8, 8), torch.tensor([5.0, 300.0, 999.0]), torch.tensor([1, 2, 10])
    slow = run.teacher.denoiser.network
    with torch.no_grad():  # the quick half of the sines, and of the cosines, is gone
        weight = slow.time_embedding.linear_1.weight
        half, quarter = weight.shape[1] // 2, weight.shape[1] // 4
        weight[:, :quarter] = weight[:, half : half + quarter] = 0
    due = slow(x, time, label=label)
    span = torch.tensor([0.0, 0.2, 0.9])
    torch.testing.assert_close(run.network(x, time, label=label, span=span), due, rtol=1e-4, atol=1e-5)
    go(tmp_path / "run", **settings)
    assert load(tmp_path / "run").plan(1).sampler_name == "mean-flow"
    with pytest.raises(UsageError, match="no U-Net of velocities on the flow schedule"):
        go(tmp_path / "other", **(settings | {"teacher": teacher}))


def test_a_latent_consistency_student_begins_as_its_teacher_and_is_told_the_guidance(tmp_path, teacher):
    settings = settings_of("latent-consistency", teacher)
    run = Run(TrainConfig(out=str(tmp_path / "run"), **settings, steps=2), False, Console(io.StringIO()))
    x, time, label = torch.randn(3, 1, 8, 8), torch.tensor([5.0, 300.0, 999.0]), torch.tensor([1, 2, 10])
    guidance = torch.tensor([1.0, 3.0, 7.0])
    due = run.teacher.denoiser.network(x, time, label=label)
    torch.testing.assert_close(run.network(x, time, label=label, guidance=guidance), due, rtol=1e-4, atol=1e-5)
    go(tmp_path / "run", steps=2, **settings)
    model = load(tmp_path / "run")
    plan = model.plan(2, classes=[1, 2])
    assert (plan.guidance, plan.evaluations, plan.steps) == (2.0, 4, 4)
    told = []
    model.denoiser.network.register_forward_pre_hook(lambda _, x, names: told.append(names), with_kwargs=True)
    model.sample(2, classes=[1, 2], guidance=3.0, steps=1)
    assert [(set(t), float(t["guidance"].min()), float(t["guidance"].max())) for t in told] == [
        ({"label", "guidance"}, 3.0, 3.0)
    ]


def test_a_teacher_of_other_data_is_refused(teacher):
    config = TrainConfig(out="x", objective="easy-consistency", teacher=teacher)
    shapes = open_dataset("shapes", size=16)
    with pytest.raises(UsageError, match="the teacher's images are"):
        make_plan(config, shapes, read_teacher(config))
    config = TrainConfig(out="x", objective="easy-consistency", teacher=teacher, labels=False)
    with pytest.raises(UsageError, match="10 classes"):
        make_plan(config, open_dataset("digits"), read_teacher(config))
