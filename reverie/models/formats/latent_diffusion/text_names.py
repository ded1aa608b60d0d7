"""Text encoders: CLIP in transformers' names under a prefix, and OpenCLIP in its own names.

OpenCLIP keeps queries, keys and values of an attention in one matrix, and multiplies by its projection from
the right where transformers does from the left.

References:
    Learning Transferable Visual Models From Natural Language Supervision (Radford et al., 2021)
    https://arxiv.org/abs/2103.00020
    OpenCLIP
    https://github.com/mlfoundations/open_clip
"""

from typing import Any

from reverie.base.errors import ModelFileError
from reverie.models.formats.latent_diffusion.renaming import Form, Shapes, sized

OPEN = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection.weight",
}
LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
    "attn.in_proj_weight": "self_attn.{}_proj.weight",
    "attn.in_proj_bias": "self_attn.{}_proj.bias",
}
HEAD_DIM = 64  # of every text encoder that Stable Diffusion has
MAX_LAYERS = 256
TOKENS = "text_model.embeddings.token_embedding.weight"
POSITIONS = "text_model.embeddings.position_embedding.weight"


def open_layers(shapes: Shapes) -> int:
    """Return the number of layers of an OpenCLIP text encoder."""
    return count(shapes, "transformer.resblocks.{}.ln_1.weight")


def count(shapes: Shapes, pattern: str) -> int:
    """Return how many of a numbered name there are, from 0 on."""
    return next(i for i in range(MAX_LAYERS + 1) if i == MAX_LAYERS or pattern.format(i) not in shapes)


def open_table(layers: int) -> dict[str, str]:
    """Return the new beginning of a name for each of OpenCLIP's; {} stands for q, k and v.

    Example:
        >>> open_table(1)["transformer.resblocks.0.attn.in_proj_bias"]
        'text_model.encoder.layers.0.self_attn.{}_proj.bias'
    """
    names = dict(OPEN)
    for layer in range(layers):
        old, new = f"transformer.resblocks.{layer}", f"text_model.encoder.layers.{layer}"
        names |= {f"{old}.{a}": f"{new}.{b}" for a, b in LAYER.items()}
    return names


def open_form(name: str) -> Form:
    """Return what becomes of a tensor of OpenCLIP."""
    if name.endswith(("attn.in_proj_weight", "attn.in_proj_bias")):
        return "thirds"
    return "transposed" if name.endswith("text_projection") else "same"


def config(shapes: Shapes, open_clip: bool) -> dict[str, Any]:
    """Return transformers' config of a CLIP text encoder.

    Arguments:
        shapes: Its shapes, in transformers' names.
        open_clip: It was trained by OpenCLIP, with its activation: gelu, where OpenAI's is an approximation.

    Raises:
        ModelFileError: It is no CLIP text encoder.
    """
    (vocabulary, width), (length, _) = sized(shapes, TOKENS, 2), sized(shapes, POSITIONS, 2)
    inner = sized(shapes, "text_model.encoder.layers.0.mlp.fc1.weight", 2)[0]
    if width % HEAD_DIM:
        raise ModelFileError(f"its text encoder has {width} channels, which {HEAD_DIM}, those of a head, do not divide")
    projection = shapes.get("text_projection.weight")
    return {
        "architectures": ["CLIPTextModelWithProjection" if projection else "CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 2,  # as all published have it: the end is then the largest token, whatever its number
        "hidden_act": "gelu" if open_clip else "quick_gelu",
        "hidden_size": width,
        "intermediate_size": inner,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": length,
        "model_type": "clip_text_model",
        "num_attention_heads": width // HEAD_DIM,
        "num_hidden_layers": count(shapes, "text_model.encoder.layers.{}.layer_norm1.weight"),
        "pad_token_id": 1,
        "projection_dim": projection[0] if projection else width,
        "vocab_size": vocabulary,
    }
