"""The sizes of a diffusion transformer, chosen from the data."""

from typing import Any, NamedTuple

from reverie.base.errors import UsageError
from reverie.data.dataset import Dataset
from reverie.networks.dit import DiTConfig
from reverie.training.config import TrainConfig

MOST = 16  # patches a side


class TransformerPreset(NamedTuple):
    """A size of transformer: its width, blocks, heads, and Adam's step size. base and large are DiT's S and B."""

    width: int
    depth: int
    heads: int
    learning_rate: float


TRANSFORMER_PRESETS = {
    "tiny": TransformerPreset(128, 4, 4, 1e-3),
    "small": TransformerPreset(192, 6, 6, 7e-4),
    "base": TransformerPreset(384, 12, 6, 3e-4),
    "large": TransformerPreset(768, 12, 12, 1e-4),
}


def transformer_config(
    config: TrainConfig, dataset: Dataset, preset: TransformerPreset, labels: bool
) -> dict[str, Any]:
    """Return the network's configuration: patches so large that there are 16 a side at the most.

    Raises:
        UsageError: The heads do not divide the width.
    """
    channels, height, width = dataset.shape
    inner = config.widths[0] if config.widths else preset.width
    head = config.head_dim or inner // preset.heads
    if not head or inner % head:
        raise UsageError(f"{inner} channels do not divide into heads of {head}; see --widths and --head-dim")
    return {
        "in_channels": channels,
        "out_channels": channels * (2 if config.learned_variance else 1),
        "patch": config.patch or patch_for(max(height, width)),
        "width": inner,
        "depth": config.layers or preset.depth,
        "heads": inner // head,
        "dropout": config.dropout,
        "num_class_embeds": len(dataset.classes) + 1 if labels else None,
    }


def patch_for(size: int) -> int:
    """Return the pixels a side of a patch for images of so many: a power of two.

    Example:
        >>> patch_for(8), patch_for(28), patch_for(64)
        (1, 2, 4)
    """
    return next(patch for patch in (2**k for k in range(16)) if size / patch <= MOST)


def transformer_words(network: DiTConfig) -> str:
    """Return a transformer in words.

    Example:
        >>> transformer_words(DiTConfig())
        'patches of 2x2, width 384, 12 blocks, 6 heads'
    """
    patch = f"{network.patch}x{network.patch}"
    return f"patches of {patch}, width {network.width}, {network.depth} blocks, {network.heads} heads"
