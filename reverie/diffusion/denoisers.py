r"""Denoisers: estimates of the clean data, and so of the noise, from noisy data.

A denoiser maps (x_t, t, condition) to the posterior mean E[x_0 | x_t] and the noise that goes with it,

    x_t = alpha_t x_0 + sigma_t eps.                                                                (1)

A network is one denoiser, a Gaussian mixture in closed form another (oracles.py), and whatever changes
an estimate (clipping, guidance, an inpainting rule) is a denoiser made of denoisers.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reverie.base.errors import UsageError
from reverie.diffusion.predictions import Data, Prediction, per_sample
from reverie.diffusion.registry import predictions
from reverie.diffusion.schedules import Schedule

Times = Float[Tensor, " b"]
Condition = Mapping[str, Tensor]


class Estimate(NamedTuple):
    """What a denoiser returns.

    Arguments:
        x0: The estimate of the clean data (B, *D).
        eps: The estimate of the noise (B, *D), with x = alpha x0 + sigma eps.
        fraction: Where the variance was learned: how far it lies, in log, from the posterior's (0) to
            the step's (1), (B, *D).
    """

    x0: Tensor
    eps: Tensor
    fraction: Tensor | None = None


class Denoiser(nn.Module, ABC):
    """Anything that estimates clean data from noisy data, and knows its schedule."""

    schedule: Schedule

    @abstractmethod
    def forward(self, x: Data, t: Times, condition: Condition | None = None) -> Estimate:
        """Return the estimate for noisy data x (B, *D) at times t (B,), float64, in (0, 1].

        Arguments:
            x: Noisy data (B, *D).
            t: One time per sample (B,).
            condition: What the data is to be, tensors of B rows by the network's keyword.
        """


class NetworkDenoiser(Denoiser):
    """A network seen as a denoiser.

    Arguments:
        network: Maps (x, time, **condition) to an output of x's shape, or of twice its channels where
            the variance is learned.
        schedule: The noise schedule.
        prediction: What the network's output means, by name or as an object.
        learned_variance: The second half of the output's channels is the variance's fraction, -1..1.
        dtype: Run the network under autocast in this dtype (bfloat16).

    Raises:
        UsageError: The prediction is eps or score on a schedule whose alpha ends at 0.

    Example:
        >>> from reverie.diffusion.schedules import linear
        >>> class Zero(nn.Module):
        ...     def forward(self, x, time): return 0 * x
        >>> denoiser = NetworkDenoiser(Zero(), linear(), "eps")
        >>> denoiser(torch.ones(2, 3), torch.tensor([0.5, 1.0]).double()).eps.abs().max().item()
        0.0
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        prediction: str | Prediction = "eps",
        learned_variance: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.network, self.schedule, self.dtype = network, schedule, dtype
        self.prediction: Prediction = predictions[prediction]() if isinstance(prediction, str) else prediction
        self.learned_variance = learned_variance
        if self.prediction.name in ("eps", "score") and schedule.zero_terminal_snr:
            raise UsageError(
                f"{self.prediction.name}-prediction has no meaning on a schedule that ends at zero signal "
                "(alpha = 0 at t = 1, x_0 would be 0/0); predict v or x0"
            )

    def forward(self, x: Data, t: Times, condition: Condition | None = None) -> Estimate:
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        output = self.output(x, t, condition).to(x.dtype)
        fraction = None
        if self.learned_variance:
            output, fraction = output.chunk(2, dim=1)
            fraction = (fraction + 1) / 2
        return Estimate(*self.prediction.decode(output, x, alpha, sigma), fraction)

    def output(self, x: Data, t: Times, condition: Condition | None = None) -> Tensor:
        """Return the network's raw output at x."""
        scale = self.prediction.input_scale(self.schedule.alpha(t), self.schedule.sigma(t))
        inputs, time = x * per_sample(scale, x), self.prediction.clock(self.schedule, t).to(x.dtype)
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype is not None):
            return self.network(inputs, time, **(condition or {}))


