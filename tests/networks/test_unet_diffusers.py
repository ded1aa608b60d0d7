"""The U-Net against diffusers' own, on the same weights: the same output, the same gradients, the same names."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from reverie.networks.unet import UNet, UNetConfig, modern_names

BASE = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [8, 16, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}
RESNET = {
    "down_block_types": ["ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"],
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}
NCSN = {
    "block_out_channels": [32, 32, 64],
    "down_block_types": ["SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"],
    "up_block_types": ["SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"],
    "attention_head_dim": None,
    "time_embedding_type": "fourier",
    "mid_block_scale_factor": 2**0.5,
    "norm_num_groups": None,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "freq_shift": 1,
}
ATTENDING = {"down_block_types": ["AttnDownBlock2D"] * 3, "up_block_types": ["AttnUpBlock2D"] * 3}

CONFIGS = {
    "plain": {},
    "grey to two of a kind": {"in_channels": 1, "out_channels": 2},
    "no attention at the levels": {"down_block_types": ["DownBlock2D"] * 3, "up_block_types": ["UpBlock2D"] * 3},
    "attention everywhere": ATTENDING,
    "attention with residual resampling": {**ATTENDING, "downsample_type": "resnet", "upsample_type": "resnet"},
    "residual blocks that resample": RESNET,
    "residual blocks resample beside convolutions": {**RESNET, "downsample_type": "conv", "upsample_type": "conv"},
    "another plan up than down": {"up_block_types": ["AttnUpBlock2D", "UpBlock2D", "ResnetUpsampleBlock2D"]},
    "residual resampling, named where it has no effect": {
        "down_block_types": ["DownBlock2D"] * 3,
        "up_block_types": ["UpBlock2D"] * 3,
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    },
    "older names of the blocks": {
        "down_block_types": ["UNetResDownBlock2D", "UNetResAttnDownBlock2D", "UNetResDownBlock2D"],
        "up_block_types": ["UNetResUpBlock2D", "UNetResAttnUpBlock2D", "UNetResUpBlock2D"],
    },
    "middle without attention": {"add_attention": False},
    "no middle": {"mid_block_type": None},
    "no attention at all": {
        "down_block_types": ["DownBlock2D"] * 3,
        "up_block_types": ["UpBlock2D"] * 3,
        "add_attention": False,
    },
    "scale and shift": {"resnet_time_scale_shift": "scale_shift"},
    "scale and shift, norm in the middle": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 2},
    "groups of the middle's norm": {"attn_norm_num_groups": 8},
    "scaled middle": {"mid_block_scale_factor": 1.7},
    "one head": {"attention_head_dim": None},
    "small heads": {"attention_head_dim": 2},
    "heads that leave channels over": {"attention_head_dim": 3},
    "padding at the right and bottom": {"downsample_padding": 0},
    "sines first, last frequency exact": {"flip_sin_to_cos": False, "freq_shift": 1},
    "odd number of time features": {"block_out_channels": [7, 14, 14], "norm_num_groups": 7, "attention_head_dim": 7},
    "wide time": {"time_embedding_dim": 20},
    "fourier": {"time_embedding_type": "fourier"},
    "learned": {"time_embedding_type": "learned", "num_train_timesteps": 1000},
    "classes": {"num_class_embeds": 11},
    "classes as times": {"class_embed_type": "timestep"},
    "classes as fourier times": {"class_embed_type": "timestep", "time_embedding_type": "fourier"},
    "classes as embeddings": {"class_embed_type": "identity"},
    "centred": {"center_input_sample": True},
    "mish": {"act_fn": "mish"},
    "gelu": {"act_fn": "gelu"},
    "relu": {"act_fn": "relu"},
    "swish": {"act_fn": "swish"},
    "eps": {"norm_eps": 1e-2},
    "dropout, which is off": {"dropout": 0.3},
    "one level": {
        "block_out_channels": [8],
        "down_block_types": ["AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D"],
    },
    "three layers, narrow below": {"layers_per_block": 3, "block_out_channels": [16, 8, 8]},
    "google/ddpm-cifar10-32, narrower": {
        "act_fn": "silu",
        "attention_head_dim": None,
        "block_out_channels": [8, 16, 16, 16],
        "center_input_sample": False,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-06,
        "sample_size": 32,
        "time_embedding_type": "positional",
        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    },
    "ncsn++": NCSN,
    "ncsn++ with groups": {**NCSN, "norm_num_groups": 8, "layers_per_block": 2},
    "ncsn++ down, plain up": {**NCSN, "norm_num_groups": 8, "up_block_types": ["UpBlock2D"] * 3},
    "plain down, ncsn++ at the end": {
        **NCSN,
        "norm_num_groups": 8,
        "down_block_types": ["DownBlock2D"] * 3,
        "up_block_types": ["UpBlock2D", "SkipUpBlock2D", "AttnSkipUpBlock2D"],
    },
}

CONTEXT = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [8, 16, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
}
CONTEXTS = {
    "as Stable Diffusion 1": {},
    "as Stable Diffusion 2": {"attention_head_dim": [1, 2, 2], "use_linear_projection": True, "upcast_attention": True},
    "as SDXL, without its sizes": {
        "attention_head_dim": [1, 2, 2],
        "use_linear_projection": True,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 3],
    },
    "mish, scale and shift": {
        "act_fn": "mish",
        "resnet_time_scale_shift": "scale_shift",
        "mid_block_scale_factor": 1.3,
    },
    "no middle, classes": {"mid_block_type": None, "num_class_embeds": 5},
    "classes as times, gelu": {"class_embed_type": "timestep", "act_fn": "gelu"},
    "padding at the right and bottom": {"downsample_padding": 0},
    "another plan up than down": {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D", "ResnetUpsampleBlock2D"]},
}


def scatter(network: nn.Module, seed: int = 0) -> None:
    """Move every parameter, so that nothing is zero or one by its initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.5 * noise / max(1.0, parameter[0].numel() ** 0.5) + (parameter.ndim == 1) * 0.7)


