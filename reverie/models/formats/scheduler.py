"""Schedules and sampling defaults in the words of diffusers' scheduler_config.json, both ways.

| here | there |
|---|---|
| linear, scaled-linear, sigmoid-in-beta | beta_schedule linear, scaled_linear, sigmoid, with beta_start and beta_end |
| cosine (offset 0.008, beta at most 0.999) | squaredcos_cap_v2 |
| any other table of betas | trained_betas |
| zero_snr | rescale_betas_zero_snr |
| prediction eps, x0, v | prediction_type epsilon, sample, v_prediction |
| grid leading, trailing, linspace | timestep_spacing |
| clip, threshold | clip_sample and clip_sample_range, thresholding and dynamic_thresholding_ratio |
| ddpm's variance small, large, learned | variance_type fixed_small, fixed_large, learned_range |

References:
    DDPMScheduler and DDIMScheduler
    https://huggingface.co/docs/diffusers/api/schedulers/ddpm
    https://huggingface.co/docs/diffusers/api/schedulers/ddim
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError

from reverie.base.errors import ModelFileError, UsageError
from reverie.base.registry import nearest
from reverie.diffusion.schedules import Table
from reverie.models.builders import build_schedule
from reverie.models.card import Card, SamplingDefaults, ScheduleSpec, sentence

# Ours -> theirs, and the names of the two numbers that such a table has.
RANGED = {"linear": "linear", "scaled-linear": "scaled_linear", "sigmoid-in-beta": "sigmoid"}
DEFAULT_RANGE = {"linear": (1e-4, 0.02), "scaled-linear": (0.00085, 0.012), "sigmoid-in-beta": (1e-4, 0.02)}
COSINE = "squaredcos_cap_v2"
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
SPACINGS = ("leading", "trailing", "linspace")
VARIANCES = {
    "fixed_small": "small",
    "fixed_small_log": "small",
    "fixed_large": "large",
    "fixed_large_log": "large",
    "learned_range": "learned",
}
CLASSES = ("DDPMScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDIMParallelScheduler")
# diffusers' other schedulers, and the sampler that each is here.
SOLVERS = {
    "PNDMScheduler": "pndm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler-ancestral",
    "HeunDiscreteScheduler": "heun",
    "KDPM2DiscreteScheduler": "dpm2",
    "KDPM2AncestralDiscreteScheduler": "dpm2-ancestral",
    "LMSDiscreteScheduler": "lms",
    "DPMSolverMultistepScheduler": "dpmpp-2m",
    "DPMSolverSinglestepScheduler": "dpmpp-2s",
    "DPMSolverSDEScheduler": "dpmpp-2s",
    "UniPCMultistepScheduler": "unipc",
    "DEISMultistepScheduler": "deis",
}
# Their settings, with the values that mean what the sampler does here; None where any value is passed over.
SOLVER_SETTINGS: dict[str, tuple[Any, ...] | None] = {
    "skip_prk_steps": (True,),
    "interpolation_type": ("linear",),
    "use_karras_sigmas": (False, True, None),  # read: the grid
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_flow_sigmas": (False, None),
    "flow_shift": None,
    "final_sigmas_type": ("zero", None),
    "timestep_type": ("discrete",),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "solver_order": (2,),
    "solver_type": ("midpoint", "bh2", "logrho"),
    "algorithm_type": ("dpmsolver++", "deis"),
    "lower_order_final": None,
    "euler_at_final": (False,),
    "lambda_min_clipped": None,
    "predict_x0": (True,),
    "disable_corrector": ([],),
    "solver_p": (None,),
    "use_dynamic_shifting": (False,),
    "time_shift_type": None,
    "noise_sampler_seed": None,
}
# What pipelines of Stable Diffusion carry on from one scheduler to the next, where it means nothing.
PASSED_ON = ("skip_prk_steps", "interpolation_type", "use_karras_sigmas")
DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "variance_type": "fixed_small",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "prediction_type": "epsilon",
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
    "set_alpha_to_one": True,
}


# From ours to theirs --------------------------------------------------------------------------------


def inexpressible(card: Card) -> str | None:
    """Return what of a card a DDPMScheduler has no words for; None where it has words for all.

    Example:
        >>> from reverie.models.card import NetworkSpec
        >>> inexpressible(Card(shape=(1, 8, 8), network=NetworkSpec(config={}), prediction="velocity"))
        'prediction velocity'
    """
    if card.prediction not in PREDICTIONS:
        return f"prediction {card.prediction}"
    if not isinstance(build_schedule(card.schedule), Table):
        return f"the continuous schedule {card.schedule.name}"
    return None


def write_scheduler(card: Card) -> dict[str, Any]:
    """Return the scheduler_config.json of a card that is expressible."""
    sampling = card.sampling
    clip = 1.0 if sampling.clip in (True, None) else sampling.clip
    variance = "learned" if card.learned_variance else sampling.options.get("variance", "small")
    config = {
        "_class_name": "DDPMScheduler",
        **write_schedule(card.schedule),
        "variance_type": {"large": "fixed_large", "learned": "learned_range"}.get(str(variance), "fixed_small"),
        "prediction_type": PREDICTIONS[card.prediction],
        "clip_sample": clip is not False,
        "clip_sample_range": clip or 1.0,
        "thresholding": sampling.threshold is not None,
        "timestep_spacing": sampling.grid if sampling.grid in SPACINGS else "leading",
        "steps_offset": sampling.options.get("offset", 0) if sampling.grid == "leading" else 0,
    }
    if sampling.threshold is not None:
        # Theirs has a largest threshold besides, which is 1 unless set, and thereby none.
        config |= {"dynamic_thresholding_ratio": sampling.threshold, "sample_max_value": 1e6}
    return config


def write_schedule(spec: ScheduleSpec) -> dict[str, Any]:
    """Return the part of the configuration that gives the betas."""
    table, options = build_schedule(spec), dict(spec.options)
    assert isinstance(table, Table)
    count, zero_snr = options.pop("timesteps", 1000), bool(options.pop("zero_snr", False))
    if spec.name in RANGED and not spec.betas:
        first, last = DEFAULT_RANGE[spec.name]
        given = {"beta_start": options.pop("first", first), "beta_end": options.pop("last", last)}
        named = {"beta_schedule": RANGED[spec.name], **given}
    elif spec.name == "cosine" and not spec.betas and not options:
        named = {"beta_schedule": COSINE}
    else:
        return {"num_train_timesteps": table.timesteps, "trained_betas": table.betas.tolist()}
    return {"num_train_timesteps": count, **named, "rescale_betas_zero_snr": zero_snr}


# From theirs to ours --------------------------------------------------------------------------------


class Reading(NamedTuple):
    """What a scheduler_config.json says, in a card's words, and what of it is otherwise here."""

    schedule: ScheduleSpec
    prediction: str
    learned_variance: bool
    sampling: SamplingDefaults
    warnings: tuple[str, ...]


