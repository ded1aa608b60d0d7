"""Stable Diffusion's original layout: against diffusers' own converter, there and back, and what is refused."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils as theirs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from reverie.base.errors import ModelFileError
from reverie.models.formats.latent_diffusion import Rule, describe, from_original, layout_of, to_original
from reverie.models.formats.latent_diffusion.layout import average_name
from reverie.networks.unet_config import UNetConfig

CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")


def unet(channels, context, attends, heads, **more) -> dict:
    kinds = [CROSS if a else PLAIN for a in attends]
    return {
        "block_out_channels": channels,
        "cross_attention_dim": context,
        "attention_head_dim": heads,
        "down_block_types": [down for down, _ in kinds],
        "up_block_types": [up for _, up in reversed(kinds)],
        **more,
    }


def text(width, layers, projected=False, vocabulary=50, **more) -> dict:
    inner = more.pop("intermediate_size", 4 * width)
    return {
        "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocabulary,
        "num_attention_heads": width // 64, "projection_dim": more.pop("projection_dim", width), "projected": projected,
        "bos_token_id": 0, "eos_token_id": 2, **more,
    }  # fmt: skip


def joined(pooled, each, ids) -> dict:
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": each,
        "projection_class_embeddings_input_dim": pooled + each * ids,
    }


FOUR, THREE, INNER = (True, True, True, False), (False, True, True), (False, True, True, False)
LINEAR = {"use_linear_projection": True}
SMALL_VAE = {"block_out_channels": [32, 64, 64], "layers_per_block": 1}
# Each family at reduced width: the same plan, and rules for its heads that hold at that width too.
SMALL = {
    "sd1": {
        "unet": unet([32, 64, 96, 96], 64, FOUR, 8),
        "vae": {**SMALL_VAE, "scaling_factor": 0.18215},
        "text_encoder": text(64, 2),
    },
    "sd2": {
        "unet": unet([64, 128, 128, 128], 128, FOUR, [1, 2, 2, 2], **LINEAR),
        "vae": SMALL_VAE,
        "text_encoder": text(128, 3),
    },
    "sdxl": {
        "unet": unet(
            [64, 128, 128], 192, THREE, [1, 2, 2], transformer_layers_per_block=[1, 2, 3], **LINEAR, **joined(96, 8, 6)
        ),
        "vae": SMALL_VAE,
        "text_encoder": text(64, 2),
        "text_encoder_2": text(128, 3, projected=True, projection_dim=96),
    },
    "sdxl-refiner": {
        "unet": unet(
            [64, 64, 128, 128], 128, INNER, [1, 1, 2, 2], transformer_layers_per_block=2, **LINEAR, **joined(96, 8, 5)
        ),
        "vae": SMALL_VAE,
        "text_encoder_2": text(128, 2, projected=True, projection_dim=96),
    },
}
VAE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}
CLIP_L = text(768, 12, vocabulary=49408)
BIG_G = text(1280, 32, projected=True, vocabulary=49408)
FULL = {
    "sd1": {"unet": unet([320, 640, 1280, 1280], 768, FOUR, 8), "vae": VAE, "text_encoder": CLIP_L},
    "sd2": {
        "unet": unet([320, 640, 1280, 1280], 1024, FOUR, [5, 10, 20, 20], **LINEAR),
        "vae": VAE,
        "text_encoder": text(1024, 23, vocabulary=49408),
    },
    "sdxl": {
        "unet": unet(
            [320, 640, 1280],
            2048,
            THREE,
            [5, 10, 20],
            transformer_layers_per_block=[1, 2, 10],
            **LINEAR,
            **joined(1280, 256, 6),
        ),
        "vae": VAE,
        "text_encoder": CLIP_L,
        "text_encoder_2": BIG_G,
    },
    "sdxl-refiner": {
        "unet": unet(
            [384, 768, 1536, 1536],
            1280,
            INNER,
            [6, 12, 24, 24],
            transformer_layers_per_block=4,
            **LINEAR,
            **joined(1280, 256, 5),
        ),
        "vae": VAE,
        "text_encoder_2": BIG_G,
    },
}
# How many parameters each has, as its makers and its users count them.
PARAMETERS = {
    "sd1": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd2": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
}
PREFIX = {"sd1": "cond_stage_model.transformer.", "sd2": "cond_stage_model.model."}
FAMILIES = list(SMALL)


def states(sizes: dict, in_channels: int = 4) -> dict[str, dict[str, Tensor]]:
    """Return the state dicts of diffusers' and transformers' networks, a text encoder's as it lies on the disk."""
    vae = {
        "down_block_types": ["DownEncoderBlock2D"] * len(sizes["vae"]["block_out_channels"]),
        "up_block_types": ["UpDecoderBlock2D"] * len(sizes["vae"]["block_out_channels"]),
        "latent_channels": 4,
        **sizes["vae"],
    }
    networks = {"unet": UNet2DConditionModel(in_channels=in_channels, **sizes["unet"]), "vae": AutoencoderKL(**vae)}
    for part in ("text_encoder", "text_encoder_2"):
        if part in sizes:
            settings = dict(sizes[part])
            kind = CLIPTextModelWithProjection if settings.pop("projected") else CLIPTextModel
            networks[part] = kind(CLIPTextConfig(**settings))
    found = {}
    for part, network in networks.items():
        state = {name: value for name, value in network.state_dict().items() if not name.endswith("position_ids")}
        if part.startswith("text") and not any(name.startswith("text_model.") for name in state):
            state = {f"text_model.{name}": value for name, value in state.items()}
        found[part] = state
    return found


