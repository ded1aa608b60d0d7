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
from torch.autograd import forward_ad

from reverie.base.errors import UsageError
from reverie.diffusion.predictions import Data, Prediction, per_sample
from reverie.diffusion.registry import predictions
from reverie.diffusion.schedules import Schedule

Times = Float[Tensor, " b"]
Condition = Mapping[str, Tensor]


REMEMBERED = 4096  # batches of times, of which a denoiser knows the scales


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
        UsageError: The prediction is eps, score or edm on a schedule whose alpha ends at 0; or the network's
            output has not the shape that learned_variance calls for.

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
        self._known: dict[tuple[object, ...], tuple[Tensor, Tensor, Tensor]] = {}
        if schedule.zero_terminal_snr and not self.prediction.at_zero_signal:
            raise UsageError(
                f"{self.prediction.name}-prediction has no meaning on a schedule that ends at zero signal "
                "(alpha = 0 at t = 1, its x_0 or its clock is not finite there); predict v, x0 or velocity"
            )

    def forward(self, x: Data, t: Times, condition: Condition | None = None) -> Estimate:
        alpha, sigma, time = self.known(t, x.dtype)
        output = self.call(x, time, alpha, sigma, condition).to(x.dtype)
        fraction = None
        if self.learned_variance:
            output, fraction = output.chunk(2, dim=1)
            fraction = (fraction + 1) / 2
        return Estimate(*self.prediction.decode(output, x, alpha, sigma), fraction)

    def output(self, x: Data, t: Times, condition: Condition | None = None) -> Tensor:
        """Return the network's raw output at x."""
        alpha, sigma, time = self.look(t, x.dtype)
        return self.call(x, time, alpha, sigma, condition)

    def known(self, t: Times, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return alpha, sigma and the network's clock at times t (B,): remembered, for samplers ask the same again."""
        if t.device.type != "cpu" or t.requires_grad or forward_ad.unpack_dual(t).tangent is not None:
            return self.look(t, dtype)
        key = (*t.tolist(), dtype, self.prediction, self.schedule)
        if key not in self._known:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            with torch.inference_mode(False), torch.no_grad():
                self._known[key] = self.look(t.clone(), dtype)
        return self._known[key]

    def look(self, t: Times, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return alpha, sigma and the network's clock at times t (B,)."""
        alpha, sigma = self.schedule.marginal(t)
        return alpha, sigma, self.prediction.clock(self.schedule, t).to(dtype)

    def call(self, x: Data, time: Times, alpha: Times, sigma: Times, condition: Condition | None) -> Tensor:
        """Return the network's raw output at x, whose clock and scales are known already, its shape checked."""
        return self.evaluate(self.prediction.inputs(x, alpha, sigma), time, condition)

    def evaluate(self, x: Data, time: Times, condition: Condition | None = None) -> Tensor:
        """Return the network's raw output at its own input (B, *D) and clock (B,), its shape checked."""
        told = condition or {}
        if self.dtype is None:
            output: Tensor = self.network(x, time, **told)
        else:
            with torch.autocast(x.device.type, self.dtype):
                output = self.network(x, time, **told)
        if self.learned_variance or output.shape != x.shape:
            self.check_shape(output, x)
        return output

    def check_shape(self, output: Tensor, x: Data) -> None:
        """Refuse an output that has not the shape due."""
        due = (len(x), x.shape[1] * (2 if self.learned_variance else 1), *x.shape[2:])
        if output.shape != due:
            raise UsageError(
                f"the network gives {tuple(output.shape)} for noisy data {tuple(x.shape)}, where {due} is due "
                f"(learned_variance is {self.learned_variance}; it doubles the channels)"
            )


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
        if not limit > 0:
            raise UsageError(f"the threshold's limit is {limit}; it must be positive")
        self.denoiser, self.schedule = denoiser, denoiser.schedule
        self.quantile, self.limit = quantile, limit

    def forward(self, x: Data, t: Times, condition: Condition | None = None) -> Estimate:
        estimate = self.denoiser(x, t, condition)
        size = estimate.x0.flatten(1).abs()
        size = size.to(torch.promote_types(size.dtype, torch.float32))  # quantile takes no half precision
        threshold = per_sample(size.quantile(self.quantile, dim=1).clamp(min=self.limit), x)
        x0 = estimate.x0.clamp(-threshold, threshold) * (self.limit / threshold)
        return with_x0(estimate, x0, x, t, self.schedule)


def with_x0(estimate: Estimate, x0: Data, x: Data, t: Times, schedule: Schedule) -> Estimate:
    """Return the estimate with another x_0 (B, *D), and the noise that makes x of it, by (1)."""
    alpha, sigma = (per_sample(value, x) for value in schedule.marginal(t))
    eps = (x - alpha * x0) / sigma
    return Estimate(x0, torch.where(sigma > 0, eps, estimate.eps), estimate.fraction)


class FixedBatch(Denoiser):
    """Another denoiser, always called with the same number of rows, the last of them padding.

    On a CPU the bits of a row of a network's output depend on the size of the batch (the matrix
    products choose their blocking by it), though not on its neighbours nor on its place. With the size
    fixed, a sample comes out the same alone and in any company. It goes around the network's denoiser,
    inside of what binds conditions to rows (guidance).

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
        parts = [self.call(i, x, t, condition) for i in range(0, len(x), self.size)]
        x0 = torch.cat([part.x0 for part in parts])[: len(x)]
        eps = torch.cat([part.eps for part in parts])[: len(x)]
        fractions = [part.fraction for part in parts if part.fraction is not None]
        return Estimate(x0, eps, torch.cat(fractions)[: len(x)] if fractions else None)

    def call(self, start: int, x: Data, t: Times, condition: Condition | None) -> Estimate:
        """Return the estimate for the bucket that begins at a row, its padding a copy of the last row."""
        index = torch.arange(start, start + self.size, device=x.device).clamp(max=len(x) - 1)
        rows = {name: value[index] for name, value in condition.items()} if condition else None
        return self.denoiser(x[index], t[index], rows)