class Clipped(Denoiser):
    """Another denoiser, its x_0 kept within [-limit, limit] and its noise made to agree.

    Arguments:
        denoiser: The denoiser to correct.
        limit: The data's range; 1 for images in [-1, 1].
    """

    def __init__(self, denoiser: Denoiser, limit: float = 1.0) -> None:
        super().__init__()
        if not limit > 0:
            raise UsageError(f"the clipping limit is {limit}; it must be positive")
        self.denoiser, self.schedule, self.limit = denoiser, denoiser.schedule, limit

    def forward(self, x: Data, t: Times, condition: Condition | None = None) -> Estimate:
        estimate = self.denoiser(x, t, condition)
        return with_x0(estimate, estimate.x0.clamp(-self.limit, self.limit), x, t, self.schedule)


class Thresholded(Denoiser):
    """Dynamic thresholding: x_0 clipped at a percentile of its own magnitude and scaled back to the range.

    Arguments:
        denoiser: The denoiser to correct.
        quantile: Which quantile of |x_0| within a sample becomes the limit, in (0, 1].
        limit: The data's range; a threshold below it counts as it.

    References:
        Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding (Saharia et al., 2022), 2.3
        https://arxiv.org/abs/2205.11487
    """

    def __init__(self, denoiser: Denoiser, quantile: float = 0.995, limit: float = 1.0) -> None:
        super().__init__()
        if not 0 < quantile <= 1:
            raise UsageError(f"the threshold's quantile is {quantile}; it must lie in (0, 1]")
        self.denoiser, self.schedule = denoiser, denoiser.schedule
        self.quantile, self.limit = quantile, limit

    def forward(self, x: Data, t: Times, condition: Condition | None = None) -> Estimate:
        estimate = self.denoiser(x, t, condition)
        threshold = estimate.x0.flatten(1).abs().float().quantile(self.quantile, dim=1).clamp(min=self.limit)
        threshold = per_sample(threshold, x)
        x0 = estimate.x0.clamp(-threshold, threshold) * (self.limit / threshold)
        return with_x0(estimate, x0, x, t, self.schedule)


def with_x0(estimate: Estimate, x0: Data, x: Data, t: Times, schedule: Schedule) -> Estimate:
    """Return the estimate with another x_0 (B, *D), and the noise that makes x of it, by (1)."""
    sigma = per_sample(schedule.sigma(t), x)
    eps = (x - per_sample(schedule.alpha(t), x) * x0) / sigma
    return Estimate(x0, torch.where(sigma > 0, eps, estimate.eps), estimate.fraction)


class FixedBatch(Denoiser):
    """Another denoiser, always called with the same number of rows, the last of them padding.

    On a CPU the bits of a row of a network's output depend on the size of the batch (the matrix
    products choose their blocking by it), though not on its neighbours nor on its place. With the size
    fixed, a sample comes out the same alone and in any company.

    Arguments:
        denoiser: The denoiser to call.
        size: Rows of each call, at least 1.
    """

    def __init__(self, denoiser: Denoiser, size: int) -> None:
        super().__init__()
        if size < 1:
            raise UsageError(f"the bucket's size is {size}; it must be at least 1")
        self.denoiser, self.schedule, self.size = denoiser, denoiser.schedule, size

    def forward(self, x: Data, t: Times, condition: Condition | None = None) -> Estimate:
        parts = [self.call(i, x, t, condition or {}) for i in range(0, len(x), self.size)]
        x0 = torch.cat([part.x0 for part in parts])[: len(x)]
        eps = torch.cat([part.eps for part in parts])[: len(x)]
        fractions = [part.fraction for part in parts if part.fraction is not None]
        return Estimate(x0, eps, torch.cat(fractions)[: len(x)] if fractions else None)

    def call(self, start: int, x: Data, t: Times, condition: Condition) -> Estimate:
        """Return the estimate for the bucket that begins at a row, its padding a copy of the last row."""
        index = torch.arange(start, start + self.size, device=x.device).clamp(max=len(x) - 1)
        return self.denoiser(x[index], t[index], {name: value[index] for name, value in condition.items()})
