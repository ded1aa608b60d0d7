"""The training run, from its configuration to a model on the disk.

It reads from top to bottom: prepare (and refuse, before anything is made), restore, then step after
step until the steps, the minutes or a signal end it. Everything random is a function of the seed and of
where in the run it is, so that a run that was killed and resumed is the run that was not.
"""

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch.optim import AdamW

import reverie
from reverie.base.errors import ModelFileError, StorageError, UsageError
from reverie.base.storage import write_file
from reverie.data import open_dataset
from reverie.data.batches import Batch, Batches, run_split
from reverie.data.dataset import Dataset
from reverie.diffusion.denoisers import NetworkDenoiser
from reverie.models.builders import build, build_prediction, build_schedule
from reverie.models.card import Card, CodecSpec, TrainingRecord, read_card
from reverie.models.checkpoints import Checkpoint, CheckpointStore, check_tensors
from reverie.models.codec import Codec
from reverie.models.formats import write_model
from reverie.models.formats.codec_file import CODEC, beside, codec_contents, read_codec, spec_of
from reverie.models.load import find_device
from reverie.models.model import Model
from reverie.networks.edm2_layers import Uncertainty
from reverie.training import adapter
from reverie.training.conditions import Conditions
from reverie.training.config import SLOPED, TrainConfig
from reverie.training.ema import PowerEMA, make_averages
from reverie.training.few_step import make_target, read_teacher, start_from
from reverie.training.graphed import Graphed, graphs
from reverie.training.latents import CACHE, Latents
from reverie.training.metrics import Console, Stream, imported
from reverie.training.optimizers import flatten_optimizer, restore_optimizer
from reverie.training.plan import make_plan
from reverie.training.previews import filled, preview
from reverie.training.run import BaseRun, Progress, Resume, carry_out
from reverie.training.setup import make_objective, make_times, merge
from reverie.training.snapshots import write_snapshot
from reverie.training.start import read_start, start_with
from reverie.training.update import Examples, StepReport, Update, draw_examples, on_device, seeded
from reverie.training.validation import held_out_loss

MAX_FILLED = 16  # pictures that are filled in for a preview, each by itself


def train(config: TrainConfig, resume: Resume = "no", stream: Stream = sys.stderr) -> Path:
    """Train a model, or go on with a run, and return the run's folder.

    Arguments:
        config: What to do.
        resume: "no" starts a run, whose folder must not hold one; "yes" continues one, which must be
            there; "auto" does whichever fits.
        stream: Where the run's report and its progress bar go; it may close.

    Raises:
        UsageError: The configuration does not fit the data, the machine or the folder.
        DataError: The data can't be read.
        ModelFileError: The run to be resumed is damaged, or is another.
        NonFiniteError: Too many steps in a row were not finite.
        StorageError: The last checkpoint could not be saved.
        Stopped: A signal ended the run; its state is saved.
    """
    return carry_out(Run, config, resume, stream)


