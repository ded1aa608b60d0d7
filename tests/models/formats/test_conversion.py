"""Conversions: there and back, every tensor is what it was."""

import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from reverie.base.errors import UsageError
from reverie.models.formats import recognise
from reverie.models.formats.conversion import CARRIED, convert

PARTS = {
    "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model",
    "text_encoder_2": "model",
}  # fmt: skip


def held(folder):
    """Return the tensors of a folder by part, whichever of their two names text encoders have."""
    found = {}
    for part, stem in PARTS.items():
        if (folder / part).is_dir():
            for name, tensor in load_file(folder / part / f"{stem}.safetensors").items():
                found[part, name.removeprefix("text_model.")] = tensor
    return found


def same(one, other):
    assert one.keys() == other.keys()
    return all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(autouse=True)
def vocabulary(folders, monkeypatch):
    monkeypatch.setenv("REVERIE_CLIP_VOCABULARY", str(folders["sd1"][0] / "tokenizer"))


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_folder_to_file_to_folder(folders, family, tmp_path):
    source = folders[family][0]
    convert(source, tmp_path / "one.safetensors", "original")
    convert(tmp_path / "one.safetensors", tmp_path / "back", "diffusers")
    assert same(held(tmp_path / "back"), held(source))
    assert recognise(tmp_path / "back").name == "stable-diffusion"
    scheduler = "scheduler/scheduler_config.json"
    assert (tmp_path / "back" / scheduler).read_bytes() == (source / scheduler).read_bytes()


def test_file_to_folder_to_file_with_what_no_folder_has_a_place_for(folders, tmp_path):
    """In half precision, with averaged weights, a schedule and a header of its own."""
    convert(folders["sd1"][0], tmp_path / "plain.safetensors", "original")
    tensors = {name: tensor.half() for name, tensor in load_file(tmp_path / "plain.safetensors").items()}
    tensors |= {"alphas_cumprod": torch.rand(1000), "model_ema.decay": torch.tensor(0.5),
                "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}  # fmt: skip
    save_file(tensors, tmp_path / "one.safetensors", {"modelspec.title": "a title"})
    made = convert(tmp_path / "one.safetensors", tmp_path / "folder", "diffusers")
    assert made.carried == 3
    assert (tmp_path / "folder" / CARRIED).is_file()
    convert(tmp_path / "folder", tmp_path / "again.safetensors", "original")
    assert same(load_file(tmp_path / "again.safetensors"), tensors)
    with safe_open(tmp_path / "again.safetensors", "pt") as file:
        assert file.metadata()["modelspec.title"] == "a title"


def test_diffusers_opens_what_was_converted(folders, tmp_path):
    from diffusers import StableDiffusionPipeline

    convert(folders["sd1"][0], tmp_path / "one.safetensors", "original")
    convert(tmp_path / "one.safetensors", tmp_path / "back", "diffusers")
    opened = StableDiffusionPipeline.from_pretrained(tmp_path / "back", local_files_only=True)
    for part in ("unet", "vae", "text_encoder"):
        own = getattr(opened, part).state_dict()
        other = getattr(folders["sd1"][1], part).state_dict()
        assert same(own, other)


def test_nothing_is_overwritten_unasked(folders, tmp_path):
    shutil.copytree(folders["sd1"][0], tmp_path / "folder")
    (tmp_path / "x.safetensors").write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        convert(tmp_path / "folder", tmp_path / "x.safetensors", "original")
    assert (tmp_path / "x.safetensors").read_text() == "mine"
    convert(tmp_path / "folder", tmp_path / "y.safetensors", "original")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        convert(tmp_path / "y.safetensors", tmp_path / "mine", "diffusers")
    with pytest.raises(UsageError, match="cannot be written as native"):
        convert(tmp_path / "folder", tmp_path / "z", "native")
