r"""The exact consistency function of an oracle: where its probability-flow ODE ends.

    f(x_t, t) = x_0 along dy/dphi = v(y, phi)                                                       (1)

(probability_flow.py, eq. 1): for a Gaussian in closed form (oracles.py, eq. 2), for anything else by fine
integration with an error that is set. It is what every trained consistency function is measured against.

References:
    Consistency Models (Song et al., 2023), section 3, definition
    https://arxiv.org/abs/2303.01469
"""

import torch
from torch import Tensor

from reverie.base.randomness import Noise
from reverie.diffusion.denoisers import Condition, Denoiser, Estimate, Times
from reverie.diffusion.oracles import Gaussian, refuse
from reverie.diffusion.predictions import Data, per_sample
from reverie.diffusion.samplers.adaptive import Adaptive


class Exact(Denoiser):
    """The probability-flow map of another denoiser, as a denoiser: its x0 is f of (1), its eps what makes x of it.

    Arguments:
        denoiser: An oracle.
        tolerance: The error of the integration, relative and absolute, as far as x's dtype allows; of no effect on a
            Gaussian.

    Example:
        >>> from reverie.diffusion.schedules import EDM
        >>> bell = Gaussian(torch.zeros(1), torch.ones(1, 1), EDM())
        >>> Exact(bell)(torch.tensor([[5.0**0.5]]), torch.tensor([2 / 80]).double()).x0  # std sqrt(1 + 2^2) there
        tensor([[1.]])
    """

    def __init__(self, denoiser: Denoiser, tolerance: float = 1e-6) -> None:
        super().__init__()
        self.denoiser, self.schedule, self.tolerance = denoiser, denoiser.schedule, tolerance

    @torch.no_grad()
    def forward(self, x: Data, t: Times, condition: Condition | None = None) -> Estimate:
        refuse(condition)
        x0 = self.end(x, t)
        alpha, sigma = (per_sample(value, x) for value in self.schedule.marginal(t))
        return Estimate(x0, torch.where(sigma > 0, (x - alpha * x0) / sigma, 0))

    def end(self, x: Data, t: Times) -> Tensor:
        """Return where the path through x at t ends (B, *D)."""
        if isinstance(self.denoiser, Gaussian):
            return self.denoiser.flow(x, t, torch.zeros_like(t))
        least = 20 * torch.finfo(x.dtype).eps  # what the number format allows
        solver = Adaptive(max(self.tolerance, least), max(self.tolerance, least))
        state = solver.init(x, t.cpu())
        return solver.step(self.denoiser, state, 0.0, Noise([0] * len(x))).x
