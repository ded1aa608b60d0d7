"""The U-Net in latent diffusion's original names: its config from shapes, and its names from its config.

The original counts the blocks of all levels through: input_blocks.0 is the first convolution, then come
for each level its layers and, where there is a level below, a halving; output_blocks are the same upwards,
with a layer more and the doubling at the end of a level's last block.

References:
    High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al., 2022), and its code
    https://arxiv.org/abs/2112.10752
    https://github.com/CompVis/latent-diffusion/blob/main/ldm/modules/diffusionmodules/openaimodel.py
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from reverie.base.errors import ModelFileError
from reverie.models.formats.latent_diffusion.renaming import Shapes, sized

RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "time_embed.cond_proj": "time_embedding.cond_proj",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
HEADS = 8  # of Stable Diffusion 1, at every level
HEAD_DIM = 64  # of 2 and XL
MAX_BLOCKS = 256


class Plan(NamedTuple):
    """What the shapes tell of a U-Net."""

    channels: tuple[int, ...]
    layers: int
    depths: tuple[int, ...]  # transformer blocks at each level, 0 where it does not attend
    middle: int  # transformer blocks in the middle
    linear: bool  # linear layers at both ends of a transformer
    context_dim: int


def read_plan(shapes: Shapes) -> Plan:
    """Return what the shapes of a U-Net tell, its names without what comes before them.

    Raises:
        ModelFileError: It is not put together as Stable Diffusion's are.
    """
    channels, layers, depths = [], [0], [set[int]()]
    for block in range(1, MAX_BLOCKS):
        place = f"input_blocks.{block}"
        if f"{place}.0.in_layers.2.weight" in shapes:
            if layers[-1] == 0:
                channels.append(sized(shapes, f"{place}.0.in_layers.2.weight", 4)[0])
            layers[-1] += 1
            depths[-1].add(depth(shapes, f"{place}.1"))
        elif f"{place}.0.op.weight" in shapes:
            layers.append(0)
            depths.append(set())
        else:
            break
    if not channels or len(channels) != len(layers) or len(set(layers)) != 1 or any(len(d) != 1 for d in depths):
        raise ModelFileError("its U-Net's levels differ in their layers or transformers, which is not supported")
    found = tuple(d.pop() for d in depths)
    up = [depth(shapes, f"output_blocks.{i}.1") for i in range(len(found) * (layers[0] + 1))]
    middle = depth(shapes, "middle_block.1")
    if up != [d for d in found[::-1] for _ in range(layers[0] + 1)] or (found[-1] and middle != found[-1]):
        raise ModelFileError("its U-Net's transformers differ on the way up or in the middle, which is not supported")
    if not middle:
        raise ModelFileError("its U-Net attends to no text in the middle, which is not supported")
    linear = len(shapes.get("middle_block.1.proj_in.weight", ())) == 2
    context = sized(shapes, "middle_block.1.transformer_blocks.0.attn2.to_k.weight", 2)[1]
    return Plan(tuple(channels), layers[0], found, middle, linear, context)


def depth(shapes: Shapes, place: str) -> int:
    """Return the number of transformer blocks at a place, 0 where there is no transformer."""
    count = 0
    while f"{place}.transformer_blocks.{count}.norm1.weight" in shapes:
        count += 1
    return count


def table(attends: Sequence[bool], layers: int) -> dict[str, str]:
    """Return the new beginning of a name for each old one.

    Arguments:
        attends: Whether each level has transformers, from the top.
        layers: Residual blocks at each level on the way down.

    Example:
        >>> names = table((True, False), layers=1)
        >>> names["output_blocks.1.1.conv"], names["input_blocks.2.0.op"]
        ('up_blocks.0.upsamplers.0.conv', 'down_blocks.0.downsamplers.0.conv')
    """
    names, levels = dict(ENDS), len(attends)

    def residual(old: str, new: str) -> None:
        names.update({f"{old}.{a}": f"{new}.{b}" for a, b in RESIDUAL.items()})

    for level in range(levels):
        for layer in range(layers):
            old, new = f"input_blocks.{1 + level * (layers + 1) + layer}", f"down_blocks.{level}"
            residual(f"{old}.0", f"{new}.resnets.{layer}")
            if attends[level]:
                names[f"{old}.1"] = f"{new}.attentions.{layer}"
        names[f"input_blocks.{(level + 1) * (layers + 1)}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
        for layer in range(layers + 1):
            old, new = f"output_blocks.{level * (layers + 1) + layer}", f"up_blocks.{level}"
            residual(f"{old}.0", f"{new}.resnets.{layer}")
            if attends[-1 - level]:
                names[f"{old}.1"] = f"{new}.attentions.{layer}"
        # The doubling follows the attention where there is one, and is in its place where there is none.
        names[f"{old}.{2 if attends[-1 - level] else 1}.conv"] = f"{new}.upsamplers.0.conv"
    residual("middle_block.0", "mid_block.resnets.0")
    residual("middle_block.2", "mid_block.resnets.1")
    names["middle_block.1"] = "mid_block.attentions.0"
    return names


def config(plan: Plan, shapes: Shapes, added: Mapping[str, Any]) -> dict[str, Any]:
    """Return diffusers' config of a UNet2DConditionModel.

    Arguments:
        plan: What the shapes tell.
        shapes: The shapes.
        added: What is told beside the text, in diffusers' words.

    Raises:
        ModelFileError: The number of attention's heads cannot be told.
    """
    attends = [bool(d) for d in plan.depths]
    unit = HEAD_DIM if plan.linear else HEADS
    if any(c % unit for c, d in zip(plan.channels, [*plan.depths[:-1], 1], strict=True) if d):
        raise ModelFileError(f"its U-Net has levels of {list(plan.channels)} channels, which {unit} does not divide")
    deep = [*[d or 1 for d in plan.depths[:-1]], plan.middle]
    used = {d for d in (*plan.depths, plan.middle) if d}
    cond = "time_embed.cond_proj.weight"
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": [max(1, c // HEAD_DIM) for c in plan.channels] if plan.linear else HEADS,
        "block_out_channels": list(plan.channels),
        "center_input_sample": False,
        "cross_attention_dim": plan.context_dim,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "downsample_padding": 1,
        "dropout": 0.0,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": sized(shapes, "input_blocks.0.0.weight", 4)[1],
        "layers_per_block": plan.layers,
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": 1e-5,
        "norm_num_groups": 32,
        "out_channels": sized(shapes, "out.2.weight", 4)[0],
        "time_cond_proj_dim": sized(shapes, cond, 2)[1] if cond in shapes else None,
        "transformer_layers_per_block": used.pop() if len(used) == 1 else deep,
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "upcast_attention": False,
        "use_linear_projection": plan.linear,
        **added,
    }
