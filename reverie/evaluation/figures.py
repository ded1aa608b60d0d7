"""Figures with their errors and with everything that they depend on, as JSON and as lines."""

from dataclasses import dataclass, field
from typing import Any

import reverie


@dataclass(frozen=True)
class Figure:
    """A figure with its error and what it depends on.

    Arguments:
        value: It.
        standard_error: Of it; None where it has none.
        n: How many samples, or images, it was measured on.
        real_n: How many real images they were compared to; None where it was none.
        better: Which way is better: lower, higher, or what an ideal value is.
        details: The rest: the feature space and its fingerprint, the sampler, steps, seed, evaluations, seconds, ...
    """

    value: float
    standard_error: float | None
    n: int
    real_n: int | None
    better: str
    details: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        own = {name: getattr(self, name) for name in ("value", "standard_error", "n", "real_n", "better")}
        return own | self.details


@dataclass(frozen=True)
class Evaluation:
    """All that was measured.

    Arguments:
        subject: What was evaluated, as JSON holds it.
        against: The real images.
        samples: How the samples came about; None where none were needed.
        features: The feature space; None where none was needed.
        figures: By name.
        picture: The file of samples beside their nearest training images, if it was asked for.
        seconds: How long everything took.
    """

    subject: dict[str, Any]
    against: dict[str, Any]
    samples: dict[str, Any] | None
    features: dict[str, Any] | None
    figures: dict[str, Figure]
    picture: str | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        own = {name: getattr(self, name) for name in ("subject", "against", "samples", "features")}
        metrics = {name: figure.to_json() for name, figure in self.figures.items()}
        more = {"picture": self.picture, "seconds": round(self.seconds, 3), "reverie": reverie.__version__}
        return own | {"metrics": metrics} | more

    def to_text(self) -> str:
        """Return it as lines for reading: each figure with its error, and what it depends on."""
        return "\n".join(line for name, figure in self.figures.items() for line in lines(name, figure))


def lines(name: str, figure: Figure) -> list[str]:
    """Return a figure and its settings, a line each."""
    error = "" if figure.standard_error is None else f" +- {figure.standard_error:.3g}"
    own = {key: value for key, value in figure.details.items() if value is not None}
    words = ", ".join(f"{key.replace('_', ' ')} {shown(value)}" for key, value in own.items())
    counts = f"n {figure.n}" + ("" if figure.real_n is None else f", real n {figure.real_n}")
    return [f"{name:12} {figure.value:.5g}{error}  ({figure.better} is better)", f"             {counts}; {words}"]


def shown(value: Any) -> str:
    """Return a setting for reading."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
