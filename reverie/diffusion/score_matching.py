r"""Score matching: fitting a score s(x, t) to that of the noisy data, s* = grad ln p_t, which nobody knows.

What one would minimise is the Fisher divergence (1); what one can minimise differs from it by a constant:

    J     = 1/2 E |s - s*|^2,                                                                       (1)
    J_ism = E [tr ds/dx + 1/2 |s|^2]                    = J - 1/2 E |s*|^2,                         (2)
    J_ssm = E [v^T ds/dx v + 1/2 (v^T s)^2],  E vv^T = I,    the same in expectation over v,        (3)
    J_ssm-vr: (3) with 1/2 |s|^2, the expectation over v, for its second term,                      (4)
    J_dsm = 1/2 E |s + eps / sigma|^2                   = J + 1/2 E |eps / sigma|^2 - 1/2 E |s*|^2. (5)

They are implicit, sliced and denoising score matching. Expectations are over x_t = alpha x_0 + sigma eps, at
each time with a weight lambda(t); at the least times of a schedule x_t is as good as the data itself. All of
them are divided by the number of a sample's elements, like the other losses here.

A denoiser's score is s = -E / sigma, E being its noise. With lambda = sigma^2, the usual weight, (5) is
1/2 |E - eps|^2: half of L_simple for eps (objectives.py). Only (2) to (4) do without eps, at the price of a
second derivative through the network.

References:
    Estimation of Non-Normalized Statistical Models by Score Matching (Hyvarinen, 2005), theorem 1
    https://jmlr.org/papers/v6/hyvarinen05a.html
    A Connection Between Score Matching and Denoising Autoencoders (Vincent, 2011)
    https://doi.org/10.1162/NECO_a_00142
    Sliced Score Matching: A Scalable Approach to Density and Score Estimation (Song et al., 2019), theorem 1
    https://arxiv.org/abs/1905.07088
    Generative Modeling by Estimating Gradients of the Data Distribution (Song & Ermon, 2019), eq. 1-3, 5 and 6
    https://arxiv.org/abs/1907.05600
    Maximum Likelihood Training of Score-Based Diffusion Models (Song et al., 2021), theorem 1
    https://arxiv.org/abs/2101.09258
"""

from collections.abc import Callable
from hashlib import blake2b
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from reverie.base.errors import UsageError
from reverie.base.randomness import normal
from reverie.base.registry import nearest
from reverie.diffusion.denoisers import Condition, Denoiser, Times
from reverie.diffusion.objectives import Objective
from reverie.diffusion.predictions import Data, per_sample
from reverie.diffusion.process import diffuse
from reverie.diffusion.schedules import Schedule

Field = Callable[[Tensor], Tensor]  # a score at one time for each sample: (B, *D) -> (B, *D)
Loss = Float[Tensor, " b"]
Directions = Float[Tensor, "m b *d"]
LevelWeight = Callable[[Schedule, Tensor], Tensor]  # lambda: (schedule, t) -> (B,)
Kind = Literal["rademacher", "gaussian"]

LEVEL_WEIGHTS: dict[str, LevelWeight] = {
    "variance": lambda schedule, t: schedule.variance(t),  # NCSN's: all levels count alike
    # EDM's, of data with a deviation of 1/2: the errors of its output count alike at all levels.
    "edm": lambda schedule, t: schedule.variance(t) * (1 + schedule.variance(t) / (0.5 * schedule.alpha(t)).square()),
    "uniform": lambda schedule, t: torch.ones_like(t),  # the Fisher divergence itself
    "likelihood": lambda schedule, t: schedule.diffusion(t).square(),  # a bound on -ln p(x_0), its mean over t
}


# The score, and what is made of it ----------------------------------------------------------------


def score(denoiser: Denoiser, x: Data, t: Times, condition: Condition | None = None) -> Data:
    """Return a denoiser's score (B, *D) of noisy data x (B, *D) at times t (B,): -E / sigma.

    Raises:
        UsageError: sigma is 0 at one of the times.

    Example:
        >>> from reverie.diffusion.oracles import Mixture
        >>> from reverie.diffusion.schedules import VE
        >>> bell = Mixture(torch.zeros(1, 2), torch.ones(1), torch.ones(1), VE())
        >>> score(bell, torch.ones(1, 2), torch.tensor([1e-9]).double())
        tensor([[-1., -1.]])
    """
    sigma = per_sample(denoiser.schedule.sigma(t), x)
    if not bool((sigma > 0).all()):
        least = denoiser.schedule.t_min
        raise UsageError(
            f"a score was asked for at t = {t.min():g}, where sigma is 0; take a later t, such as {least:g}"
        )
    return -denoiser(x, t, condition).eps / sigma


