r"""From a plan to samples: the network in buckets, guided, clipped, and the one loop.

A sample is a function of the model, of the plan's settings and of its own seed:

    picture i of seed s  =  picture 0 of seed s + i,                                                (1)

and of nothing else. Its noise is keyed by its seed; and where `exact` is asked for, its network call has
a number of rows that depends on the model's shape alone, so that not one bit depends on how many samples
are drawn, on the batch that it is drawn in, or on its neighbours there.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reverie.base.randomness import Noise
from reverie.diffusion.denoisers import Clipped, Denoiser, FixedBatch, NetworkDenoiser, Thresholded
from reverie.diffusion.guidance.known import Known
from reverie.diffusion.guidance.zero_shot import Known as Measured
from reverie.diffusion.predictions import per_sample
from reverie.diffusion.samplers.base import State, run, start
from reverie.models.conditioning import Conditioner, Told, bound, guided, same_length, told
from reverie.models.editing import Given
from reverie.models.memory import check_memory, memory_errors
from reverie.models.plan import SamplingPlan
from reverie.models.reuse import Reusing
from reverie.models.speed import arithmetic, is_packed


class Progress(NamedTuple):
    """Where sampling is, after a step.

    Arguments:
        batch: Which batch, from 0.
        step: How many steps it has taken.
        done: Steps taken in all batches.
        total: Steps to take in all.
        state: Where its samples are; `state.x0` is a preview of them.
    """

    batch: int
    step: int
    done: int
    total: int
    state: State


@dataclass(frozen=True)
class Intermediate:
    """Where the samples were on the way.

    Arguments:
        step: After which step.
        t: The time then.
        x: The noisy samples (n, *D).
        x0: The estimate of the clean ones (n, *D).
    """

    step: int
    t: float
    x: Tensor
    x0: Tensor


def execute(
    denoiser: NetworkDenoiser,
    plan: SamplingPlan,
    callback: Callable[[Progress], None] | None = None,
    conditioner: Conditioner | None = None,
    given: Given | None = None,
    beside: int = 0,
    noise: Noise | None = None,
) -> tuple[Float[Tensor, "n ..."], tuple[Intermediate, ...]]:
    """Carry out a plan.

    Arguments:
        denoiser: The model's.
        plan: What to do.
        callback: Called after every step; what it raises ends the sampling.
        conditioner: What reads prompts, where the model takes any.
        given: What the samples start from; None for noise.
        beside: The bytes that the network and the codec take beside their weights.
        noise: That of all samples; None for that of their seeds.

    Returns:
        The samples (n, *D), float32 on the CPU, and the intermediates that the plan keeps.

    Raises:
        NonFiniteError: A step gave NaN or infinity.
        OutOfMemoryError: There is not enough memory.
    """
    device = next(denoiser.network.parameters(), torch.empty(0)).device
    what = f"{plan.n} sample{'s' * (plan.n != 1)} of {plan.shape}"
    lower = "n, the batch size, the size of the picture, or the number of intermediates"
    cpu = torch.device("cpu")
    check_memory(memory_needed(plan) + (beside if device.type == "cpu" else 0), cpu, what, lower)
    results, kept, noise = [], [], Noise(plan.seeds) if noise is None else noise
    networks = [one.network for one in (denoiser, plan.guiding.bad and plan.guiding.bad.denoiser) if one]
    with memory_errors(what, lower), evaluating(*networks), arithmetic(device, plan.speed):
        batches = same_length(plan, conditioner)
        for batch, rows in enumerate(batches):
            watch = watcher(plan, batch, len(batches), callback)
            ready = prepared(denoiser, plan, rows, device, conditioner, given)
            x, passed = draw(ready, plan, noise.rows(list(rows)), device, watch, given)
            results.append(x)
            kept.append(passed)
        return torch.cat(results), tuple(joined(parts) for parts in zip(*kept, strict=True))


def memory_needed(plan: SamplingPlan) -> int:
    """Return the bytes that the samples take, at the least: results, what is kept, and the states of a batch."""
    numbers = math.prod(plan.shape)
    # A result is there in parts and joined; a batch has x, x0, eps, noise and what is made of them.
    return 4 * numbers * (2 * plan.n * (1 + 2 * len(plan.kept)) + 6 * plan.batch_size)


def watcher(
    plan: SamplingPlan, batch: int, batches: int, callback: Callable[[Progress], None] | None
) -> Callable[[int, State], None] | None:
    """Return what to call after each step of a batch."""
    if callback is None:
        return None
    total = batches * plan.steps
    return lambda step, state: callback(Progress(batch, step, batch * plan.steps + step, total, state))


@contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """A block in which networks have no dropout."""
    training = [network.training for network in networks]
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for network, before in zip(networks, training, strict=True):
            network.train(before)


def prepared(
    denoiser: NetworkDenoiser,
    plan: SamplingPlan,
    rows: Iterable[int],
    device: torch.device,
    conditioner: Conditioner | None = None,
    given: Given | None = None,
) -> Denoiser:
    """Return the denoiser of some of a plan's samples: the network in buckets, guided, then clipped."""
    rows = list(rows)
    said, worse = told_all(plan, rows, conditioner, device, given), None
    if (bad := plan.guiding.bad) is not None:
        told_it = told_all(plan, rows, bad.conditioner, device, given)
        worse = bound(in_buckets(bad.denoiser, plan), told_it, plan.guidance)
    core = guided(in_buckets(denoiser, plan), said, plan, denoiser.network, worse)
    if plan.threshold is not None and plan.clip is not None:
        core = Thresholded(core, plan.threshold, plan.clip)
    elif plan.clip is not None:
        core = Clipped(core, plan.clip)
    if given is not None and given.known is not None:
        return Measured(core, given.known.measurement, given.known.y.to(device))
    if given is None or given.mask is None or given.beside is not None:
        return core
    return Known(core, given.x0.to(device), given.mask.to(device))


