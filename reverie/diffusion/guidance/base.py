"""What guidance by a difference of two estimates has in common: beside the guided estimate, the one that is asked for.

Kinds of it can be put around each other. Each takes its differences from the same estimate, D_c, the one for what is
asked for, and none computes that one twice.
"""

from abc import abstractmethod

from reverie.diffusion.denoisers import Condition, Denoiser, Estimate, Times
from reverie.diffusion.predictions import Data


class Guided(Denoiser):
    """A denoiser that is guided, and knows what it would say without."""

    @abstractmethod
    def both(self, x: Data, t: Times, condition: Condition | None = None) -> tuple[Estimate, Estimate]:
        """Return the estimate for what is asked for, without guidance, and the guided one; arguments as in a call."""

    def forward(self, x: Data, t: Times, condition: Condition | None = None) -> Estimate:
        return self.both(x, t, condition)[1]


def both(denoiser: Denoiser, x: Data, t: Times, condition: Condition | None = None) -> tuple[Estimate, Estimate]:
    """Return a denoiser's estimate without guidance and with it: twice the same of one that has none."""
    if isinstance(denoiser, Guided):
        return denoiser.both(x, t, condition)
    estimate = denoiser(x, t, condition)
    return estimate, estimate