def fisher_divergence(
    denoiser: Denoiser, truth: Denoiser, x: Data, t: Times, condition: Condition | None = None
) -> Loss:
    """Return 1/2 |s - s*|^2 over the elements' number (B,): equation (1), where the truth is an oracle.

    Arguments:
        denoiser: Whose score is judged.
        truth: Whose score is right.
        x: Noisy data (B, *D), drawn from the truth at its times.
        t: Times (B,).
        condition: The denoiser's.
    """
    error = score(denoiser, x, t, condition) - score(truth, x, t)
    return error.square().flatten(1).mean(1) / 2


def curvature(field: Field, x: Data, directions: Directions) -> tuple[Data, Float[Tensor, "m b"]]:
    """Return the score (B, *D) at x and v^T ds/dx v (M, B) for directions v (M, B, *D), both differentiable.

    Attention is computed in its plain form, as PyTorch's fused kernels have no second derivative; nor has a
    network under torch.compile.
    """
    train = torch.is_grad_enabled()
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        x = x.detach().requires_grad_()
        s = field(x)
        products = []
        for v in directions:
            (pulled,) = torch.autograd.grad(
                (s * v).sum(), x, create_graph=train, retain_graph=True, materialize_grads=True
            )
            products.append((pulled * v).flatten(1).sum(1))
    return s, torch.stack(products)


def implicit(field: Field, x: Data) -> Loss:
    """Return tr ds/dx + 1/2 |s|^2 over the elements' number (B,): equation (2).

    The trace is exact, and takes a backward pass for each element: for few of them.

    Arguments:
        field: The score, (B, *D) -> (B, *D).
        x: Where (B, *D).

    Example:
        >>> implicit(lambda x: -x, torch.tensor([[1.0, 3.0]])).detach()  # (-2 + 5) / 2
        tensor([1.5000])
    """
    axes = torch.eye(x.shape[1:].numel(), dtype=x.dtype, device=x.device).reshape(-1, 1, *x.shape[1:])
    s, products = curvature(field, x, axes.expand(-1, *x.shape))
    return products.mean(0) + s.square().flatten(1).mean(1) / 2


def sliced(field: Field, x: Data, directions: Directions, reduced: bool = True) -> Loss:
    """Return the mean over M directions of v^T ds/dx v + 1/2 (v^T s)^2, over the elements' number (B,): equation (3).

    Arguments:
        field: The score, (B, *D) -> (B, *D).
        x: Where (B, *D).
        directions: Vectors v (M, B, *D) with E vv^T = I, drawn without regard to x.
        reduced: Put 1/2 |s|^2 for the second term: equation (4). It varies less where |s|^2 is large beside
            ds/dx, as for data of many dimensions; in few it need not.

    Example:
        >>> x, v = torch.tensor([[1.0, 3.0]]), torch.tensor([[[1.0, -1.0]]])
        >>> sliced(lambda x: -x, x, v).detach(), sliced(lambda x: -x, x, v, reduced=False).detach()
        (tensor([1.5000]), tensor([0.]))
    """
    s, products = curvature(field, x, directions)
    projected = s.square().flatten(1).sum(1) if reduced else (s * directions).flatten(2).sum(2).square().mean(0)
    return (products.mean(0) + projected / 2) / x.shape[1:].numel()


def draw_directions(kind: Kind, count: int, eps: Data, seed: int = 0) -> Directions:
    """Return directions (count, B, *D) with E vv^T = I, for losses at a step's noise eps (B, *D).

    They are fixed by the seed and by the bits of the noise: other noise, other directions; the same step
    again, the same ones.

    Arguments:
        kind: rademacher, each element 1 or -1; or gaussian.
        count: Directions for each sample.
        eps: The step's noise.
        seed: Sets streams of directions apart.
    """
    bits = eps.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    z = normal((count, *eps.shape), seed, "directions", blake2b(bits, digest_size=16).hexdigest()).to(eps)
    return z if kind == "gaussian" else torch.where(z < 0, -1.0, 1.0).to(eps)


# Objectives ---------------------------------------------------------------------------------------


class ScoreMatching(Objective):
    """What the objectives of score matching share: the weight of each noise level.

    Arguments:
        weight: lambda(t): variance, sigma^2, which makes the losses of all levels of one size; edm, for EDM's
            output, sigma^2 (1 + 4 sigma^2 / alpha^2); uniform, 1; likelihood, the g^2 of the schedule's equation; or a
            function of (schedule, t).

    Raises:
        UsageError: There is no weight of that name.
    """

    def __init__(self, weight: str | LevelWeight = "variance") -> None:
        if isinstance(weight, str) and weight not in LEVEL_WEIGHTS:
            known = ", ".join(LEVEL_WEIGHTS)
            raise UsageError(f"there is no level weight {weight!r}{nearest(weight, LEVEL_WEIGHTS)} (known: {known})")
        self.weight: LevelWeight = LEVEL_WEIGHTS[weight] if isinstance(weight, str) else weight

    def weighed(self, loss: Loss, denoiser: Denoiser, t: Times) -> Loss:
        """Return the losses (B,), each times the weight of its time."""
        return self.weight(denoiser.schedule, t).to(loss) * loss


