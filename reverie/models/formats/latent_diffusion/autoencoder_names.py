"""The autoencoder in latent diffusion's original names.

Its attention is of 1x1 convolutions there and of matrices here, and its decoder counts the levels from the
full size down, as the encoder does, where diffusers counts them in the order in which they are run.

References:
    High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al., 2022), and its code
    https://github.com/CompVis/latent-diffusion/blob/main/ldm/modules/diffusionmodules/model.py
"""

from typing import Any

from reverie.base.errors import ModelFileError
from reverie.models.formats.latent_diffusion.renaming import Form, Shapes, sized

ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
MATRICES = tuple(f".mid.attn_1.{name}.weight" for name in ("q", "k", "v", "proj_out"))
MAX_LEVELS, MAX_LAYERS = 12, 64


def read_plan(shapes: Shapes) -> tuple[tuple[int, ...], int]:
    """Return the channels of each level and the layers of a level of the encoder, from an autoencoder's shapes.

    Raises:
        ModelFileError: It is not put together as Stable Diffusion's is.
    """
    channels, layers = [], set()
    for level in range(MAX_LEVELS):
        first = f"encoder.down.{level}.block.0.conv1.weight"
        if first not in shapes:
            break
        channels.append(sized(shapes, first, 4)[0])
        layers.add(sum(f"encoder.down.{level}.block.{j}.conv1.weight" in shapes for j in range(MAX_LAYERS)))
    if not channels or len(layers) != 1:
        raise ModelFileError("its autoencoder has no encoder, or levels that differ in their layers")
    return tuple(channels), layers.pop()


def table(levels: int, layers: int) -> dict[str, str]:
    """Return the new beginning of a name for each old one.

    Arguments:
        levels: How many there are.
        layers: Residual blocks at each level of the encoder; the decoder has one more.

    Example:
        >>> table(3, 2)["decoder.up.2.block.0.conv1"], table(3, 2)["encoder.mid.attn_1.q"]
        ('decoder.up_blocks.0.resnets.0.conv1', 'encoder.mid_block.attentions.0.to_q')
    """
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}

    def residual(old: str, new: str) -> None:
        names.update({f"{old}.{part}": f"{new}.{part}" for part in ("norm1", "conv1", "norm2", "conv2")})
        names[f"{old}.nin_shortcut"] = f"{new}.conv_shortcut"

    for half, count in (("encoder", layers), ("decoder", layers + 1)):
        names |= {f"{half}.{part}": f"{half}.{part}" for part in ("conv_in", "conv_out")}
        names[f"{half}.norm_out"] = f"{half}.conv_norm_out"
        residual(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0")
        residual(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1")
        names |= {f"{half}.mid.attn_1.{a}": f"{half}.mid_block.attentions.0.{b}" for a, b in ATTENTION.items()}
        for level in range(levels):
            down = half == "encoder"
            old = f"{half}.{'down' if down else 'up'}.{level}"
            new = f"{half}.down_blocks.{level}" if down else f"{half}.up_blocks.{levels - 1 - level}"
            for layer in range(count):
                residual(f"{old}.block.{layer}", f"{new}.resnets.{layer}")
            sampler = ("downsample", "downsamplers") if down else ("upsample", "upsamplers")
            names[f"{old}.{sampler[0]}.conv"] = f"{new}.{sampler[1]}.0.conv"
    return names


def form(name: str, shape: tuple[int, ...]) -> Form:
    """Return what becomes of a tensor of an old name."""
    return "matrix" if name.endswith(MATRICES) and len(shape) > 2 else "same"


def config(shapes: Shapes, scaling_factor: float) -> dict[str, Any]:
    """Return diffusers' config of an AutoencoderKL.

    Arguments:
        shapes: The autoencoder's shapes.
        scaling_factor: What its latents are multiplied by for the U-Net.

    Raises:
        ModelFileError: It is not put together as Stable Diffusion's is.
    """
    channels, layers = read_plan(shapes)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(channels),
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "force_upcast": True,
        "in_channels": sized(shapes, "encoder.conv_in.weight", 4)[1],
        "latent_channels": sized(shapes, "decoder.conv_in.weight", 4)[1],
        "layers_per_block": layers,
        "norm_num_groups": 32,
        "out_channels": sized(shapes, "decoder.conv_out.weight", 4)[0],
        "scaling_factor": scaling_factor,
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "use_quant_conv": "quant_conv.weight" in shapes,
    }
