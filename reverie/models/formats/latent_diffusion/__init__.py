"""Stable Diffusion's original layout: one file for the U-Net, the autoencoder and the text encoders.

    layout = describe(shapes, metadata)             what it is, and where each tensor goes; None where it is none
    parts = from_original(layout, read)             {"unet": {...}, "vae": {...}, "text_encoder": {...}, ...}
    tensors = to_original(layout, parts, carried)   and back; `layout.left` says what to carry along
    layout = layout_of("sd1", shapes of the parts)  for a model that never was in one file

| file | what it holds |
|---|---|
| `layout.py` | `describe`: the family, the configs, the rules, what is left over; how each is decided |
| `both_ways.py` | `from_original`, `to_original`, `layout_of` |
| `renaming.py` | `Rule`: a tensor's name and form there and here |
| `unet_names.py`, `autoencoder_names.py`, `text_names.py` | the names and the config of each part |
"""

from reverie.models.formats.latent_diffusion.both_ways import from_original, layout_of, to_original
from reverie.models.formats.latent_diffusion.layout import Family, Layout, describe
from reverie.models.formats.latent_diffusion.renaming import Rule

__all__ = ["Family", "Layout", "Rule", "describe", "from_original", "layout_of", "to_original"]
