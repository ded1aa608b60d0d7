"""From what was asked for to tensors: classes to labels, prompts to what a network makes of their words."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from reverie.data.words import Vocabulary
from reverie.diffusion.denoisers import Condition, Denoiser
from reverie.diffusion.guidance.classifier_free import ClassifierFree, Conditioned
from reverie.models.card import Card, WordsSpec
from reverie.models.plan import SamplingPlan


class Told(NamedTuple):
    """What the network is told of each sample, and what stands for nothing; None where nothing has no such thing."""

    condition: Condition
    nothing: Condition | None


class Conditioner(ABC):
    """Prompts to what the network is told. Each prompt is encoded alone, so that it is the same in any company."""

    @abstractmethod
    def encode(self, prompts: Sequence[str], shape: Sequence[int] = ()) -> dict[str, Tensor]:
        """Return tensors of a row for each prompt, by the network's keyword.

        Arguments:
            prompts: The texts.
            shape: The samples', for what depends on their size.
        """

    @abstractmethod
    def remarks(self, prompt: str) -> list[str]:
        """Return what of a prompt does not reach the network, in sentences."""


class WordsConditioner(Conditioner):
    """The words of a model that was trained along with their encoder (networks/captioned.py).

    Arguments:
        spec: The vocabulary.
        network: The network, which has `encode`.
    """

    def __init__(self, spec: WordsSpec, network: nn.Module) -> None:
        self.vocabulary, self.network = Vocabulary(spec.entries, spec.length), network

    def encode(self, prompts: Sequence[str], shape: Sequence[int] = ()) -> dict[str, Tensor]:
        """Return the context (B, n, width) and the pooled words (B, p) of prompts."""
        device = next(self.network.parameters()).device
        with torch.no_grad():
            alone = {p: self.network.encode(self.vocabulary([p]).to(device)) for p in set(prompts)}  # type: ignore[operator]
        return {name: torch.cat([alone[p][name] for p in prompts]) for name in alone[prompts[0]]}

    def remarks(self, prompt: str) -> list[str]:
        """Return which characters no caption had, and what was cut."""
        spelling, found = self.vocabulary.spell(prompt), []
        if spelling.unknown:
            found.append(f"no caption had {''.join(dict.fromkeys(spelling.unknown))[:20]!r}; passed over")
        if (over := len(spelling.numbers) - self.vocabulary.length) > 0:
            found.append(
                f"the prompt is {len(spelling.numbers)} pieces long, the model reads {self.vocabulary.length}; "
                f"the last {over} are cut"
            )
        return found


def build_conditioner(card: Card, network: nn.Module) -> Conditioner | None:
    """Return what reads prompts for a model that was trained with the encoder of its words; None for others."""
    return WordsConditioner(card.text, network) if isinstance(card.text, WordsSpec) else None


def told(plan: SamplingPlan, rows: Iterable[int], conditioner: Conditioner | None, device: torch.device) -> Told | None:
    """Return what some of a plan's samples are to be; None where the model is told nothing."""
    rows = list(rows)
    if plan.prompts is not None:
        assert conditioner is not None
        asked, unwanted = ([texts[i] for i in rows] for texts in (plan.prompts, plan.negatives or plan.prompts))
        both = conditioner.encode([*asked, *unwanted], plan.shape)
        parts = [{name: value[half].to(device) for name, value in both.items()} for half in halves(len(rows))]
        return Told(parts[0], parts[1])
    if plan.labels is None:
        return None
    labels = torch.tensor([plan.labels[i] for i in rows], device=device)
    nothing = None if plan.null_label is None else {"label": torch.full_like(labels, plan.null_label)}
    return Told({"label": labels}, nothing)


def halves(count: int) -> tuple[slice, slice]:
    """Return the first and the second half of 2 count rows."""
    return slice(0, count), slice(count, 2 * count)


def guided(denoiser: Denoiser, said: Told, guidance: float | None) -> Denoiser:
    """Return the denoiser with its condition bound to it, guided where that is asked for."""
    if said.nothing is None or guidance is None or guidance == 1:
        return Conditioned(denoiser, said.condition)
    if guidance == 0:
        return Conditioned(denoiser, said.nothing)
    return ClassifierFree(denoiser, said.condition, said.nothing, guidance)