def read_scheduler(config: Mapping[str, Any]) -> Reading:
    """Return what a scheduler_config.json says.

    Raises:
        ModelFileError: It asks for something that is not supported; the message names it.

    Example:
        >>> read_scheduler({"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}).prediction
        'v'
    """
    kind = config.get("_class_name", "DDPMScheduler")
    if not isinstance(kind, str) or (kind not in CLASSES and kind not in SOLVERS):
        known = ", ".join((*CLASSES, *SOLVERS))
        raise ModelFileError(f"the scheduler is a {str(kind)[:100]}; the ones that are read are {known}")
    also = SOLVER_SETTINGS.keys() if kind in SOLVERS else PASSED_ON
    unknown = [name for name in config if name not in DEFAULTS and name not in also and not name.startswith("_")]
    if unknown:
        raise ModelFileError(f"the {kind} has an unknown setting {unknown[0][:100]!r}{nearest(unknown[0], DEFAULTS)}")
    settings = DEFAULTS | {name: value for name, value in config.items() if name in DEFAULTS}
    if kind in SOLVERS:
        # None of them clips; a solver that has no spacing of its own counts as DDIM does.
        settings |= {"clip_sample": False, "variance_type": "fixed_small"}
    check_numbers(settings)
    theirs = {there: here for here, there in PREDICTIONS.items()}
    prediction = theirs.get(choice(settings, "prediction_type", theirs))
    variance = VARIANCES[choice(settings, "variance_type", VARIANCES)]
    try:
        schedule = read_schedule(settings)
        build_schedule(schedule)
        sampling = read_sampling(settings, SOLVERS.get(kind, "ddim" if "DDIM" in kind else "ddpm"), variance)
        if kind in SOLVERS and config.get("use_karras_sigmas"):
            sampling = sampling.model_copy(update={"grid": "karras", "options": {}})
    except ValidationError as error:
        raise ModelFileError(f"the settings of the {kind} are not sound: {sentence(error)}") from None
    except UsageError as error:
        raise ModelFileError(f"the settings of the {kind} are not sound: {error}") from None
    return Reading(
        schedule,
        prediction or "eps",
        variance == "learned",
        sampling,
        (*differences(settings), *passed_over(kind, config)),
    )


