r"""Two other training loops, run as their own documentation says, for a fixed number of minutes.

Both get what ours gets: the same images (28x28 as they are: three levels, the last of 7x7, so nothing is padded or
resized), the same threads, the same minutes counted from the first batch, and the same number of network evaluations
for each sample. Both get their batches from memory, which is less work than the image files that they usually read,
and neither saves nor samples while the clock runs. What is theirs stays theirs; every value below is a default of
theirs unless it says otherwise:

- **diffusers**: UNet2DModel (32, 64, 64) with attention at the second level, 1.62 M parameters; the recipe of its
  example of unconditional training: DDPMScheduler with 1,000 linear steps, eps-prediction, AdamW (1e-4, betas 0.95
  and 0.999, weight decay 1e-6), 500 steps of warm-up and a cosine, clipping at 1, EMA up to 0.9999 with its own rise
  (power 3/4; a flag there, set here), under Accelerate, batch 16. Two things differ, both in its favour: the warm-up
  takes a tenth of the minutes at most, as a short run would else be all warm-up, and the cosine, which needs to know
  the number of steps, falls to zero over the minutes instead. Sampled by DDIMPipeline, with the settings that it
  takes from the scheduler.
- **denoising-diffusion-pytorch**: its Unet (dim 32, multipliers 1, 2, 2; 1.41 M parameters), its GaussianDiffusion
  (v-prediction, sigmoid schedule, 1,000 steps), and its Trainer itself, unmodified: Adam (1e-4, betas 0.9 and 0.99),
  EMA 0.995 every 10 steps, clipping at 1, batch 16. Two of its options are set, both in its favour: no mirroring,
  which makes digits that are none, and no FID while it trains. Only its data loader is replaced. Sampled by its DDIM
  (eta 0).

Both packages import torchvision, of which there is no build for every PyTorch. Where importing it fails, diffusers is
told that there is none, and denoising-diffusion-pytorch is given an empty stand-in: it needs only names to exist, of
image transforms that the replaced data loader would have used.

References:
    Unconditional image generation, diffusers' guide and its script
    https://huggingface.co/docs/diffusers/training/unconditional_training

    denoising-diffusion-pytorch
    https://github.com/lucidrains/denoising-diffusion-pytorch
"""

import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

Images = UInt8[Tensor, "n 1 h w"]


