"""Small Stable Diffusions with random weights, made by diffusers and transformers."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from reverie.models.clip_tokens import byte_signs

WORDS = ("cat", "red", "dog", "mars")


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return a small vocabulary of CLIP's kind, in which a few words are whole."""
    signs = list(byte_signs())
    merges = []
    for word in WORDS:
        *head, last = [*word[:-1], f"{word[-1]}</w>"]
        piece = head[0]
        for part in [*head[1:], last]:
            if (piece, part) not in merges:
                merges.append((piece, part))
            piece += part
    entries = [*signs, *(f"{sign}</w>" for sign in signs), *dict.fromkeys("".join(two) for two in merges)]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    return {entry: i for i, entry in enumerate(entries)}, merges


def tokenizer(folder: Path, pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """Return a tokenizer, having written it as the folders on the hub have it."""
    folder.mkdir(parents=True, exist_ok=True)
    entries, merges = vocabulary()
    (folder / "vocab.json").write_text(json.dumps(entries))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(two) for two in merges) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": pad}))
    return CLIPTokenizer(vocab=entries, merges=merges, pad_token=pad, model_max_length=77)


def text_encoder(width: int, pooled: bool, layers: int = 3) -> CLIPTextModel | CLIPTextModelWithProjection:
    """Return a text encoder with random weights."""
    entries, _ = vocabulary()
    config = CLIPTextConfig(
        vocab_size=len(entries), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, projection_dim=width, hidden_act="gelu" if pooled else "quick_gelu",
        bos_token_id=len(entries) - 2, eos_token_id=len(entries) - 1, pad_token_id=1,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if pooled else CLIPTextModel)(config)


def scheduler(prediction: str = "epsilon") -> DDIMScheduler:
    """Return Stable Diffusion's schedule, its last step to the data."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=True,
        steps_offset=1, timestep_spacing="leading", prediction_type=prediction,
    )  # fmt: skip


def unet(cross: int, **settings: object) -> UNet2DConditionModel:
    """Return a small U-Net with random weights."""
    plan = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (32, 64), "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": cross,
        "attention_head_dim": 8, "norm_num_groups": 32, **settings,
    }  # fmt: skip
    return UNet2DConditionModel(**plan)


def vae(scale: float = 0.18215) -> AutoencoderKL:
    """Return a small autoencoder with random weights, 4 pixels to a latent."""
    return AutoencoderKL(
        block_out_channels=(32, 32, 64), layers_per_block=1, latent_channels=4, norm_num_groups=32, sample_size=32,
        scaling_factor=scale, down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip


def stable_diffusion(folder: Path, prediction: str = "epsilon", **settings: object) -> StableDiffusionPipeline:
    """Return a pipeline of Stable Diffusion 1 or 2, having saved it."""
    torch.manual_seed(0)
    pipeline = StableDiffusionPipeline(
        vae=vae(), text_encoder=text_encoder(64, pooled=False), tokenizer=tokenizer(folder / "tokenizer"),
        unet=unet(64, **settings), scheduler=scheduler(prediction), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    return saved(pipeline, folder)


def stable_diffusion_xl(folder: Path) -> StableDiffusionXLPipeline:
    """Return a pipeline of Stable Diffusion XL, having saved it."""
    torch.manual_seed(0)
    added = {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "use_linear_projection": True,
        "projection_class_embeddings_input_dim": 6 * 8 + 64, "transformer_layers_per_block": [1, 2],
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": [1, 2],
        "block_out_channels": (64, 128),
    }  # fmt: skip
    pipeline = StableDiffusionXLPipeline(
        vae=vae(0.13025), text_encoder=text_encoder(64, pooled=False), text_encoder_2=text_encoder(64, pooled=True),
        tokenizer=tokenizer(folder / "tokenizer"), tokenizer_2=tokenizer(folder / "tokenizer_2", "!"),
        unet=unet(128, **added), scheduler=scheduler(),
    )  # fmt: skip
    return saved(pipeline, folder)


def saved(pipeline, folder: Path):
    """Return a pipeline, having saved it, with tokenizers as the folders on the hub have them."""
    for part in ("unet", "vae"):  # the zeros of the start would hide everything
        for p in getattr(pipeline, part).parameters():
            if p.ndim > 1:
                torch.nn.init.normal_(p, std=0.5 * p[0].numel() ** -0.5)
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    for name in ("tokenizer", "tokenizer_2"):
        if (folder / name).is_dir():
            tokenizer(folder / name, "!" if name == "tokenizer_2" else "<|endoftext|>")
    return pipeline


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folders of Stable Diffusion 1, 2 and XL, each with diffusers' pipeline of it."""
    root = tmp_path_factory.mktemp("stable")
    second = {"use_linear_projection": True, "attention_head_dim": [1, 2], "block_out_channels": (64, 128)}
    return {
        "sd1": (root / "sd1", stable_diffusion(root / "sd1")),
        "sd2": (root / "sd2", stable_diffusion(root / "sd2", "v_prediction", **second)),
        "sdxl": (root / "sdxl", stable_diffusion_xl(root / "sdxl")),
    }