def passed_over(kind: str, config: Mapping[str, Any]) -> list[str]:
    """Return which settings of a solver's mean something else than its sampler does here, in sentences."""
    if kind not in SOLVERS:
        return []
    found = []
    for name, same in SOLVER_SETTINGS.items():
        if name in config and same is not None and config[name] not in same:
            found.append(
                f"the scheduler's {name} is {str(config[name])[:40]!r}; the sampler {SOLVERS[kind]} goes its own way"
            )
    return found


def check_numbers(settings: Mapping[str, Any]) -> None:
    """Refuse a setting that is no number where diffusers' own is one, or no list of betas."""
    for name, default in DEFAULTS.items():
        value = settings[name]
        if isinstance(default, int | float) and not isinstance(value, int | float):
            raise ModelFileError(
                f"the scheduler's {name} is {str(value)[:100]!r}; it must be a number, or true or false"
            )
    betas = settings["trained_betas"]
    if betas is not None and not isinstance(betas, list | tuple):
        raise ModelFileError(f"the scheduler's trained_betas is a {type(betas).__name__}; it must be a list of numbers")


def choice(settings: Mapping[str, Any], name: str, known: Mapping[str, Any] | tuple[str, ...]) -> str:
    """Return a setting that is one of a few names."""
    value = settings[name]
    if not isinstance(value, str) or value not in known:
        raise ModelFileError(f"the scheduler's {name} is {str(value)[:100]!r}; it must be one of {', '.join(known)}")
    return value


def read_schedule(settings: Mapping[str, Any]) -> ScheduleSpec:
    """Return the schedule of a scheduler's settings."""
    zero_snr = {"zero_snr": True} if settings["rescale_betas_zero_snr"] else {}
    if settings["trained_betas"] is not None:
        if zero_snr:
            raise ModelFileError("the scheduler has trained_betas and rescale_betas_zero_snr; only one is supported")
        return ScheduleSpec(name="table", betas=settings["trained_betas"])
    ours = {there: here for here, there in RANGED.items()} | {COSINE: "cosine"}
    name = ours[choice(settings, "beta_schedule", ours)]
    span = {} if name == "cosine" else {"first": settings["beta_start"], "last": settings["beta_end"]}
    return ScheduleSpec(name=name, options={"timesteps": settings["num_train_timesteps"], **span, **zero_snr})


def read_sampling(settings: Mapping[str, Any], sampler: str, variance: str) -> SamplingDefaults:
    """Return the sampling defaults: what diffusers' own pipeline would do."""
    betas = settings["trained_betas"]
    count = settings["num_train_timesteps"] if betas is None else len(betas)
    grid = choice(settings, "timestep_spacing", SPACINGS)
    options: dict[str, Any] = {"variance": variance} if sampler == "ddpm" else {}
    if grid == "leading" and settings["steps_offset"]:
        options["offset"] = settings["steps_offset"]
    thresholding = bool(settings["thresholding"]) and not ends_at_one(settings)
    clip = bool(settings["clip_sample"]) or bool(settings["thresholding"])
    limit = settings["clip_sample_range"] if settings["clip_sample"] and not settings["thresholding"] else 1.0
    return SamplingDefaults(
        sampler=sampler,
        options=options,
        grid=grid,
        steps=count if sampler == "ddpm" else min(50, count),
        clip=clip and float(limit),
        threshold=settings["dynamic_thresholding_ratio"] if thresholding else None,
    )


def ends_at_one(settings: Mapping[str, Any]) -> bool:
    """Return whether the largest threshold is 1, which makes of thresholding a plain clip."""
    most = settings["sample_max_value"]
    return isinstance(most, int | float) and most <= 1


def differences(settings: Mapping[str, Any]) -> list[str]:
    """Return what sampling does here otherwise than there, in sentences."""
    found = []
    if settings["thresholding"] and not ends_at_one(settings) and settings["sample_max_value"] < 1e6:
        found.append(f"the scheduler bounds its threshold by {settings['sample_max_value']}; here it has no bound")
    if not settings["set_alpha_to_one"]:
        found.append(
            "the scheduler ends at its first timestep (set_alpha_to_one false); here the last step ends at the data"
        )
    return found
