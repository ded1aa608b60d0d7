"""A model, or a folder of pictures, beside real images: what is measured, how, and everything that it depends on.

The real images that samples are compared to are a fixed random part of the source; the rest of it trains the feature
space, so that no image is on both sides. How many samples there are has nothing to do with how many are drawn at a
time. Every figure carries its settings (`Figure`).
"""

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.base.registry import nearest as nearest_name
from reverie.data.batches import run_split
from reverie.data.dataset import Dataset
from reverie.diffusion.schedules import Table
from reverie.evaluation.figures import Evaluation, Figure
from reverie.evaluation.frechet import frechet_with_error
from reverie.evaluation.gap import denoising_losses, gap
from reverie.evaluation.kernel import kernel_distance
from reverie.evaluation.likelihood import Bits, bound_bits, flow_bits
from reverie.evaluation.manifold import manifold
from reverie.evaluation.neighbours import copying, flat, nearest
from reverie.evaluation.spaces import Report, Say, Space, by, shuffled, spaces
from reverie.evaluation.subjects import Pictures, Sampled, drawn_classes, other_size
from reverie.evaluation.told import check_measurable, unconditional
from reverie.models.model import Model
from reverie.models.pictures import grid_picture, picture_bytes, write_new

METRICS = ("frechet", "kid", "prdc", "nearest", "gap", "likelihood")
USUAL = ("frechet", "kid", "prdc", "nearest")  # what is measured where nothing is asked for
COMPARED = {"frechet", "kid", "prdc"}  # in a feature space
OF_MODELS = ("gap", "likelihood")
REAL = 10_000  # real images that samples are compared to, at most
HELD_OUT = 0.05  # the share that a run holds out where its configuration says nothing
SHOWN = 12  # pairs of a sample and its nearest training image in the picture
GUESSED = 0.5  # a classifier that knows fewer than this share of the classes is a poor space
FEWEST = 50  # pictures that a distance needs on either side


def evaluate(
    subject: Model | Dataset,
    against: Dataset,
    *,
    metrics: str | Sequence[str] = USUAL,
    n: int | None = None,
    real: int | None = None,
    features: str | None = None,
    features_from: Dataset | None = None,
    held_out: Dataset | None = None,
    seed: int = 0,
    classes: Sequence[int | str] | str | None = None,
    neighbours: int = 5,
    images: int = 64,
    probes: int = 2,
    draws: int = 1,
    tolerance: float = 1e-3,
    picture: Path | str | None = None,
    say: Say | None = None,
    report: Report | None = None,
    **request: Any,
) -> Evaluation:
    """Measure a model, or pictures, beside real images.

    Arguments:
        subject: The model, which is sampled; or a data set of pictures that were generated.
        against: The real images, of the same shape.
        metrics: One or several of frechet, kid, prdc, nearest, gap, likelihood.
        n: How many samples; 1000, of a data set all of it.
        real: How many real images they are compared to; half of the source, 10,000 at most.
        features: The feature space: pixels or classifier; classifier where there are classes.
        features_from: Labelled images for the classifier; by default the other half of the source.
        held_out: Images that the subject was not trained on, for nearest and gap; a run of ours knows its own.
        seed: Of the first sample, each next being one more; and of the likelihood's draws.
        classes: Which classes are drawn, in the real images' shares, and compared to real images of those alone; "all".
            By default samples are drawn without a class, where the model has learned that.
        neighbours: k of prdc.
        images: Of the likelihood.
        probes: Of its trace; 0 is the exact one.
        draws: How often it spreads each image over the cells of its bytes.
        tolerance: Of its ODE.
        picture: Where to write samples beside their nearest training images; a new file.
        say: Told what is done; nothing is said by default.
        report: Told how far it is: (stage, done, of how many).
        request: How to sample, as `Model.plan` takes it: sampler, steps, guidance, ...

    Raises:
        UsageError: Something does not go together, or would have no effect.
        NonFiniteError: The model gave NaN or infinity.
    """
    say, report = say or (lambda line: None), report or (lambda stage, done, total: None)
    if isinstance(subject, Model):
        source: Sampled | Pictures = Sampled(subject, n, seed, request, say, report)
    else:
        if beside := [*request, *(["classes"] if classes is not None else [])]:
            raise UsageError(f"{', '.join(beside)}: of no effect on pictures that are there ({subject.name})")
        source = Pictures(subject, n)
    wanted = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    job = Job(
        source, against, wanted, real, features, features_from, held_out, seed, classes, neighbours, images,
        probes, draws, tolerance, None if picture is None else Path(picture), say, report,
    )  # fmt: skip
    return job.run()


