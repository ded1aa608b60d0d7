"""What a run of few steps has beside any other: a teacher, an averaged target, a card that says how it is sampled."""

from copy import deepcopy
from typing import Any

import torch
from torch import nn

from reverie.base.errors import ModelFileError, UsageError
from reverie.data.dataset import Dataset
from reverie.diffusion.denoisers import Denoiser, NetworkDenoiser
from reverie.diffusion.few_step.consistency import Consistency
from reverie.diffusion.few_step.continuous_consistency import ContinuousConsistency
from reverie.diffusion.few_step.easy_consistency import EasyConsistency
from reverie.diffusion.few_step.latent_consistency import LatentConsistency
from reverie.diffusion.few_step.mean_flow import MeanFlow
from reverie.diffusion.few_step.progressive import Progressive
from reverie.diffusion.few_step.reflow import Reflow
from reverie.diffusion.objectives import Objective, Simple
from reverie.diffusion.schedules import Schedule
from reverie.diffusion.times import LogNormalTimes, TimeSampler, UniformTimes
from reverie.models.card import Card, DataRecord, NetworkSpec, SamplingDefaults
from reverie.models.load import load
from reverie.models.model import Model
from reverie.networks.numbered import SLOW, Numbered, slowed
from reverie.training.config import CURRICULUM, FLOWING, TrainConfig
from reverie.training.ema import EMA

RATE = 3e-4  # Adam's step size for a network that was trained before
LEVELS = (-1.1, 2.0)  # mean and standard deviation of ln(sigma / alpha) in consistency training
SPANS = (-0.4, 1.0)  # those of ln(t / (1 - t)) in MeanFlow
CLOCKED = "time_embedding.linear_1.weight"  # on the sinusoids of the time
STAGES = 8  # of easy consistency tuning
STUDENT = 8  # steps of progressive's student
WARM_UP = 4  # sCM's is that part of the run
SAMPLING = {name: SamplingDefaults(sampler="consistency", grid="angle", steps=2) for name in CURRICULUM} | {
    "mean-flow": SamplingDefaults(sampler="mean-flow", steps=1),
    "reflow": SamplingDefaults(steps=2),
    "progressive": SamplingDefaults(steps=STUDENT),
    "latent-consistency": SamplingDefaults(sampler="consistency", grid="angle", steps=4, guidance=2.0),
}


def read_teacher(config: TrainConfig, device: str = "cpu") -> Model | None:
    """Return the model that a run learns from, without dropout and gradients; None for none.

    Raises:
        UsageError: There is no such model, or it is one that this objective can't start from.
        ModelFileError: It is damaged.
    """
    if config.teacher is None:
        return None
    model = load(config.teacher, device=device)
    if model.card.prediction == "x0":
        raise UsageError(f"the teacher {config.teacher} predicts x0, which has no boundary at zero noise; take another")
    if model.card.learned_variance:
        raise UsageError(f"the teacher {config.teacher} learned a variance, which few steps have no use for")
    model.denoiser.dtype = None
    model.denoiser.eval().requires_grad_(False)
    return model


