r"""Our samplers as schedulers that a pipeline of diffusers accepts.

A pipeline calls its model once for each of `timesteps` and hands every output to `step`; a sampler calls
the denoiser when it likes. So `timesteps` lists the time of every evaluation, found by a dry run, and each
`step` replays the sampler's own step from its start,

    outputs so far -> sampler.step -> the next request for an output, x and t, or the step's end,         (1)

with a denoiser that answers from the outputs recorded and stops the step where they end. What is computed
again is arithmetic only, and gives the same numbers again. Nothing here imports diffusers: a pipeline asks
for no more than the methods below.

References:
    Schedulers
    https://huggingface.co/docs/diffusers/api/schedulers/overview
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from reverie.base.errors import UsageError
from reverie.base.randomness import Noise
from reverie.diffusion.denoisers import Clipped, Condition, Denoiser, Estimate, NetworkDenoiser, Times
from reverie.diffusion.predictions import Data, Prediction
from reverie.diffusion.process import diffuse
from reverie.diffusion.registry import grids
from reverie.diffusion.samplers.base import Sampler, State
from reverie.diffusion.schedules import Schedule, Table

NAMES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


@dataclass(frozen=True)
class StepOutput:
    """What `step` returns.

    Arguments:
        prev_sample: What the model is to see next, or the sample (B, *D).
        pred_original_sample: The estimate of the clean sample that this call's output makes (B, *D).
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class Config(dict[str, Any]):
    """A scheduler's configuration, read as config["name"] or config.name.

    Raises:
        UsageError: It is made another scheduler of, as DDIMPipeline does with whatever it is constructed with.
    """

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"the configuration has no {name}")
        return self[name]

    def get(self, name: str, default: Any = None) -> Any:
        """Return what goes by a name, or the default."""
        if name == "_use_default_values":  # what diffusers' from_config, and nothing else, looks for
            raise UsageError(
                "no scheduler of diffusers can be made of a reverie sampler; where a pipeline does that with the one "
                "that it is constructed with, set pipeline.scheduler afterwards"
            )
        return super().get(name, default)


class Asked(Exception):  # noqa: N818 - it is no error
    """The sampler asks for an output that is not there yet, at x (B, *D) and t (B,)."""

    def __init__(self, x: Data, t: Times) -> None:
        self.x, self.t = x, t


class Replay(NetworkDenoiser):
    """A denoiser whose network's outputs are recorded; it raises Asked where they end."""

    def __init__(self, schedule: Schedule, prediction: Prediction, learned_variance: bool) -> None:
        super().__init__(nn.Identity(), schedule, prediction, learned_variance)
        self.outputs: list[Tensor] = []
        self.used = 0

    def forward(self, x: Data, t: Times, condition: Condition | None = None) -> Estimate:
        if self.used == len(self.outputs):
            raise Asked(x, t)
        return super().forward(x, t, condition)

    def call(self, x: Data, time: Times, alpha: Times, sigma: Times, condition: Condition | None) -> Tensor:
        self.used += 1
        return self.outputs[self.used - 1]