@dataclass
class Job:
    """An evaluation as it goes; its fields are `evaluate`'s arguments."""

    subject: Sampled | Pictures
    against: Dataset
    metrics: tuple[str, ...]
    real: int | None
    features: str | None
    features_from: Dataset | None
    held_out: Dataset | None
    seed: int
    classes: Sequence[int | str] | str | None
    neighbours: int
    images: int
    probes: int
    draws: int
    tolerance: float
    picture: Path | None
    say: Say
    report: Report
    figures: dict[str, Figure] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.check()

    # What is refused --------------------------------------------------------------------------------

    def check(self) -> None:
        """Refuse what does not go together."""
        self.check_metrics()
        if tuple(self.subject.shape) != self.against.shape:
            raise UsageError(other_size(self.subject.shape, self.against))
        for name, other in (("features_from", self.features_from), ("held_out", self.held_out)):
            if other is not None and other.shape != self.against.shape:
                raise UsageError(f"the images of {name} are {by(other.shape)}, those compared {by(self.against.shape)}")
        self.check_effects()
        if self.features is not None:
            spaces.places.get(self.features) or spaces[self.features]  # which says what there is
        if self.features_from is not None and self.features == "pixels":
            raise UsageError("features_from trains a classifier, and has no effect on features pixels; leave it out")
        if self.picture is not None and self.picture.exists():
            raise UsageError(f"{self.picture} is there already; choose another name")

    def check_effects(self) -> None:
        """Refuse what would have no effect on the metrics that are asked for."""
        asked = set(self.metrics)
        for name, wanted in (
            ("real", COMPARED), ("features", COMPARED), ("features_from", COMPARED),
            ("held_out", {"nearest", "gap", "likelihood"}), ("picture", {"nearest"}),
        ):  # fmt: skip
            if getattr(self, name) is not None and not asked & wanted:
                raise UsageError(f"{name} has no effect on {', '.join(self.metrics)}; it is for {listed(wanted)}")

    def check_metrics(self) -> None:
        """Refuse metrics that there are not, and those that pictures can't be measured by."""
        for name in self.metrics:
            if name not in METRICS:
                raise UsageError(f"there is no metric {name!r}{nearest_name(name, METRICS)} (known: {listed(METRICS)})")
            if name in OF_MODELS and self.model is None:
                raise UsageError(f"metric {name} is of a model, and {self.subject.about()['source']} holds pictures")
            if name in OF_MODELS and self.model is not None:
                check_measurable(self.model, name)
        if not self.metrics:
            raise UsageError(f"no metric is asked for; name some of {listed(METRICS)}")

    # Who is compared with whom --------------------------------------------------------------------------

    @property
    def model(self) -> Model | None:
        """The model; None for a set of pictures."""
        return self.subject.model

    @property
    def count(self) -> int:
        """How many samples."""
        return self.subject.count

    @cached_property
    def halves(self) -> tuple[list[int], list[int]]:
        """The source's images that samples are compared to, and those that a classifier is trained on."""
        order = shuffled(len(self.against), "evaluate")
        apart = 0 if self.features_from is not None or self.space_name != "classifier" else len(order) - len(order) // 2
        most = min(REAL, len(order) - apart)
        return order[:most], order[most:]

    @cached_property
    def real_rows(self) -> list[int]:
        """The real images that samples are compared to: of the classes that are drawn, as many as are asked for."""
        rows = self.halves[0]
        if self.wanted is not None and self.wanted != self.against.classes:
            labels = self.against.labels(rows)
            assert labels is not None
            inside = {self.against.classes.index(name) for name in self.wanted}
            rows = [row for row, label in zip(rows, labels.tolist(), strict=True) if label in inside]
        if self.real is not None and self.real > len(rows):
            raise UsageError(f"real is {self.real}, and there are {len(rows)} real images to compare to")
        return rows[: self.real]

    @cached_property
    def wanted(self) -> tuple[str, ...] | None:
        """The classes that are drawn; None for samples without a class."""
        return None if self.model is None else drawn_classes(self.model, self.against, self.classes)

    @property
    def space_name(self) -> str:
        """The feature space's name."""
        labelled = self.features_from or self.against
        return self.features or ("classifier" if len(labelled.classes) > 1 else "pixels")

    @cached_property
    def drawn(self) -> UInt8[Tensor, "n c h w"]:
        """The samples."""
        return self.subject.samples()

    # Features ---------------------------------------------------------------------------------------

    @cached_property
    def space(self) -> Space:
        """The feature space, made when it is first needed."""
        name, compared, rest = self.space_name, *self.halves
        labelled, rows, judged = self.against, rest, compared
        if self.features_from is not None:
            labelled = self.features_from
            order = shuffled(len(labelled), "evaluate")
            cut = max(1, len(order) // 10)
            rows, judged = order[cut:], order[:cut]
        made: Space = spaces[name](
            self.against.shape, labelled=labelled, rows=rows, judged=judged, say=self.say, report=self.report
        )
        if name == "classifier" and made.about["accuracy"] < GUESSED:
            self.say(f"warning: the classifier knows {made.about['accuracy']:.0%} of the classes: a poor space")
        return made

    @cached_property
    def real_features(self) -> Float[Tensor, "n d"]:
        """The features of the real images, read a part at a time."""
        rows = self.real_rows
        return torch.cat([self.space(self.against.images(rows[i : i + 500])) for i in range(0, len(rows), 500)])

    @cached_property
    def sample_features(self) -> Float[Tensor, "n d"]:
        """The features of the samples."""
        return self.space(self.drawn)

    # Figures ----------------------------------------------------------------------------------------

    def run(self) -> Evaluation:
        """Measure all that is asked for."""
        began = time.monotonic()
        self.settle()
        for name in METRICS:
            if name in self.metrics:
                getattr(self, name)()
        sampled, compared = set(self.metrics) - set(OF_MODELS), COMPARED & set(self.metrics)
        return Evaluation(
            self.subject.about(),
            self.about_against(),
            {"n": self.count, **self.subject.settings(), "plan": self.subject.plan_settings()} if sampled else None,
            {"space": self.space.name, "fingerprint": self.space.fingerprint, **self.space.about} if compared else None,
            self.figures,
            None if self.picture is None else str(self.picture),
            time.monotonic() - began,
        )

    def settle(self) -> None:
        """Settle all that can be refused before the first sample is drawn."""
        if isinstance(self.subject, Sampled) and set(self.metrics) - set(OF_MODELS):
            if self.wanted is not None:
                labels = self.against.labels(self.real_rows)
                self.subject.labels = None if labels is None else labels.tolist()
            self.subject.plan(0, min(self.count, 2))
        if "gap" in self.metrics and self.trained_on[1] is None:
            raise UsageError(
                f"gap needs images that the model was not trained on: {self.against.name} is not the data of its run, "
                "or it held none out; name some by --held-out"
            )
        if COMPARED & set(self.metrics):
            self.settle_features()

    def settle_features(self) -> None:
        """Make the feature space, and refuse too few pictures for it."""
        few = min(self.count, len(self.real_rows))
        if few < FEWEST:
            raise UsageError(
                f"{self.count} samples and {len(self.real_rows)} real images; distances need {FEWEST} of each at least"
            )
        if few <= (dimensions := self.space.about["dimensions"]):
            self.say(
                f"warning: {few} pictures for {dimensions} features: the Frechet distance is mostly bias; more "
                "pictures, or kid, say more"
            )

    def note(self, name: str, value: float, error: float | None, better: str, began: float, **details: Any) -> None:
        """Keep a figure in the feature space, with all that it depends on."""
        self.figures[name] = Figure(
            value, error, self.count, len(self.real_rows), better,
            {
                "features": self.space.name, "fingerprint": self.space.fingerprint, **details,
                **self.subject.settings(), "seconds": round(time.monotonic() - began, 3),
            },
        )  # fmt: skip

    def frechet(self) -> None:
        """Measure the Frechet distance."""
        a, b, began = self.sample_features, self.real_features, time.monotonic()
        got = frechet_with_error(a, b)
        self.note("frechet", got.value, got.standard_error, "lower", began, bias=got.bias, corrected=got.corrected)

    def kid(self) -> None:
        """Measure the kernel distance."""
        a, b, began = self.sample_features, self.real_features, time.monotonic()
        got = kernel_distance(a, b)
        self.note("kid", got.value, got.standard_error, "lower", began, blocks=got.blocks, bias=0.0)

    def prdc(self) -> None:
        """Measure precision, recall, density and coverage."""
        a, b, began = self.sample_features, self.real_features, time.monotonic()
        got = manifold(b, a, self.neighbours)
        for name in ("precision", "recall", "density", "coverage"):
            value, error = getattr(got, name)
            self.note(name, value, error, "1" if name == "density" else "higher", began, k=got.k)

    @cached_property
    def trained_on(self) -> tuple[list[int], Dataset | None, list[int]]:
        """The training images (rows of the source), and the held-out ones: their data set, None for none, and rows."""
        everything, found = list(range(len(self.against))), None
        record = None if self.model is None else self.model.card.training
        data = None if self.model is None else self.model.card.data
        if record is not None and data is not None and data.fingerprint == self.against.fingerprint:
            share = float(record.config.get("held_out", HELD_OUT))
            found = run_split(len(self.against), share, record.seed)
        training, held = found if found is not None else (everything, [])
        if self.held_out is not None:
            return training, self.held_out, list(range(len(self.held_out)))
        return training, (self.against if held else None), held

    def nearest(self) -> None:
        """Measure how near samples lie to the training images, and draw some beside them."""
        training, source, held = self.trained_on
        samples, began = self.drawn, time.monotonic()
        known, rows = [], list(training)
        for start in range(0, len(rows), 5000):
            known.append(self.against.images(rows[start : start + 5000]))
            self.report("training images", start + len(known[-1]), len(rows))
        points = torch.cat(known)
        distance, index = nearest(flat(samples), flat(points))
        told = {"distance": "root mean square over pixels, in grey levels", "median": float(distance.median()),
                "least": float(distance.min())}  # fmt: skip
        if source is None:
            self.say(
                f"nearest: no images are known that were not trained on, so only distances to {self.against.name} are "
                "told; --held-out SOURCE judges them"
            )
            value, error, better, name = float(distance.median()), None, "neither", "nearest"
        else:
            others, _ = nearest(flat(source.images(held)), flat(points))
            got = copying(distance, others)
            told |= {"held_out_n": len(held), "held_out_median": got.held_out, "z": got.z}
            value, error, better, name = got.share, got.standard_error, "0.5", "nearest"
        seconds = {"seconds": round(time.monotonic() - began, 3)}
        self.figures[name] = Figure(
            value, error, self.count, len(points), better,
            {"measure": "share nearer than held-out images" if source else "median distance", **told}
            | self.subject.settings() | seconds,
        )  # fmt: skip
        if self.picture is not None:
            self.draw(samples, points, distance, index)

    def draw(
        self, samples: UInt8[Tensor, "n c h w"], points: UInt8[Tensor, "m c h w"], distance: Tensor, index: Tensor
    ) -> None:
        """Write the samples that lie nearest to the training images, each beside its nearest one."""
        assert self.picture is not None
        chosen = distance.argsort()[:SHOWN]
        pairs = torch.stack([samples[chosen], points[index[chosen]]], 1).flatten(0, 1)
        words = [text for d in distance[chosen].tolist() for text in (f"sample {d:.0f}", "trained")]
        write_new(self.picture, picture_bytes(grid_picture(pairs, 6, words)))
        self.say(f"the {len(chosen)} samples that lie nearest to training images, each beside its own: {self.picture}")

    def gap(self) -> None:
        """Measure the loss on training images and on held-out ones."""
        training, source, held = self.trained_on
        model = self.model
        assert model is not None
        assert source is not None
        held = held[:500]
        order = shuffled(len(training), "gap")
        rows, began = [training[i] for i in order[: len(held)]], time.monotonic()
        sets = (("training", self.against, rows), ("held-out", source, held))
        losses = [
            denoising_losses(
                model.denoiser, data.images(part), self.conditions(data, part), name,
                tick=partial(self.tick, f"loss, {name}", len(part)),
            )
            for name, data, part in sets
        ]  # fmt: skip
        got = gap(*losses)
        self.figures["gap"] = Figure(
            got.value, got.standard_error, len(held), len(rows), "0",
            {"measure": "held-out less training loss of the noise, mean over ten levels", "training": got.training,
             "held_out": got.held_out, "seconds": round(time.monotonic() - began, 3)},
        )  # fmt: skip

    def tick(self, stage: str, total: int, done: int) -> None:
        """Tell how far a stage is."""
        self.report(stage, done, total)

    def conditions(self, data: Dataset, rows: Sequence[int]) -> Callable[[slice], Mapping[str, Tensor]]:
        """Return what the network is told of some images."""
        model = self.model
        assert model is not None
        return lambda part: unconditional(model, data, rows[part])

    def likelihood(self) -> None:
        """Measure bits/dim by the ODE, and by the bound where there is a table."""
        model = self.model
        assert model is not None
        _, source, held = self.trained_on
        data = source or self.against
        rows = (held or shuffled(len(data), "bits"))[: self.images]
        if len(rows) < self.images:
            self.say(f"likelihood: of the {len(rows)} images that there are")
        images, conditions = data.images(rows), self.conditions(data, rows)
        unseen = source is not None
        began = time.monotonic()
        flow = flow_bits(
            model.denoiser, images, conditions, probes=self.probes, draws=self.draws, tolerance=self.tolerance,
            seed=self.seed, tick=partial(self.tick, "bits by the ODE", len(rows)),
        )  # fmt: skip
        self.note_bits("bits_ode", flow, began, unseen)
        if not isinstance(model.denoiser.schedule, Table):
            self.say("likelihood: no variational bound, for this model's schedule is no table")
            return
        began = time.monotonic()
        bound = bound_bits(
            model.denoiser, images, conditions, variance="learned" if model.card.learned_variance else "large",
            seed=self.seed, tick=partial(self.tick, "bits by the bound", len(rows)),
        )  # fmt: skip
        self.note_bits("bits_bound", bound, began, unseen)

    def note_bits(self, name: str, got: Bits, began: float, unseen: bool) -> None:
        """Keep bits/dim, with all that they depend on."""
        self.figures[name] = Figure(
            got.value, None if math.isnan(got.standard_error) else got.standard_error, got.n, None, "lower",
            {
                "unit": "bits/dim, an upper bound", "method": got.how, "dequantisation": got.dequantisation or "none",
                "own_error": got.own_error, "held_out_images": unseen, "seed": self.seed,
                "evaluations": got.evaluations, "seconds": round(time.monotonic() - began, 3),
            },
        )  # fmt: skip

    # What they were -----------------------------------------------------------------------------------

    def about_against(self) -> dict[str, Any]:
        """Return what the real images were."""
        data = self.against
        return {
            "source": data.name, "fingerprint": data.fingerprint, "count": len(data),
            "real_n": len(self.real_rows) if COMPARED & set(self.metrics) else None, "shape": list(data.shape),
            "preparation": data.preparation, "classes": None if self.wanted is None else list(self.wanted),
        }  # fmt: skip


def listed(names: Collection[str]) -> str:
    """Return metrics' names in their order."""
    return ", ".join(name for name in METRICS if name in names)
