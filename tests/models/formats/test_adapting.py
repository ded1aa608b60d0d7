"""LoRAs and new words put on a Stable Diffusion as it is loaded."""

import pytest
import torch
from safetensors.torch import save_file

from reverie.base.errors import ModelFileError, UsageError
from reverie.models.load import load

HOW = {"sampler": "ddim", "steps": 2, "guidance": 3.0, "seed": 1, "exact": False}
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def write_lora(path, seed=0, layer=LAYER, width=32):
    torch.manual_seed(seed)
    factors = {"lora_A": torch.randn(2, width), "lora_B": torch.randn(width, 2)}
    save_file({f"unet.{layer}.{name}.weight": factor for name, factor in factors.items()}, path)
    return str(path)


def test_a_lora_changes_the_picture_by_its_weight_and_is_recorded(folders, tmp_path):
    base = folders["sd1"][0]
    path = write_lora(tmp_path / "style.safetensors")
    plain = load(base).sample(1, prompt="cat", **HOW)
    none = load(base, loras={path: 0.0}).sample(1, prompt="cat", **HOW)
    half, full = (load(base, loras={path: weight}).sample(1, prompt="cat", **HOW) for weight in (0.5, 1.0))
    assert torch.equal(none.images, plain.images)
    assert not torch.equal(half.images, plain.images)
    assert not torch.equal(half.images, full.images)
    assert half.record["loras"][0]["weight"] == 0.5
    assert plain.record["loras"] == []


def test_a_picture_with_a_lora_is_made_again(folders, tmp_path):
    from reverie.models.pictures import write_pictures
    from reverie.models.provenance import again

    path = write_lora(tmp_path / "style.safetensors")
    samples = load(folders["sd1"][0], loras={path: 0.5}).sample(1, prompt="cat", **HOW)
    (picture,) = write_pictures(samples, tmp_path / "out")
    with pytest.warns(RuntimeWarning, match="free batches"):
        assert torch.equal(again(picture).uint8, samples.uint8)
    write_lora(tmp_path / "style.safetensors", seed=5)
    with pytest.warns(RuntimeWarning), pytest.raises(UsageError, match="another now"):
        again(picture)


def test_weights_change_and_go_while_the_model_is_there(folders, tmp_path):
    model = load(folders["sd1"][0])
    before = model.sample(1, prompt="cat", **HOW).images
    adapted = load(folders["sd1"][0], loras=[write_lora(tmp_path / "a.safetensors")])
    assert "2 of 2" in adapted.adapted.notes[0]
    adapted.adapted.loras.clear()
    assert torch.equal(adapted.sample(1, prompt="cat", **HOW).images, before)


def test_a_lora_for_nothing_here_is_an_error(folders, tmp_path):
    with pytest.raises(ModelFileError):
        load(folders["sd1"][0], loras=[write_lora(tmp_path / "x.safetensors", layer="nowhere.to_q")])
    with pytest.raises(ModelFileError):
        load(folders["sd1"][0], loras=[write_lora(tmp_path / "y.safetensors", width=48)])


def test_a_new_word(folders, tmp_path):
    torch.manual_seed(0)
    save_file({"zib": torch.randn(2, 64)}, tmp_path / "zib.safetensors")
    plain, learned = load(folders["sd1"][0]), load(folders["sd1"][0], embeddings=[str(tmp_path / "zib.safetensors")])
    assert learned.adapted.words == ["zib"]
    tokens = learned.conditioner.tokens[0]
    assert len(tokens.ids("a zib cat")) == len(tokens.ids("a cat")) + 2
    own, other = (model.sample(1, prompt="a zib cat", **HOW).images for model in (learned, plain))
    assert not torch.equal(own, other)
    same = [model.sample(1, prompt="a red cat", **HOW).images for model in (learned, plain)]
    assert torch.equal(*same)


def test_clip_skip(folders):
    plain, skipped = (load(folders["sd1"][0], clip_skip=count) for count in (0, 1))
    one, other = (model.sample(1, prompt="cat", **HOW).images for model in (plain, skipped))
    assert not torch.equal(one, other)
    with pytest.raises(UsageError, match="clip_skip is 9"):
        load(folders["sd1"][0], clip_skip=9)