class Listening(Denoiser):
    """A denoiser that knows nothing and notes when it is asked."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule
        self.asked: list[tuple[float, bool]] = []
        self.start = torch.zeros(0)

    def forward(self, x: Data, t: Times, condition: Condition | None = None) -> Estimate:
        self.asked.append((t[0].item(), torch.equal(x, self.start)))
        return Estimate(0.5 * x, 0.5 * x, 0.5 * torch.ones_like(x))


def requests(sampler: Sampler, schedule: Schedule, grid: Tensor) -> list[list[float]]:
    """Return the times at which each step of a grid (N + 1,) asks its denoiser.

    Raises:
        UsageError: A step first asks at another x or t than where it starts, which a pipeline could not know: EDM's
            churn does; or the sampler is adaptive, or tells the network more than the time.
    """
    if sampler.tells:
        more = ", ".join(sampler.tells)
        raise UsageError(f"{sampler} tells the network {more} beside the time, which no pipeline does; use another")
    if sampler.adaptive:
        raise UsageError(f"{sampler} asks as often as it sees fit, and a pipeline must know beforehand; use another")
    found, last = [], len(grid) - 1
    denoiser, start = Listening(schedule), torch.ones(1, 1, 2, 2)
    state = sampler.init(start, grid[0].item())
    for k, (t, s) in enumerate(pairwise(grid.tolist())):
        denoiser.asked, denoiser.start = [], start
        state = replace(sampler.step(denoiser, state, s, Noise([0]), last - 1 - k), x=start)
        if not denoiser.asked or denoiser.asked[0] != (t, True):
            raise UsageError(
                f"{sampler} changes x before it asks the model; in a pipeline the model comes first. "
                "Use it without churn, or another sampler"
            )
        found.append([asked for asked, _ in denoiser.asked])
    return found


class Scheduler:
    """A sampler in the form of a diffusers scheduler. Made by `as_scheduler`, which says how.

    Arguments:
        sampler: The sampler.
        schedule: The noise schedule that the network was trained on.
        prediction: What its output means.
        grid: The name of the grid.
        grid_options: Options of the grid.
        clip: Keep x_0 within [-clip, clip]; None for no clipping.
        learned_variance: The second half of the output's channels is the variance's fraction.
    """

    def __init__(
        self,
        sampler: Sampler,
        schedule: Schedule,
        prediction: Prediction,
        grid: str,
        grid_options: dict[str, Any],
        clip: float | None,
        learned_variance: bool,
    ) -> None:
        self.sampler, self.schedule, self.prediction = sampler, schedule, prediction
        self.make_grid, self.grid_options = grids[grid], grid_options
        self.replay = Replay(schedule, prediction, learned_variance)
        self.denoiser: Denoiser = self.replay if clip is None else Clipped(self.replay, clip)
        count = schedule.timesteps if isinstance(schedule, Table) else 1000
        named = NAMES.get(prediction.name, prediction.name)
        self.config = Config(num_train_timesteps=count, prediction_type=named, sampler=repr(sampler), grid=grid)
        self.grid: Tensor | None = None
        self.timesteps = torch.zeros(0)  # the time of each evaluation, as the network is given it
        self.times: list[float] = []  # and as we know it
        self.steps: list[int] = []  # and which step it belongs to
        self.num_inference_steps: int | None = None
        self.order = 1
        self.restart()

    def restart(self) -> None:
        """Forget where the samples are."""
        self.begin_index: int | None = None
        self.call: int | None = None  # the number, among `timesteps`, of the output that is due
        self.state: State | None = None
        self.noise = Noise([])
        self.outputs: list[Tensor] = []
        self.given: Tensor | None = None  # what the pipeline was last told to show the model
        self.at: tuple[Tensor, Times] | None = None  # where the model is being asked, inside of a step

    def __len__(self) -> int:
        count: int = self.config.num_train_timesteps
        return count

    @property
    def step_index(self) -> int | None:
        """The number, among `timesteps`, of the output that is due; None before the first."""
        return self.call

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at a later one of `timesteps` (image to image)."""
        self.begin_index = begin_index

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of the noise that sampling starts from."""
        first = torch.ones(1, dtype=torch.float64) if self.grid is None else self.grid[:1]
        return float(self.schedule.prior_std(first))

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Settle the grid: N steps, and in `timesteps` the time of each evaluation, as the network is given it."""
        self.grid = self.make_grid(self.schedule, num_inference_steps, **self.grid_options)
        asked = requests(self.sampler, self.schedule, self.grid)
        self.num_inference_steps, self.order = num_inference_steps, len(asked[0])
        self.times = [t for times in asked for t in times]
        self.steps = [k for k, times in enumerate(asked) for _ in times]
        clock = self.prediction.clock(self.schedule, torch.tensor(self.times, dtype=torch.float64))
        whole = bool((clock == clock.round()).all())
        self.timesteps = clock.to(torch.int64 if whole else torch.float32).to(device)
        self.restart()

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """Return a noisy sample as the network is to see it: c_in x; itself for all predictions but edm."""
        if timestep is None or not self.times_known():
            raise UsageError("scale_model_input needs a timestep, and set_timesteps before it")
        call = self.find(timestep) if self.call is None else self.call
        t = torch.tensor(self.times[call : call + 1], dtype=torch.float64)
        scale = self.prediction.input_scale(*self.schedule.marginal(t))
        return sample * scale.to(sample) if bool(scale != 1) else sample

    def times_known(self) -> bool:
        """Return whether set_timesteps was called."""
        return self.grid is not None

    def find(self, timestep: Tensor | float) -> int:
        """Return the number, among `timesteps`, of the call that a run begins with: the first of a step."""
        wanted = float(timestep)
        calls = [i for i, t in enumerate(self.timesteps.tolist()) if t == wanted and self.begin_index in (None, i)]
        first = [i for i in calls if i == 0 or self.steps[i - 1] != self.steps[i]]
        if not first:
            raise UsageError(f"timestep {wanted:g} begins no step; give those of `timesteps`, in order")
        return first[0]

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        return_dict: bool = True,
        eta: float | None = None,
        **options: Any,
    ) -> StepOutput | tuple[Tensor, Tensor]:
        """Return what the model is to see next, or at the end the samples.

        Arguments:
            model_output: The network's output (B, C, H, W).
            timestep: The one of `timesteps` that it was given.
            sample: The noisy sample (B, *D) before scale_model_input.
            generator: Only its initial seed counts, at the first call: sample i's noise is that of seed + i, or of the
                i-th of a list. Without one, a seed is drawn from torch's own.
            return_dict: Return a StepOutput; else a tuple of its two.
            eta: What some pipelines hand to every scheduler: 0 or the sampler's own. It is set in the sampler.
            options: None of them is known; None counts as not given.

        Raises:
            UsageError: An option that would have no effect; a timestep out of order; samples changed in the middle of
                a step; more calls than there are timesteps.
        """
        self.refuse(eta, options)
        self.begin(timestep, sample, generator)
        x, t = self.place(sample)
        self.outputs.append(model_output)
        x0 = self.answer([model_output], x, t).x0
        advanced = self.advance()
        self.given = advanced.to(sample.dtype)
        output = StepOutput(self.given, x0.to(sample.dtype))
        return output if return_dict else (output.prev_sample, output.pred_original_sample)

    def refuse(self, eta: float | None, options: Mapping[str, Any]) -> None:
        """Refuse options that would have no effect."""
        own = getattr(self.sampler, "eta", 0.0)
        if eta and eta != own:
            raise UsageError(f"eta is {eta}, which the pipeline can't set; give {self.sampler} its own")
        if given := sorted(name for name, value in options.items() if value is not None):
            raise UsageError(f"step was given {', '.join(given)}, which {self.sampler} has no use for; leave it out")

    def begin(
        self, timestep: Tensor | float, sample: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None
    ) -> None:
        """See that this is the call that is due; at a run's first, settle the noise."""
        if not self.times_known():
            raise UsageError("call set_timesteps before step")
        if self.call is None:
            self.call = self.find(timestep)
            self.noise = Noise(seeds_of(generator, len(sample)))
        if self.call == len(self.times):
            raise UsageError(f"all {len(self.times)} timesteps are done; call set_timesteps to begin again")
        due = self.timesteps[self.call].item()
        if float(timestep) != due:
            raise UsageError(
                f"timestep {float(timestep):g} came where {due:g} is due; give those of `timesteps` in order"
            )

    def place(self, sample: Tensor) -> tuple[Data, Times]:
        """Return where the model was asked: our own x unless the pipeline changed it."""
        assert self.call is not None
        untouched = self.given is not None and self.given.shape == sample.shape and torch.equal(self.given, sample)
        if self.at is not None:
            if not untouched:
                raise UsageError(
                    "the samples were changed in the middle of a step; use a sampler of one evaluation a step"
                )
            return self.at
        x = sample if sample.dtype == torch.float64 else sample.float()
        if self.state is None:
            self.state = self.sampler.init(x, self.times[self.call])
        elif not untouched:
            self.state = replace(self.state, x=x)
        return self.state.x, self.state.t.to(x.device)

    def answer(self, outputs: list[Tensor], x: Data, t: Times) -> Estimate:
        """Return the estimate at (x, t) that outputs make."""
        self.replay.outputs, self.replay.used = outputs, 0
        estimate: Estimate = self.denoiser(x, t)
        return estimate

    def advance(self) -> Data:
        """Replay the step (1); return the x at which the next output is due, or the samples."""
        assert self.call is not None and self.state is not None and self.grid is not None  # noqa: PT018
        k = self.steps[self.call]
        self.replay.outputs, self.replay.used = self.outputs, 0
        self.call += 1
        try:
            left = len(self.grid) - 2 - k
            with torch.no_grad():
                self.state = self.sampler.step(self.denoiser, self.state, float(self.grid[k + 1]), self.noise, left)
        except Asked as asked:
            self.at = asked.x, asked.t
            return asked.x
        self.at, self.outputs = None, []
        return self.state.x

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return x_t = alpha x_0 + sigma eps (B, *D) at the times (B,) that the network knows as these timesteps."""
        clock = timesteps.to("cpu", torch.float64).flatten()
        t = self.time_of(clock).expand(len(original_samples))
        return diffuse(self.schedule, original_samples, t.to(original_samples.device), noise).to(original_samples)

    def time_of(self, clock: Tensor) -> Times:
        """Return the time t (B,) of what a network is given as time."""
        if self.prediction.name == "edm":
            return self.schedule.time(-8 * clock).clamp(max=1)
        return self.schedule.time_of_timestep(clock) if isinstance(self.schedule, Table) else clock / 1000


def seeds_of(generator: torch.Generator | Sequence[torch.Generator] | None, count: int) -> list[int]:
    """Return the seed of each sample's noise."""
    if generator is None:
        first = int(torch.randint(2**62, ()).item())
    elif isinstance(generator, torch.Generator):
        first = generator.initial_seed()
    else:
        seeds = [one.initial_seed() for one in generator]
        if len(seeds) != count:
            raise UsageError(f"{len(seeds)} generators for {count} samples; give one, or one for each")
        return seeds
    return [first + i for i in range(count)]


