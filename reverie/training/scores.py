r"""Runs of score matching: an NCSN, by the objectives of `reverie.diffusion.score_matching`.

Where nothing else is said, noise is the VE schedule's, from 0.01 up to the largest distance between two of the data, so
that annealed Langevin dynamics can go from any image to any other (technique 1 of 2020); the network predicts as EDM's
does, and the model is sampled by annealed Langevin dynamics.

References:
    Generative Modeling by Estimating Gradients of the Data Distribution (Song & Ermon, 2019)
    https://arxiv.org/abs/1907.05600
    Improved Techniques for Training Score-Based Generative Models (Song & Ermon, 2020), techniques 1 and 3
    https://arxiv.org/abs/2006.09011
"""

import math

import torch

from reverie.base.errors import UsageError
from reverie.base.randomness import generator
from reverie.data.dataset import Dataset
from reverie.diffusion.score_matching import Denoising, Implicit, ScoreMatching, Sliced
from reverie.models.card import SamplingDefaults
from reverie.training.config import TrainConfig
from reverie.training.update import to_unit

MOST = 256  # elements that a sample of implicit score matching may have
LOOKED_AT = 1000  # images, for the largest distance between two of them
LANGEVIN = SamplingDefaults(sampler="langevin", grid="log-snr", steps=30)


def make_score(config: TrainConfig) -> ScoreMatching:
    """Return the objective of score matching that a configuration names.

    Where no weight of the noise levels is asked for, it is `edm` for denoising with EDM's output, which makes the
    errors of that output count alike at all levels, and NCSN's `variance` elsewhere.
    """
    alike = config.objective == "denoising-score" and config.prediction == "edm" and config.start is None
    weight = config.level_weight or ("edm" if alike else "variance")
    if config.objective == "implicit-score":
        return Implicit(weight, MOST)
    return Sliced(weight, slices=config.slices or 1) if config.objective == "sliced-score" else Denoising(weight)


def largest_noise(config: TrainConfig, dataset: Dataset) -> dict[str, float | int | bool]:
    """Return the options of the VE schedule for some data: the largest distance between two of its images.

    Raises:
        UsageError: The images have too many elements for the objective.
    """
    elements = math.prod(dataset.shape)
    if config.objective == "implicit-score" and elements > MOST:
        raise UsageError(
            f"objective implicit-score takes a backward pass for each element, and these images have {elements}, more "
            f"than {MOST}; take sliced-score, or a smaller --size"
        )
    if config.schedule != "ve":
        return {}
    rows = generator(0, "largest noise").permutation(len(dataset))[:LOOKED_AT].tolist()
    points = to_unit(dataset.images(rows)).flatten(1)
    largest = float(torch.cdist(points, points).max())
    return {"sigma_max": float(f"{largest:.3g}")} if largest > 1 else {}