def pair(settings: dict) -> tuple[nn.Module, UNet]:
    """Build theirs from its settings, and ours from its config and its weights, in float64."""
    kind = UNet2DConditionModel if "cross_attention_dim" in settings else UNet2DModel
    theirs = kind(**settings).double()
    scatter(theirs)
    ours = UNet(UNetConfig.from_diffusers(json.loads(theirs.to_json_string()))).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs.eval(), ours.eval()


def inputs(config: UNetConfig, size: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, dict, dict]:
    """Return images, times and the conditions in our words and in theirs."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, config.in_channels, *size, generator=generator, dtype=dtype)
    ours, theirs = {}, {}
    if config.num_class_embeds:
        ours["label"] = torch.tensor([0, 2, config.num_class_embeds - 1])
    elif config.class_embed_type == "timestep":
        ours["label"] = torch.tensor([1, 2, 500])
    elif config.class_embed_type == "identity":
        ours["label"] = torch.randn(3, config.time_channels, generator=generator, dtype=dtype)
    if "label" in ours:
        theirs["class_labels"] = ours["label"]
    if config.context_dim:
        ours["context"] = torch.randn(3, 5, config.context_dim, generator=generator, dtype=dtype)
        theirs["encoder_hidden_states"] = ours["context"]
    return x, torch.tensor([1, 37, 999]), ours, theirs


# In float64 diffusers' own UNet2DModel fails here: it leaves the features of the class in float32.
SINGLE = {"classes as times"}
ALL = {name: {**BASE, **extra} for name, extra in CONFIGS.items()}
ALL |= {f"context: {name}": {**CONTEXT, **extra} for name, extra in CONTEXTS.items()}


@pytest.mark.parametrize("name", ALL)
def test_outputs_equal_theirs(name):
    theirs, ours = pair(ALL[name])
    for size in ((16, 16), (8, 24)) if name not in SINGLE else ():
        x, time, told, their_told = inputs(ours.config, size, torch.float64)
        with torch.no_grad():
            want, got = theirs(x, time, **their_told).sample, ours(x, time, **told)
        assert want.std() > 1e-3
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)

    theirs, ours = theirs.float(), ours.float()
    x, time, told, their_told = inputs(ours.config, (16, 8), torch.float32)
    with torch.no_grad():
        want, got = theirs(x, time, **their_told).sample, ours(x, time, **told)
        ours = ours.to(memory_format=torch.channels_last)
        last = ours(x.contiguous(memory_format=torch.channels_last), time, **told)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    # PyTorch's group norm takes the variance of an image in channels-last as E[x^2] - E[x]^2, and loses a digit.
    torch.testing.assert_close(last, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_they_take_our_config_and_our_weights(name):
    theirs, first = pair(ALL[name])
    config = first.config.to_diffusers()
    dtype, tolerance = (torch.float32, 1e-5) if name in SINGLE else (torch.float64, 1e-10)
    again = type(theirs).from_config(config).to(dtype).eval()
    ours = UNet(UNetConfig.from_diffusers(config)).to(dtype).eval()
    scatter(ours, seed=3)
    again.load_state_dict(ours.state_dict(), strict=True)
    x, time, label, their_label = inputs(ours.config, (8, 16), dtype)
    with torch.no_grad():
        got, want = again(x, time, **their_label).sample, ours(x, time, **label)
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    assert config["_class_name"] == type(theirs).__name__
    assert UNetConfig.from_diffusers(config) == ours.config


@pytest.mark.parametrize("name", ["as Stable Diffusion 1", "mish, scale and shift"])
@pytest.mark.parametrize("size", [(13, 7), (28, 28), (1, 5), (6, 1)])
def test_odd_sizes_equal_theirs(name, size):
    """UNet2DConditionModel takes any size where it pads all round; UNet2DModel takes even ones only."""
    theirs, ours = pair(ALL[f"context: {name}"])
    x, time, told, their_told = inputs(ours.config, size, torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, time, **told), theirs(x, time, **their_told).sample, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "name", ["attention with residual resampling", "classes", "ncsn++", "context: as Stable Diffusion 2"]
)
def test_gradients_equal_theirs(name):
    theirs, ours = pair(ALL[name])
    x, time, told, their_told = inputs(ours.config, (8, 8), torch.float64)
    ours(x, time, **told).square().sum().backward()
    theirs(x, time, **their_told).sample.square().sum().backward()
    gradients = {parameter: value.grad for parameter, value in theirs.named_parameters() if value.requires_grad}
    assert gradients.keys() == {parameter for parameter, value in ours.named_parameters() if value.requires_grad}
    for parameter, value in ours.named_parameters():
        if value.requires_grad:
            torch.testing.assert_close(value.grad, gradients[parameter], rtol=1e-9, atol=1e-9, msg=parameter)


@pytest.mark.parametrize("name", ["plain", "fourier", "attention everywhere", "context: as Stable Diffusion 1"])
def test_buffers_and_parameters_have_their_names_and_shapes(name):
    theirs, ours = pair(ALL[name])
    shapes = [{key: value.shape for key, value in network.state_dict().items()} for network in (theirs, ours)]
    assert shapes[0] == shapes[1]
    frozen = [
        {key for key, value in network.named_parameters() if not value.requires_grad} for network in (theirs, ours)
    ]
    assert frozen[0] == frozen[1]


def test_checkpoints_with_old_names_load():
    theirs, ours = pair(ALL["attention everywhere"])
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in theirs.state_dict().items():
        for new, past in old_names.items():
            name = name.replace(f".{new}.", f".{past}.")
        old[name] = tensor
    assert old.keys() != theirs.state_dict().keys()
    assert modern_names(old).keys() == theirs.state_dict().keys()
    ours.load_state_dict(modern_names(old), strict=True)