def shapes_of(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


def extras(family: str, sizes: dict) -> dict[str, Tensor]:
    """Return the tensors that original files hold beside the parts'."""
    more = {"alphas_cumprod": torch.rand(7), "model_ema.decay": torch.rand(()), "denoiser.sigmas": torch.rand(9)}
    if family in ("sd1", "sdxl"):
        start = {"sd1": PREFIX["sd1"], "sdxl": "conditioner.embedders.0.transformer."}[family]
        more[f"{start}text_model.embeddings.position_ids"] = torch.arange(77)[None]
    if family == "sd2":
        settings, start = sizes["text_encoder"], PREFIX["sd2"]
        width, layer = settings["hidden_size"], f"transformer.resblocks.{settings['num_hidden_layers']}."
        more |= {f"{start}logit_scale": torch.rand(()), f"{start}text_projection": torch.rand(width, width)}
        for name, shape in {
            "ln_1.weight": (width,), "ln_1.bias": (width,), "ln_2.weight": (width,), "ln_2.bias": (width,),
            "attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,),
            "attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,),
            "mlp.c_fc.weight": (4 * width, width), "mlp.c_fc.bias": (4 * width,),
            "mlp.c_proj.weight": (width, 4 * width), "mlp.c_proj.bias": (width,),
        }.items():  # fmt: skip
            more[f"{start}{layer}{name}"] = torch.rand(shape)
    elif "text_encoder_2" in sizes:
        more[f"conditioner.embedders.{1 if family == 'sdxl' else 0}.model.logit_scale"] = torch.rand(())
    return more


@pytest.fixture(scope="module")
def files() -> dict:
    """Return each family's parts, and the original file of them."""
    made = {}
    for family, sizes in SMALL.items():
        torch.manual_seed(0)
        parts = states(sizes)
        layout = layout_of(family, {part: shapes_of(state) for part, state in parts.items()})
        made[family] = parts, to_original(layout, parts, extras(family, sizes))
    return made


def their_parts(file: dict[str, Tensor], family: str, sizes: dict) -> dict[str, dict[str, Tensor]]:
    """Convert an original file by diffusers' own converter."""
    config = {"layers_per_block": 2, "class_embed_type": None, **sizes["unet"]}
    levels = len(sizes["vae"]["block_out_channels"])
    vae_levels = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    found = {
        "unet": theirs.convert_ldm_unet_checkpoint(file, config),
        "vae": theirs.convert_ldm_vae_checkpoint(file, vae_levels),
    }
    if family in ("sd1", "sdxl"):
        found["text_encoder"] = theirs.convert_ldm_clip_checkpoint(file)
    open_clip = {
        "sd2": ("text_encoder", "cond_stage_model.model."),
        "sdxl": ("text_encoder_2", "conditioner.embedders.1.model."),
        "sdxl-refiner": ("text_encoder_2", "conditioner.embedders.0.model."),
    }
    if family in open_clip:
        part, prefix = open_clip[family]
        found[part] = theirs.convert_open_clip_checkpoint(None, file, prefix)
    for part in found:
        found[part] = {name: value for name, value in found[part].items() if not name.endswith("position_ids")}
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_original_names_are_those_that_diffusers_reads(files, family):
    parts, file = files[family]
    converted = their_parts(file, family, SMALL[family])
    if family == "sd2":  # theirs knows the unused layer by its number, 23
        last = f"text_model.encoder.layers.{SMALL['sd2']['text_encoder']['num_hidden_layers']}."
        text = converted["text_encoder"]
        converted["text_encoder"] = {k: v for k, v in text.items() if not k.startswith(last)}
    assert converted.keys() == parts.keys()
    for part, state in parts.items():
        assert converted[part].keys() == state.keys()
        assert all(torch.equal(converted[part][name], value) for name, value in state.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_every_tensor_is_equal_and_every_name_accounted_for(files, family):
    parts, file = files[family]
    layout = describe(shapes_of(file))
    assert (layout.family, layout.task) == (family, "text-to-image")
    ours = from_original(layout, file.__getitem__)
    for part, state in parts.items():
        assert ours[part].keys() == state.keys()
        assert all(torch.equal(ours[part][name], value) for name, value in state.items())
        assert layout.parts[part] == shapes_of(state)

    taken = [rule.old for rules in layout.rules.values() for rule in rules]
    assert len(set(taken)) == len(taken)
    assert {*taken, *layout.left} == set(file)
    assert {*layout.left} == {*extras(family, SMALL[family])}
    assert "not known" not in layout.left.values()

    again = to_original(layout, ours, {name: file[name] for name in layout.left})
    assert again.keys() == file.keys()
    assert all(torch.equal(again[name], value) and again[name].shape == value.shape for name, value in file.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_configs_are_those_of_the_networks(files, family):
    _, file = files[family]
    configs, sizes = describe(shapes_of(file)).configs, SMALL[family]
    there = json.loads(UNet2DConditionModel(**sizes["unet"]).to_json_string())
    ours = UNetConfig.from_diffusers(configs["unet"])
    assert (
        ours.to_diffusers() | {"sample_size": None, "upcast_attention": False}
        == UNetConfig.from_diffusers(there).to_diffusers()
    )
    assert configs["vae"]["block_out_channels"] == sizes["vae"]["block_out_channels"]
    assert configs["vae"]["scaling_factor"] == (0.13025 if "xl" in family else 0.18215)
    AutoencoderKL.from_config(configs["vae"]).load_state_dict(files[family][0]["vae"], strict=True)
    for part in ("text_encoder", "text_encoder_2"):
        if part in sizes:
            want = {key: value for key, value in sizes[part].items() if key != "projected"}
            assert {key: configs[part][key] for key in want} == want
            quick = part == "text_encoder" and family != "sd2"
            assert configs[part]["hidden_act"] == ("quick_gelu" if quick else "gelu")


def full_shapes(family: str, in_channels: int = 4) -> dict[str, dict[str, tuple[int, ...]]]:
    with torch.device("meta"):
        return {part: shapes_of(state) for part, state in states(FULL[family], in_channels).items()}


@pytest.mark.parametrize("family", FULL)
def test_full_size(family):
    parts = full_shapes(family)
    file = {rule.old: rule.shape for rules in layout_of(family, parts).rules.values() for rule in rules}
    extra = {}
    if family == "sd2":
        extra = extras("sd2", FULL["sd2"])
        file |= shapes_of(extra)
    layout = describe(file)
    assert layout.parts == parts
    converted = their_parts({n: torch.empty(s, device="meta") for n, s in file.items()}, family, FULL[family])
    assert {part: shapes_of(state) for part, state in converted.items()} == parts
    for part, count in PARAMETERS.get(family, {}).items():
        assert sum(torch.Size(shape).numel() for shape in parts[part].values()) == count
    config = UNetConfig.from_diffusers(layout.configs["unet"])
    assert (
        config.to_diffusers() | {"sample_size": None, "upcast_attention": False}
        == UNetConfig.from_diffusers(dict(_class_name="UNet2DConditionModel", **FULL[family]["unet"])).to_diffusers()
    )
    assert config.sample_size == {"sd1": 64, "sd2": 96}.get(family, 128)
    if family == "sdxl-refiner":
        assert layout.configs["unet"]["transformer_layers_per_block"] == 4


def test_their_own_guess_agrees():
    for family, kind in (("sd1", "v1"), ("sd2", "v2"), ("sdxl", "xl_base"), ("sdxl-refiner", "xl_refiner")):
        layout = layout_of(family, full_shapes(family))
        file = {rule.old: torch.empty(rule.shape, device="meta") for rs in layout.rules.values() for rule in rs}
        assert theirs.infer_diffusers_model_type(file) == kind


# Decisions ------------------------------------------------------------------------------------------


def header(files, family: str) -> dict[str, tuple[int, ...]]:
    return shapes_of(files[family][1])


def widened(shapes: dict, channels: int) -> dict:
    name = "model.diffusion_model.input_blocks.0.0.weight"
    return {**shapes, name: (shapes[name][0], channels, 3, 3)}


@pytest.mark.parametrize(("channels", "task"), [(9, "inpainting"), (8, "instructions"), (5, "depth")])
def test_the_task_is_read_from_the_first_convolution(files, channels, task):
    layout = describe(widened(header(files, "sd2"), channels))
    assert (layout.task, layout.prediction, layout.warnings) == (task, "eps", ())
    assert layout.configs["unet"]["in_channels"] == channels
    assert (layout.configs["unet"]["sample_size"], layout.configs["vae"]["sample_size"]) == (128, 512)


def test_what_is_predicted(files):
    two, xl = header(files, "sd2"), header(files, "sdxl")
    guess = describe(two)
    assert (guess.prediction, guess.decided, len(guess.warnings)) == ("v", "a guess", 1)
    told = describe(two, {"modelspec.prediction_type": "epsilon"})
    assert (told.prediction, told.warnings) == ("eps", ())
    assert describe(xl).prediction == describe(header(files, "sd1")).prediction == "eps"
    marked = describe({**xl, "v_pred": (0,), "ztsnr": (0,)})
    assert (marked.prediction, marked.zero_snr) == ("v", True)
    assert {marked.left["v_pred"][:6], marked.left["ztsnr"][:6]} == {"a mark"}
    assert not describe(xl).zero_snr


def test_an_autoencoder_alone(files):
    parts, file = files["sd1"]
    bare = {name.removeprefix("first_stage_model."): v for name, v in file.items() if name.startswith("first_stage")}
    layout = describe({**shapes_of(bare), "loss.logvar": (), "model_ema.decay": ()})
    assert (layout.family, set(layout.rules), set(layout.left)) == ("autoencoder", {"vae"}, {"loss.logvar", "model_ema.decay"})  # noqa: E501  # fmt: skip
    ours = from_original(layout, bare.__getitem__)["vae"]
    assert all(torch.equal(ours[name], value) for name, value in parts["vae"].items())
    written = layout_of("autoencoder", {"vae": shapes_of(parts["vae"])})
    assert to_original(written, {"vae": parts["vae"]}).keys() == bare.keys()


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sdxl-refiner"])
def test_a_unet_alone(files, family):
    unet = {n: s for n, s in header(files, family).items() if n.startswith("model.diffusion_model.")}
    if family == "sd1":
        assert (describe(unet).family, set(describe(unet).rules)) == (family, {"unet"})
        return
    with pytest.raises(ModelFileError, match="is told 1"):  # the text's width is not in the file
        describe(unet)
    name = "model.diffusion_model.label_emb.0.0.weight"
    ids = 6 if family == "sdxl" else 5
    layout = describe({**unet, name: (unet[name][0], 1280 + 256 * ids)})
    assert (layout.family, layout.configs["unet"]["addition_time_embed_dim"]) == (family, 256)


def test_averaged_weights_are_read_where_they_are_whole(files):
    _, file = files["sd1"]
    unet = {n: t for n, t in file.items() if n.startswith("model.diffusion_model.")}
    file = file | {average_name(name): tensor + 1 for name, tensor in unet.items()}
    layout = describe(shapes_of(file))
    plain, averaged = (from_original(layout, file.__getitem__, average=on) for on in (False, True))
    assert all(torch.equal(averaged["unet"][name], value + 1) for name, value in plain["unet"].items())
    want = theirs.convert_ldm_unet_checkpoint(file, {"layers_per_block": 2}, extract_ema=True)
    assert all(torch.equal(averaged["unet"][name], value) for name, value in want.items())
    del file["model_ema.diffusion_modelout2bias"]
    layout = describe(shapes_of(file))
    with pytest.raises(ModelFileError, match="no averaged weights"):
        from_original(layout, file.__getitem__, average=True)


def test_the_oldest_names_of_clip(files):
    parts, file = files["sd1"]
    old = {n.replace(".transformer.text_model.", ".transformer."): t for n, t in file.items()}
    layout = describe(shapes_of(old))
    ours = from_original(layout, old.__getitem__)["text_encoder"]
    assert all(torch.equal(ours[name], value) for name, value in parts["text_encoder"].items())
    assert to_original(layout, from_original(layout, old.__getitem__)).keys() | layout.left.keys() == old.keys()


def test_openclip_of_2_without_its_projection_is_used_whole(files):
    shapes = header(files, "sd2")
    kept = {n: s for n, s in shapes.items() if not n.endswith("text_projection")}
    layers = SMALL["sd2"]["text_encoder"]["num_hidden_layers"]
    assert describe(kept).configs["text_encoder"]["num_hidden_layers"] == layers + 1
    assert describe(shapes).configs["text_encoder"]["num_hidden_layers"] == layers


# Refusals -------------------------------------------------------------------------------------------

UNET = "model.diffusion_model."
OLDEST = "cond_stage_model.transformer.final_layer_norm.bias"
QUERY = "first_stage_model.encoder.mid.attn_1.q.weight"
FUSED = PREFIX["sd2"] + "transformer.resblocks.0.attn.in_proj_bias"


def without(pattern: str):
    return lambda shapes: {n: s for n, s in shapes.items() if pattern not in n}


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("sd1", lambda s: {**s, UNET + "motion.0.weight": (3,)}, "1 tensors have no place.*motion.0.weight"),
        ("sd1", lambda s: {**s, "first_stage_model.quantize.embedding": (3,)}, "no place"),
        ("sd1", lambda s: widened(s, 7), "takes 7 channels"),
        ("sd1", without("out.2.weight"), "out.2.weight is missing"),
        ("sd1", without("encoder.down.0"), "no encoder"),
        ("sd1", without("decoder.conv_in.weight"), "decoder.conv_in.weight is missing"),
        ("sd1", without("token_embedding"), "token_embedding.weight is missing"),
        ("sd1", without("input_blocks.2.0"), "levels differ|no place|way up"),
        ("sd1", without("input_blocks.2.1"), "levels differ"),
        ("sd1", without("output_blocks.4.1.transformer"), "transformers differ on the way up"),
        ("sd1", without("middle_block.1"), "in the middle|attends to no text"),
        ("sd1", lambda s: {**s, OLDEST: (64,)}, "are the same tensor"),
        ("sd1", lambda s: {**s, "first_stage_model.quant_conv.{}": (64,), QUERY: (64, 63, 2, 1)}, "no place|attn_1.q"),
        ("sd1", lambda s: {**s, "edm_mean": (1, 4, 1, 1)}, "Playground"),
        ("sd1", lambda s: {**s, UNET + "label_emb.weight": (1000, 128)}, "upscaler"),
        ("sd2", lambda s: {**s, UNET + "label_emb.0.0.weight": (256, 2048)}, "unCLIP"),
        ("sdxl", lambda s: {**s, UNET + "label_emb.0.0.weight": (256, 100)}, "is told 100 numbers"),
        ("sdxl", lambda s: {**s, UNET + "label_emb.0.0.weight": ()}, "label_emb.0.0.weight has"),
        ("sd1", lambda s: {**s, QUERY: (64, 64, 3, 3)}, "attn_1.q.weight has"),
        ("sd2", lambda s: {**s, FUSED: (10,)}, "in_proj_bias has"),
        ("sd1", lambda s: dict.fromkeys(s, ()), "."),
        ("sdxl", lambda s: {n: (0,) * len(v) for n, v in s.items()}, "."),
        ("sd2", lambda s: {n: (7,) * len(v) for n, v in s.items()}, "."),
    ],
)  # fmt: skip
def test_what_is_not_stable_diffusion_is_refused_in_one_line(files, family, change, message):
    with pytest.raises(ModelFileError, match=message) as refusal:
        describe(change(header(files, family)))
    assert "\n" not in str(refusal.value)


ENDS = ["weight", "0", "1.weight", "{}", "", "qkv.{}", "{0.__class__}"]
SHAPES = st.lists(st.sampled_from([0, 1, 3, 5, 64, 2**10]), max_size=5).map(tuple)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(FAMILIES),
    st.lists(st.integers(0, 10**6), max_size=4),
    st.lists(st.tuples(st.integers(0, 10**6), SHAPES), max_size=4),
    st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from(ENDS)), max_size=3),
)
def test_any_header_at_all_is_described_or_refused(files, family, gone, shaped, called):
    shapes = header(files, family)
    names = list(shapes)
    for index, shape in shaped:
        shapes[names[index % len(names)]] = shape
    for index, end in called:
        shapes[names[index % len(names)].rpartition(".")[0] + "." + end] = (3, 3)
    for index in gone:
        shapes.pop(names[index % len(names)], None)
    try:
        layout = describe(shapes)
    except ModelFileError:
        return
    if layout is not None:
        taken = [rule.old for rules in layout.rules.values() for rule in rules]
        assert sorted([*taken, *layout.left]) == sorted(shapes)
        from_original(layout, lambda name: torch.zeros(shapes[name], device="meta"))


