r"""The likelihood by the probability-flow ODE: ln p(x) itself, not a bound on it.

With phi = arctan(sigma / alpha), which no schedule can do without, and y = x_t / sqrt(alpha^2 + sigma^2), the
probability-flow ODE is the same on every schedule and has no singular end, alpha = 0 included:

    dy/dphi = v(y, phi) = cos(phi) E - sin(phi) D,                                                  (1)

D and E the denoiser's estimates of x_0 and eps at x_t. Along it the density changes by the divergence of v, so that,
with the prior N(0, prior_std^2) at t = 1 and x taken for x_0 + rho eps at the first time, rho = tan(phi_first),

    ln p(x) = ln p_1(y_1) + int_(phi_first)^(pi/2 or so) tr(dv/dy) dphi + dims ln cos(phi_first).   (2)

The trace is exact, one derivative for each dimension, or Hutchinson's estimate, one for each probe e,

    tr J = E[e^T J e],    E[e e^T] = I,                                                             (3)

the same probes all the way, so that the ODE stays one. It is solved in ln(phi), in which both ends are smooth.

Noised data is another estimate: with z = x + rho eps and the decoder N(D, rho^2), a lower bound on ln p(x_0),

    ln p(x_0) >= E[ln p(z) + ln p(x_0 | z) - ln q(z | x_0)].                                        (4)

References:
    Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021), appendix D.2
    https://arxiv.org/abs/2011.13456
    Progressive Distillation for Fast Sampling of Diffusion Models (Salimans & Ho, 2022), appendix D (the angle)
    https://arxiv.org/abs/2202.00512
    FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models (Grathwohl et al., 2019), section 3
    https://arxiv.org/abs/1810.01367
    Maximum Likelihood Training of Score-Based Diffusion Models (Song et al., 2021), the bound at the first time
    https://arxiv.org/abs/2101.09258
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.base.randomness import Noise, generator, normal, torch_seed
from reverie.diffusion.denoisers import Condition, Denoiser, Times
from reverie.diffusion.dequantisation import Dequantiser, Uniform, dtype_of, evaluating, log_cell, spread
from reverie.diffusion.likelihood import gaussian_log_mass
from reverie.diffusion.predictions import Data, per_sample
from reverie.diffusion.probability_flow import angle, velocity
from reverie.diffusion.runge_kutta_pair import integrate, rms

Trace = Literal["exact", "hutchinson"]
Probe = Literal["rademacher", "gaussian"]
Start = Literal["as-is", "noised"]
MAX_EXACT = 4096
DEFAULT_PROBES = 4


@dataclass(frozen=True)
class Likelihood:
    """The log-likelihood of each sample, and how well it is known.

    Arguments:
        nats: ln p(x) (B,), or ln P(x) of discrete data; higher is better.
        standard_error: Of each (B,), over probes or over repeated draws; 0 where nothing was drawn, NaN where
            it can't be told from a single draw.
        evaluations: How often each sample's denoiser was called (B,), each time with a derivative for every
            dimension (exact) or probe.
        dimensions: How many numbers a sample has.
        bound: Whether the expected value of nats is a lower bound, instead of the model's own.

    Example:
        >>> zero = torch.zeros(2, dtype=torch.float64)
        >>> print(Likelihood(zero - 2.0, zero, torch.tensor([50, 60]), 4))
        0.7213 bits/dim +- 0.0000, -0.5000 nats/dim, 2 samples, 55 evaluations
    """

    nats: Float[Tensor, " b"]
    standard_error: Float[Tensor, " b"]
    evaluations: Int64[Tensor, " b"]
    dimensions: int
    bound: bool = False

    @property
    def nats_per_dim(self) -> Float[Tensor, " b"]:
        """ln p(x) / dimensions (B,); higher is better."""
        return self.nats / self.dimensions

    @property
    def bits_per_dim(self) -> Float[Tensor, " b"]:
        """-ln p(x) / (dimensions ln 2) (B,); lower is better."""
        return -self.nats / (self.dimensions * math.log(2))

    @property
    def own_error(self) -> float:
        """The standard error of the mean of nats over these very samples, by what was drawn for them."""
        return float(self.standard_error.square().sum().sqrt() / len(self.nats))

    @property
    def sampling_error(self) -> float:
        """The standard error of the mean of nats over all that these samples were drawn from; own_error is part of it.
        NaN for a single sample."""
        return float(self.nats.std() / math.sqrt(len(self.nats))) if len(self.nats) > 1 else math.nan

    def __str__(self) -> str:
        unit = self.dimensions * math.log(2)
        nats, bits = float(self.nats_per_dim.mean()), float(self.bits_per_dim.mean())
        parts = [
            f"{'at most ' if self.bound else ''}{bits:.4f} bits/dim{plus_minus(self.sampling_error / unit)}",
            f"{nats:.4f} nats/dim",
            f"{len(self.nats)} sample{'s' if len(self.nats) > 1 else ''}",
            f"{float(self.evaluations.double().mean()):.0f} evaluations",
        ]
        if self.own_error > 0:
            parts.insert(3, f"whose own mean is{plus_minus(self.own_error / unit)}")
        return ", ".join(parts)

    @staticmethod
    def join(parts: Sequence["Likelihood"]) -> "Likelihood":
        """Return one likelihood of all the samples, in order."""
        names = ("nats", "standard_error", "evaluations")
        nats, error, calls = (torch.cat([getattr(part, name) for part in parts]) for name in names)
        return Likelihood(nats, error, calls, parts[0].dimensions, parts[0].bound)


def plus_minus(error: float) -> str:
    """Return an error as it is printed, nothing where it is not known."""
    return "" if math.isnan(error) else f" +- {error:.4f}"


# The ODE ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProbabilityFlow:
    """The ODE of y and of the trace's integrals, as one field in u = ln(phi).

    Arguments:
        denoiser: The model.
        condition: The samples' condition.
        shape: One sample's shape.
        dtype: What the denoiser computes in.
        probes: The probes (P, B, *D), or None for the exact trace.
    """

    denoiser: Denoiser
    condition: Condition | None
    shape: Sequence[int]
    dtype: torch.dtype
    probes: Tensor | None

    def __call__(self, u: Times, state: Tensor) -> Tensor:
        """Return d/du of y and of the traces' integrals for each dimension, side by side (B, D + P)."""
        phi = u.exp()
        slope, traces = self.slope_and_traces(self.y(state), phi)
        dimensions = math.prod(self.shape)
        return per_sample(phi, state) * torch.cat([slope.flatten(1), traces / dimensions], 1)

    def y(self, state: Tensor) -> Data:
        """Return the y (B, *D) in a state."""
        return state[:, : math.prod(self.shape)].reshape(-1, *self.shape)

    def start(self, y: Data) -> Tensor:
        """Return the state with y, and integrals that are 0."""
        count = 1 if self.probes is None else len(self.probes)
        return torch.cat([y.flatten(1), y.new_zeros(len(y), count)], 1)

    def norm(self, error: Tensor) -> Times:
        """Return the larger of y's error and the worst integral's (B,): the one must not drown in the other."""
        size = math.prod(self.shape)
        return torch.maximum(rms(error[:, :size]), error[:, size:].abs().amax(1))

    def slope_and_traces(self, y: Data, phi: Times) -> tuple[Tensor, Tensor]:
        """Return v (B, *D) and the trace of dv/dy by each probe (B, P), or the exact one (B, 1)."""
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            v = velocity(self.denoiser, y, phi, self.condition, self.dtype)
            if not v.requires_grad:
                raise UsageError("the denoiser computes without gradients: its ODE's divergence can't be had")
            if self.probes is None:
                traces = exact_trace(v, y)
            else:
                parts = [(vjp(v, y, e, i + 1 < len(self.probes)) * e) for i, e in enumerate(self.probes)]
                traces = torch.stack([part.flatten(1).sum(1) for part in parts], 1)
        return v.detach(), traces


