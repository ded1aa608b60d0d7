"""LoRA files in every layout: the same change from each, merged by hand, taken out without a trace."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from reverie.base.errors import ModelFileError, UsageError
from reverie.models.formats.latent_diffusion.both_ways import unet_table
from reverie.models.formats.latent_diffusion.renaming import renamed
from reverie.models.lora import Loras, flat, match, names_of, read_lora
from reverie.models.lora_file import role_of
from reverie.networks.lora import add_lora, lora_state_dict, remove_lora, trained
from reverie.networks.unet import UNet, UNetConfig

RANK = 2
SD1 = UNetConfig(
    in_channels=4, channels=(16, 32), layers=1, attention=(True, False), context_dim=12, num_heads=2, norm_num_groups=4
)
XL = SD1.model_copy(update={"use_linear_projection": True})
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 30}
TEXT |= {"bos_token_id": 0, "eos_token_id": 2}
LAYERS = {
    "unet": (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0",
        "mid_block.attentions.0.proj_in",
        "up_blocks.1.attentions.1.transformer_blocks.0.ff.net.0.proj",
        "up_blocks.0.resnets.1.conv1",
        "down_blocks.0.downsamplers.0.conv",
        "time_embedding.linear_1",
    ),
    "text_encoder": ("encoder.layers.1.self_attn.q_proj", "encoder.layers.0.mlp.fc1"),
    "text_encoder_2": ("text_model.encoder.layers.0.self_attn.out_proj",),
}


def parts_of(*names: str, config: UNetConfig = SD1) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    text = CLIPTextConfig(**TEXT)
    kinds = {
        "unet": lambda: UNet(config),
        "text_encoder": lambda: CLIPTextModel(text),
        "text_encoder_2": lambda: CLIPTextModelWithProjection(text),
    }
    networks = {name: kinds[name]() for name in names}
    with torch.no_grad():
        for network in networks.values():
            for parameter in network.parameters():
                parameter.copy_(torch.randn_like(parameter))
    return networks


@pytest.fixture
def parts() -> dict[str, nn.Module]:
    return parts_of("unet", "text_encoder", "text_encoder_2")


def changes(parts: dict[str, nn.Module], seed: int = 1) -> dict[tuple[str, str], tuple[Tensor, Tensor, float]]:
    """Return B, A and alpha of each chosen layer."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for part, network in parts.items():
        for index, path in enumerate(LAYERS[part]):
            shape = network.get_submodule(path).weight.shape
            up = torch.randn(shape[0], RANK, *[1] * (len(shape) - 2), generator=generator)
            down = torch.randn(RANK, *shape[1:], generator=generator)
            made[part, path] = up, down, float(index + 1)
    return made


def on_disk(part: str, path: str) -> str:
    """Return a text encoder's name as files have it, whatever the library's version."""
    return path if part == "unet" or path.startswith("text_model.") else f"text_model.{path}"


def kohya(parts, made, original: bool = False) -> dict[str, Tensor]:
    shapes = {name: tuple(value.shape) for name, value in parts["unet"].state_dict().items()}
    back = {new: old for old, new in unet_table(shapes).items()}
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    if len(parts) < 3:
        prefixes["text_encoder"] = "lora_te_"
    state = {}
    for (part, path), (up, down, alpha) in made.items():
        name = renamed(path, back) if original and part == "unet" else on_disk(part, path)
        name = prefixes[part] + name.replace(".", "_")
        state |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(alpha)}
    return state


def scaled(made) -> dict:
    """Return the factors with alpha / rank put into B, for layouts that have no alpha."""
    return {place: (up * alpha / RANK, down) for place, (up, down, alpha) in made.items()}


def peft(parts, made, up_name: str = "lora_B", down_name: str = "lora_A") -> dict[str, Tensor]:
    state = {}
    for (part, path), (up, down) in scaled(made).items():
        name = f"{part}.{on_disk(part, path)}"
        state |= {f"{name}.{up_name}.weight": up, f"{name}.{down_name}.weight": down}
    return state


def older(parts, made) -> dict[str, Tensor]:
    state = {}
    for (part, path), (up, down) in scaled(made).items():
        name, roles = f"{part}.{on_disk(part, path)}", ("lora.up", "lora.down")
        if ".attn" in path:
            owner, layer = path.replace(".to_out.0", ".to_out").rsplit(".", 1)
            name, roles = f"{part}.{owner}.processor.{layer}_lora", ("up", "down")
        elif part != "unet":
            roles = ("lora_linear_layer.up", "lora_linear_layer.down")
        state |= {f"{name}.{roles[0]}.weight": up, f"{name}.{roles[1]}.weight": down}
    return state