class Run(BaseRun):
    """A run: everything that a step needs, and the loop.

    Making it opens the data and builds the network; only `go` writes.

    Arguments:
        config: What to do; of a resumed run, what to do otherwise than before.
        resumed: Whether its folder holds it already.
        console: Where its report and its progress bar go.
    """

    config: TrainConfig

    def __init__(self, config: TrainConfig, resumed: bool, console: Console) -> None:
        config, changes = merge(config, Path(config.out)) if resumed else (config, [])
        super().__init__(config, resumed, console)
        for line in changes:
            self.say(line)
        self.teacher, start = read_teacher(self.config), read_start(self.config)
        self.codec = self.find_codec(self.teacher or start)
        self.dataset = self.open_data(self.shape_of_pictures(start))
        spec = self.encode()
        self.plan = make_plan(self.config, self.dataset, self.teacher, start, spec)
        self.record_dtype()
        self.conditions = Conditions(self.plan.card, self.dataset)
        self.make_model(start)
        self.make_training()

    def record_dtype(self) -> None:
        """Put the arithmetic that the machine decided into the configuration: on another one, it is to stay."""
        if self.config.dtype == "auto":
            dtype = "float32" if self.plan.dtype is None else "bfloat16"
            self.say(f"dtype: {dtype}, as --dtype is auto; kept for --resume")
            self.config = self.config.model_copy(update={"dtype": dtype})

    def open_data(self, like: tuple[int | None, ...] | None = None) -> Dataset:
        """Return the data, its unreadable files named; of a model's shape (C, H, W), where nothing else is said."""
        config = self.config
        opened = partial(
            open_dataset, config.data, on_bad=config.on_bad, max_bad=config.max_bad, limit=config.limit
        )  # fmt: skip
        try:
            size: Any = (like[1], like[2]) if like and like[1] and config.size is None else config.size
            dataset = opened(size=size, channels=config.channels or (like[0] if like else None))
        except UsageError:  # a source that has a size of its own, as shapes:32
            if like is None:
                raise
            dataset = opened(size=config.size, channels=config.channels)
        for skipped in dataset.skipped:
            self.say(f"skipped {skipped}")
        return dataset

    def find_codec(self, origin: Model | None) -> Codec | None:
        """Return the codec: the run's own, that of the model it begins as, or the one that is named."""
        if self.resumed:
            codec = beside(self.folder, read_card(self.folder / "card.json"))
        else:
            codec = origin.codec if origin else read_codec(self.config.codec) if self.config.codec else None
        return None if codec is None else codec.to(find_device(self.config.device))

    def shape_of_pictures(self, start: Model | None) -> tuple[int | None, ...] | None:
        """Return the shape (C, H, W) that the data's pictures have where nothing is said; None for their own."""
        channels, factor = (self.codec.channels, self.codec.factor) if self.codec else (None, 1)
        if start is None:
            return None if channels is None else (channels, None, None)
        return (channels or start.card.shape[0], factor * start.card.shape[1], factor * start.card.shape[2])

    def encode(self) -> CodecSpec | None:
        """Make latents of the data, where there is a codec; return what the card says of it."""
        if self.codec is None:
            return None
        cache = self.folder / CACHE if self.resumed else None
        self.dataset = latents = Latents(self.dataset, self.codec, self.config.flip, cache, self.say)
        known = self.resumed or self.config.codec is None  # whose scale is that of its model
        return spec_of(self.codec) if known else latents.measure()

    def make_model(self, start: Model | None) -> None:
        """Build the network, and the model that is sampled: the same network, never compiled."""
        plan, config = self.plan, self.config
        with seeded(True, config.seed, "weights"):
            denoiser = build(plan.card)
        if self.teacher:
            start_from(denoiser.network, self.teacher)
            self.teacher.to(plan.device)
        if start:
            start_with(denoiser.network, start, str(config.start))
            adapter.adapt(denoiser.network, config)
        denoiser.dtype = plan.dtype
        self.model = Model(denoiser, plan.card, codec=self.codec)  # first: it lays the weights out as it likes
        self.network = denoiser.network.to(plan.device).to(memory_format=self.layout).train()  # type: ignore[call-overload]
        if config.checkpointing:
            self.network.gradient_checkpointing = True
        trained: Any = self.network
        if config.compile:
            trained = torch.compile(self.network)
        elif graphs(self.network, config, plan.device):
            trained = Graphed(self.network)
        card = plan.card
        self.denoiser = NetworkDenoiser(
            trained, build_schedule(card.schedule), build_prediction(card), card.learned_variance, plan.dtype
        )

    def make_training(self) -> None:
        """Make what trains it."""
        config, plan = self.config, self.plan
        for tracker in config.track:
            imported(tracker)  # refused now, before anything is made
        self.train_indices, self.held_out = run_split(len(self.dataset), config.held_out, config.seed)
        self.emas = make_averages(config, self.network)
        optimizer = AdamW(
            [p for p in self.network.parameters() if p.requires_grad], lr=plan.learning_rate, betas=(0.9, config.beta2),
            weight_decay=config.weight_decay, fused=True,
        )  # fmt: skip
        times = make_times(config, self.denoiser.schedule)
        self.target = make_target(config, self.denoiser, self.network)
        teacher = self.teacher.denoiser if self.teacher else None
        prediction = self.denoiser.prediction if config.start else None
        objective = make_objective(config, teacher, self.target.denoiser if self.target else None, prediction)
        self.update = Update(self.denoiser, objective, times, optimizer, config, plan.learning_rate)
        if config.uncertainty:
            with seeded(True, config.seed, "uncertainty"):
                self.update.learn_levels(Uncertainty().to(plan.device))
        self.store = CheckpointStore(self.folder / "checkpoints", keep=config.keep)
        self.batches = Batches(
            self.dataset, config.batch_size, config.seed, indices=self.train_indices,
            flip=config.flip and self.codec is None, workers=config.workers,
        )  # fmt: skip

    @property
    def layout(self) -> torch.memory_format:
        """The memory layout of images and weights."""
        # The norms' forward mode, of which two objectives make use, has no channels-last.
        last = self.config.channels_last and self.config.objective not in SLOPED
        return torch.channels_last if last else torch.contiguous_format

    def write_beginnings(self) -> None:
        """Write what the run is, before its first step."""
        if isinstance(self.dataset, Latents):
            self.dataset.write(self.folder / CACHE)
            write_file(self.folder / CODEC, codec_contents(self.codec)[CODEC])
        write_file(self.folder / "card.json", self.plan.card.model_dump_json(indent=1).encode())
        # Last, as it is what makes the folder a run.
        write_file(self.folder / "config.json", self.config.model_dump_json(indent=1, exclude_unset=True).encode())

    def finish(self) -> None:
        """Write the last checkpoint, loss and samples, and the model itself."""
        if self.saved_at != self.progress.step:
            self.snapshot()
            self.validate()
            self.sample()
            self.save(last=True)
        with self.emas[0].applied(self.network):
            card = self.plan.card.model_copy(update={"training": self.training_record()})
            denoiser = self.model.denoiser
            if self.config.lora is not None:
                adapter.write_adapter(self.network, self.folder)
                denoiser = build(card)
                denoiser.network.load_state_dict(adapter.merged(self.network))
            write_model(Model(denoiser, card, codec=self.codec), self.folder / "model", overwrite=True)
        self.say(
            f"done: step {self.progress.step}, {self.progress.seconds / 60:.1f} minutes; the model is {self.folder}"
        )

    def training_record(self) -> TrainingRecord:
        """Return how the model came about so far."""
        return TrainingRecord(
            steps=self.progress.step,
            images=self.progress.step * self.config.batch_size,
            seed=self.config.seed,
            seconds=self.progress.seconds,
            config=self.config.model_dump(mode="json", exclude_unset=True),
        )

    def lines(self) -> list[str]:
        """Return the plan in words."""
        return self.plan.lines()

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        return self.config.rate(step, self.plan.learning_rate)

    def also(self, step: int) -> None:
        """Take a snapshot where one is due."""
        if self.config.snapshot_due(step):
            self.snapshot()

    # One step -------------------------------------------------------------------------------------

    def trained(self, batch: Batch) -> StepReport:
        """Train on a batch, with times and noise."""
        return self.update(self.examples(batch), self.progress.step)

    def follow(self, updates: int) -> None:
        """Let the averages follow, and what makes an objective's targets."""
        for ema in self.emas:
            ema.update(updates)
        if self.target:
            self.target.average.update(updates)

    def examples(self, batch: Batch) -> Examples:
        """Return a batch with its times and noise, on the device."""
        told = self.conditions(batch.indices.tolist())
        positions = batch.positions.tolist()
        images = batch.images
        if isinstance(self.dataset, Latents) and self.config.flip:  # the mirror image's latents: not those mirrored
            images = self.dataset.turned(batch.indices.tolist(), self.batches.mirrored(batch.positions.numpy()))
        examples = draw_examples(images, told, positions, self.update.times, self.progress.step, self.config)
        return on_device(examples, self.plan.device, self.layout)

    def validate(self) -> None:
        """Write the held-out loss of the averaged weights, per noise level."""
        if not self.config.validate_every or not self.held_out or not self.update.objective.denoises:
            return
        with self.averaged():
            levels = held_out_loss(
                self.model.denoiser,
                self.dataset,
                self.held_out,
                self.conditions,
                self.plan.device,
                self.config.batch_size,
                fill=self.config.fill,
            )
        named = {f"held_out_loss/{k}": float(loss) for k, loss in enumerate(levels)}
        self.log.write(self.progress.step, {"held_out_loss": float(levels.mean()), **named})
        self.say(f"step {self.progress.step}: held-out loss {float(levels.mean()):.4f}")

    def pictured(self) -> Image:
        """Return a grid of samples of the averaged weights; where they fill in, held-out pictures and what is made."""
        config = self.config
        count, seed = config.sample_count, config.seed
        few = not self.update.objective.denoises
        steps = self.plan.card.sampling.steps if few else config.sample_steps
        with self.averaged():
            if not config.fill:
                return preview(self.model, count, steps, seed, self.prompts(count))
            return filled(self.model, self.dataset.images(self.subjects(min(count, MAX_FILLED))), steps, seed)

    def subjects(self, count: int) -> list[int]:
        """Return what a grid of samples shows or is told of, of data held out where there is any."""
        chosen = self.held_out or self.train_indices
        return [chosen[i % len(chosen)] for i in range(count)]

    def prompts(self, count: int) -> list[str] | None:
        """Return captions for a grid of samples."""
        if self.plan.card.text is None:
            return None
        return [self.dataset.caption(i) or "" for i in self.subjects(count)]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A block in which the network holds its first average, and no dropout."""
        with self.emas[0].applied(self.network):
            self.network.eval()
            try:
                yield
            finally:
                self.network.train()

    def snapshot(self) -> None:
        """Keep the averages whose length is a share of the run, for lengths that are wished for later."""
        for ema in self.emas:
            if not isinstance(ema, PowerEMA) or not self.progress.updates:
                continue
            try:
                write_snapshot(self.folder, ema, self.progress.updates)
            except StorageError as error:
                self.say(f"no snapshot at step {self.progress.step}: {error}")

    def state(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
        """Return the run's state: tensors by group, and a record of everything else."""
        objective = self.update.objective
        tensors, record = flatten_optimizer(self.update.optimizer, self.update.named_weights(self.network))
        groups = {"model": self.network.state_dict(), "optimizer": tensors, "times": self.update.times.state()}
        groups["objective"] = objective.learned.state_dict() if objective.learned else {}
        groups |= {ema.name: ema.state() for ema in self.emas}
        groups |= adapter.groups(self.network, self.emas) if self.config.lora is not None else {}
        groups |= {"target": self.target.average.state()} if self.target else {}
        config = self.config.model_dump_json(exclude_unset=True)
        return {name: group for name, group in groups.items() if group}, {
            "progress": asdict(self.progress),
            "training": self.training_record().model_dump(mode="json"),
            "gradient": {"mean_norm": self.update.mean_norm, "counted": self.update.counted},
            "optimizer": record,
            "averages": [ema.name for ema in self.emas],
            "code_version": reverie.__version__,
            "config_hash": hashlib.sha256(config.encode()).hexdigest(),
            "data_fingerprint": self.dataset.fingerprint,
        }

    def check_same_run(self) -> None:
        """Refuse a run whose model or data has changed since."""
        path = self.folder / "card.json"
        before, now = read_card(path), self.plan.card
        if before.data != now.data:
            raise ModelFileError(f"{self.folder} was trained on {before.data}; {self.config.data} is now {now.data}")
        same = before.model_copy(update={"code": now.code})
        if same != now:
            names = [name for name in Card.model_fields if getattr(same, name) != getattr(now, name)]
            raise ModelFileError(f"{path} describes another model: {', '.join(names)} differ; restore it from a copy")

    def load(self, checkpoint: Checkpoint) -> None:
        """Take up a checkpoint's state."""
        record, weights = checkpoint.record, checkpoint.tensors("model")
        if self.config.lora is not None:
            adapter.restore(self.network, self.emas, checkpoint)
        else:
            check_tensors(self.network.state_dict(), weights, str(checkpoint.path))
            for ema in self.emas:
                ema.load(checkpoint.tensors(ema.name), str(checkpoint.path))
            self.network.load_state_dict(weights)
        if self.target:
            self.target.average.load(checkpoint.tensors("target"), str(checkpoint.path))
        objective = self.update.objective
        if objective.learned is not None:
            learned = checkpoint.tensors("objective")
            check_tensors(objective.learned.state_dict(), learned, str(checkpoint.path))
            objective.learned.load_state_dict(learned)
        restore_optimizer(
            self.update.optimizer,
            self.update.named_weights(self.network),
            checkpoint.tensors("optimizer"),
            record["optimizer"],
        )
        if "times" in checkpoint.groups:
            self.update.times.load(checkpoint.tensors("times"))
        self.progress = Progress(**record["progress"])
        self.update.mean_norm = record["gradient"]["mean_norm"]
        self.update.counted = record["gradient"]["counted"]