def vjp(v: Tensor, y: Tensor, e: Tensor, keep: bool) -> Tensor:
    """Return e^T dv/dy (B, *D)."""
    (product,) = torch.autograd.grad(v, y, e, retain_graph=keep)
    return product


def exact_trace(v: Tensor, y: Tensor) -> Tensor:
    """Return the trace of dv/dy (B, 1), a derivative for each dimension."""
    size = y[0].numel()
    unit, total = torch.zeros_like(y).flatten(1), y.new_zeros(len(y))
    for i in range(size):
        e = unit.index_fill(1, torch.tensor([i], device=y.device), 1).reshape(y.shape)
        total = total + vjp(v, y, e, i + 1 < size).flatten(1)[:, i]
    return total[:, None]


def draw_probes(shape: Sequence[int], seeds: Sequence[int], count: int, kind: Probe) -> Float[Tensor, "p b ..."]:
    """Return probes (P, B, *shape) with E[e e^T] = I, each sample's fixed by its own seed."""
    if kind == "gaussian":
        return torch.stack([torch.stack([normal(shape, s, "probe", p) for s in seeds]) for p in range(count)])
    signs = [[generator(s, "probe", p).integers(0, 2, tuple(shape)) for s in seeds] for p in range(count)]
    return torch.stack([torch.stack([torch.from_numpy(2.0 * sign - 1) for sign in row]) for row in signs])


