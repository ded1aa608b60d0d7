"""What the training of an autoencoder is told."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from reverie.training.run_config import RunConfig, option


class CodecConfig(RunConfig):
    """A training run of an autoencoder.

    Example:
        >>> CodecConfig(out="runs/codec", steps=1000).latent_channels
        4
    """

    factor: Literal[1, 2, 4, 8, 16, 32] | None = option(
        "network", None, "pixels a side of a latent; the largest of 2, 4, 8 that leaves 8 a side"
    )
    latent_channels: int = option("network", 4, "channels of the latents", ge=1, le=256)
    widths: tuple[Annotated[int, Field(ge=1, le=16384)], ...] | None = option(
        "network", None, "channels of each level, comma-separated; 32, 64, 128, 128", min_length=1, max_length=8
    )
    layers: int = option("network", 1, "residual blocks a level", ge=1, le=16)
    attention: bool = option("network", True, "attention in the middle")

    distance: Literal["l1", "l2"] = option("loss", "l1", "distance of pixels")
    kl: float = option("loss", 1e-6, "weight of the latents' divergence from a standard normal", ge=0)
    perceptual: float = option("loss", 0.1, "weight of the distance in the features of a random network", ge=0)
    adversarial: float = option("loss", 0.0, "weight of a critic of patches, beside the pixels' gradient", ge=0)
    adversarial_after: int = option("loss", 1000, "steps before the critic is heard", ge=0)
    ema: float = option("optimiser", 0.999, "decay of the averaged weights, which are the result", gt=0, lt=1)

    @model_validator(mode="after")
    def check(self) -> "CodecConfig":
        """Refuse what does not go together, all at once."""
        if wrong := list(self.contradictions()):
            raise ValueError("; ".join(wrong))
        return self

    def contradictions(self) -> Any:
        """Yield what does not go together, in words."""
        if self.widths and self.factor and self.factor != 1 << (len(self.widths) - 1):
            yield f"{len(self.widths)} widths make a factor of {1 << (len(self.widths) - 1)}, not {self.factor}"
        if "adversarial_after" in self.model_fields_set and not self.adversarial:
            yield "adversarial_after has no effect without adversarial"

    def rate(self, step: int, base: float) -> float:
        """Return the learning rate of a step (counted from 0): warm-up, then constant."""
        return base * min(1.0, (step + 1) / (self.warmup + 1))


# What a resumed run may not change: it would no longer be the same run.
CODEC_FIXED = (
    "data", "size", "channels", "flip", "limit", "held_out", "seed", "factor", "latent_channels", "widths", "layers",
    "attention", "distance", "kl", "perceptual", "adversarial", "adversarial_after", "ema", "batch_size",
)  # fmt: skip