def comfy(parts, made) -> dict[str, Tensor]:
    shapes = {name: tuple(value.shape) for name, value in parts["unet"].state_dict().items()}
    back = {new: old for old, new in unet_table(shapes).items()}
    state = {}
    for (part, path), (up, down) in scaled(made).items():
        if part == "unet":
            name = f"diffusion_model.{renamed(path, back)}"
            state |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    return state


LAYOUTS = {
    "kohya": kohya,
    "kohya, original names": lambda parts, made: kohya(parts, made, original=True),
    "peft": peft,
    "peft with a name": lambda parts, made: peft(parts, made, "lora_B.default", "lora_A.default"),
    "diffusers": lambda parts, made: peft(parts, made, "lora.up", "lora.down"),
    "diffusers, older": older,
    "comfy": comfy,
}


def written(folder: Path, state: dict[str, Tensor], name: str = "style", metadata: dict | None = None) -> Path:
    path = folder / f"{name}.safetensors"
    save_file({key: value.contiguous() for key, value in state.items()}, path, metadata)
    return path


def by_hand(weight: Tensor, up: Tensor, down: Tensor, scale: float) -> Tensor:
    product = torch.einsum("or,r...->o...", up.flatten(1).double(), down.double())
    return weight.double() + scale * product.reshape(weight.shape)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("config", [SD1, XL], ids=["convolutions", "linear"])
def test_each_layout_gives_the_same_change(parts, tmp_path, layout, config):
    parts["unet"] = parts_of("unet", config=config)["unet"]
    before = {part: copy.deepcopy(network.state_dict()) for part, network in parts.items()}
    made = changes(parts)
    state = LAYOUTS[layout](parts, made)
    loras = Loras(parts)
    report = loras.add(written(tmp_path, state), 0.7)
    here = [place for place in made if layout != "comfy" or place[0] == "unet"]
    assert (report.used, report.unused) == (len(state), ())
    assert sum(report.layers.values()) == len(here)
    changed = {f"{path}.weight": (part, path) for part, path in here}
    for part, network in parts.items():
        for name, value in network.state_dict().items():
            place = changed.get(name)
            if place is None or place[0] != part:
                assert torch.equal(value, before[part][name]), name
                continue
            up, down, alpha = made[place]
            want = by_hand(before[part][name], up, down, 0.7 * alpha / RANK)
            torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=1e-5)
    assert loras.weights == {"style": 0.7}
    loras.clear()
    for part, network in parts.items():
        assert all(torch.equal(value, before[part][name]) for name, value in network.state_dict().items())


def test_several_at_once_do_not_care_how_they_came_about(parts, tmp_path):
    made = [changes(parts, seed) for seed in (1, 2)]
    files = [written(tmp_path, kohya(parts, m), f"l{i}") for i, m in enumerate(made)]
    before = {part: copy.deepcopy(network.state_dict()) for part, network in parts.items()}
    loras = Loras(parts)
    loras.add(files[0], 1.0)
    loras.add(files[1], 0.0)
    loras.weigh({"l1": 0.5, "l0": 0.25})
    place = ("unet", LAYERS["unet"][0])
    weight = before["unet"][f"{place[1]}.weight"]
    for m, factor in zip(made, (0.25, 0.5), strict=True):
        up, down, alpha = m[place]
        weight = by_hand(weight, up, down, factor * alpha / RANK)
    got = parts["unet"].get_submodule(place[1]).weight
    torch.testing.assert_close(got.double(), weight, rtol=1e-5, atol=1e-5)

    walked = {name: value.clone() for name, value in parts["unet"].state_dict().items()}
    loras.weigh({"l0": 3.0})
    loras.remove("l1")
    loras.weigh({"l0": 0.25})
    loras.add(files[1], 0.5)
    assert all(torch.equal(value, walked[name]) for name, value in parts["unet"].state_dict().items())

    loras.weigh({"l0": 0.0, "l1": 0.0})
    assert all(torch.equal(v, before["unet"][n]) for n, v in parts["unet"].state_dict().items())


def test_parameters_stay_the_objects_that_they_were(parts, tmp_path):
    objects = {name: id(parameter) for name, parameter in parts["unet"].named_parameters()}
    loras = Loras(parts)
    loras.add(written(tmp_path, kohya(parts, changes(parts))))
    loras.clear()
    assert {name: id(parameter) for name, parameter in parts["unet"].named_parameters()} == objects


