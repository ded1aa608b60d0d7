"""The U-Nets of Stable Diffusion 1.x, 2.x and XL against diffusers' own: at reduced width the same output on the
same weights, at full size the same names and shapes."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from reverie.base.errors import ModelFileError, UsageError
from reverie.networks.unet import UNet, UNetConfig

CROSS, PLAIN = "CrossAttn{}Block2D", "{}Block2D"


def blocks(*attends: bool) -> dict:
    """Return the block types of levels that attend or not."""
    down = [(CROSS if a else PLAIN).format("Down") for a in attends]
    up = [(CROSS if a else PLAIN).format("Up") for a in reversed(attends)]
    return {"down_block_types": down, "up_block_types": up}


# The published unet/config.json, as diffusers writes them: those of 1.x are the oldest and say the least.
SD1 = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    **blocks(True, True, True, False),
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
}
SD2 = {
    **SD1,
    "_diffusers_version": "0.10.0.dev0",
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "only_cross_attention": False,
    "num_class_embeds": None,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
SDXL = {
    **SD2,
    **blocks(False, True, True),
    "_diffusers_version": "0.19.0.dev0",
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_dim": 2048,
    "cross_attention_norm": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "projection_class_embeddings_input_dim": 2816,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "sample_size": 128,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": [1, 2, 10],
    "upcast_attention": None,
}
REFINER = {
    **SDXL,
    **blocks(False, True, True, False),
    "attention_head_dim": [6, 12, 24, 24],
    "block_out_channels": [384, 768, 1536, 1536],
    "cross_attention_dim": 1280,
    "projection_class_embeddings_input_dim": 2560,
    "transformer_layers_per_block": 4,
}
FULL = {
    "1.5": SD1,
    "1.5 inpainting": {**SD1, "in_channels": 9},
    "2.1": SD2,
    "2 inpainting": {**SD2, "in_channels": 9, "sample_size": 64},
    "XL": SDXL,
    "XL inpainting": {**SDXL, "in_channels": 9},
    "XL refiner": REFINER,
    "1.5 LCM": {**SD1, "time_cond_proj_dim": 256},
    "XL LCM": {**SDXL, "time_cond_proj_dim": 256},
}
NARROW = {"norm_num_groups": 4, "layers_per_block": 1, "cross_attention_dim": 12}


def narrow(name: str) -> dict:
    """Return a config of the same plan, narrow enough for a test."""
    config = {**FULL[name], **NARROW}
    config["block_out_channels"] = [16, 32, 48, 48][: len(config["block_out_channels"])]
    if config["attention_head_dim"] != 8:
        config["attention_head_dim"] = [c // 8 for c in config["block_out_channels"]]
    if "addition_time_embed_dim" in config:
        ids = 5 if name == "XL refiner" else 6
        config |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 20 + 8 * ids}
        config["transformer_layers_per_block"] = 2 if name == "XL refiner" else [1, 2, 3]
    if config.get("time_cond_proj_dim"):
        config["time_cond_proj_dim"] = 10
    return config


def theirs_and_ours(name: str) -> tuple[nn.Module, UNet]:
    """Build both at reduced width, on the same weights, none of them at its initial zero."""
    theirs = UNet2DConditionModel.from_config(narrow(name)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.5 * noise / max(1.0, parameter[0].numel() ** 0.5) + (parameter.ndim == 1) * 0.7)
    ours = UNet(UNetConfig.from_diffusers(json.loads(theirs.to_json_string()))).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def told(config: UNetConfig, count: int = 2) -> tuple[dict[str, Tensor], dict]:
    """Return the conditions in our words and in theirs."""
    generator = torch.Generator().manual_seed(1)
    ours = {"context": torch.randn(count, 7, config.context_dim, generator=generator)}
    theirs = {"encoder_hidden_states": ours["context"]}
    total, each = config.projection_class_embeddings_input_dim, config.addition_time_embed_dim
    if total:
        ours["pooled"] = torch.randn(count, 20, generator=generator)
        ours["sizes"] = torch.tensor([[1024.0, 768, 0, 16, 1024, 1024]] * count)[:, : (total - 20) // each]
        ours["sizes"][1] += 64
        theirs["added_cond_kwargs"] = {"text_embeds": ours["pooled"], "time_ids": ours["sizes"]}
    if config.time_cond_proj_dim:
        ours["time_cond"] = theirs["timestep_cond"] = torch.randn(count, 10, generator=generator)
    return ours, theirs


@pytest.mark.parametrize("name", FULL)
def test_outputs_equal_theirs(name):
    theirs, ours = theirs_and_ours(name)
    x = torch.randn(2, ours.config.in_channels, 16, 8, generator=torch.Generator().manual_seed(2))
    time = torch.tensor([3, 981])
    here, there = told(ours.config)
    with torch.no_grad():
        want, got = theirs(x, time, **there).sample, ours(x, time, **here)
        apart = ours(x[:, :4], time, **here, beside=x[:, 4:])
    assert want.std() > 1e-2
    assert (got - want).norm() / want.norm() < 1e-5
    assert torch.equal(apart, got)


@pytest.mark.parametrize("name", FULL)
def test_names_shapes_and_config_of_the_full_size(name):
    with torch.device("meta"):
        theirs = UNet2DConditionModel.from_config(FULL[name])
        ours = UNet(UNetConfig.from_diffusers(FULL[name]))
    shapes = [{key: tuple(value.shape) for key, value in net.state_dict().items()} for net in (theirs, ours)]
    assert shapes[0] == shapes[1]

    written = ours.config.to_diffusers()
    assert UNetConfig.from_diffusers(written) == ours.config
    for key, value in FULL[name].items():
        if key in written and not key.startswith("_"):
            assert written[key] == (value or False if key == "upcast_attention" else value), key


@pytest.mark.parametrize("key", ["pooled", "sizes", "time_cond", "context"])
def test_each_condition_matters_and_is_asked_for(key):
    _, ours = theirs_and_ours("XL LCM")
    x, time = torch.randn(2, 4, 8, 8), torch.tensor([3, 981])
    here, _ = told(ours.config)
    with torch.no_grad():
        changed = ours(x, time, **{**here, key: here[key] + 1})
        assert (changed - ours(x, time, **here)).abs().amax((1, 2, 3)).min() > 1e-5
    del here[key]
    with pytest.raises(UsageError, match=f"needs (a )?{key}"):
        ours(x, time, **here)


def test_what_does_not_fit_is_refused(unchecked):
    _, ours = theirs_and_ours("XL")
    x, time = torch.randn(2, 4, 8, 8), torch.tensor([3, 981])
    here, _ = told(ours.config)
    with pytest.raises(UsageError, match=r"pooled is \(2, 20\) and sizes \(2, 5\).* P \+ 8 S = 68"):
        ours(x, time, **{**here, "sizes": here["sizes"][:, :5]})
    with pytest.raises(UsageError, match="takes no time_cond"):
        ours(x, time, **here, time_cond=torch.zeros(2, 10))
    _, plain = theirs_and_ours("1.5")
    with pytest.raises(UsageError, match="takes no pooled"):
        plain(x, time, **here)
    _, painting = theirs_and_ours("1.5 inpainting")
    with pytest.raises(UsageError, match=r"takes \(B, 9, H, W\)"):
        painting(x, time, context=here["context"])
    with pytest.raises(UsageError, match=r"beside is \(2, 5, 4, 8\)"):
        painting(x, time, context=here["context"], beside=torch.zeros(2, 5, 4, 8))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"addition_time_embed_dim": None}, "come together"),
        ({"projection_class_embeddings_input_dim": None}, "come together"),
        ({"addition_embed_type": "image"}, "addition_embed_type"),
        ({"addition_time_embed_dim": 2816}, "addition_time_embed_dim is 2816; it must be from 2 to 2815"),
        ({"transformer_layers_per_block": [1, 2]}, "transformer_layers"),
        ({"time_cond_proj_dim": -1}, "time_cond_proj_dim"),
    ],
)
def test_a_config_that_makes_no_network_is_refused(extra, message):
    with pytest.raises(ModelFileError, match=message):
        UNetConfig.from_diffusers({**SDXL, **extra})
