r"""Classifier guidance: a denoiser that knows no classes, guided to one by a classifier.

    grad ln p_t(x) + s grad ln p(y | x_t),                                                          (1)

which at s = 1 is the score of p_t(x | y) by Bayes' rule, and at s > 1 that of a density in which the classifier is
surer than it is, p(x) p(y | x)^s. The paper's classifier was trained on noisy data and knows its time. One of clean
data can be asked for its opinion of the estimate instead, with a gradient that goes through the denoiser. That is an
approximation: it takes all that x_t leaves open to be at its mean.

References:
    Diffusion Models Beat GANs on Image Synthesis (Dhariwal & Nichol, 2021), section 4.2, eq. 14
    https://arxiv.org/abs/2105.05233
    Universal Guidance for Diffusion Models (Bansal et al., 2023), section 3.1
    https://arxiv.org/abs/2302.07121
"""

from collections.abc import Callable

from jaxtyping import Float, Int64
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.diffusion.denoisers import Denoiser, Times
from reverie.diffusion.guidance.gradient import Steered
from reverie.diffusion.predictions import Data


class ClassifierGuided(Steered):
    """A denoiser guided by a classifier: equation (1).

    Arguments:
        denoiser: What is guided.
        classifier: From data (B, *D) and times (B,) to logits (B, K): ln p(y | x_t) and a constant.
        label: What is asked for, one class for each sample (B,).
        scale: s, one number or one per sample (B,); 0 is no guidance.
        clean: The classifier takes the estimate D(x_t) in place of the noisy x_t.

    Raises:
        UsageError: A scale that is not finite; on a call, labels that are not the samples' or not the classifier's.

    Example:
        >>> import torch
        >>> from reverie.diffusion.oracles import Mixture
        >>> from reverie.diffusion.schedules import EDM
        >>> two = Mixture(torch.tensor([[-1.0], [1.0]]), torch.full((2,), 0.1), torch.ones(2), EDM())
        >>> knows = lambda x, t: two.parts(x, t).joint
        >>> guided = ClassifierGuided(two, knows, torch.tensor([1]))
        >>> x, t = torch.zeros(1, 1), torch.ones(1).double()
        >>> two(x, t).x0, guided(x, t).x0
        (tensor([[0.]]), tensor([[1.0000]]))
    """

    def __init__(
        self,
        denoiser: Denoiser,
        classifier: Callable[[Data, Times], Tensor],
        label: Int64[Tensor, " b"],
        scale: float | Tensor = 1.0,
        clean: bool = False,
    ) -> None:
        super().__init__(denoiser, self.log_prob, scale, clean)
        self.classifier, self.label = classifier, label

    def log_prob(self, x: Data, t: Times) -> Float[Tensor, " b"]:
        """Return ln p(y | x) of each sample's label (B,), in nats."""
        logits, label = self.classifier(x, t), self.label.to(x.device)
        if logits.ndim != 2 or not len(logits) == len(label) == len(x):
            raise UsageError(
                f"the classifier gives {tuple(logits.shape)} for {len(x)} samples and {len(label)} labels; "
                "(B, K) is due, and a label for each"
            )
        if bool((label < 0).any()) or bool((label >= logits.shape[1]).any()):
            raise UsageError(f"the labels are {label.tolist()[:8]}; the classifier knows 0..{logits.shape[1] - 1}")
        return logits.log_softmax(1).gather(1, label[:, None])[:, 0]