def test_half_precision_weights_come_back_bit_for_bit(tmp_path):
    parts = parts_of("unet")
    state = kohya(parts, changes(parts))
    network = parts["unet"].to(torch.bfloat16)
    before = copy.deepcopy(network.state_dict())
    loras = Loras(parts)
    loras.add(written(tmp_path, {name: value.half() for name, value in state.items()}))
    weight = network.get_submodule(LAYERS["unet"][0]).weight
    assert weight.dtype == torch.bfloat16
    assert not torch.equal(weight, before[LAYERS["unet"][0] + ".weight"])
    loras.clear()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_convolution_with_pixels_of_its_own(tmp_path):
    parts, path = parts_of("unet"), "up_blocks.0.resnets.1.conv1"
    weight = parts["unet"].get_submodule(path).weight.detach().clone()
    up, down = torch.randn(weight.shape[0], 2, 1, 1), torch.randn(2, weight.shape[1], 1, 1)
    mid = torch.randn(2, 2, 3, 3)
    name = "lora_unet_" + path.replace(".", "_")
    state = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.lora_mid.weight": mid}
    report = Loras(parts).add(written(tmp_path, state))
    want = weight + torch.einsum("om,mnkl,ni->oikl", up.flatten(1), mid, down.flatten(1))
    torch.testing.assert_close(parts["unet"].get_submodule(path).weight.detach(), want, rtol=1e-5, atol=1e-5)
    assert report.used == 3


def test_settings_of_peft_scale_the_change(tmp_path):
    parts, path = parts_of("unet"), LAYERS["unet"][0]
    weight = parts["unet"].get_submodule(path).weight.detach().clone()
    up, down = torch.randn(weight.shape[0], 4), torch.randn(4, weight.shape[1])
    state = {f"unet.{path}.lora_B.weight": up, f"unet.{path}.lora_A.weight": down}

    def got(settings: dict) -> Tensor:
        said = {"lora_adapter_metadata": json.dumps(settings)}
        parts["unet"].get_submodule(path).weight.data = weight
        Loras(parts).add(written(tmp_path, state, metadata=said))
        return (parts["unet"].get_submodule(path).weight.detach() - weight) / (up @ down)

    for settings, scale in (
        ({}, 1.0),
        ({"unet.lora_alpha": 8, "unet.r": 4}, 2.0),
        ({"unet.lora_alpha": 8, "unet.use_rslora": True}, 4.0),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 2}}, 0.5),
        ({"text_encoder.lora_alpha": 8}, 1.0),
    ):
        assert abs(got(settings).median().item() - scale) < 1e-4

    folder = tmp_path / "peft"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 12, "r": 4, "peft_type": "LORA"}))
    renamed_state = {name.replace("unet.", "base_model.model."): value for name, value in state.items()}
    save_file(renamed_state, folder / "adapter_model.safetensors")
    assert next(iter(read_lora(folder).factors.values())).scale == 3.0
    assert match(read_lora(folder), parts)[1].used == 2


def test_what_training_saves_is_what_is_read(tmp_path):
    parts = parts_of("unet")
    before = copy.deepcopy(parts["unet"].state_dict())
    names = add_lora(parts["unet"], rank=4, alpha=2, targets=["to_q", "to_v", "conv2"])
    with torch.no_grad():
        for _, adapter in trained(parts["unet"]):
            adapter.lora_B.normal_()
    with pytest.raises(UsageError, match="is being trained"):
        Loras(parts)
    path = written(tmp_path, lora_state_dict(parts["unet"]))
    want = {name: adapter(before[f"{name}.weight"]).detach() for name, adapter in trained(parts["unet"])}
    remove_lora(parts["unet"])
    report = Loras(parts).add(path)
    assert (report.used, report.layers) == (2 * len(names), {"unet": len(names)})
    for name in names:
        got = parts["unet"].get_submodule(name).weight.detach()
        torch.testing.assert_close(got, want[name], rtol=1e-6, atol=1e-6)


def test_diffusers_and_peft_read_what_training_saves(tmp_path):
    """The same pictures from diffusers' own network with the file loaded through PEFT."""
    pytest.importorskip("peft")
    from diffusers import UNet2DConditionModel

    ours = parts_of("unet")["unet"].eval()
    theirs = UNet2DConditionModel.from_config(ours.config.to_diffusers()).eval()
    theirs.load_state_dict(ours.state_dict())
    add_lora(ours, rank=4, alpha=2, targets=["to_q", "to_v", "conv2"])
    with torch.no_grad():
        for _, adapter in trained(ours):
            adapter.lora_B.normal_()
    path = written(tmp_path, lora_state_dict(ours))
    theirs.load_lora_adapter(str(path), prefix="unet")
    x, time, context = torch.randn(2, 4, 8, 8), torch.tensor([1, 900]), torch.randn(2, 5, 12)
    with torch.no_grad():
        want, got = theirs(x, time, context).sample, ours(x, time, context=context)
    assert (got - want).norm() / want.norm() < 1e-5


