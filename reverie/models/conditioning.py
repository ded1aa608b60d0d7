"""From what was asked for to tensors: classes to labels, prompts to what a network makes of their words."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from reverie.data.words import MOST_TEXT, Vocabulary
from reverie.diffusion.denoisers import Condition, Denoiser
from reverie.diffusion.guidance.auto import AutoGuided
from reverie.diffusion.guidance.classifier_free import ClassifierFree, Conditioned
from reverie.diffusion.guidance.interval import During
from reverie.diffusion.guidance.perturbed import Perturbed, PerturbedGuided
from reverie.diffusion.guidance.rescale import Rescaled
from reverie.models.card import Card, WordsSpec
from reverie.models.guiding import broken
from reverie.models.plan import SamplingPlan
from reverie.networks.attention import unmixed


class Told(NamedTuple):
    """What the network is told of each sample, and what stands for nothing; None where nothing has no such thing."""

    condition: Condition
    nothing: Condition | None


class Conditioner(ABC):
    """Prompts to what the network is told. Each prompt is encoded alone, so that it is the same in any company."""

    rests = False
    """Whether `rest` lets go of anything."""

    @abstractmethod
    def encode(
        self, prompts: Sequence[str], size: tuple[int, int] = (0, 0), chunks: int = 1, nothing: bool = False
    ) -> dict[str, Tensor]:
        """Return tensors of a row for each prompt, by the network's keyword.

        Arguments:
            prompts: The texts.
            size: Height and width of the pictures, in pixels.
            chunks: The length of the prompts that they are drawn with, as `length` says.
            nothing: They are what guidance leads away from.
        """

    def length(self, prompt: str) -> int:
        """Return a prompt's length in the network's own measure: what is drawn together has one length."""
        return 1

    @abstractmethod
    def remarks(self, prompt: str) -> list[str]:
        """Return what of a prompt does not reach the network as it stands, in sentences."""

    def rest(self) -> None:  # noqa: B027
        """Let go of what only reading needs, until the next prompt is read; by default there is no such thing."""

    @abstractmethod
    def to(self, device: torch.device | str) -> None:
        """Move what it computes with to a device; nothing moves, where that is the network's own."""


class WordsConditioner(Conditioner):
    """The words of a model that was trained along with their encoder (networks/captioned.py).

    Arguments:
        spec: The vocabulary.
        network: The network, which has `encode`.
    """

    def __init__(self, spec: WordsSpec, network: nn.Module) -> None:
        self.vocabulary, self.network = Vocabulary(spec.entries, spec.length), network

    def encode(
        self, prompts: Sequence[str], size: tuple[int, int] = (0, 0), chunks: int = 1, nothing: bool = False
    ) -> dict[str, Tensor]:
        """Return the context (B, n, width) and the pooled words (B, p) of prompts."""
        device = next(self.network.parameters()).device
        with torch.no_grad():
            alone = {p: self.network.encode(self.vocabulary([p]).to(device)) for p in set(prompts)}  # type: ignore[operator]
        return {name: torch.cat([alone[p][name] for p in prompts]) for name in alone[prompts[0]]}

    def remarks(self, prompt: str) -> list[str]:
        """Return which characters no caption had, and what was cut."""
        spelling, found = self.vocabulary.spell(prompt), []
        if len(prompt) > MOST_TEXT:
            found.append(f"the prompt has {len(prompt)} characters; those after the first {MOST_TEXT} are passed over")
        if spelling.unknown:
            found.append(f"no caption had {''.join(dict.fromkeys(spelling.unknown))[:20]!r}; passed over")
        if (over := len(spelling.numbers) - self.vocabulary.length) > 0:
            found.append(
                f"the prompt is {len(spelling.numbers)} pieces long, the model reads {self.vocabulary.length}; "
                f"the last {over} are cut"
            )
        return found

    def to(self, device: torch.device | str) -> None:
        """The encoder is the network's own, and moves with it."""


