r"""Bits for each number of a picture: by the probability-flow ODE and by the variational bound, with their errors.

    bits/dim = -log2 P(bytes) / d,                                                                   (1)

d being the bytes of a picture. By the ODE, -log2 P is bounded by the density after uniform dequantisation, each byte
spread evenly over its cell (dequantisation.py); by the bound, it is that of DDPM's sampler with a discretised
Gaussian at its end (diffusion/likelihood.py), which needs no dequantisation and a schedule that is a table. Both are
upper bounds on average, of two models: one is the flow, the other the sampler.

Two errors are told: that of the images, a sample of all there are, and where images were spread more than once,
that of the spreading and of Hutchinson's probes alone.

References:
    A Note on the Evaluation of Generative Models (Theis et al., 2016), section 3.1
    https://arxiv.org/abs/1511.01844
    Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021), section 4.3
    https://arxiv.org/abs/2011.13456
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import UInt8
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.base.randomness import Noise, torch_seed
from reverie.diffusion.denoisers import Denoiser
from reverie.diffusion.dequantisation import evaluating
from reverie.diffusion.flow_likelihood import Likelihood, discrete_log_likelihood
from reverie.diffusion.likelihood import Variance, bound
from reverie.diffusion.schedules import Table

Conditions = Callable[[slice], Mapping[str, Tensor]]  # of some rows of the images
Tick = Callable[[int], None]  # called with how many images are done
UNIFORM = "uniform over each byte's cell of 1/127.5"


@dataclass(frozen=True)
class Bits:
    """Bits/dim of some images.

    Arguments:
        value: Their mean; lower is better.
        standard_error: Of the mean over all that they were drawn from.
        own_error: Of the mean over these very images, by what was drawn for them; None where it was drawn once.
        n: How many images.
        evaluations: How often the network looked at each, on average.
        how: The method and its settings, in words.
        dequantisation: How bytes became a density; None where there was no need.
    """

    value: float
    standard_error: float
    own_error: float | None
    n: int
    evaluations: float
    how: str
    dequantisation: str | None


def nothing(rows: slice) -> Mapping[str, Tensor]:
    """Return the condition of a model without any."""
    return {}


def batches(count: int, size: int, tick: Tick | None) -> Iterator[slice]:
    """Yield the rows of each batch, and tell how far it is after each."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
        if tick:
            tick(min(start + size, count))


def seeds(count: int, seed: int) -> list[int]:
    """Return the seed of each image's draws."""
    return [torch_seed(seed, "bits", i) for i in range(count)]


def flow_bits(
    denoiser: Denoiser,
    images: UInt8[Tensor, "n *d"],
    conditions: Conditions = nothing,
    *,
    probes: int = 2,
    draws: int = 1,
    tolerance: float = 1e-3,
    seed: int = 0,
    batch_size: int = 16,
    tick: Tick | None = None,
) -> Bits:
    """Return bits/dim by the probability-flow ODE, after uniform dequantisation.

    Arguments:
        denoiser: The model.
        images: Bytes (N, *D).
        conditions: What the network is told of some rows of them.
        probes: Hutchinson's, for each image; 0 is the exact trace.
        draws: How often each image is spread over its cells; from two on, `own_error` is known.
        tolerance: rtol and atol of the ODE.
        seed: Fixes spreading and probes; each image has its own, whatever the batch.
        batch_size: Images at a time: memory and speed, and no effect on the figure but rounding.
        tick: Called after each batch with how many are done.

    Raises:
        UsageError: There are no images, or an option is out of its range.
        NonFiniteError: The model gave NaN or infinity.
    """
    if not len(images) or tolerance <= 0:
        raise UsageError(f"{len(images)} images at tolerance {tolerance}; there must be one, and it must be above 0")
    how: dict[str, object] = {"trace": "hutchinson", "probes": probes} if probes else {"trace": "exact"}
    own, device, parts = seeds(len(images), seed), device_of(denoiser), []
    for rows in batches(len(images), batch_size, tick):
        parts.append(
            discrete_log_likelihood(
                denoiser, images[rows].to(device), conditions(rows) or None, draws=draws, noise=Noise(own[rows]),
                rtol=tolerance, atol=tolerance, **how,  # type: ignore[arg-type]
            )
        )  # fmt: skip
    whole = Likelihood.join(parts)
    unit = whole.dimensions * math.log(2)
    error = None if math.isnan(whole.own_error) else whole.own_error / unit
    trace = f"Hutchinson's trace, {probes} probe{'s' * (probes > 1)}" if probes else "the exact trace"
    return Bits(
        float(whole.bits_per_dim.mean()), whole.sampling_error / unit, error, len(images),
        float(whole.evaluations.double().mean()), f"probability-flow ODE to {tolerance:g}, {trace}", UNIFORM,
    )  # fmt: skip


def bound_bits(
    denoiser: Denoiser,
    images: UInt8[Tensor, "n *d"],
    conditions: Conditions = nothing,
    *,
    variance: Variance = "large",
    seed: int = 0,
    batch_size: int = 16,
    tick: Tick | None = None,
) -> Bits:
    """Return bits/dim by the variational bound of DDPM's sampler, all the table's steps.

    Arguments:
        denoiser: The model, on a table.
        images: Bytes (N, *D).
        conditions: What the network is told of some rows of them.
        variance: Which variance the sampler's steps have.
        seed: Fixes the noise of each image.
        batch_size: Images at a time.
        tick: Called after each batch with how many are done.

    Raises:
        UsageError: There are no images, or the schedule is no table.
    """
    if not len(images):
        raise UsageError("there is no image to take the bound of")
    schedule, own, parts = denoiser.schedule, seeds(len(images), seed), []
    if not isinstance(schedule, Table):
        raise UsageError("the variational bound needs a schedule that is a table; take the ODE's figure alone")
    device = device_of(denoiser)
    with evaluating(denoiser):
        for rows in batches(len(images), batch_size, tick):
            x0 = images[rows].to(device) / 127.5 - 1
            parts.append(bound(denoiser, x0, Noise(own[rows]), dict(conditions(rows)) or None, variance).total)
    total = torch.cat(parts).double()
    error = float(total.std() / math.sqrt(len(total))) if len(total) > 1 else math.nan
    return Bits(
        float(total.mean()), error, None, len(images), schedule.timesteps,
        f"variational bound, {schedule.timesteps} steps of DDPM with the {variance} variance", None,
    )  # fmt: skip


def device_of(denoiser: Denoiser) -> torch.device:
    """Return where a denoiser computes: the CPU, if it has no weights."""
    return next((p.device for p in denoiser.parameters()), torch.device("cpu"))
