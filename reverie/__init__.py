"""reverie: diffusion models from the formula to the picture."""

__version__ = "0.1.0"
