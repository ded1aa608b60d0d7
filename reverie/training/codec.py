"""The training run of an autoencoder: from pictures to a vae's folder that diffusion is trained on (`--codec`)."""

import hashlib
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

import reverie
from reverie.base.errors import ModelFileError, UsageError
from reverie.base.randomness import normals
from reverie.base.storage import write_file
from reverie.data import open_dataset
from reverie.data.batches import Batch, Batches, split
from reverie.data.dataset import Dataset
from reverie.models.checkpoints import Checkpoint, CheckpointStore, check_tensors
from reverie.models.codec import Codec
from reverie.models.formats.codec_file import write_vae
from reverie.models.load import find_device
from reverie.models.pictures import grid_picture, to_uint8
from reverie.networks.autoencoder import Autoencoder, AutoencoderConfig
from reverie.networks.discriminator import Discriminator
from reverie.networks.perceptual import Perceptual
from reverie.training.codec_config import CODEC_FIXED, CodecConfig
from reverie.training.codec_update import CodecUpdate
from reverie.training.ema import EMA
from reverie.training.metrics import Console, Stream, imported
from reverie.training.optimizers import flatten_optimizer, restore_optimizer
from reverie.training.plan import choose_dtype, norm_groups, shape_words
from reverie.training.run import BaseRun, Progress, Resume, carry_out
from reverie.training.setup import merge
from reverie.training.update import StepReport, seeded, to_unit

WIDTHS = (32, 64, 128, 128, 128, 128)
RATE = 1e-3
MEASURED = 512  # pictures that the scale of the latents is measured on
VALIDATED = 128


def train_codec(config: CodecConfig, resume: Resume = "no", stream: Stream = sys.stderr) -> Path:
    """Train an autoencoder, or go on with a run, and return the run's folder, whose vae/ is the result.

    Arguments:
        config: What to do.
        resume: "no" starts a run, "yes" continues one, "auto" does whichever fits.
        stream: Where the run's report and its progress bar go.

    Raises:
        UsageError: The configuration does not fit the data, the machine or the folder.
        DataError: The data can't be read.
        ModelFileError: The run to be resumed is damaged, or is another.
        NonFiniteError: Too many steps in a row were not finite.
        StorageError: The last checkpoint could not be saved.
        Stopped: A signal ended the run; its state is saved.
    """
    return carry_out(CodecRun, config, resume, stream)


def network_for(config: CodecConfig, dataset: Dataset) -> AutoencoderConfig:
    """Return the autoencoder's settings, chosen from the data where nothing is said.

    Raises:
        UsageError: The factor does not divide the pictures' sides.
    """
    channels, height, width = dataset.shape
    levels = len(config.widths) if config.widths else (config.factor or factor_for(min(height, width))).bit_length()
    widths = config.widths or WIDTHS[:levels]
    factor = 1 << (levels - 1)
    if height % factor or width % factor:
        raise UsageError(f"a factor of {factor} does not divide {height}x{width}; set --size or --factor")
    return AutoencoderConfig(
        in_channels=channels,
        channels=widths,
        layers=config.layers,
        latent_channels=config.latent_channels,
        attention=config.attention,
        norm_num_groups=norm_groups(widths),
        sample_size=height if height == width else (height, width),
    )