def in_buckets(denoiser: NetworkDenoiser, plan: SamplingPlan) -> Denoiser:
    """Return a network's denoiser in the plan's arithmetic, and in its buckets where there are any."""
    # Weights that are laid out for speed bring their arithmetic with them.
    dtype = None if is_packed(denoiser.network) else plan.dtype
    core: Denoiser = NetworkDenoiser(
        asked(denoiser.network, plan), denoiser.schedule, denoiser.prediction, denoiser.learned_variance, dtype
    )
    if plan.cache_every > 1:
        core = Reusing(core, plan.cache_every)
    return core if plan.bucket is None else FixedBatch(core, plan.bucket)


def asked(network: nn.Module, plan: SamplingPlan) -> nn.Module:
    """Return what stands for a network in a plan: itself, or its recorded calls on a GPU.

    These do the same at each call: where something changes the network's inside, or hangs on its modules' calls, it is
    asked itself.
    """
    graphs = plan.speed.graphs
    if graphs is None or graphs.network is not network or plan.cache_every > 1 or plan.guiding.perturbed is not None:
        return network
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    return network if hooked else graphs


def told_all(
    plan: SamplingPlan, rows: list[int], conditioner: Conditioner | None, device: torch.device, given: Given | None
) -> Told | None:
    """Return what a network is told of some of a plan's samples, with what it sees beside its input."""
    said = told(plan, rows, conditioner, device)
    if given is None or given.beside is None:
        return said
    return with_beside(said, given.beside.to(device).expand(len(rows), *given.beside.shape))


def with_beside(said: Told | None, beside: Float[Tensor, "b k h w"]) -> Told:
    """Return what a network is told, with what it sees beside its input."""
    told_of = said or Told({}, None)
    nothing = None if told_of.nothing is None else {**told_of.nothing, "beside": beside}
    return Told({**told_of.condition, "beside": beside}, nothing)


def draw(
    denoiser: Denoiser,
    plan: SamplingPlan,
    noise: Noise,
    device: torch.device,
    watch: Callable[[int, State], None] | None,
    given: Given | None = None,
) -> tuple[Tensor, list[Intermediate]]:
    """Return the samples (B, *D) of some noise, on the CPU, and where they were on the way."""
    grid = plan.grid.expand(len(noise.seeds), -1)
    first = start(plan.sampler, denoiser.schedule, plan.shape, grid[:, 0], noise, device)
    if given is not None:
        first = plan.sampler.init(noised(denoiser, given.x0.to(device), grid[:, 0], noise), grid[:, 0])
    kept, previews = [], watch is not None or bool(plan.kept)
    for step, state in enumerate(run(plan.sampler, denoiser, first, grid, noise, previews), start=1):
        if step in plan.kept:
            kept.append(Intermediate(step, float(plan.grid[step]), state.x.cpu(), state.x0.cpu()))
        if watch is not None:
            watch(step, state)
    return state.x.cpu(), kept


def noised(denoiser: Denoiser, x0: Float[Tensor, "*d"], t: Float[Tensor, " b"], noise: Noise) -> Float[Tensor, "b *d"]:
    """Return data with each sample's noise, as it is at times t (B,): x_t = alpha x_0 + sigma eps."""
    eps = noise(x0.shape, [0] * len(t)).to(x0)
    alpha, sigma = (per_sample(value, eps) for value in denoiser.schedule.marginal(t))
    return alpha * x0 + sigma * eps


def joined(parts: Sequence[Intermediate]) -> Intermediate:
    """Return the intermediates of all batches after one step as one."""
    return replace(parts[0], x=torch.cat([part.x for part in parts]), x0=torch.cat([part.x0 for part in parts]))