class Denoising(ScoreMatching):
    """Denoising score matching (5): half of `Simple("eps")`, or with the weight uniform, half of `Simple("score")`.

    Arguments:
        weight: As of `ScoreMatching`.

    Example:
        >>> from reverie.diffusion.oracles import Mixture
        >>> from reverie.diffusion.schedules import Flow
        >>> point = Mixture(torch.ones(1, 2), torch.zeros(1), torch.ones(1), Flow())
        >>> Denoising()(point, torch.ones(1, 2), torch.tensor([0.5]).double(), torch.ones(1, 2))
        tensor([0.])
    """

    def __call__(self, denoiser: Denoiser, x0: Data, t: Times, eps: Data, condition: Condition | None = None) -> Loss:
        x = diffuse(denoiser.schedule, x0, t, eps)
        error = score(denoiser, x, t, condition) + eps / per_sample(denoiser.schedule.sigma(t), eps)
        return self.weighed(error.square().flatten(1).mean(1) / 2, denoiser, t)


class Implicit(ScoreMatching):
    """Implicit score matching (2), Hyvarinen's: the trace exact, a backward pass for each element.

    Arguments:
        weight: As of `ScoreMatching`.
        most: The most elements that a sample may have: the graphs of all the passes are in memory at once.

    Raises:
        UsageError: The data has more elements than that.

    Example:
        >>> from reverie.diffusion.oracles import Mixture
        >>> from reverie.diffusion.schedules import VE
        >>> bell, t = Mixture(torch.zeros(1, 2), torch.ones(1), torch.ones(1), VE()), torch.tensor([1e-9]).double()
        >>> Implicit("uniform")(bell, torch.tensor([[1.0, 3.0]]), t, torch.zeros(1, 2)).detach()
        tensor([1.5000])
    """

    def __init__(self, weight: str | LevelWeight = "variance", most: int = 256) -> None:
        super().__init__(weight)
        self.most = most

    def __call__(self, denoiser: Denoiser, x0: Data, t: Times, eps: Data, condition: Condition | None = None) -> Loss:
        elements = x0.shape[1:].numel()
        if elements > self.most:
            raise UsageError(
                f"an exact trace of {elements} elements takes as many backward passes, and the limit is "
                f"{self.most}; use Sliced, or raise `most`"
            )
        x = diffuse(denoiser.schedule, x0, t, eps)
        return self.weighed(implicit(lambda x: score(denoiser, x, t, condition), x), denoiser, t)


class Sliced(ScoreMatching):
    """Sliced score matching: (3), or with its variance reduced (4).

    Arguments:
        weight: As of `ScoreMatching`.
        directions: rademacher, whose losses vary less; or gaussian.
        slices: Directions for each sample, a backward pass each.
        reduced: (4) instead of (3).
        seed: Sets streams of directions apart; within one they are fixed by the noise (`draw_directions`).

    Raises:
        UsageError: There are no such directions, or fewer than one slice.

    Example:
        >>> from reverie.diffusion.oracles import Mixture
        >>> from reverie.diffusion.schedules import VE
        >>> bell, t = Mixture(torch.zeros(1, 2), torch.ones(1), torch.ones(1), VE()), torch.tensor([1e-9]).double()
        >>> Sliced("uniform")(bell, torch.tensor([[1.0, 3.0]]), t, torch.zeros(1, 2)).detach()
        tensor([1.5000])
    """

    def __init__(
        self,
        weight: str | LevelWeight = "variance",
        directions: Kind = "rademacher",
        slices: int = 1,
        reduced: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(weight)
        if directions not in ("rademacher", "gaussian"):
            raise UsageError(f"the directions are {directions!r}; they must be rademacher or gaussian")
        if slices < 1:
            raise UsageError(f"slices is {slices}; it must be at least 1")
        self.directions, self.slices, self.reduced, self.seed = directions, slices, reduced, seed

    def __call__(self, denoiser: Denoiser, x0: Data, t: Times, eps: Data, condition: Condition | None = None) -> Loss:
        x = diffuse(denoiser.schedule, x0, t, eps)
        directions = draw_directions(self.directions, self.slices, eps, self.seed)
        loss = sliced(lambda x: score(denoiser, x, t, condition), x, directions, self.reduced)
        return self.weighed(loss, denoiser, t)