def test_what_writers_put_beside_a_text_encoder_is_carried(files):
    shapes = header(files, "sdxl")
    start = "conditioner.embedders.0.transformer."
    more = {f"{start}text_projection.weight": (64, 64), "conditioner.embedders.1.model.attn_mask": (77, 77)}
    layout = describe({**shapes, **more})
    assert {layout.left[name] for name in more} == {"of the text encoder, unused by the U-Net"}
    assert layout.configs == describe(shapes).configs


def test_other_files_are_none_of_this_layout(files):
    parts, _ = files["sd1"]
    assert all(describe(shapes_of(state)) is None for state in parts.values())
    assert describe({}) is None
    assert describe({"lora_unet_conv_in.lora_up.weight": (3, 3)}) is None


def test_writing_refuses_what_does_not_fit(files):
    parts, file = files["sd1"]
    layout = describe(shapes_of(file))
    with pytest.raises(ModelFileError, match="the parts are unet; the layout has"):
        to_original(layout, {"unet": parts["unet"]})
    broken = {**parts, "vae": {**parts["vae"], "new": torch.zeros(1)}}
    del broken["vae"]["quant_conv.bias"]
    with pytest.raises(ModelFileError, match=r"2 tensors .*quant_conv.bias is missing; new has no place"):
        to_original(layout, broken)
    with pytest.raises(ModelFileError, match=r"quant_conv.bias is carried"):
        to_original(layout, parts, {"first_stage_model.quant_conv.bias": torch.zeros(1)})
    with pytest.raises(ModelFileError, match="is sd1, not sd2"):
        layout_of("sd2", {"unet": shapes_of(parts["unet"])})
    with pytest.raises(ModelFileError, match="sd1 has no part 'text_encoder_2'"):
        layout_of("sd1", {"text_encoder_2": {}})


def test_nothing_is_copied_but_what_changes_its_form(files):
    _, file = files["sdxl"]
    layout = describe(shapes_of(file))
    ours = from_original(layout, file.__getitem__)
    copied = [
        name
        for part, rules in layout.rules.items()
        for rule in rules
        for name in rule.new
        if ours[part][name].untyped_storage().data_ptr() != file[rule.old].untyped_storage().data_ptr()
    ]
    assert copied == ["text_projection.weight"]


def test_a_rule_says_its_shapes_before_it_is_applied():
    assert Rule("a", (4, 3, 1, 1), ("b",), "matrix").shapes == {"b": (4, 3)}
    assert Rule("a", (4, 3), ("b",), "transposed").shapes == {"b": (3, 4)}
    assert Rule("a", (6, 3), ("q", "k", "v"), "thirds").shapes == {"q": (2, 3), "k": (2, 3), "v": (2, 3)}
