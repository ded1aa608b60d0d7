"""Averages of several lengths, judged: by the loss on what was held out, or by samples beside the data.

Every length meets the same images, times and noise, or the same seeds, so that the differences are the lengths'.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from reverie.base.errors import UsageError
from reverie.base.randomness import normal
from reverie.data import open_dataset
from reverie.data.batches import split
from reverie.data.dataset import Dataset
from reverie.diffusion.objectives import Simple
from reverie.evaluation.features import train_classifier
from reverie.evaluation.frechet import Moments, frechet_distance
from reverie.models.load import load
from reverie.models.model import Model
from reverie.training.conditions import Conditions
from reverie.training.config import TrainConfig
from reverie.training.setup import make_times, read_config
from reverie.training.snapshots import find_snapshots, put_weights, reconstruct, settle
from reverie.training.update import to_unit

Judge = Callable[[Model], float]
LENGTHS = (0.03, 0.05, 0.075, 0.1, 0.125, 0.15, 0.2, 0.25)
DRAWS = 8  # times for each image of the held-out loss
MOST = 500  # images of it
SHOWN = 5000  # images that features are learned from


class Point(NamedTuple):
    """A length, what it was judged to be (less is better), and the error of its profile."""

    sigma_rel: float
    value: float
    error: float


def run_data(run: Path) -> tuple[TrainConfig, Dataset]:
    """Return a run's configuration and its data."""
    config = read_config(run, TrainConfig)
    data = open_dataset(
        config.data, size=config.size, channels=config.channels, on_bad=config.on_bad, max_bad=config.max_bad,
        limit=config.limit,
    )  # fmt: skip
    return config, data


def held_out(config: TrainConfig, data: Dataset) -> list[int]:
    """Return the indices of what a run has not trained on.

    Raises:
        UsageError: It has trained on everything.
    """
    _, rest = split(len(data), min(config.held_out, MOST / len(data)), config.seed)
    if not rest:
        raise UsageError(f"{config.out} holds nothing out; use --metric frechet")
    return rest


def loss_judge(config: TrainConfig, data: Dataset) -> Judge:
    """Return the loss on what was held out, at the times that the run trained on, in the space of its prediction."""
    rest = held_out(config, data)
    x0, simple = to_unit(data.images(rest)), Simple(config.prediction, weight=config.weight)

    @torch.no_grad()
    def judge(model: Model) -> float:
        times = make_times(config, model.denoiser.schedule)
        told, total = Conditions(model.card, data)(rest), 0.0
        condition = {name: value.to(model.device) for name, value in told.condition.items()} if told else {}
        for k in range(DRAWS):
            eps = torch.stack([normal(x0.shape[1:], 0, "sweep", k, i) for i in rest]).to(model.device)
            drawn = times(len(rest), 0, "sweep", k)
            loss = simple(model.denoiser, x0.to(model.device), drawn.t.to(model.device), eps, condition)
            total += float((loss.cpu() * drawn.factor.to(loss.dtype).cpu()).mean())
        return total / DRAWS

    return judge


def frechet_judge(config: TrainConfig, data: Dataset, samples: int, steps: int | None) -> Judge:
    """Return the Frechet distance of samples from the run's data, in features of a classifier learned from it.

    Raises:
        UsageError: The data has no classes to learn features by, or the samples are too few.
    """
    if not data.classes:
        raise UsageError(f"{data.name} has no classes, from which the features are learned; use --metric loss")
    if samples < 2 * 64:
        raise UsageError(f"samples is {samples}; a distance in 64 features needs at least 128")
    shown = list(range(0, len(data), -(-len(data) // SHOWN)))
    images, labels = data.images(shown), data.labels(shown)
    assert labels is not None
    classifier = train_classifier(images, labels, epochs=max(3, 30_000 // len(shown)))
    truth = Moments.of(classifier.features(images))

    def judge(model: Model) -> float:
        classes = [i % len(model.card.classes) for i in range(samples)] if model.card.classes else None
        made = model.sample(samples, seed=0, classes=classes, steps=steps).uint8
        found = Moments.of(classifier.features(made.cpu()))
        return frechet_distance(found.mean, found.covariance, truth.mean, truth.covariance)

    return judge


def sweep(
    run: Path,
    judge: Judge,
    lengths: Sequence[float] = LENGTHS,
    updates: int | None = None,
    device: str = "cpu",
    report: Callable[[Point], None] | None = None,
) -> list[Point]:
    """Return what averages of several lengths are judged to be.

    Arguments:
        run: The run's folder.
        judge: From a model to a number, less being better.
        lengths: The relative lengths.
        updates: At which update; the last snapshot's, if not said.
        device: Where the network computes.
        report: Called with each point as it is there.

    Raises:
        UsageError: The run has no snapshots, or a length is none.
    """
    snapshots = find_snapshots(run)
    errors = [settle(snapshots, length, updates).error for length in lengths]  # refuses before anything is computed
    model = load(run, device=device)
    model.denoiser.network.eval()
    points = []
    for length, error in zip(lengths, errors, strict=True):
        put_weights(model, reconstruct(snapshots, length, updates), str(run))
        points.append(Point(length, judge(model), error))
        if report:
            report(points[-1])
    return points