def test_names_of_every_layer_that_kohya_trains_at_full_size():
    """722 layers of XL's U-Net, 192 of version 1's, by the original names too, as diffusers translates them."""
    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_lora_to_diffusers,
        _maybe_map_sgm_blocks_to_diffusers,
    )

    sizes = {"channels": (320, 640, 1280), "attention": (False, True, True), "transformer_layers": (1, 2, 10)}
    xl = UNetConfig(in_channels=4, context_dim=2048, head_dim=64, use_linear_projection=True, **sizes)
    sizes = {"channels": (320, 640, 1280, 1280), "attention": (True, True, True, False)}
    one = UNetConfig(in_channels=4, context_dim=768, num_heads=8, **sizes)
    for config, count in ((xl, 722), (one, 192)):
        with torch.device("meta"):
            network = UNet(config)
        shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
        back, known = {new: old for old, new in unet_table(shapes).items()}, names_of({"unet": network})
        kinds = nn.Linear | nn.Conv2d
        paths = [p for p, layer in network.named_modules() if isinstance(layer, kinds) and ".attentions." in p]
        assert len(paths) == count
        for names in ({path: path for path in paths}, {path: renamed(path, back) for path in paths}):
            keys = {"lora_unet_" + flat(name): path for path, name in names.items()}
            assert all(known[key] == ("unet", path) for key, path in keys.items())
            state = {f"{key}.lora_{role}.weight": torch.zeros(1) for key in keys for role in ("down", "up")}
            mapped = _maybe_map_sgm_blocks_to_diffusers(state, SimpleNamespace(layers_per_block=2))
            theirs, _ = _convert_non_diffusers_lora_to_diffusers(mapped)
            plain = {role_of(key)[0].removeprefix("unet.") for key in theirs}
            assert plain == set(paths)


# Refusals -------------------------------------------------------------------------------------------


def test_unused_tensors_are_counted_and_named(parts, tmp_path):
    made = changes(parts)
    state = kohya(parts, made) | {"bundle_emb.token.string_to_param.*": torch.zeros(2, 16)}
    report = Loras({"unet": parts["unet"]}).add(written(tmp_path, state))
    assert report.used == 3 * len(LAYERS["unet"])
    assert len(report.unused) == len(state) - report.used
    assert "bundle_emb.token.string_to_param.*" in report.unused
    assert "are unused" in str(report)


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("lora_unet_double_blocks_0_img_attn_proj", "Flux"),
        ("lora_unet_joint_blocks_0_x_block_attn_proj", "Stable Diffusion 3"),
        ("transformer.transformer_blocks.0.attn.to_q", "a diffusion transformer"),
        ("lora_te2_text_model_encoder_layers_30_self_attn_q_proj", "Stable Diffusion XL"),
        ("lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_k", r"Stable Diffusion \(Stable Diffusion XL\)"),
        ("lora_unet_dwn_blocks", "a base that is not known"),
    ],
)
def test_a_lora_of_which_nothing_fits_names_its_base(parts, tmp_path, name, base):
    state = {f"{name}.lora_up.weight": torch.zeros(8, 2), f"{name}.lora_down.weight": torch.zeros(2, 2048)}
    path = written(tmp_path, state)
    with pytest.raises(ModelFileError, match=f"none of its 1 layers is in this model.*a LoRA of {base}") as refusal:
        Loras(parts).add(path)
    assert "\n" not in str(refusal.value)


def test_a_lora_of_another_base_is_refused_and_nothing_is_changed(parts, tmp_path):
    before = copy.deepcopy(parts["unet"].state_dict())
    state = kohya({"unet": parts["unet"]}, changes({"unet": parts["unet"]}))
    for index, name in enumerate(n for n in list(state) if n.endswith("lora_down.weight")):
        if index < 4:
            state[name] = torch.zeros(RANK, 2048, *state[name].shape[2:])
    where = "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    state |= {f"lora_unet_{where}.lora_up.weight": torch.zeros(16, 2)}
    state |= {f"lora_unet_{where}.lora_down.weight": torch.zeros(2, 2048)}
    path = written(tmp_path, state)
    message = (
        r"of another base \(Stable Diffusion XL\): 5 of 8 layers have other shapes: .*changes \(16, 2048\), the model"
    )
    with pytest.raises(ModelFileError, match=message) as refusal:
        Loras(parts).add(path)
    assert str(refusal.value).count("the model has") == 3
    assert all(torch.equal(value, before[name]) for name, value in parts["unet"].state_dict().items())


