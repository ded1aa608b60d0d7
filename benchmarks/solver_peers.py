"""diffusers' schedulers and k-diffusion's samplers on an exact denoiser, under the linear table of 1000 betas."""

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from reverie.diffusion.denoisers import Denoiser
from reverie.diffusion.schedules import Table

Solve = Callable[[Denoiser, Tensor, int], Tensor]

MULTI = {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}
SPACINGS = ("linspace", "leading", "trailing")
# Scheduler, its settings beside the spacing, and the evaluations of a step.
SCHEDULERS: list[tuple[str, dict[str, Any], int]] = [
    ("DDIMScheduler", {}, 1),
    ("PNDMScheduler", {"skip_prk_steps": True}, 1),
    ("EulerDiscreteScheduler", {}, 1),
    ("LMSDiscreteScheduler", {}, 1),
    ("HeunDiscreteScheduler", {}, 2),
    ("KDPM2DiscreteScheduler", {}, 2),
    ("DEISMultistepScheduler", {"solver_order": 2}, 1),
    ("DEISMultistepScheduler", {"solver_order": 3}, 1),
    ("DPMSolverMultistepScheduler", {"solver_order": 2}, 1),
    ("DPMSolverMultistepScheduler", {"solver_order": 2, "solver_type": "heun"}, 1),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}, 1),
    ("DPMSolverMultistepScheduler", {"solver_order": 2, "use_lu_lambdas": True}, 1),
    ("DPMSolverMultistepScheduler", {"solver_order": 3, "use_lu_lambdas": True}, 1),
    ("DPMSolverSinglestepScheduler", {"solver_order": 2}, 1),
    ("DPMSolverSinglestepScheduler", {"solver_order": 3}, 1),
    ("UniPCMultistepScheduler", {"solver_order": 2}, 1),
    ("UniPCMultistepScheduler", {"solver_order": 3}, 1),
]
KARRAS = {
    "EulerDiscreteScheduler",
    "LMSDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
}


def diffusers_solvers() -> Iterator[tuple[str, Solve]]:
    """Yield each setting of each scheduler, by name."""
    for name, settings, cost in SCHEDULERS:
        words = "".join(f" {value}" if not isinstance(value, bool) else f" {key}" for key, value in settings.items())
        lu = settings.get("use_lu_lambdas")
        if "Singlestep" in name:  # it has no spacing
            yield f"{name}{words}", diffusers_solver(name, settings, cost)
        for spacing in () if "Singlestep" in name else ("linspace",) if lu else SPACINGS:
            yield f"{name}{words} {spacing}", diffusers_solver(name, settings | {"timestep_spacing": spacing}, cost)
        if name in KARRAS and not lu:
            for sigmas in MULTI:
                yield f"{name}{words} {next(iter(sigmas))}", diffusers_solver(name, settings | sigmas, cost)


def diffusers_solver(name: str, settings: dict[str, Any], cost: int) -> Solve:
    """Return a function that solves with one scheduler in at most so many evaluations."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()

    def solve(denoiser: Denoiser, x: Tensor, evaluations: int) -> Tensor:
        table = denoiser.schedule
        assert isinstance(table, Table)
        steps = evaluations if cost == 1 else (evaluations + 1) // cost
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler = getattr(diffusers, name)(
                num_train_timesteps=table.timesteps, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", **settings
            )
            scheduler.set_timesteps(steps)
        if name == "PNDMScheduler":
            scheduler.set_timesteps(evaluations - 1)  # it runs one more than it is asked for
        asked = 0
        x = x * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            seen = scheduler.scale_model_input(x, timestep)
            t = ((timestep.double() + 1) / table.timesteps).clamp(1e-9, 1).expand(len(x))
            x = scheduler.step(denoiser(seen, t).eps, timestep, x).prev_sample
            asked += 1
        if asked > evaluations:
            raise RuntimeError(f"{name} evaluated {asked} times, {evaluations} were allowed")
        return x

    return solve


@lru_cache(maxsize=1)
def k_diffusion_sampling() -> ModuleType | None:
    """Return k_diffusion.sampling alone, without the package's other imports; None where it is not installed."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None:
        return None
    package = ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations or [])
    utils = ModuleType("k_diffusion.utils")
    utils.append_dims = lambda x, dims: x[(...,) + (None,) * (dims - x.ndim)]  # type: ignore[attr-defined]
    package.utils = utils  # type: ignore[attr-defined]
    sys.modules |= {"k_diffusion": package, "k_diffusion.utils": utils}
    for needed in ("torchsde", "torchdiffeq"):  # for its noise and its likelihood, which are not used here
        if importlib.util.find_spec(needed) is None or not _imports(needed):
            stand_in = ModuleType(needed)
            stand_in.odeint = None  # type: ignore[attr-defined]
            sys.modules[needed] = stand_in
    return importlib.import_module("k_diffusion.sampling")


def _imports(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def k_diffusion_solvers() -> Iterator[tuple[str, Solve]]:
    """Yield each deterministic sampler of k-diffusion on each of its grids, by name."""
    sampling = k_diffusion_sampling()
    if sampling is None:
        return
    plain = {"euler": 1, "heun": 2, "dpm_2": 2, "lms": 1, "dpmpp_2m": 1, "dpmpp_2s_ancestral": 2}
    for name, cost in plain.items():
        for grid in ("karras", "exponential", "table"):
            yield f"k {name} {grid}", k_solver(sampling, name, cost, grid)
    yield "k dpm_fast", k_solver(sampling, "dpm_fast", 1, "fast")


def k_solver(sampling: ModuleType, name: str, cost: int, grid: str) -> Solve:
    """Return a function that solves with one sampler of k-diffusion."""
    function = getattr(sampling, f"sample_{name}")
    more: dict[str, Any] = {"eta": 0.0} if name in ("dpmpp_2s_ancestral", "dpm_fast") else {}

    def solve(denoiser: Denoiser, x: Tensor, evaluations: int) -> Tensor:
        schedule = denoiser.schedule
        asked = 0

        def model(z: Tensor, sigma: Tensor) -> Tensor:
            nonlocal asked
            asked += 1
            t = schedule.time(-2 * sigma.double().log()).clamp(max=1)
            return denoiser(z * schedule.alpha(t)[:, None], t).x0

        ends = torch.tensor([1.0, schedule.t_min], dtype=torch.float64)
        big, small = (schedule.sigma(ends) / schedule.alpha(ends)).tolist()
        z = x / float(schedule.alpha(ends[:1]))
        if grid == "fast":
            z = function(model, z, small, big, evaluations - 1, disable=True, **more)
            last = model(z, z.new_full((len(z),), small))
            return last if asked <= evaluations else z * float("nan")
        steps = evaluations if cost == 1 else (evaluations + 1) // cost
        sigmas = sampling.append_zero(k_sigmas(sampling, grid, steps, small, big, denoiser)).double()
        z = function(model, z, sigmas, disable=True, **more)
        if asked > evaluations:
            raise RuntimeError(f"{name} evaluated {asked} times, {evaluations} were allowed")
        return z

    return solve


def k_sigmas(sampling: ModuleType, grid: str, steps: int, small: float, big: float, denoiser: Denoiser) -> Tensor:
    """Return the noise levels of one of k-diffusion's grids."""
    if grid == "karras":
        return sampling.get_sigmas_karras(steps, small, big)[:-1]
    if grid == "exponential":
        return sampling.get_sigmas_exponential(steps, small, big)[:-1]
    t = torch.linspace(1, denoiser.schedule.t_min, steps, dtype=torch.float64)
    return denoiser.schedule.sigma(t) / denoiser.schedule.alpha(t)