class Walk(NamedTuple):
    """What (2) is made of: y_1 (B, D); ln p_1(y_1) (B,), the integral (B, P) and dims ln cos(phi) (B,), all in nats;
    and the number of evaluations (B,)."""

    y: Tensor
    prior: Tensor
    integral: Tensor
    volume: Tensor
    evaluations: Tensor


def walk(
    denoiser: Denoiser,
    x: Data,
    t: float,
    condition: Condition | None,
    probes: Tensor | None,
    rtol: float,
    atol: float,
    max_steps: int,
) -> Walk:
    """Take x (B, *D), as x_0 + rho eps of time t, to t = 1, and return the three terms of (2)."""
    schedule, size = denoiser.schedule, x[0].numel()
    times = torch.tensor([t, 1.0], dtype=torch.float64, device=x.device)
    first, last = angle(schedule, times)
    wide = None if probes is None else probes.to(x.device, torch.float64)
    flow = ProbabilityFlow(denoiser, condition, x.shape[1:], dtype_of(denoiser, x.dtype), wide)
    start = flow.start(first.cos() * x.double())
    end = integrate(flow, start, float(first.log()), float(last.log()), rtol, atol, norm=flow.norm, max_steps=max_steps)
    variance = 2 * (schedule.prior_std(times[1:]) / torch.hypot(*schedule.marginal(times[1:]))).log()
    y = end.y[:, :size]
    prior = gaussian_log_mass(y, torch.zeros_like(y), variance, None).sum(1)
    return Walk(y, prior, size * end.y[:, size:], (size * first.cos().log()).expand(len(x)), end.evaluations)


# The likelihood ---------------------------------------------------------------------------------


