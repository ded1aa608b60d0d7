"""A U-Net's config: what is derived, what is refused, and diffusers' config.json."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from reverie.base.errors import ModelFileError, UsageError
from reverie.networks.unet_config import DEFAULTS, NEUTRAL, UNetConfig

GOOGLE = {  # google/ddpm-cifar10-32
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
STABLE = {  # the first Stable Diffusion
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
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
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}


def test_a_few_settings_are_enough():
    config = UNetConfig(in_channels=1, channels=(32, 64, 64), attention=(False, True, False), num_class_embeds=11)
    assert config.out_channels == 1
    assert config.norm_num_groups == 32
    assert config.down_types == ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D")
    assert config.up_types == ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    assert config.heads(64) == (1, 64)


@pytest.mark.parametrize(
    ("channels", "groups"), [((20, 40), 20), ((48, 64), 16), ((7, 13), 1), ((128, 256), 32), ((33, 66), 11)]
)
def test_groups_divide_every_level(channels, groups):
    assert UNetConfig(channels=channels).norm_num_groups == groups


def test_heads_by_number_or_by_width():
    assert UNetConfig(num_heads=4).heads(64) == (4, 16)
    assert UNetConfig(head_dim=8).heads(64) == (8, 8)
    assert UNetConfig(channels=(24,), head_dim=10).heads(24) == (2, 10)


def test_residual_resampling_names_the_blocks():
    config = UNetConfig(attention=(False, False, True), downsample_type="resnet", upsample_type="resnet")
    assert config.down_types == ("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D")
    assert config.up_types == ("AttnUpBlock2D", "ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D")


def test_json_and_back():
    config = UNetConfig(in_channels=1, channels=(32, 48), attention=(True, False), num_heads=4)
    assert UNetConfig.model_validate_json(config.model_dump_json()) == config


SKIP = {"down_block_types": ("SkipDownBlock2D",) * 2, "up_block_types": ("SkipUpBlock2D",) * 2, "channels": (32, 32)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chanels": (32,)}, "chanels"),
        ({"channels": ()}, "channels"),
        ({"channels": (32,) * 13}, "at most 12"),
        ({"channels": (16385,)}, "less than or equal to 16384"),
        ({"channels": (0,)}, "greater than or equal to 1"),
        ({"layers": 65}, "less than or equal to 64"),
        ({"layers": 0}, "greater than or equal to 1"),
        ({"in_channels": 10**9}, "in_channels"),
        ({"num_class_embeds": 10**9}, "num_class_embeds"),
        ({"norm_eps": float("nan")}, "norm_eps"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"mid_block_scale_factor": float("inf")}, "mid_block_scale_factor"),
        ({"dropout": 1.0}, "dropout"),
        ({"channels": (32,) * 12, "layers": 64, "context_dim": 8, "transformer_layers": 64}, "more than 4096 blocks"),
        ({"attention": (True,)}, "attention has 1 levels and channels has 3"),
        ({"attention": (True,) * 3, **SKIP}, "attention or block types, not both"),
        ({"down_block_types": ("DownBlock2D",) * 3}, "3 of down and 0 of up"),
        ({"channels": (32, 48), "norm_num_groups": 32}, "norm_num_groups is 32, which does not divide the 48"),
        ({"attn_norm_num_groups": 7}, "attn_norm_num_groups is 7; it must divide 256"),
        ({"head_dim": 8, "num_heads": 4}, "not both"),
        ({"head_dim": 257}, "head_dim is 257, which does not fit a level of 256"),
        ({"num_heads": 3}, "num_heads is 3, which does not fit a level of 256"),
        ({"context_dim": 8, "head_dim": 60}, "head_dim is 60, which does not fit"),
        ({"channels": (1,)}, "at least 2"),
        ({"channels": (2,), "freq_shift": 1}, "at least 4"),
        ({"head_dim": 8, "middle": "none"}, "need attention"),
        ({"context_dim": 8, "middle": "none"}, "context_dim needs attention"),
        ({"context_dim": 8, "middle": "plain", "attention": (True,) * 3}, "the middle is 'attention' or 'none'"),
        ({"context_dim": 8, "downsample_type": "resnet"}, "'conv'"),
        ({"context_dim": 8, "time_embedding_type": "fourier"}, "positional"),
        ({"context_dim": 8, "attn_norm_num_groups": 8}, "without context_dim"),
        ({"context_dim": 8, "transformer_layers": (1, 2)}, "transformer_layers has 2 levels"),
        ({"transformer_layers": 2}, "transformer_layers needs context_dim"),
        ({"use_linear_projection": True}, "use_linear_projection needs context_dim"),
        ({"class_embed_type": "timestep", "num_class_embeds": 3}, "not both"),
        ({"time_embedding_type": "learned"}, "needs num_train_timesteps"),
        ({"num_train_timesteps": 1000}, "goes with a learned"),
        ({"attn_norm_num_groups": 8, "middle": "plain"}, "needs a middle that attends"),
        ({"norm_num_groups": None}, "only Skip blocks"),
        ({**SKIP, "channels": (32, 48)}, "a multiple of 32 channels at every level"),
        ({**SKIP, "in_channels": 1}, "3 channels in and out, not 1 and 1"),
        ({**SKIP, "down_block_types": ("DownBlock2D", "SkipDownBlock2D")}, "first of the way down"),
        ({**SKIP, "up_block_types": ("SkipUpBlock2D", "UpBlock2D")}, "last of the way up"),
        ({**SKIP, "down_block_types": ("CrossAttnDownBlock2D",) * 2}, "need context_dim"),
        (
            {
                "channels": (8, 8),
                "context_dim": 8,
                "down_block_types": ("AttnDownBlock2D",) * 2,
                "up_block_types": ("UpBlock2D",) * 2,
            },
            "is a CrossAttn block",
        ),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        UNetConfig(**settings)


def test_a_config_does_not_change():
    with pytest.raises(ValidationError, match="frozen"):
        UNetConfig().layers = 3


# diffusers --------------------------------------------------------------------------------------


def test_googles_config_is_said_in_a_few_settings():
    config = UNetConfig.from_diffusers(GOOGLE)
    assert config.attention == (False, True, False, False)
    assert config.down_block_types == ()
    assert (config.head_dim, config.downsample_padding, config.freq_shift) == (None, 0, 1)


def test_stable_diffusions_config_is_said_in_a_few_settings():
    config = UNetConfig.from_diffusers(STABLE)
    assert config.attention == (True, True, True, False)
    assert (config.context_dim, config.num_heads) == (768, 8)


@pytest.mark.parametrize("given", [GOOGLE, STABLE], ids=["google", "stable diffusion"])
def test_a_config_goes_there_and_back(given):
    there = json.loads(json.dumps(UNetConfig.from_diffusers(given).to_diffusers()))
    assert {name: there[name] for name in given if name != "_diffusers_version"} == {
        name: value for name, value in given.items() if name != "_diffusers_version"
    }
    assert UNetConfig.from_diffusers(there) == UNetConfig.from_diffusers(given)


def test_what_is_left_out_has_diffusers_default():
    config = UNetConfig.from_diffusers({})
    assert config.channels == DEFAULTS["UNet2DModel"]["block_out_channels"]
    assert config.head_dim == 8


def test_a_number_of_heads_becomes_a_width_where_it_can():
    same = UNetConfig(channels=(32, 64, 64), attention=(False, True, True), num_heads=4)
    assert same.to_diffusers()["attention_head_dim"] == 16
    with pytest.raises(UsageError, match="num_heads is 4 on levels of different width"):
        UNetConfig(channels=(32, 64, 64), attention=(True, True, True), num_heads=4).to_diffusers()


def test_positions_and_patches_are_nothing_that_diffusers_has():
    with pytest.raises(UsageError, match="positions"):
        UNetConfig(channels=(32, 64), positions=True).to_diffusers()
    with pytest.raises(UsageError, match="patch: 2"):
        UNetConfig(channels=(32, 64), patch=2).to_diffusers()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"_class_name": "UNet1DModel"}, "UNet1DModel"),
        ({"_class_name": ["UNet2DModel"]}, "UNet2DModel"),
        ({"drpout": 0.1}, "unknown setting 'drpout', did you mean dropout"),
        ({"resnet_skip_time_act": True}, "resnet_skip_time_act = True, which is not supported"),
        ({"dual_cross_attention": True}, "dual_cross_attention = True"),
        ({"block_out_channels": [128, 256]}, "4 of down and 4 of up blocks|attention has 4 levels"),
        ({"block_out_channels": "wide"}, "block_out_channels"),
        ({"block_out_channels": [10**9] * 4}, "block_out_channels.0: .*16384"),
        ({"down_block_types": ["KDownBlock2D"] * 4}, "down_block_types"),
        ({"down_block_types": 5}, "must be a list of block types"),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, "must be UNetMidBlock2D or null"),
        ({"add_attention": "yes"}, "add_attention is 'yes'"),
        ({"act_fn": "tanh"}, "act_fn"),
        ({"norm_num_groups": 7}, "norm_num_groups is 7"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift"),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(extra, message):
    with pytest.raises(ModelFileError, match=message) as refusal:
        UNetConfig.from_diffusers({**GOOGLE, **extra})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"addition_embed_type": "text_image"}, "addition_embed_type: Input should be .text_time."),
        ({"only_cross_attention": True}, "only_cross_attention"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "must be UNetMidBlock2DCrossAttn or null"),
        ({"attention_head_dim": [8, 8, 8, 16]}, "heads of different widths"),
        ({"attention_head_dim": [8, 8]}, "one for each level"),
        ({"attention_head_dim": [8, 4, 2, 0]}, "above 0"),
        ({"cross_attention_dim": [768, 768, 768, 1024]}, "levels that differ"),
        ({"layers_per_block": [1, 2, 2, 2]}, "levels that differ"),
        ({"time_embedding_type": "fourier"}, "positional"),
        ({"class_embed_type": "projection"}, "class_embed_type"),
    ],
)
def test_a_setting_of_the_conditional_network_that_would_be_ignored_is_refused(extra, message):
    with pytest.raises(ModelFileError, match=message):
        UNetConfig.from_diffusers({**STABLE, **extra})


def test_settings_that_change_nothing_are_taken():
    neutral = {name: values[0] for name, values in NEUTRAL.items()}
    same = UNetConfig.from_diffusers({**STABLE, **neutral, "use_ema_warmup": False, "decay": 0.9999})
    assert same == UNetConfig.from_diffusers(STABLE)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**12) | st.floats() | st.text(max_size=5) | st.sampled_from([8, 32]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)
SETTINGS = sorted({*DEFAULTS["UNet2DModel"], *DEFAULTS["UNet2DConditionModel"], *NEUTRAL, "_class_name"})


@given(st.sampled_from([GOOGLE, STABLE]), st.dictionaries(st.sampled_from(SETTINGS), JSON, min_size=1, max_size=3))
def test_any_config_at_all_is_read_or_refused(base, changes):
    try:
        config = UNetConfig.from_diffusers({**base, **changes})
    except ModelFileError:
        return
    assert UNetConfig.from_diffusers(config.to_diffusers()).to_diffusers() == config.to_diffusers()
