r"""Guidance rescale: a guided estimate brought back to the spread that it had without guidance.

    x_0 <- (phi std(x_c) / std(x_0) + 1 - phi) x_0,                                                 (1)

std over all numbers of a sample, x_c the estimate for what is asked for. Guidance adds a difference to the estimate,
and the larger its weight the larger the estimate: pictures come out with too much contrast, above all where the
schedule ends at zero signal. phi = 0 leaves them so, phi = 1 takes the growth back whole; the paper takes 0.7. Programs
differ in what they scale; here it is x_0, whatever the network predicts, with the noise made to agree.

References:
    Common Diffusion Noise Schedules and Sample Steps are Flawed (Lin et al., 2024), section 3.4, eq. 15 and 16
    https://arxiv.org/abs/2305.08891
"""

import torch

from reverie.base.errors import UsageError
from reverie.diffusion.denoisers import Condition, Denoiser, Estimate, Times, with_x0
from reverie.diffusion.guidance.base import Guided, both
from reverie.diffusion.predictions import Data, per_sample


class Rescaled(Guided):
    """A guided denoiser, its estimate brought back to the spread of the one without guidance: equation (1).

    Arguments:
        denoiser: What is guided: by classifier-free guidance, by a worse model, by a perturbed one, or by several.
        rescale: phi, in [0, 1].

    Raises:
        UsageError: phi lies elsewhere.

    Example:
        >>> from reverie.diffusion.guidance.perturbed import PerturbedGuided
        >>> from reverie.diffusion.oracles import Mixture
        >>> from reverie.diffusion.schedules import Flow
        >>> means = torch.tensor([[[1.0, -1.0]], [[0.5, -0.5]]])
        >>> good, bad = (Mixture(mean, torch.zeros(1), torch.ones(1), Flow()) for mean in means)
        >>> guided = PerturbedGuided(good, bad, scale=3.0)
        >>> Rescaled(guided, 1.0)(torch.zeros(1, 2), torch.tensor([0.5]).double()).x0
        tensor([[ 1., -1.]])
    """

    def __init__(self, denoiser: Denoiser, rescale: float) -> None:
        super().__init__()
        if not 0 <= rescale <= 1:
            raise UsageError(f"guidance_rescale is {rescale}; it must lie in [0, 1] (0 means none)")
        self.denoiser, self.schedule, self.rescale = denoiser, denoiser.schedule, rescale

    def both(self, x: Data, t: Times, condition: Condition | None = None) -> tuple[Estimate, Estimate]:
        asked, guided = both(self.denoiser, x, t, condition)
        if self.rescale == 0:
            return asked, guided
        wanted, found = (estimate.x0.flatten(1).std(1) for estimate in (asked, guided))
        ratio = torch.where(found > 0, wanted / found, 1.0)
        x0 = per_sample(self.rescale * ratio + (1 - self.rescale), x) * guided.x0
        return asked, with_x0(guided, x0, x, t, self.schedule)
