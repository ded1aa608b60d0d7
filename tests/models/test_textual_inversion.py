"""New words from files of every layout, and in the text encoder."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from reverie.base.errors import ModelFileError, UsageError
from reverie.models.textual_inversion import add_vectors, read_embedding, split_words

ONE, TWO = {"text_encoder": 16}, {"text_encoder": 16, "text_encoder_2": 24}
VECTORS = torch.arange(48.0).reshape(3, 16)
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 30}


def a1111(vectors: Tensor = VECTORS) -> dict:
    """Return what AUTOMATIC1111's web page saves with torch.save."""
    return {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": vectors.clone().requires_grad_()},
        "name": "another-name",
        "step": 4999,
        "sd_checkpoint": "cc6cb27103",
        "sd_checkpoint_name": None,
    }


def safe(folder: Path, state: dict[str, Tensor], name: str = "toy") -> Path:
    save_file(state, folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


def pickled(folder: Path, state: object, name: str = "toy.pt") -> Path:
    torch.save(state, folder / name)
    return folder / name


LAYOUTS = {
    "a1111": (lambda folder: pickled(folder, a1111()), "toy", VECTORS),
    "a1111, safetensors": (lambda folder: safe(folder, {"emb_params": VECTORS}), "toy", VECTORS),
    "diffusers": (lambda folder: safe(folder, {"<cat-toy>": VECTORS}), "<cat-toy>", VECTORS),
    "diffusers, one vector": (lambda folder: safe(folder, {"<cat-toy>": VECTORS[1]}), "<cat-toy>", VECTORS[1:2]),
    "diffusers, .bin": (
        lambda folder: pickled(folder, {"<cat-toy>": torch.nn.Parameter(VECTORS[0])}, "learned_embeds.bin"),
        "<cat-toy>",
        VECTORS[:1],
    ),
    "half": (lambda folder: safe(folder, {"emb_params": VECTORS.half()}), "toy", VECTORS),
    "clip_l alone": (lambda folder: safe(folder, {"clip_l": VECTORS}), "toy", VECTORS),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_gives_its_word(tmp_path, layout):
    make, name, want = LAYOUTS[layout]
    word = read_embedding(make(tmp_path), ONE)
    assert (word.name, word.count, list(word.vectors)) == (name, len(want), ["text_encoder"])
    assert torch.equal(word.vectors["text_encoder"], want)
    assert word.vectors["text_encoder"].dtype == torch.float32


@pytest.mark.parametrize("names", [("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1")])
def test_xl_has_vectors_for_both_encoders(tmp_path, names):
    second = torch.randn(3, 24)
    path = safe(tmp_path, dict(zip(names, (VECTORS, second), strict=True)))
    word = read_embedding(path, TWO)
    assert (word.name, word.count) == ("toy", 3)
    assert read_embedding(path, TWO, name="mine").name == "mine"
    assert torch.equal(word.vectors["text_encoder"], VECTORS)
    assert torch.equal(word.vectors["text_encoder_2"], second)


@pytest.mark.parametrize(
    ("state", "widths", "message"),
    [
        ({"emb_params": VECTORS}, {"text_encoder": 768}, r"is for text encoders of 16 channels; this model has 768"),
        ({"emb_params": VECTORS}, TWO, r"of 16 channels; this model has 16 \(text_encoder\), 24 \(text_encoder_2\)"),
        ({"clip_l": VECTORS, "clip_g": torch.zeros(3, 24)}, ONE, "of 24, 16 channels|of 16, 24 channels"),
        ({"clip_l": VECTORS, "clip_g": torch.zeros(3, 16)}, TWO, "is for text encoders of"),
        ({"clip_l": VECTORS, "clip_g": torch.zeros(2, 24)}, TWO, "vectors; it must be one number"),
        ({"emb_params": torch.zeros(76, 16)}, ONE, r"has \[76\] vectors"),
        ({"emb_params": torch.zeros(0, 16)}, ONE, "no embedding"),
        ({"emb_params": torch.zeros(1, 2, 16)}, ONE, "no embedding"),
        ({"emb_params": torch.zeros(())}, ONE, "no embedding"),
        ({"conv_in.weight": VECTORS, "conv_in.bias": torch.zeros(3)}, ONE, r"no embedding .*\(2 tensors\)"),
        ({}, ONE, r"no embedding .*holds nothing"),
        ({"emb_params": VECTORS * float("nan")}, ONE, "hold NaN"),
        ({"emb_params": VECTORS.long()}, ONE, "no numbers"),
    ],
)
def test_what_is_no_embedding_of_this_model_gets_one_line(tmp_path, state, widths, message):
    with pytest.raises(ModelFileError, match=message) as refusal:
        read_embedding(safe(tmp_path, state), widths)
    assert "\n" not in str(refusal.value)


def test_damaged_and_hostile_files_get_one_line(tmp_path):
    with pytest.raises(UsageError, match="there is no"):
        read_embedding(tmp_path / "missing.pt", ONE)
    path = safe(tmp_path, {"emb_params": VECTORS})
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ModelFileError, match="no sound safetensors"):
        read_embedding(path, ONE)
    with pytest.raises(ModelFileError, match="contains code"):
        read_embedding(pickled(tmp_path, {"string_to_param": {"*": Path("x")}}), ONE)


# In the encoder -------------------------------------------------------------------------------------


def encoder(kind=CLIPTextModel, eos: int = 29):
    torch.manual_seed(0)
    return kind(CLIPTextConfig(**SMALL, projection_dim=8, bos_token_id=28, eos_token_id=eos, pad_token_id=0)).eval()


@pytest.mark.parametrize("kind", [CLIPTextModel, CLIPTextModelWithProjection])
@pytest.mark.parametrize("eos", [2, 29])
def test_new_tokens_join_and_the_rest_stays(kind, eos):
    model, plain = encoder(kind, eos), encoder(kind, eos)
    ids = add_vectors(model, torch.randn(3, 16), end=29)
    assert ids == [30, 31, 32]
    old = torch.tensor([[28, 3, 4, 29, 0, 0]])
    with torch.no_grad():
        want, got = plain(old), model(old)
        assert all(torch.equal(a, b) for a, b in zip(want.to_tuple(), got.to_tuple(), strict=True))
        new = model(torch.tensor([[28, 3, 31, 29, 0, 0]]))
        # A token whose vector is that of an old one is that old one, also in what is pooled at the end.
        add_vectors(model, model.get_input_embeddings().weight[[4]].detach(), end=29)
        same = model(torch.tensor([[28, 3, 33, 29, 0, 0]]))
    assert all(torch.equal(a, b) for a, b in zip(want.to_tuple(), same.to_tuple(), strict=True))
    assert not torch.allclose(new[0], want[0])


def test_vectors_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match=r"\(2, 15\); this encoder takes \(N, 16\)"):
        add_vectors(encoder(), torch.zeros(2, 15))
    with pytest.raises(UsageError, match="the number of the end"):
        add_vectors(encoder(eos=2), torch.zeros(2, 16))
    assert encoder(eos=2).get_input_embeddings().num_embeddings == 30


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a photo", [("a photo", False)]),
        ("toy", [("toy", True)]),
        ("<cat>,TOY", [("<cat>", True), (",", False), ("toy", True)]),
        ("toys my_toy toy2 toy-box", [("toys my_toy toy2 toy-box", False)]),
        ("a toy-car.", [("a ", False), ("toy-car", True), (".", False)]),
        ("", []),
    ],
)
def test_words_are_found_whole_and_the_longest_first(text, pieces):
    assert split_words(text, ["toy", "toy-car", "<cat>"]) == pieces


def test_without_new_words_a_text_is_whole():
    assert split_words("a toy", []) == [("a toy", False)]
    assert split_words("", []) == []