PATH = "lora_unet_time_embedding_linear_1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {n: v for n, v in s.items() if not n.endswith("lora_up.weight")}, "lack one of their two factors"),
        (lambda s: s | {f"{PATH}.lora_up.weight": torch.zeros(64, 3)}, "do not go together: .*up \\(64, 3\\)"),
        (lambda s: s | {f"{PATH}.lora_up.weight": torch.zeros(64)}, "do not go together"),
        (lambda s: s | {f"{PATH}.lora_down.weight": torch.zeros(0, 16)}, "do not go together"),
        (lambda s: s | {f"{PATH}.alpha": torch.ones(2)}, "do not go together"),
        (lambda s: s | {f"{PATH}.lora_up.weight": torch.full((64, 2), float("nan"))}, "hold NaN"),
        (lambda s: s | {f"{PATH}.lora_up.weight": torch.zeros(64, 2, dtype=torch.int64)}, "no numbers"),
        (lambda s: s | {f"{PATH}.hada_w1_a": torch.zeros(2, 2)}, "a LoHa, which is not supported"),
        (lambda s: s | {f"{PATH}.lokr_w1": torch.zeros(2, 2)}, "a LoKr"),
        (lambda s: s | {f"{PATH}.dora_scale": torch.zeros(2, 2)}, "a DoRA"),
        (lambda s: s | {f"{PATH}.diff": torch.zeros(2, 2)}, "a change of whole weights"),
        (lambda s: s | {"unet.time_embedding.linear_1.lora_up.weight": torch.zeros(64, 2),
                        "unet.time_embedding.linear_1.lora_down.weight": torch.zeros(2, 16)}, "there twice"),
        (lambda s: s | {f"{PATH}.lora_B.weight": torch.zeros(64, 2)}, "two tensors for up"),
        (lambda s: {"conv_in.weight": torch.zeros(2)}, "is no LoRA: none of its 1 tensors"),
        (lambda s: {}, "is no LoRA"),
    ],
)  # fmt: skip
def test_a_hostile_file_gets_one_line(tmp_path, change, message):
    parts = parts_of("unet")
    path = written(tmp_path, change(kohya(parts, changes(parts))))
    with pytest.raises(ModelFileError, match=message) as refusal:
        Loras(parts).add(path)
    assert "\n" not in str(refusal.value)


def test_a_damaged_file_or_none_gets_one_line(parts, tmp_path):
    path = written(tmp_path, kohya(parts, changes(parts)))
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(ModelFileError, match="no sound safetensors file"):
        read_lora(path)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    with pytest.raises(ModelFileError, match="a PNG picture"):
        read_lora(path)
    with pytest.raises(UsageError, match="there is no"):
        read_lora(tmp_path / "missing.safetensors")
    bad = written(tmp_path, peft(parts, changes(parts)), metadata={"lora_adapter_metadata": "[1"})
    with pytest.raises(ModelFileError, match="is no JSON object"):
        read_lora(bad)
    bad = written(tmp_path, peft(parts, changes(parts)), metadata={"lora_adapter_metadata": '{"unet.lora_alpha": "8"}'})
    with pytest.raises(ModelFileError, match="must be a number"):
        read_lora(bad)


def test_a_pickle_of_weights_is_read_and_one_with_code_is_not(parts, tmp_path):
    state = kohya(parts, changes(parts))
    path = tmp_path / "style.pt"
    torch.save(state, path)
    assert len(read_lora(path).factors) == len(changes(parts))
    torch.save({"model": parts["unet"]}, path)
    with pytest.raises(ModelFileError, match="contains code"):
        read_lora(path)


def test_wrong_names_and_weights_are_refused(parts, tmp_path):
    loras = Loras(parts)
    path = written(tmp_path, kohya(parts, changes(parts)))
    with pytest.raises(UsageError, match="the weight of the LoRA style is nan"):
        loras.add(path, float("nan"))
    assert loras.weights == {}
    loras.add(path)
    with pytest.raises(UsageError, match="called style already"):
        loras.add(path)
    with pytest.raises(UsageError, match="no LoRA called stile, did you mean style"):
        loras.weigh({"stile": 1.0})
    with pytest.raises(UsageError, match="no LoRA called other"):
        loras.remove("other")
    with pytest.raises(UsageError, match="no part 'vae'"):
        Loras({"vae": nn.Linear(2, 2)}).add(path)
