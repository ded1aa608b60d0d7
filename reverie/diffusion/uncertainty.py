r"""A loss weighed by how well each noise level can be done at all, which is learned along with the network.

    L = w e / exp(u(c)) + u(c),    e the error, w its weight, c the network's clock (ln(sigma) / 4),     (1)

whose minimum over u is at exp(u) = E[w e | c]: then every noise level has the same part, 1, in the loss and in
its gradient. u is a small network of the clock alone, of which sampling needs nothing: it belongs to the objective.

References:
    Analyzing and Improving the Training Dynamics of Diffusion Models (Karras et al., 2023), eq. 14 to 16 and 21
    https://arxiv.org/abs/2312.02696
    Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics (Kendall et al., 2018)
    https://arxiv.org/abs/1705.07115
"""

from jaxtyping import Float
from torch import Tensor, nn

from reverie.base.errors import UsageError
from reverie.diffusion.denoisers import Condition, Denoiser, Times
from reverie.diffusion.objectives import Objective
from reverie.diffusion.predictions import Data, EDMOutput


class Weighed(Objective):
    """Another objective, weighed by a learned uncertainty: equation (1).

    Its `learned` is trained along with the network, and kept beside it.

    Arguments:
        objective: The loss that is weighed; on EDM's own output the weight of EDM is 1.
        uncertainty: The network u: from the clock (B,) to the logarithm of the loss that is to be expected (B,).

    Example:
        >>> import torch
        >>> from reverie.diffusion.objectives import Simple
        >>> from reverie.diffusion.oracles import Mixture
        >>> from reverie.diffusion.schedules import EDM
        >>> class Two(nn.Module):
        ...     def forward(self, clock): return 0 * clock + 2
        >>> point = Mixture(torch.ones(1, 2), torch.zeros(1), torch.ones(1), EDM())
        >>> Weighed(Simple("edm"), Two())(point, torch.ones(1, 2), torch.tensor([0.01]), torch.ones(1, 2))
        tensor([2.])
    """

    def __init__(self, objective: Objective, uncertainty: nn.Module) -> None:
        self.objective, self.uncertainty = objective, uncertainty
        self.learned = uncertainty
        self.draws, self.denoises = objective.draws, objective.denoises

    def begin(self, step: int) -> None:
        self.objective.begin(step)

    def __call__(
        self, denoiser: Denoiser, x0: Data, t: Times, eps: Data, condition: Condition | None = None
    ) -> Float[Tensor, " b"]:
        loss = self.objective(denoiser, x0, t, eps, condition)
        if denoiser.schedule.zero_terminal_snr:
            raise UsageError("the uncertainty's clock has no end on a schedule that ends at zero signal; use edm or vp")
        u = self.uncertainty(EDMOutput().clock(denoiser.schedule, t).to(loss)).to(loss)
        return loss * (-u).exp() + u