def student_card(config: TrainConfig, dataset: Dataset, teacher: Model, data: DataRecord, code: str) -> Card:
    """Return the card of a teacher's student: the teacher's own, on this data, with its digest in it.

    Raises:
        UsageError: The data is not of the teacher's shape, or has other classes.
    """
    card = teacher.card
    if dataset.shape != card.shape:
        raise UsageError(f"the teacher's images are {card.shape}, those of {dataset.name} {dataset.shape}")
    if card.classes and (not config.labels or dataset.classes != card.classes):
        raise UsageError(f"the teacher has {len(card.classes)} classes; {dataset.name} as it is read here has others")
    network = card.network.model_copy(update={"config": card.network.config | {"dropout": config.dropout}})
    if config.objective == "latent-consistency":
        if not card.classes or not card.unconditional or network.name != "unet":
            raise UsageError(f"the teacher {config.teacher} is no U-Net that was trained for guidance to classes")
        network = NetworkSpec(name="numbered", config={"numbers": ["guidance"], "unet": network.config})
    if config.objective == "mean-flow":
        if network.name != "unet" or (card.schedule.name, card.prediction) != FLOWING:
            raise UsageError(f"the teacher {config.teacher} is no U-Net of velocities on the flow schedule")
        network = NetworkSpec(name="numbered", config={"numbers": ["span"], "clock": SLOW, "unet": network.config})
    changes = {"network": network, "data": data, "training": None, "code": code, "teacher": teacher.digest}
    sampling = SAMPLING[config.objective]
    if config.student_steps is not None:
        sampling = sampling.model_copy(update={"steps": config.student_steps})
    return card.model_copy(update=changes | {"sampling": sampling})


def start_from(network: nn.Module, teacher: Model) -> None:
    """Give a network its teacher's weights.

    Raises:
        ModelFileError: They are not those of such a network.
    """
    state = dict(teacher.denoiser.network.state_dict())
    if isinstance(network, Numbered):  # the weights of what its number does are at zero, and not the teacher's
        own = {name: value for name, value in network.inner.state_dict().items() if "cond_proj" in name}
        if network.config.clock == SLOW:
            own[CLOCKED] = slowed(state[CLOCKED])
        network, state = network.inner, state | own
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ModelFileError(f"the teacher's weights do not fit its card: {str(error).splitlines()[0]}") from None


class Target:
    """The averaged network that makes a consistency objective's target.

    Arguments:
        denoiser: What is trained.
        network: Its network as it is trained, never compiled.
        decay: Of the average, without a warm-up.
    """

    def __init__(self, denoiser: NetworkDenoiser, network: nn.Module, decay: float) -> None:
        self.average = EMA(network, decay, warmup=False)
        copy = deepcopy(network).requires_grad_(False)
        copy.load_state_dict(self.average.state(), assign=True)  # the same memory: what is averaged is what computes
        self.denoiser = NetworkDenoiser(copy, denoiser.schedule, denoiser.prediction, False, denoiser.dtype)


def make_target(config: TrainConfig, denoiser: NetworkDenoiser, network: nn.Module) -> Target | None:
    """Return the averaged target that is asked for; None where the network is its own."""
    return Target(denoiser, network, config.target_decay) if config.target_decay else None


def make_few_step(config: TrainConfig, teacher: NetworkDenoiser | None, target: Denoiser | None) -> Objective:
    """Return the objective of few steps that a configuration names."""
    steps = config.total_steps or 1
    if config.objective == "easy-consistency":
        return EasyConsistency(steps, stages=config.stages or STAGES, target=target)
    if config.objective == "continuous-consistency":
        return ContinuousConsistency(steps // WARM_UP, teacher)
    if config.objective == "mean-flow":
        return MeanFlow(mean=SPANS[0], std=SPANS[1])
    if config.objective == "reflow" and teacher is not None:
        return Reflow(teacher, Simple(teacher.prediction))
    if config.objective == "progressive" and teacher is not None:
        return Progressive(teacher, config.student_steps or STUDENT)
    if config.objective == "latent-consistency" and teacher is not None:
        network: Any = teacher.network
        nothing = {"label": torch.tensor([network.config.num_class_embeds - 1])}  # the label beyond the classes
        return LatentConsistency(teacher, nothing, target=target)
    return Consistency(steps, teacher, target=target)


def few_step_times(config: TrainConfig, schedule: Schedule) -> TimeSampler:
    """Return the times that an objective of few steps is trained on where none are asked for."""
    if config.objective in (*CURRICULUM, "latent-consistency"):
        return LogNormalTimes(schedule, *LEVELS)
    return LogNormalTimes(schedule, *SPANS) if config.objective == "mean-flow" else UniformTimes(schedule)