def as_scheduler(
    sampler: Sampler,
    schedule: Schedule,
    prediction: str | Prediction = "eps",
    grid: str = "trailing",
    clip: float | None = None,
    learned_variance: bool = False,
    **grid_options: Any,
) -> Scheduler:
    """Return a sampler as a scheduler for a pipeline of diffusers: `pipeline.scheduler = as_scheduler(...)`.

    Noise is ours, fixed by the sample's seed (see `Scheduler.step`), not the generator's own stream. A sampler that
    asks the model several times a step has as many `timesteps` a step.

    Arguments:
        sampler: Any that asks the model where a step starts, and as often as it says: none with churn, none adaptive.
        schedule: The noise schedule that the network was trained on.
        prediction: What its output means, by name or as an object.
        grid: The name of the grid; `set_timesteps` makes it.
        clip: Keep x_0 within [-clip, clip]; None for no clipping.
        learned_variance: The second half of the output's channels is the variance's fraction.
        grid_options: Options of the grid (offset, rho).

    Raises:
        UsageError: The prediction has no meaning on the schedule; or, in set_timesteps, a sampler with churn.

    Example:
        >>> from reverie.diffusion.registry import samplers, schedules
        >>> scheduler = as_scheduler(samplers["heun"](), schedules["linear"]())
        >>> scheduler.set_timesteps(4)
        >>> scheduler.timesteps.tolist()
        [999, 749, 749, 499, 499, 249, 249]
    """
    denoiser = NetworkDenoiser(nn.Identity(), schedule, prediction, learned_variance)
    return Scheduler(sampler, schedule, denoiser.prediction, grid, grid_options, clip, learned_variance)
