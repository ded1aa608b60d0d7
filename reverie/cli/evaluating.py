"""From what `reverie evaluate` was told to figures, with a bar for each stage."""

import math
from typing import TYPE_CHECKING, Any

import torch

from reverie.base.errors import Stopped, UsageError
from reverie.cli.console import note
from reverie.cli.drawing import asked, opened, sides
from reverie.cli.options import flag
from reverie.cli.sample import How, Machine, What
from reverie.cli.tuning import Stages
from reverie.data import open_dataset
from reverie.data.dataset import Dataset
from reverie.evaluation import evaluate as measured
from reverie.evaluation.figures import Evaluation
from reverie.evaluation.subjects import is_model, open_against
from reverie.models.load import load
from reverie.models.model import Model

if TYPE_CHECKING:
    from reverie.cli.evaluate import EvaluateSettings

OF_ANYTHING = {"n", "size", "threads"}  # what a folder of pictures takes of a sampler's options


def evaluate(settings: "EvaluateSettings", path: str) -> Evaluation:
    """Measure all that is asked for."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    subject, request = subject_of(settings, path)
    size = sides(settings.size)
    against = open_against(str(settings.against), subject, size)
    shape = against.shape
    stages = Stages()
    try:
        return measured.evaluate(
            subject, against, metrics=settings.metrics, n=settings.n, real=settings.real, features=settings.features,
            features_from=beside(settings.features_from, shape), held_out=beside(settings.held_out, shape),
            seed=settings.seed or 0, classes=settings.class_ or None, neighbours=settings.neighbours,
            images=settings.images, probes=settings.probes, draws=settings.draws, tolerance=settings.tolerance,
            picture=settings.picture, say=lambda line: said(line, stages),
            report=lambda stage, done, total: stages(stage, done, total, math.nan), **request,
        )  # fmt: skip
    except KeyboardInterrupt as stop:
        raise Stopped("stopped; nothing was written", 2) from stop
    finally:
        stages.close()


def subject_of(settings: "EvaluateSettings", path: str) -> tuple[Model | Dataset, dict[str, Any]]:
    """Return the model and how it is to be sampled, or the pictures, of which nothing of that is asked."""
    if is_model(path):
        model = opened(settings, path, dtype=settings.dtype)
        bad = None if settings.bad is None else load(settings.bad, device=settings.device)
        return model, asked(settings, bad)
    sampling = {*What.model_fields, *How.model_fields, *Machine.model_fields} - OF_ANYTHING
    if beside := sorted(sampling & settings.model_fields_set):
        raise UsageError(f"{', '.join(map(flag, beside))}: of models, and {path} holds pictures; leave it out")
    return open_dataset(path), {}


def beside(spec: str | None, shape: tuple[int, int, int]) -> Dataset | None:
    """Return a source that is opened in the real images' shape; None for none."""
    return None if spec is None else open_dataset(spec, channels=shape[0], size=(shape[1], shape[2]))


def said(line: str, stages: Stages) -> None:
    """Say a line; the bar before it ends."""
    stages.close()
    note(line)