def log_likelihood(
    denoiser: Denoiser,
    x: Data,
    condition: Condition | None = None,
    *,
    trace: Trace = "exact",
    probes: int | None = None,
    probe: Probe = "rademacher",
    noise: Noise | None = None,
    start: Start = "as-is",
    levels: int | None = None,
    t: float | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 1000,
) -> Likelihood:
    """Return ln p(x) of each sample under the model's probability flow.

    What has a density is x_0 + rho eps, the data at the first time t, rho = sigma / alpha there: "as-is" takes x for
    that, and returns its own density (2), blurred by no more than rho. "noised" adds the noise, and returns the bound
    (4) on the density of x_0 itself, or with levels on the probability of its level.

    Arguments:
        denoiser: The model, as it is: guided, clipped or not. Without dropout for the time.
        x: Data (B, *D); images in [-1, 1]. For bytes see `discrete_log_likelihood`.
        condition: The samples' condition.
        trace: "exact" (at most 4096 dimensions) or "hutchinson".
        probes: How many probes of Hutchinson's each sample has, 4 by default; of one there is no standard error.
        probe: Their distribution.
        noise: The samples' seeds, which fix probes and noise; by default 0, 1, ...
        start: "as-is" or "noised".
        levels: Of noised data, how many levels in [-1, 1] x has, which makes it a probability.
        t: The first time, by default the schedule's t_min.
        rtol: The relative error that a step of the ODE may have.
        atol: The error that is tolerated beside it, of y and of the integral for each dimension.
        max_steps: Steps that the ODE may take.

    Raises:
        UsageError: An option is out of its range or has no effect, there are too many dimensions for the exact trace,
            or the ODE can't be solved to that tolerance.
        NonFiniteError: The model gave NaN or infinity.

    Example:
        >>> from reverie.diffusion import oracles, schedules
        >>> one = oracles.Gaussian(torch.zeros(3).double(), torch.eye(3).double(), schedules.VE())
        >>> x = torch.ones(1, 3, dtype=torch.float64)
        >>> bool((log_likelihood(one, x).nats - one.log_prob(x)).abs() < 1e-3)
        True
    """
    t = denoiser.schedule.t_min if t is None else t
    check_options(x, trace, probes, probe, start, levels, t)
    noise = Noise(range(len(x))) if noise is None else noise
    if len(noise.seeds) != len(x):
        raise UsageError(f"there are {len(noise.seeds)} seeds for {len(x)} samples; give one for each")
    drawn = draw_probes(x.shape[1:], noise.seeds, probes or DEFAULT_PROBES, probe) if trace == "hutchinson" else None
    with torch.inference_mode(False), torch.no_grad(), evaluating(denoiser):
        rows = None if condition is None else {name: value.clone() for name, value in condition.items()}
        z, extra = (x.clone(), 0.0) if start == "as-is" else noised(denoiser, x.clone(), t, rows, noise, levels)
        terms = walk(denoiser, z, t, rows, drawn, rtol, atol, max_steps)
        nats = (terms.prior + terms.volume + extra)[:, None] + terms.integral
    exact = drawn is None and start == "as-is"
    # A noised start is drawn once: what the probes tell is not its error.
    error = torch.zeros_like(nats[:, 0]) if exact else standard_error(nats if start == "as-is" else nats[:, :1])
    calls = terms.evaluations + int(start == "noised")
    return Likelihood(nats.mean(1), error, calls, x[0].numel(), start == "noised")


def noised(
    denoiser: Denoiser, x: Data, t: float, condition: Condition | None, noise: Noise, levels: int | None
) -> tuple[Data, Tensor]:
    """Return z = x + rho eps (B, *D), and ln p(x | z) - ln q(z | x) (B,): what (4) adds to ln p(z)."""
    times = torch.full((len(x),), t, dtype=torch.float64, device=x.device)
    alpha, sigma = denoiser.schedule.marginal(times)
    eps, variance = noise.like(x, [0] * len(x)), per_sample(2 * (sigma / alpha).log(), x)
    z = x + per_sample(sigma / alpha, x) * eps
    mean = denoiser((per_sample(alpha, x) * z).to(dtype_of(denoiser, x.dtype)), times, condition).x0.to(x)
    decoder = gaussian_log_mass(x, mean, variance, levels)
    encoder = gaussian_log_mass(z, x, variance, None)
    return z, (decoder - encoder).flatten(1).double().sum(1)


