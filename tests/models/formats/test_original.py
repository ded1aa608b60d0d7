"""One file of the original layout: the model that the folder is."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from reverie.base.errors import ModelFileError
from reverie.models.formats import read_model, recognise
from reverie.models.formats.latent_diffusion import layout_of, to_original

FAMILIES = {"sd1": ("text_encoder",), "sd2": ("text_encoder",), "sdxl": ("text_encoder", "text_encoder_2")}
HOW = {"sampler": "ddim", "grid": "trailing", "steps": 3, "guidance": 3.0, "prompt": "a red cat"}
HOW |= {"seed": 2, "size": 32, "exact": False}


def original(folder, family):
    """Return the tensors of a folder of diffusers' in the original layout."""
    parts = {name: load_file(folder / name / "diffusion_pytorch_model.safetensors") for name in ("unet", "vae")}
    for name in FAMILIES[family]:
        held = load_file(folder / name / "model.safetensors")
        parts[name] = {f"text_model.{key}" if key.startswith(("embed", "enc", "final")) else key: value
                       for key, value in held.items()}  # fmt: skip
    shapes = {name: {key: tuple(value.shape) for key, value in part.items()} for name, part in parts.items()}
    layout = layout_of(family, shapes, family == "sd2")
    return {name: value.contiguous() for name, value in to_original(layout, parts).items()}


@pytest.fixture
def vocabulary(folders, monkeypatch):
    monkeypatch.setenv("REVERIE_CLIP_VOCABULARY", str(folders["sd1"][0] / "tokenizer"))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_file_draws_what_the_folder_draws(folders, family, tmp_path, vocabulary):
    path = tmp_path / "no name says anything.safetensors"
    save_file(original(folders[family][0], family), path)
    assert recognise(path).name == "original"
    one, other = read_model(path), read_model(folders[family][0])
    torch.testing.assert_close(one.sample(1, **HOW).images, other.sample(1, **HOW).images, atol=1e-4, rtol=0)


def test_a_checkpoint_of_pytorchs_with_its_state_dict_within(folders, tmp_path, vocabulary):
    torch.save({"state_dict": original(folders["sd1"][0], "sd1"), "epoch": 3}, tmp_path / "model.ckpt")
    save_file(original(folders["sd1"][0], "sd1"), tmp_path / "model.safetensors")
    one, other = (read_model(tmp_path / f"model.{kind}") for kind in ("ckpt", "safetensors"))
    assert torch.equal(one.sample(1, **HOW).images, other.sample(1, **HOW).images)


def test_a_part_of_a_file_is_named(tmp_path):
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, tmp_path / "part.safetensors")
    with pytest.raises(ModelFileError, match=r"part\.safetensors: "):
        read_model(tmp_path / "part.safetensors")


def test_a_file_with_a_tensor_missing_or_more_says_so(folders, tmp_path, vocabulary):
    tensors = original(folders["sd1"][0], "sd1")
    name = "model.diffusion_model.input_blocks.0.0.bias"
    save_file({key: value for key, value in tensors.items() if key != name}, tmp_path / "less.safetensors")
    with pytest.raises(ModelFileError, match=r"conv_in\.bias"):
        read_model(tmp_path / "less.safetensors")
    save_file(tensors | {"model.diffusion_model.adapter.weight": torch.zeros(3)}, tmp_path / "more.safetensors")
    with pytest.raises(ModelFileError, match="adapter"):
        read_model(tmp_path / "more.safetensors")
