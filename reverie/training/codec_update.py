r"""One step of an autoencoder's training: as little of the image lost as may be, through latents that stay tame.

    L = |x - x'| + p d(x, x') + k KL(q(z | x) || N(0, 1)) / n + a lambda G(x'),    x' = D(z), z ~ q(z | x)   (1)

with the perceptual distance d (perceptual.py), n numbers in an image, and G = -mean C(x') of a critic C that is
trained along by its hinge loss (discriminator.py); lambda makes the critic's gradient on the last layer as large as
that of the first two terms,

    lambda = |grad L_rec| / (|grad G| + 10^-4), at most 10^4.                                                (2)

References:
    High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al., 2022), appendix G
    https://arxiv.org/abs/2112.10752
    Taming Transformers for High-Resolution Image Synthesis (Esser et al., 2021), eq. 7 to 9
    https://arxiv.org/abs/2012.09841
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import AdamW

from reverie.networks.autoencoder import Autoencoder, Moments
from reverie.networks.discriminator import Discriminator, hinge
from reverie.networks.perceptual import Perceptual
from reverie.training.codec_config import CodecConfig
from reverie.training.update import MEMORY, SETTLED, StepReport, doubt

LARGEST = 1e4  # of lambda


@dataclass
class CodecUpdate:
    """The step, with its memory of gradients.

    Arguments:
        network: The autoencoder.
        critic: What tells real from made patches; None for none.
        perceptual: The distance d; None for none.
        config: The run's configuration.
        dtype: The networks' arithmetic under autocast, None for float32.
        rate: The learning rate after warm-up.
        mean_norm: The running mean of the gradient's norm.
        counted: Steps that went into it.
    """

    network: Autoencoder
    critic: Discriminator | None
    perceptual: Perceptual | None
    config: CodecConfig
    dtype: torch.dtype | None
    rate: float
    mean_norm: float = 0.0
    counted: int = 0

    def __post_init__(self) -> None:
        config, options = self.config, {"lr": self.rate, "weight_decay": self.config.weight_decay, "fused": True}
        self.optimizer = AdamW(self.network.parameters(), betas=(0.5, config.beta2), **options)  # type: ignore[arg-type]
        self.against = None
        if self.critic is not None:
            self.against = AdamW(self.critic.parameters(), betas=(0.5, config.beta2), **options)  # type: ignore[arg-type]

    def __call__(self, images: Float[Tensor, "b c h w"], noise: Float[Tensor, "b k i j"], step: int) -> StepReport:
        """Make step number `step` (from 0) on images (B, C, H, W) in [-1, 1] and their latents' noise, or skip it."""
        for optimizer in filter(None, (self.optimizer, self.against)):
            for group in optimizer.param_groups:
                group["lr"] = self.config.rate(step, self.rate)
        with self.autocast(images.device.type):
            made, moments = self.network(images, noise)
        made = made.float()
        losses = self.losses(images, made, moments, step)
        total = sum(losses.values(), torch.zeros((), device=images.device))
        total.backward()
        if self.critic is not None and step >= self.config.adversarial_after:
            losses["critic"] = self.teach_critic(images, made.detach())
        report = self.judged(float(total.detach()), losses)
        if not report.skipped:
            self.optimizer.step()
            if "critic" in losses and self.against is not None:
                self.against.step()
            self.mean_norm = report.norm if self.counted == 0 else MEMORY * self.mean_norm + (1 - MEMORY) * report.norm
            self.counted += 1
        for optimizer in filter(None, (self.optimizer, self.against)):
            optimizer.zero_grad(set_to_none=True)
        return report

    def autocast(self, device: str) -> Any:
        """Return a block in which the networks compute in their dtype."""
        return nullcontext() if self.dtype is None else torch.autocast(device, self.dtype)

    def losses(self, images: Tensor, made: Tensor, moments: Moments, step: int) -> dict[str, Tensor]:
        """Return the terms of (1), weighed, by name."""
        error = made - images
        terms = {"pixels": error.abs().mean() if self.config.distance == "l1" else error.square().mean()}
        if self.perceptual is not None:
            terms["perceptual"] = self.config.perceptual * self.perceptual(images, made).mean()
        heard = self.critic is not None and step >= self.config.adversarial_after
        if self.critic is not None and heard:
            seen = self.frozen(self.critic, made)
            scale = balance(sum(terms.values(), torch.zeros(())), -seen.mean(), self.network.last_layer)
            terms["adversarial"] = -self.config.adversarial * scale * seen.mean()
        mean, log_variance = moments
        divergence = Moments(mean.float(), log_variance.float()).divergence().mean()
        terms["divergence"] = self.config.kl * divergence / images[0].numel()
        return terms

    def frozen(self, critic: nn.Module, made: Tensor) -> Tensor:
        """Return the critic's scores of what was made, whose gradient is not the critic's to learn from."""
        critic.requires_grad_(False)
        with self.autocast(made.device.type):
            seen: Tensor = critic(made)
        critic.requires_grad_(True)
        return seen.float()

    def teach_critic(self, images: Tensor, made: Tensor) -> Tensor:
        """Take the critic's gradient, and return its loss."""
        assert self.critic is not None
        with self.autocast(images.device.type):
            loss = hinge(self.critic(images), self.critic(made))
        loss.backward()
        return loss.detach()

    def judged(self, loss: float, losses: dict[str, Tensor]) -> StepReport:
        """Return what the step did, or would have done."""
        norm = float(torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip_norm))
        most = self.config.spike * self.mean_norm if self.counted >= SETTLED else math.inf
        skipped = doubt(loss, norm, most)
        if not skipped and self.critic is not None and "critic" in losses:
            against = float(torch.nn.utils.clip_grad_norm_(self.critic.parameters(), self.config.clip_norm))
            skipped = doubt(float(losses["critic"]), against, math.inf)
        return StepReport(loss, norm, skipped, {name: float(value.detach()) for name, value in losses.items()})


def balance(wanted: Float[Tensor, ""], against: Float[Tensor, ""], last: nn.Parameter) -> Float[Tensor, ""]:
    """Return lambda of (2): how many times larger the first loss's gradient is on the last layer than the second's.

    Example:
        >>> w = nn.Parameter(torch.ones(2))
        >>> round(float(balance(3 * w.sum(), w.sum(), w)), 3)
        3.0
    """
    (a,) = torch.autograd.grad(wanted, last, retain_graph=True)
    (b,) = torch.autograd.grad(against, last, retain_graph=True)
    return (a.norm() / (b.norm() + 1e-4)).clamp(max=LARGEST).detach()