def build_conditioner(card: Card, network: nn.Module) -> Conditioner | None:
    """Return what reads prompts for a model that was trained with the encoder of its words; None for others."""
    return WordsConditioner(card.text, network) if isinstance(card.text, WordsSpec) else None


def told(plan: SamplingPlan, rows: Iterable[int], conditioner: Conditioner | None, device: torch.device) -> Told | None:
    """Return what some of a plan's samples are to be; None where the model is told nothing."""
    rows = list(rows)
    if plan.prompts is not None:
        assert conditioner is not None
        asked, unwanted = ([texts[i] for i in rows] for texts in (plan.prompts, plan.negatives or plan.prompts))
        chunks = max(map(conditioner.length, {*asked, *unwanted}))
        parts = [
            {name: value.to(device) for name, value in conditioner.encode(texts, plan.size, chunks, nothing).items()}
            for texts, nothing in ((asked, False), (unwanted, True))
        ]
        conditioner.rest()
        return Told(parts[0], parts[1])
    if plan.labels is None:
        return None
    labels = torch.tensor([plan.labels[i] for i in rows], device=device)
    nothing = None if plan.null_label is None else {"label": torch.full_like(labels, plan.null_label)}
    return Told({"label": labels}, nothing)


def same_length(plan: SamplingPlan, conditioner: Conditioner | None) -> list[range]:
    """Return the rows of each batch: consecutive, of one length of prompts, as many as the plan takes together."""
    if plan.prompts is None or conditioner is None:
        return [range(i, min(i + plan.batch_size, plan.n)) for i in range(0, plan.n, plan.batch_size)]
    negatives = plan.negatives or plan.prompts
    lengths = [max(map(conditioner.length, texts)) for texts in zip(plan.prompts, negatives, strict=True)]
    found: list[range] = []
    for i, length in enumerate(lengths):
        if found and len(found[-1]) < plan.batch_size and lengths[found[-1][0]] == length:
            found[-1] = range(found[-1][0], i + 1)
        else:
            found.append(range(i, i + 1))
    return found


def bound(denoiser: Denoiser, said: Told | None, guidance: float | None, as_number: bool = False) -> Denoiser:
    """Return the denoiser with what it is told bound to it, without guidance: what is asked for, or nothing at w = 0.

    Arguments:
        denoiser: What is told.
        said: What the network is told, and what stands for nothing; None for a network that is told nothing.
        guidance: w; None for no condition.
        as_number: Whether the network is told w, and does by itself what guidance does.
    """
    if said is None:
        return denoiser
    if as_number and guidance:
        rows = next(iter(said.condition.values()))
        return Conditioned(denoiser, {**said.condition, "guidance": torch.full((len(rows),), guidance).to(rows.device)})
    return Conditioned(denoiser, said.nothing if guidance == 0 and said.nothing is not None else said.condition)


def guided(
    denoiser: Denoiser, said: Told | None, plan: SamplingPlan, network: nn.Module, bad: Denoiser | None = None
) -> Denoiser:
    """Return the denoiser with its condition bound to it, guided as the plan says: each kind around the one before.

    Arguments:
        denoiser: What is guided.
        said: What the network is told, and what stands for nothing; None for a network that is told nothing.
        plan: The plan.
        network: The denoiser's network.
        bad: The worse model that it is guided by, its condition bound to it.
    """
    ask = plan.guiding
    plain = found = bound(denoiser, said, plan.guidance, plan.guidance_told)
    if plan.guided and said is not None and said.nothing is not None:
        assert plan.guidance is not None
        found = ClassifierFree(denoiser, said.condition, said.nothing, plan.guidance)
    if bad is not None and ask.auto is not None:
        found = AutoGuided(found, bad, ask.auto)
    if ask.perturbed is not None:
        parts = broken(network)
        perturbed = Perturbed(denoiser, lambda: unmixed(parts))
        found = PerturbedGuided(found, bound(perturbed, said, plan.guidance), ask.perturbed)
    if ask.rescale is not None:
        found = Rescaled(found, ask.rescale)
    return found if ask.interval is None else During(found, plain, *ask.interval)
