r"""Deep features used again: what the lower levels of a U-Net say changes little from one step to the next.

    y_1(x_k) ~ y_1(x_m),    m = N floor(k / N),                                                          (1)

with y_1 what comes up to the first level at call k: it is worked out at every N-th call, and between them the first
level alone is, on the way down and up. The picture changes, by how much docs/speed.md says; so it is
never done unasked.

References:
    DeepCache: Accelerating Diffusion Models for Free (Ma et al., 2023), section 3.2
    https://arxiv.org/abs/2312.00858
"""

from torch import nn

from reverie.base.errors import UsageError
from reverie.diffusion.denoisers import Condition, Denoiser, Estimate, Times
from reverie.diffusion.predictions import Data
from reverie.diffusion.samplers.base import Sampler
from reverie.models.speed import Speed
from reverie.networks.captioned import Captioned
from reverie.networks.unet import Deep, UNet, keeping_deep

MAX_EVERY = 1000


class Reusing(Denoiser):
    """A U-Net's denoiser whose lower levels are asked at every N-th call: (1).

    Arguments:
        denoiser: The network's denoiser.
        every: N.
    """

    def __init__(self, denoiser: Denoiser, every: int) -> None:
        super().__init__()
        self.denoiser, self.schedule, self.every = denoiser, denoiser.schedule, every
        self.calls, self.deep = 0, Deep()

    def forward(self, x: Data, t: Times, condition: Condition | None = None) -> Estimate:
        # Guidance that begins or ends within an interval changes the rows: then all is asked.
        if self.calls % self.every == 0 or not self.deep.of(x):
            self.deep, self.calls = Deep(), 0
        self.calls += 1
        with keeping_deep(self.deep):
            return self.denoiser(x, t, condition)


def has_deep(network: nn.Module) -> bool:
    """Whether a network has levels below its first that can be passed over."""
    unet = network.image if isinstance(network, Captioned) else network
    if not isinstance(unet, UNet) or len(unet.config.channels) < 2:
        return False
    return not any("Skip" in kind for kind in (*unet.config.down_types, *unet.config.up_types))


def settle_reuse(every: int | None, network: nn.Module, sampler: Sampler, speed: Speed, perturbed: bool) -> int:
    """Return N, 1 for none, having refused what would have no effect or no meaning.

    Raises:
        UsageError: It is so.
    """
    if every is None or every == 1:
        return 1
    if isinstance(every, bool) or not isinstance(every, int) or not 2 <= every <= MAX_EVERY:
        raise UsageError(f"cache_every is {every!r}; it must be a whole number in 2..{MAX_EVERY}, or left out")
    if speed.name != "fast":
        raise UsageError(f"cache_every {every} changes the picture, which speed exact does not; ask for speed fast")
    if not has_deep(network):
        raise UsageError(
            f"cache_every {every} has no effect: this network has no lower levels to pass over; leave it out"
        )
    if sampler.adaptive:
        raise UsageError(
            "cache_every does not go with a sampler that chooses its own steps; take another, or leave it out"
        )
    if perturbed:
        raise UsageError(
            "cache_every does not go with perturbed, whose calls differ below the first level alone; choose one"
        )
    return every
