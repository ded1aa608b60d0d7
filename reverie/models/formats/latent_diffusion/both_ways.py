"""Tensors from the original layout to the new names, and back."""

from collections.abc import Callable, Mapping

from torch import Tensor

from reverie.base.errors import ModelFileError
from reverie.models.formats.latent_diffusion import autoencoder_names, text_names, unet_names
from reverie.models.formats.latent_diffusion.layout import TEXTS, UNET, VAE, Family, Layout, describe
from reverie.models.formats.latent_diffusion.renaming import Shape, Shapes, convert, renamed, revert


def from_original(layout: Layout, read: Callable[[str], Tensor], average: bool = False) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each part under their new names.

    Arguments:
        layout: What the file is.
        read: Returns the tensor of an old name; with a mapped file nothing is copied but what changes its form.
        average: The U-Net's averaged weights instead of the others.

    Raises:
        ModelFileError: There are no averaged weights.
    """
    rules = dict(layout.rules)
    if average:
        if not layout.averaged:
            raise ModelFileError("the file has no averaged weights (model_ema) of its whole U-Net")
        rules["unet"] = layout.averaged
    return {part: convert(made, read) for part, made in rules.items()}


def to_original(
    layout: Layout, parts: Mapping[str, Mapping[str, Tensor]], carried: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return a file's tensors in the original layout.

    Arguments:
        layout: What the file is to be: read from one, or made by `layout_of`.
        parts: The tensors of each part, by their new names.
        carried: Tensors that go along under their old names: those that `layout.left` lists.

    Raises:
        ModelFileError: Parts or tensors are missing, left over or of another shape.
    """
    if parts.keys() != layout.rules.keys():
        raise ModelFileError(f"the parts are {', '.join(parts)}; the layout has {', '.join(layout.rules)}")
    tensors: dict[str, Tensor] = {}
    for part, rules in layout.rules.items():
        tensors |= revert(rules, parts[part])
    if twice := tensors.keys() & (carried or {}).keys():
        raise ModelFileError(f"{sorted(twice)[0]} is carried, and is of a part as well")
    return tensors | dict(carried or {})


def layout_of(family: Family, parts: Mapping[str, Shapes], v_prediction: bool = False) -> Layout:
    """Return the layout that a model has in the original names which never was in them.

    Arguments:
        family: Which Stable Diffusion.
        parts: The shapes of each part's tensors, by their new names.
        v_prediction: The U-Net predicts v; XL needs a mark for it, an empty tensor `v_pred` to be carried.

    Raises:
        ModelFileError: They are not put together as that family is.
    """
    prefixes = {part: (prefix, open_clip) for prefix, (part, open_clip) in TEXTS[family].items()}
    shapes: dict[str, Shape] = {}
    for part, held in parts.items():
        if part in ("unet", "vae"):
            prefix, names = (UNET, unet_table(held)) if part == "unet" else (VAE, vae_table(held))
            if family == "autoencoder":
                prefix = ""
        elif part in prefixes:
            prefix, open_clip = prefixes[part]
            layers = text_names.count(held, "text_model.encoder.layers.{}.layer_norm1.weight")
            names = text_names.open_table(layers) if open_clip else {"text_model": "text_model"}
        else:
            raise ModelFileError(f"{family} has no part {part!r}")
        shapes |= old_shapes(held, prefix, names)
    metadata = {"modelspec.prediction_type": "v" if v_prediction else "epsilon"}
    layout = describe(shapes, metadata)
    if layout is None or layout.family != family:
        raise ModelFileError(f"the model is {'none' if layout is None else layout.family}, not {family}")
    return layout


def old_shapes(held: Shapes, prefix: str, table: Mapping[str, str]) -> dict[str, Shape]:
    """Return the old names of a part with their shapes, from the new ones."""
    back = {new.format(part): old for old, new in table.items() for part in ("qkv" if "{}" in new else "q")}
    shapes: dict[str, Shape] = {}
    for name, shape in held.items():
        old = renamed(name, back)
        if old is None:
            raise ModelFileError(f"{name} has no name in the original layout")
        form = text_names.open_form(old)
        if old.endswith(autoencoder_names.MATRICES):
            shape = (*shape, 1, 1)
        elif form == "thirds":
            shape = (3 * shape[0], *shape[1:])
        elif form == "transposed":
            shape = tuple(shape)[::-1]
        shapes[prefix + old] = tuple(shape)
    return shapes


def unet_table(held: Shapes) -> dict[str, str]:
    """Return the names of a U-Net, from those that it has in diffusers."""
    levels = text_names.count(held, "down_blocks.{}.resnets.0.conv1.weight")
    layers = text_names.count(held, "down_blocks.0.resnets.{}.conv1.weight")
    return unet_names.table([f"down_blocks.{i}.attentions.0.norm.weight" in held for i in range(levels)], layers)


def vae_table(held: Shapes) -> dict[str, str]:
    """Return the names of an autoencoder, from those that it has in diffusers."""
    levels = text_names.count(held, "encoder.down_blocks.{}.resnets.0.conv1.weight")
    layers = text_names.count(held, "encoder.down_blocks.0.resnets.{}.conv1.weight")
    return autoencoder_names.table(levels, layers)