def factor_for(size: int) -> int:
    """Return the largest factor, up to 8, that leaves 8 latents a side.

    Example:
        >>> factor_for(32), factor_for(256), factor_for(9)
        (4, 8, 1)
    """
    return max(factor for factor in (1, 2, 4, 8) if factor == 1 or size // factor >= 8)


class CodecRun(BaseRun):
    """A run that trains an autoencoder."""

    command = "codec"
    config: CodecConfig

    def __init__(self, config: CodecConfig, resumed: bool, console: Console) -> None:
        config, changes = merge(config, Path(config.out), CODEC_FIXED) if resumed else (config, [])
        super().__init__(config, resumed, console)
        for line in changes:
            self.say(line)
        self.dataset = open_dataset(
            config.data, on_bad=config.on_bad, max_bad=config.max_bad, limit=config.limit, size=config.size,
            channels=config.channels,
        )  # fmt: skip
        for skipped in self.dataset.skipped:
            self.say(f"skipped {skipped}")
        for tracker in config.track:
            imported(tracker)
        self.device = find_device(config.device)
        settings = network_for(config, self.dataset)
        channels, layout = settings.in_channels, self.layout
        with seeded(True, config.seed, "weights"):
            network = Autoencoder(settings)
            critic = Discriminator(channels) if config.adversarial else None
        self.network = network.to(self.device, memory_format=layout).train()  # type: ignore[call-overload]
        perceptual = Perceptual(channels).to(self.device) if config.perceptual else None
        self.update = CodecUpdate(
            self.network, None if critic is None else critic.to(self.device), perceptual, config,
            choose_dtype(config.dtype, self.device), config.learning_rate or RATE,
        )  # fmt: skip
        self.ema = EMA(self.network, config.ema)
        self.train_indices, self.held_out = split(len(self.dataset), config.held_out, config.seed)
        self.batches = Batches(
            self.dataset, config.batch_size, config.seed, indices=self.train_indices, flip=config.flip,
            workers=config.workers,
        )  # fmt: skip
        self.store = CheckpointStore(self.folder / "checkpoints", keep=config.keep)

    @property
    def layout(self) -> torch.memory_format:
        """The memory layout of images and weights."""
        return torch.channels_last if self.config.channels_last else torch.contiguous_format

    def lines(self) -> list[str]:
        """Return what will be done in words."""
        network, shape = self.network.config, self.dataset.shape
        latents = "x".join(str(n) for n in Codec(self.network).latent_shape(*shape[1:]))
        arithmetic = "float32" if self.update.dtype is None else "bfloat16"
        return [
            f"data: {self.dataset.name}, {len(self.dataset)} images of {shape_words(shape)}",
            f"autoencoder: channels {list(network.channels)}, latents {latents}, "
            f"{math.prod(shape) / (network.latent_channels * shape[1] * shape[2] / network.factor**2):.3g} times fewer",
            f"{arithmetic} on {self.device}",
        ]

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        return self.config.rate(step, self.update.rate)

    def write_beginnings(self) -> None:
        """Write what was told; it is what makes the folder a run."""
        write_file(self.folder / "config.json", self.config.model_dump_json(indent=1, exclude_unset=True).encode())

    def trained(self, batch: Batch) -> StepReport:
        """Train on a batch, with noise for its latents."""
        images = to_unit(batch.images).to(self.device, memory_format=self.layout)
        shape, seed = Codec(self.network).latent_shape(*images.shape[2:]), self.config.seed
        noise = normals(shape, [(seed, "latents", int(p)) for p in batch.positions.tolist()]).to(self.device)
        return self.update(images, noise, self.progress.step)

    def follow(self, updates: int) -> None:
        """Let the average follow."""
        self.ema.update(updates)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A block in which the network holds its average."""
        with self.ema.applied(self.network), torch.no_grad():
            yield

    def subjects(self, count: int) -> list[int]:
        """Return pictures to look at, held out where there are any."""
        return (self.held_out or self.train_indices)[:count]

    def seen_again(self, images: Tensor) -> Tensor:
        """Return 8-bit images encoded, to their latents' mean, and decoded."""
        made, _ = self.network(to_unit(images).to(self.device, memory_format=self.layout))
        return to_uint8(made.cpu())

    def validate(self) -> None:
        """Write how far held-out pictures are from what they are decoded to: the mean error, and PSNR."""
        if not self.config.validate_every or not self.held_out:
            return
        images = self.dataset.images(self.subjects(VALIDATED))
        with self.averaged():
            made = torch.cat([self.seen_again(part) for part in images.split(self.config.batch_size)])
        error = (made.double() - images.double()) / 255
        ratio = -10 * error.square().mean((1, 2, 3)).clamp(min=1e-10).log10().mean()
        values = {"held_out_loss": 2 * float(error.abs().mean()), "psnr": float(ratio)}
        self.log.write(self.progress.step, values)
        self.say(f"step {self.progress.step}: held-out PSNR {values['psnr']:.2f} dB")

    def pictured(self) -> Image:
        """Return a grid of pairs: a picture, and what it is decoded to."""
        images = self.dataset.images(self.subjects(max(1, self.config.sample_count // 2)))
        with self.averaged():
            made = self.seen_again(images)
        cells = torch.stack([images, made], 1).flatten(0, 1)
        return grid_picture(cells, columns=2 * max(1, math.isqrt(len(images))))

    # The end, and checkpoints -----------------------------------------------------------------------

    def finish(self) -> None:
        """Write the last checkpoint, loss and pictures, and the autoencoder in diffusers' layout."""
        if self.saved_at != self.progress.step:
            self.validate()
            self.sample()
            self.save(last=True)
        with self.averaged():
            write_vae(Codec(self.network, scale=self.measured()), self.folder / "vae")
        minutes = self.progress.seconds / 60
        self.say(f"done: step {self.progress.step}, {minutes:.1f} minutes; the codec is {self.folder}")

    def measured(self) -> float:
        """Return what makes the variance of the latents one."""
        chosen = self.train_indices[:MEASURED]
        parts = [chosen[i : i + self.config.batch_size] for i in range(0, len(chosen), self.config.batch_size)]
        means = [self.network.encode(to_unit(self.dataset.images(part)).to(self.device)).mean for part in parts]
        return float(f"{1 / max(float(torch.cat(means).double().std()), 1e-6):.4g}")

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Return the run's state: tensors by group, and a record of everything else."""
        update = self.update
        tensors, record = flatten_optimizer(update.optimizer, self.network.named_parameters())
        groups = {"model": self.network.state_dict(), "optimizer": tensors, self.ema.name: self.ema.state()}
        records = {"optimizer": record}
        if update.critic is not None and update.against is not None:
            groups["critic"] = update.critic.state_dict()
            tensors, records["critic_optimizer"] = flatten_optimizer(update.against, update.critic.named_parameters())
            groups |= {"critic_optimizer": tensors} if tensors else {}
        config = self.config.model_dump_json(exclude_unset=True)
        return groups, records | {
            "progress": asdict(self.progress),
            "gradient": {"mean_norm": update.mean_norm, "counted": update.counted},
            "code_version": reverie.__version__,
            "config_hash": hashlib.sha256(config.encode()).hexdigest(),
            "data_fingerprint": self.dataset.fingerprint,
        }

    def check_same_run(self) -> None:
        """Nothing but the data could differ, which `load` sees."""

    def load(self, checkpoint: Checkpoint) -> None:
        """Take up a checkpoint's state.

        Raises:
            ModelFileError: It is that of another network, or was made from other data.
        """
        record, update, where = checkpoint.record, self.update, str(checkpoint.path)
        if record["data_fingerprint"] != self.dataset.fingerprint:
            raise ModelFileError(f"{self.folder} was trained on other data; {self.config.data} has changed since")
        weights = checkpoint.tensors("model")
        check_tensors(self.network.state_dict(), weights, where)
        self.ema.load(checkpoint.tensors(self.ema.name), where)
        self.network.load_state_dict(weights)
        take = partial(restore_optimizer, update.optimizer, list(self.network.named_parameters()))
        take(checkpoint.tensors("optimizer"), record["optimizer"])
        if update.critic is not None and update.against is not None:
            critic = checkpoint.tensors("critic")
            check_tensors(update.critic.state_dict(), critic, where)
            update.critic.load_state_dict(critic)
            held = checkpoint.tensors("critic_optimizer") if "critic_optimizer" in checkpoint.groups else {}
            named = list(update.critic.named_parameters())
            restore_optimizer(update.against, named, held, record["critic_optimizer"])
        self.progress = Progress(**record["progress"])
        update.mean_norm, update.counted = record["gradient"]["mean_norm"], record["gradient"]["counted"]