@dataclass(frozen=True)
class Task:
    """What every trainer is asked for; None is the trainer's own default.

    Arguments:
        trainer: Its name.
        data: Folder of MNIST's IDX files.
        minutes: Minutes of training.
        samples: Images to draw afterwards.
        sample_steps: Network evaluations for each of them.
        sample_batch: Images drawn at once.
        seed: Seed of weights, batches and samples.
        batch_size: Images in a training step.
        learning_rate: Peak learning rate.
        warmup: Steps over which it rises.
        precision: "no" (float32) or "bf16", as Accelerate calls them.
    """

    trainer: str
    data: str
    minutes: float
    samples: int
    sample_steps: int
    sample_batch: int
    seed: int
    batch_size: int | None = None
    learning_rate: float | None = None
    warmup: int | None = None
    precision: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What a trainer did.

    Arguments:
        settings: Its choices, by name.
        parameters: Number of trained parameters.
        steps: Optimiser steps.
        seconds: Wall time of training.
        images_per_second: Median over the steps after the warm-up.
        loss: Mean training loss of the last tenth of the steps, each trainer's own loss: not comparable.
        sample_seconds: Wall time for each sampled image.
        samples: The images (N, 1, H, W).
    """

    settings: dict[str, Any]
    parameters: int
    steps: int
    seconds: float
    images_per_second: float
    loss: float | None
    sample_seconds: float
    samples: Images


# The clock ------------------------------------------------------------------------------------


class TimedBatches:
    """Batches of images in [0, 1], in a new order each epoch, until the minutes are over.

    The time between two requests is the time of a step: nothing inside a trainer need be touched.

    Arguments:
        images: All images (N, 1, H, W).
        batch_size: Images in a batch B; the last, smaller one of an epoch is left out.
        minutes: Minutes after the first request at which there are no more.
        seed: Seed of the orders.
    """

    def __init__(self, images: Images, batch_size: int, minutes: float, seed: int) -> None:
        self.images, self.batch_size, self.budget = images, batch_size, 60 * minutes
        self.generator = torch.Generator().manual_seed(seed)
        self.rows: list[Tensor] = []
        self.requests: list[float] = []

    def __iter__(self) -> "TimedBatches":
        return self

    def __next__(self) -> Float[Tensor, "b 1 h w"]:
        self.requests.append(time.perf_counter())
        if self.seconds >= self.budget:
            raise StopIteration
        if not self.rows:
            order = torch.randperm(len(self.images), generator=self.generator)
            self.rows = list(order[: len(order) // self.batch_size * self.batch_size].split(self.batch_size))
        return self.images[self.rows.pop()].float() / 255

    @property
    def seconds(self) -> float:
        """Seconds from the first request to the last."""
        return self.requests[-1] - self.requests[0] if self.requests else 0.0

    @property
    def fraction(self) -> float:
        """The share of the minutes that is over."""
        return min(self.seconds / self.budget, 1.0)

    @property
    def steps(self) -> int:
        """Steps that were completed."""
        return len(self.requests) - 1

    def images_per_second(self) -> float:
        """Return the median over the steps after the warm-up."""
        return images_per_second(self.requests, self.batch_size)


def images_per_second(moments: list[float], images: int) -> float:
    """Return the median rate of steps of so many images, from the moments at which they ended.

    The first tenth, and at least three steps where there are more, is warm-up and left out.

    Example:
        >>> images_per_second([0.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0], images=64)
        64.0
    """
    took = [b - a for a, b in pairwise(moments)]
    skipped = min(max(3, len(took) // 10), len(took) - 1)
    return images / statistics.median(took[skipped:])


class WarmupCosine:
    """A learning rate that rises for some steps and then falls to zero over what is left of the minutes.

    Arguments:
        batches: The clock.
        steps: Steps of the rise; it takes a tenth of the minutes at most, or a short run would be all warm-up.
    """

    def __init__(self, batches: TimedBatches, steps: int) -> None:
        self.batches, self.steps = batches, steps
        self.risen: float | None = None  # the share of the minutes at which the rise was over

    def __call__(self, step: int) -> float:
        fraction = self.batches.fraction
        rise = max(step / self.steps if self.steps else 1.0, fraction / 0.1)
        if self.risen is None and rise < 1:
            return rise
        if self.risen is None:
            self.risen = min(fraction, 0.1)
        return 0.5 * (1 + math.cos(math.pi * (fraction - self.risen) / (1 - self.risen)))


def last_tenth(losses: list[float]) -> float | None:
    """Return the mean of the last tenth."""
    return statistics.fmean(losses[-max(1, len(losses) // 10) :]) if losses else None


def draw_samples(task: Task, draw: Callable[[int], Float[Tensor, "b 1 h w"]]) -> tuple[Images, float]:
    """Return samples from a function that draws some in [0, 1], and the seconds that each took."""
    began = time.perf_counter()
    batches = []
    for start in range(0, task.samples, task.sample_batch):
        batch = draw(min(task.sample_batch, task.samples - start))
        if not batch.isfinite().all():
            raise ArithmeticError(f"{task.trainer}: samples from {start} on are not finite; its training diverged")
        batches.append((batch.clamp(0, 1) * 255).round().to(torch.uint8).cpu())
    return torch.cat(batches), (time.perf_counter() - began) / task.samples


def count_parameters(network: torch.nn.Module) -> int:
    """Return the number of trained parameters."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


# diffusers ------------------------------------------------------------------------------------


def small_unet(size: int) -> torch.nn.Module:
    """Return diffusers' small U-Net of grey images, with random weights."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=size,
        in_channels=1,
        out_channels=1,
        layers_per_block=2,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )


def train_diffusers(task: Task, images: Images) -> Outcome:
    """Train a UNet2DModel as diffusers' example of unconditional training does."""
    if not torchvision_works():
        sys.modules["torchvision"] = None  # type: ignore[assignment]  # Python's own way to say: not there
    from accelerate import Accelerator
    from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler
    from diffusers.training_utils import EMAModel

    settings: dict[str, Any] = {
        "batch_size": task.batch_size or 16,
        "learning_rate": task.learning_rate or 1e-4,
        "warmup": 500 if task.warmup is None else task.warmup,
        "precision": task.precision or "no",
        "sampler": f"DDIMPipeline, {task.sample_steps} steps, leading, clipped",
    }
    torch.manual_seed(task.seed)
    accelerator = Accelerator(mixed_precision=settings["precision"])
    network = small_unet(images.shape[-1])
    table = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=settings["learning_rate"], betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
    )
    batches = TimedBatches(images, settings["batch_size"], task.minutes, task.seed)

    rate = WarmupCosine(batches, settings["warmup"])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    network, optimizer, schedule = accelerator.prepare(network, optimizer, schedule)
    ema = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4)
    ema.to(accelerator.device)

    network.train()
    losses = []
    for batch in batches:
        clean = batch.to(accelerator.device) * 2 - 1
        noise = torch.randn_like(clean)
        timesteps = torch.randint(1000, (len(clean),), device=clean.device)
        loss = F.mse_loss(network(table.add_noise(clean, noise, timesteps), timesteps).sample.float(), noise)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(network.parameters())
        losses.append(loss.item())

    ema.copy_to(network.parameters())
    network.eval()
    pipeline = DDIMPipeline(accelerator.unwrap_model(network), DDIMScheduler.from_config(table.config))
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(task.seed)

    def draw(count: int) -> Tensor:
        drawn = pipeline(count, generator, num_inference_steps=task.sample_steps, output_type="np").images
        return torch.from_numpy(drawn).permute(0, 3, 1, 2)

    return outcome(task, settings, network, batches, losses, draw)


