"""What a training run is told: typed, bounded, each field a flag of `reverie train` with its help.

None means: chosen from the data and the machine (plan.py says how); the run's config.json holds what was
told, its card.json what was chosen. No import of torch here, so that `reverie train --help` is quick.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from reverie.diffusion.registry import predictions, schedules, weights
from reverie.training.run_config import RunConfig, option


class TrainConfig(RunConfig):
    """A training run.

    Example:
        >>> TrainConfig(out="runs/digits", steps=1000).batch_size
        32
    """

    labels: bool = option("data", True, "condition on the data's classes, where it has any")
    captions: bool = option(
        "data", False, "condition on the data's captions; an encoder of their words is trained along"
    )

    start: str | None = option(
        "start",
        None,
        "a model to start from: its network, schedule, prediction, vocabulary and weights",
        metavar="MODEL",
    )
    codec: str | None = option(
        "start", None, "train on the latents of an autoencoder: a vae's folder, a model of latents, or encoder:decoder",
        metavar="PATH",
    )  # fmt: skip
    lora: int | None = option("start", None, "train a LoRA of this rank, and nothing else", ge=1, le=4096)
    lora_alpha: float | None = option("start", None, "its strength is alpha / rank; the rank", gt=0)
    fill: bool = option("start", False, "learn to fill in what a mask leaves out, as reverie edit --mask asks for")

    network: Literal["unet", "edm2", "dit"] = option(
        "network",
        "unet",
        "unet; edm2, whose layers keep magnitudes, with EDM's noise, output, times and averages; dit, a transformer",
    )
    preset: Literal["auto", "tiny", "small", "base", "large", "xs", "s", "m", "l", "xl", "xxl"] = option(
        "network", "auto", "size of the network; xs to xxl are the EDM2 paper's"
    )
    widths: tuple[Annotated[int, Field(ge=1, le=16384)], ...] | None = option(
        "network", None, "channels of each level, comma-separated; from the preset", min_length=1, max_length=8
    )
    layers: int | None = option("network", None, "residual blocks a level, dit's in all; from the preset", ge=1, le=64)
    attention: tuple[bool, ...] | None = option("network", None, "self-attention at each level; from the preset")
    head_dim: int | None = option("network", None, "channels of an attention head; from the preset", ge=1, le=1024)
    patch: int | None = option(
        "network", None, "pixels a side of a patch: 1 for unet, and dit's leave 16 patches a side", ge=1, le=64
    )
    dropout: float = option("network", 0.0, "dropout in the residual blocks", ge=0, lt=1)
    time_scale_shift: bool = option("network", False, "time scales and shifts, instead of adding; so with captions")
    checkpointing: bool = option("network", False, "recompute activations in the backward pass: less memory, more time")

    schedule: str = option("diffusion", "cosine", "noise schedule: " + ", ".join(schedules))
    timesteps: int | None = option("diffusion", None, "entries of the schedule's table; 1000", ge=2, le=100_000)
    zero_snr: bool = option("diffusion", False, "rescale the table to zero terminal SNR")
    prediction: str = option("diffusion", "v", "what the network predicts: " + ", ".join(predictions))
    learned_variance: bool = option("diffusion", False, "learn the variance too; needs --objective hybrid or vlb")
    objective: Literal[
        "simple", "hybrid", "vlb", "consistency", "easy-consistency", "continuous-consistency", "mean-flow", "reflow",
        "progressive", "latent-consistency", "denoising-score", "sliced-score", "implicit-score",
    ] = option("diffusion", "simple", "L_simple, L_hybrid or L_vlb; one of few steps; or score matching")  # fmt: skip
    level_weight: Literal["variance", "edm", "uniform", "likelihood"] | None = option(
        "diffusion", None, "weight of the noise levels in score matching; edm with EDM's output, else NCSN's variance"
    )
    slices: int | None = option("diffusion", None, "directions for each image in sliced-score; 1", ge=1, le=1000)
    distance: Literal["l2", "l1", "huber"] = option("diffusion", "l2", "distance in L_simple")
    weight: str = option("diffusion", "uniform", "weight of the noise levels in L_simple: " + ", ".join(weights))
    times: Literal["uniform", "log-normal", "importance"] = option("diffusion", "uniform", "which times are trained on")
    time_mean: float | None = option("diffusion", None, "log-normal's mean; -1.2, latents -0.4", ge=-20, le=20)
    time_std: float | None = option("diffusion", None, "log-normal's standard deviation; 1.2, latents 1", gt=0, le=20)
    uncertainty: bool = option("diffusion", False, "learn how much each noise level counts")
    label_dropout: float = option("diffusion", 0.1, "share of labels or captions hidden, for guidance", ge=0, le=1)

    teacher: str | None = option("few steps", None, "a model to begin as and to learn from, for few steps")
    target_decay: float = option(
        "few steps", 0.0, "decay of the averaged network in a consistency target; 0 for none", ge=0, lt=1
    )
    stages: int | None = option(
        "few steps", None, "how often easy-consistency halves its gap; 8, fewer in a short run", ge=1, le=16
    )
    student_steps: int | None = option(
        "few steps", None, "steps of progressive's student, whose teacher takes twice as many; 8", ge=1, le=50_000
    )

    accumulate: int = option("optimiser", 1, "parts that a step's batch is worked through in", ge=1, le=100_000)
    decay: Literal["constant", "cosine", "inverse-sqrt"] = option(
        "optimiser", "constant", "learning rate after the warm-up"
    )
    decay_after: int | None = option(
        "optimiser", None, "steps before inverse-sqrt sets in; half of the run's, 70,000 at most", ge=1
    )
    ema: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = option(
        "optimiser", (0.999,), "decays of the averaged weights; the first is sampled", min_length=1, max_length=8
    )
    ema_lengths: tuple[Annotated[float, Field(gt=0, lt=0.2886)], ...] = option(
        "optimiser", (), "averages over these shares of the run, of which reverie ema makes others", max_length=4
    )

    compile: bool = option("machine", False, "torch.compile the network: a minute or two first, then faster")

    snapshot_every: int | None = option(
        "reports", None, "steps between snapshots of ema_lengths; a 32nd of the run's, or save_every", ge=1
    )
    sample_steps: int = option("reports", 25, "steps that the samples take", ge=1)

    @model_validator(mode="after")
    def settle(self) -> "TrainConfig":
        """Take what goes with the network, where nothing else is said."""
        usual: dict[str, Any] = {}
        if self.network == "edm2":
            usual = EDM2 if self.objective == "simple" else EDM2 | {"uncertainty": False}
        if self.objective in SCORES:
            usual = usual | NCSN
        if self.captions and self.network == "unet":
            usual = usual | {"time_scale_shift": True}
        self.__dict__.update({name: value for name, value in usual.items() if name not in self.model_fields_set})
        return self

    @model_validator(mode="after")
    def check(self) -> "TrainConfig":
        """Refuse what does not go together, all at once."""
        wrong = list(self.contradictions())
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    def contradictions(self) -> Any:
        """Yield what does not go together, in words."""
        if self.accumulate > self.batch_size or self.batch_size % self.accumulate:
            yield f"accumulate ({self.accumulate}) must divide batch_size ({self.batch_size})"
        if self.learned_variance and self.objective not in ("hybrid", "vlb"):
            yield f"learned_variance needs objective hybrid or vlb: {self.objective} says nothing of the variance"
        if self.objective == "hybrid" and not self.learned_variance:
            yield "objective hybrid is there to learn the variance; add learned_variance"
        if self.objective == "vlb" and (self.distance != "l2" or self.weight != "uniform"):
            yield "objective vlb has no distance and no weight of its own; leave them out"
        if self.distance != "l2" and self.weight != "uniform":
            yield f"weight {self.weight} is defined for distance l2"
        if self.decay == "cosine" and self.steps is None:
            yield "decay cosine needs steps: it must know where it ends"
        if self.captions and self.labels and "labels" in self.model_fields_set:
            yield "captions and labels are one or the other; leave labels out"
        yield from self.starting()
        yield from self.switched_off()
        yield from self.without_effect()
        yield from self.of_scores()
        if self.network == "edm2" and (self.time_scale_shift or self.captions):
            yield "time_scale_shift and captions are for other networks; edm2 has neither"
        if self.network == "unet" and self.preset in ("xs", "s", "m", "l", "xl", "xxl"):
            yield f"preset {self.preset} is edm2's; the U-Net's are tiny, small, base and large"
        yield from self.of_transformers()
        if self.times != "log-normal" and not (self.time_mean is None and self.time_std is None):
            yield f"time_mean and time_std belong to times log-normal, not to {self.times}"
        if self.decay != "inverse-sqrt" and self.decay_after is not None:
            yield f"decay_after belongs to decay inverse-sqrt, not to {self.decay}"
        if self.snapshot_every is not None and not self.ema_lengths:
            yield "snapshot_every needs ema_lengths: there is nothing else to take snapshots of"
        if self.attention and self.widths and len(self.attention) != len(self.widths):
            yield f"attention names {len(self.attention)} levels, widths {len(self.widths)}"
        for field, registry in (("schedule", schedules), ("prediction", predictions), ("weight", weights)):
            if getattr(self, field) not in registry:
                yield f"{field} is {getattr(self, field)!r}; it must be one of {', '.join(registry)}"

    def of_transformers(self) -> Any:
        """Yield what does not go with a transformer, or goes with nothing else, in words."""
        if self.network != "dit":
            if self.patch is not None and self.network == "edm2":
                yield "patch is unet's and dit's; edm2 has none"
            return
        if self.attention or self.time_scale_shift:
            yield "attention and time_scale_shift are the U-Net's; dit has neither"
        if self.widths and len(self.widths) != 1:
            yield f"dit has one width; widths names {len(self.widths)}"
        if self.preset in ("xs", "s", "m", "l", "xl", "xxl"):
            yield f"preset {self.preset} is edm2's; dit's are tiny, small, base and large"
        if self.objective == "mean-flow":
            yield "objective mean-flow tells the network a second time, for which dit has no place"

    def starting(self) -> Any:
        """Yield what does not go with a model to start from, or needs one, in words."""
        if self.lora_alpha is not None and self.lora is None:
            yield "lora_alpha has no effect without lora"
        if self.lora is not None and (self.fill or self.ema_lengths):
            yield "lora trains an adapter alone, which neither fill nor ema_lengths goes with; leave them out"
        if self.start is None:
            if self.lora is not None:
                yield "lora needs a model to start from: --from MODEL"
            if self.fill:
                yield "fill needs a model to start from: --from MODEL"
            if self.codec and self.learned_variance:
                yield "learned_variance is of pictures of 8 bits; with a codec there are none"
            return
        if found := [name for name in STARTED if name in self.model_fields_set]:
            yield f"{', '.join(found)}: taken from the model that is started from; leave out"
        if self.objective in FEW_STEPS:
            yield f"objective {self.objective} takes its model as --teacher, not as --from"

    def switched_off(self) -> Any:
        """Yield what belongs to something that is switched off, in words."""
        asked = self.model_fields_set
        off = {
            "sample_every": (self.sample_every == 0, ("sample_count", "sample_steps")),
            "held_out": (self.held_out == 0, ("validate_every",)),
            "labels": ("labels" in asked and not self.labels and not self.captions, ("label_dropout",)),
        }
        for name, (is_off, others) in off.items():
            if is_off and (found := [other for other in others if other in asked and getattr(self, other)]):
                yield f"{', '.join(found)}: without effect where {name} is {getattr(self, name)}; leave out"

    def without_effect(self) -> Any:
        """Yield what has no effect on an objective of few steps, or on any other, in words."""
        if self.objective not in FEW_STEPS:
            for name in ("teacher", "target_decay", "student_steps", "stages"):
                if name in self.model_fields_set:
                    yield f"{name} has no effect on objective {self.objective}; it is for {', '.join(FEW_STEPS)}"
            return
        if found := [name for name in IDLE if name in self.model_fields_set]:
            yield f"{', '.join(found)}: without effect on objective {self.objective}; leave out"
        if self.teacher is not None and (found := [name for name in TEACHERS if name in self.model_fields_set]):
            yield f"{', '.join(found)}: the teacher's is taken; leave out"
        if self.objective in TAUGHT and self.teacher is None:
            yield f"objective {self.objective} needs a teacher: --teacher MODEL"
        if "target_decay" in self.model_fields_set and self.objective not in AVERAGED:
            yield f"target_decay has no effect on objective {self.objective}; it is for {', '.join(AVERAGED)}"
        if self.student_steps is not None and self.objective != "progressive":
            yield f"student_steps has no effect on objective {self.objective}; it is for progressive"
        if self.stages is not None and self.objective != "easy-consistency":
            yield f"stages has no effect on objective {self.objective}; it is for easy-consistency"
        if self.objective == "mean-flow" and not self.teacher and (self.schedule, self.prediction) != FLOWING:
            yield "objective mean-flow is of velocities on the flow schedule: --schedule flow --prediction velocity"
        if self.objective == "mean-flow" and self.captions:
            yield "objective mean-flow takes no captions; leave them out"
        if self.objective in SLOPED and self.compile:
            yield f"objective {self.objective} takes slopes in forward mode, which compile does not; leave it out"
        if self.objective == "mean-flow" and self.network == "edm2":
            yield "objective mean-flow tells the network a second time, for which edm2's has no place"
        if self.objective in CURRICULUM and self.prediction == "x0":
            yield f"prediction x0 has no boundary at zero noise, which objective {self.objective} needs"
        if self.objective in CURRICULUM and self.minutes is not None and self.steps is None:
            yield f"objective {self.objective} needs steps: its curriculum must know where it ends"

    def of_scores(self) -> Any:
        """Yield what has no effect on score matching, or on any other objective, in words."""
        asked = self.model_fields_set
        if self.objective not in SCORES and "level_weight" in asked:
            yield f"level_weight has no effect on objective {self.objective}; it is for {', '.join(SCORES)}"
        if self.objective != "sliced-score" and "slices" in asked:
            yield f"slices has no effect on objective {self.objective}; it is for sliced-score"
        if self.objective in SCORES:
            if found := [name for name in ("distance", "weight", "uncertainty") if name in asked]:
                yield f"{', '.join(found)}: without effect on objective {self.objective}; leave out"
            if self.objective != "denoising-score" and self.compile:
                yield f"objective {self.objective} takes second derivatives, which compile does not; leave it out"

    @property
    def decays(self) -> tuple[float, ...]:
        """The decays of the averages of fixed length: none where there are others and these were not asked for."""
        return () if self.ema_lengths and "ema" not in self.model_fields_set else self.ema

    def snapshot_due(self, step: int) -> bool:
        """Return whether a snapshot is to be taken after so many steps."""
        every = self.snapshot_every or (max(1, self.total_steps // 32) if self.total_steps else self.save_every)
        return bool(self.ema_lengths) and step % every == 0

    def rate(self, step: int, base: float) -> float:
        """Return the learning rate of a step (counted from 0): warm-up, then constant, 1/sqrt or a half cosine."""
        rise = min(1.0, (step + 1) / (self.warmup + 1))
        if self.decay == "inverse-sqrt":
            after = self.decay_after or min(70_000, max(1, (self.total_steps or 4000) // 2))
            return base * rise / math.sqrt(max(1.0, step / after))
        if self.decay == "constant" or self.steps is None:
            return base * rise
        return base * rise * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))


# Objectives of few steps by kind, what has no effect on any of them, and what a teacher settles.
AVERAGED = ("consistency", "easy-consistency", "latent-consistency")
CURRICULUM = (*AVERAGED, "continuous-consistency")
FEW_STEPS = (*CURRICULUM, "mean-flow", "reflow", "progressive")
SCORES = ("denoising-score", "sliced-score", "implicit-score")
NCSN: dict[str, Any] = {"schedule": "ve", "prediction": "edm"}  # of score matching, where nothing else is said
SLOPED = ("continuous-consistency", "mean-flow")
FLOWING = ("flow", "velocity")
TAUGHT = ("easy-consistency", "reflow", "progressive", "latent-consistency")
IDLE = ("distance", "weight", "uncertainty", "validate_every", "sample_steps")
TEACHERS = (
    "network", "preset", "widths", "layers", "patch", "attention", "head_dim", "time_scale_shift", "schedule",
    "timesteps", "zero_snr", "prediction", "codec",
)  # fmt: skip

STARTED = TEACHERS

# What edm2 is trained with, as in its paper, where nothing else is said.
EDM2: dict[str, Any] = {
    "schedule": "edm", "prediction": "edm", "times": "log-normal", "uncertainty": True, "decay": "inverse-sqrt",
    "ema_lengths": (0.1, 0.05),
}  # fmt: skip

# What a resumed run may not change: it would no longer be the same run.
FIXED = (
    "data", "size", "channels", "labels", "captions", "flip", "limit", "held_out", "seed", "preset", "widths", "layers",
    "network", "time_mean", "time_std", "uncertainty", "ema_lengths",
    "patch", "attention", "head_dim", "dropout", "time_scale_shift", "schedule", "timesteps", "zero_snr", "prediction",
    "learned_variance", "objective", "distance", "weight", "times", "label_dropout", "batch_size", "accumulate", "ema",
    "target_decay", "student_steps", "stages", "fill", "lora", "lora_alpha", "level_weight", "slices",
)  # fmt: skip
