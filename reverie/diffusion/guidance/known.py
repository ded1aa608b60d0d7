r"""What is known of the data, held: inpainting by replacement.

    D_k(x) = m D(x) + (1 - m) k,                                                                     (1)

with k the known data and m one where it is to be made anew. The noise that goes with the estimate is made to agree,
so that any sampler walks the known part along its own straight line, and ends there.

References:
    Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021), appendix I.2
    https://arxiv.org/abs/2011.13456
    RePaint: Inpainting using Denoising Diffusion Probabilistic Models (Lugmayr et al., 2022)
    https://arxiv.org/abs/2201.09865
"""

import torch
from jaxtyping import Float
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.diffusion.denoisers import Condition, Denoiser, Estimate, Times, with_x0
from reverie.diffusion.predictions import Data


class Known(Denoiser):
    """Another denoiser, its x_0 put back where it is known: (1).

    Arguments:
        denoiser: The denoiser to correct.
        known: The data (*D), the same for every sample.
        mask: One where it is to be made anew, zero where it is known; broadcasts over (*D).

    Raises:
        UsageError: The mask does not go with the data.

    Example:
        >>> from reverie.diffusion import oracles
        >>> from reverie.diffusion.schedules import Flow
        >>> point = oracles.Mixture(torch.ones(1, 2), torch.zeros(1), torch.ones(1), Flow())
        >>> held = Known(point, torch.tensor([5.0, 5.0]), torch.tensor([0.0, 1.0]))
        >>> held(torch.zeros(1, 2), torch.ones(1).double()).x0
        tensor([[5., 1.]])
    """

    def __init__(self, denoiser: Denoiser, known: Float[Tensor, "*d"], mask: Float[Tensor, "..."]) -> None:
        super().__init__()
        if torch.broadcast_shapes(known.shape, mask.shape) != known.shape:
            raise UsageError(f"the mask is {tuple(mask.shape)}, the data {tuple(known.shape)}; they must go together")
        self.denoiser, self.schedule = denoiser, denoiser.schedule
        self.known, self.mask = known, mask

    def forward(self, x: Data, t: Times, condition: Condition | None = None) -> Estimate:
        estimate = self.denoiser(x, t, condition)
        x0 = torch.lerp(self.known.to(x), estimate.x0, self.mask.to(x))
        return with_x0(estimate, x0, x, t, self.schedule)