# denoising-diffusion-pytorch --------------------------------------------------------------------


def train_ddpm_pytorch(task: Task, images: Images) -> Outcome:
    """Train by denoising-diffusion-pytorch's own Trainer, fed from memory."""
    if not torchvision_works():
        install_torchvision_names()
    from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet

    settings: dict[str, Any] = {
        "batch_size": task.batch_size or 16,
        "learning_rate": task.learning_rate or 1e-4,
        "precision": task.precision or "no",
        "sampler": f"its DDIM, {task.sample_steps} steps, eta 0, clipped",
    }
    if task.warmup:
        raise ValueError("denoising-diffusion-pytorch has no warm-up; leave --peer-warmup out, or run diffusers alone")
    torch.manual_seed(task.seed)
    network = Unet(dim=32, dim_mults=(1, 2, 2), channels=1)
    diffusion = GaussianDiffusion(network, image_size=images.shape[-1], sampling_timesteps=task.sample_steps)
    batches = TimedBatches(images, settings["batch_size"], task.minutes, task.seed)
    losses: list[float] = []
    diffusion.register_forward_hook(lambda module, inputs, loss: losses.append(loss.item()))

    with tempfile.TemporaryDirectory() as folder:
        write_a_few(images, Path(folder))
        trainer = Trainer(
            diffusion,
            folder,
            train_batch_size=settings["batch_size"],
            train_lr=settings["learning_rate"],
            train_num_steps=sys.maxsize,
            save_and_sample_every=sys.maxsize,
            augment_horizontal_flip=False,
            calculate_fid=False,
            amp=settings["precision"] != "no",
            mixed_precision_type=settings["precision"],
            results_folder=f"{folder}/results",
        )
        trainer.dl = batches
        with suppress(StopIteration):  # the batches end with the minutes, and so does the Trainer's endless loop
            trainer.train()

    sampler = trainer.ema.ema_model.eval()
    return outcome(task, settings, network, batches, losses, lambda count: sampler.sample(batch_size=count))


def write_a_few(images: Images, folder: Path) -> None:
    """Write the 100 image files without which the Trainer does not start."""
    for index in range(100):
        Image.fromarray(images[index, 0].numpy()).save(folder / f"{index}.png")


def outcome(
    task: Task,
    settings: dict[str, Any],
    network: torch.nn.Module,
    batches: TimedBatches,
    losses: list[float],
    draw: Callable[[int], Tensor],
) -> Outcome:
    """Draw the samples, and put together what a trainer did."""
    if batches.steps < 1:
        raise ValueError(f"{task.trainer}: no step was completed in {task.minutes} minutes; raise --minutes")
    seconds = batches.seconds
    samples, sample_seconds = draw_samples(task, draw)
    return Outcome(
        settings,
        count_parameters(network),
        batches.steps,
        seconds,
        batches.images_per_second(),
        last_tenth(losses),
        sample_seconds,
        samples,
    )


# torchvision ------------------------------------------------------------------------------------


def torchvision_works() -> bool:
    """Return whether torchvision can be imported: it may be missing, or built for another PyTorch."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        return False
    return True


def install_torchvision_names() -> None:
    """Put an empty torchvision in its place: transforms that can be named and made, but not called."""
    names = ("Compose", "Lambda", "Resize", "RandomHorizontalFlip", "CenterCrop", "ToTensor")
    transforms, utils = _module("torchvision.transforms"), _module("torchvision.utils")
    for name in names:
        setattr(transforms, name, type(name, (), {"__init__": lambda self, *arguments: None}))
    package = _module("torchvision")
    package.transforms, package.utils = transforms, utils  # type: ignore[attr-defined]


def _module(name: str) -> ModuleType:
    module = ModuleType(name, "An empty stand-in: see the module that made it.")
    module.__spec__ = ModuleSpec(name, loader=None)
    sys.modules[name] = module
    return module
