"""reverie: diffusion models from the formula to the picture.

    import reverie as rv

    model = rv.load("runs/digits")
    samples = rv.sample(model, 16, classes=7, seed=0)

Whatever is named below is imported when it is first asked for: `import reverie` alone costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PLACES = {
    "reverie.api": ("again", "evaluate", "load", "sample", "save", "train", "tune"),
    "reverie.base.errors": (
        "DataError", "ModelFileError", "NonFiniteError", "OutOfMemoryError", "ReverieError", "Stopped", "StorageError",
        "UsageError",
    ),
    "reverie.base.randomness": ("Noise", "normal", "uniform"),
    "reverie.data": ("open_dataset", "sources"),
    "reverie.diffusion.denoisers": (
        "Clipped", "Denoiser", "Estimate", "FixedBatch", "NetworkDenoiser", "Thresholded",
    ),
    "reverie.diffusion.flow_likelihood": ("Likelihood", "discrete_log_likelihood", "log_likelihood"),
    "reverie.diffusion.guidance.auto": ("AutoGuided",),
    "reverie.diffusion.guidance.classifier": ("ClassifierGuided",),
    "reverie.diffusion.guidance.classifier_free": ("ClassifierFree", "Conditioned"),
    "reverie.diffusion.guidance.gradient": ("Steered",),
    "reverie.diffusion.guidance.interval": ("During", "Interval"),
    "reverie.diffusion.guidance.perturbed": ("Perturbed", "PerturbedGuided"),
    "reverie.diffusion.guidance.rescale": ("Rescaled",),
    "reverie.diffusion.guidance.similarity": ("SimilarityGuided",),
    "reverie.diffusion.k_diffusion": ("from_k_diffusion", "to_k_diffusion"),
    "reverie.diffusion.oracles": ("Mixture",),
    "reverie.diffusion.process": ("diffuse", "posterior"),
    "reverie.diffusion.registry": ("grids", "predictions", "samplers", "schedules", "weights"),
    "reverie.diffusion.samplers.ancestral": ("DDPM",),
    "reverie.diffusion.samplers.base": ("Sampler", "State", "run", "start"),
    "reverie.diffusion.samplers.ddim": ("DDIM", "DDIMInversion"),
    "reverie.diffusion.schedules": ("Schedule", "Table"),
    "reverie.models.card": ("Card",),
    "reverie.models.diffusers_scheduler": ("as_scheduler",),
    "reverie.models.inspect": ("describe", "describe_text"),
    "reverie.models.model": ("Model", "Samples", "to_uint8"),
    "reverie.models.pictures": ("animation", "grid_picture", "read_provenance", "write_pictures"),
    "reverie.networks.dit": ("DiT", "DiTConfig"),
    "reverie.networks.edm2": ("EDM2", "EDM2Config"),
    "reverie.networks.mlp": ("MLP", "MLPConfig"),
    "reverie.networks.unet": ("UNet", "UNetConfig"),
}  # fmt: skip
_PLACE = {name: module for module, names in _PLACES.items() for name in names}

__all__ = sorted([*_PLACE, "networks"])


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is."""
    if name == "networks":  # the room of that name, which is its registry as well
        return import_module("reverie.networks")
    if name not in _PLACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_PLACE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return what can be asked for."""
    return sorted({*globals(), *__all__})