def discrete_log_likelihood(
    denoiser: Denoiser,
    images: UInt8[Tensor, "b *d"],
    condition: Condition | None = None,
    *,
    dequantiser: Dequantiser | None = None,
    draws: int = 1,
    noise: Noise | None = None,
    trace: Trace = "exact",
    probes: int | None = None,
    probe: Probe = "rademacher",
    t: float | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 1000,
) -> Likelihood:
    """Return a lower bound on ln P(x) of bytes, by dequantisation: its expected value is below the truth.

    A level k is the cell [k - 1/2, k + 1/2) of the density on 127.5 (x + 1), where the model's data are its centres.

    Arguments:
        denoiser: The model, of data in [-1, 1].
        images: Bytes (B, *D).
        condition: The samples' condition.
        dequantiser: Draws the places within the cells; Uniform by default. Another one can come closer to the truth.
        draws: How many places are drawn for each sample, each with probes of its own; of one there is no
            standard error of the sample.
        noise: The samples' seeds, which fix the draws and the probes; by default 0, 1, ...
        trace: As `log_likelihood` takes it, and so are the others.

    Raises:
        UsageError: As `log_likelihood` does.
        NonFiniteError: As `log_likelihood` does.
    """
    if draws < 1:
        raise UsageError(f"draws is {draws}; it must be at least 1")
    dequantiser = Uniform() if dequantiser is None else dequantiser
    seeds = range(len(images)) if noise is None else noise.seeds
    parts, rest = [], []
    for draw in range(draws):
        own = [torch_seed(s, "dequantisation", draw) for s in seeds]
        with torch.no_grad():
            u, log_q = dequantiser.draw(images, [(s, "place") for s in own])
        rest.append(images[0].numel() * log_cell() - log_q.double())
        parts.append(
            log_likelihood(
                denoiser, spread(images, u), condition, trace=trace, probes=probes, probe=probe,
                noise=Noise(own), t=t, rtol=rtol, atol=atol, max_steps=max_steps,
            )
        )  # fmt: skip
    nats = torch.stack([part.nats + more for part, more in zip(parts, rest, strict=True)], 1)
    calls = torch.stack([part.evaluations for part in parts]).sum(0)
    return Likelihood(nats.mean(1), standard_error(nats), calls, images[0].numel(), bound=True)


def standard_error(nats: Float[Tensor, "b k"]) -> Float[Tensor, " b"]:
    """Return the standard error of each row's mean (B,), NaN for a single column."""
    if nats.shape[1] == 1:
        return torch.full_like(nats[:, 0], torch.nan)
    return nats.std(1) / math.sqrt(nats.shape[1])


def check_options(
    x: Data, trace: str, probes: int | None, probe: str, start: str, levels: int | None, t: float
) -> None:
    """Refuse what is out of range or would have no effect."""
    if not len(x):
        raise UsageError("there is no sample to take the likelihood of")
    for name, value, known in (
        ("trace", trace, ("exact", "hutchinson")),
        ("probe", probe, ("rademacher", "gaussian")),
        ("start", start, ("as-is", "noised")),
    ):
        if value not in known:
            raise UsageError(f"{name} is {value!r}; it must be {' or '.join(known)}")
    if trace == "exact" and x[0].numel() > MAX_EXACT:
        raise UsageError(
            f"the exact trace takes a derivative for each dimension, and these samples have {x[0].numel()}, more than "
            f"{MAX_EXACT}; use trace='hutchinson'"
        )
    if trace == "exact" and (probes is not None or probe != "rademacher"):
        raise UsageError("probes are Hutchinson's; with trace='exact' they have no effect")
    if probes is not None and probes < 1:
        raise UsageError(f"probes is {probes}; it must be at least 1")
    if levels is not None and (start == "as-is" or levels < 2):
        raise UsageError(f"levels is {levels}; it is at least 2, and has an effect with start='noised' alone")
    if not 0 < t < 1:
        raise UsageError(f"the first time is {t}; it must lie in (0, 1)")
