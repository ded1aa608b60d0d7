r"""Guidance by a similarity: of a picture and a text, as CLIP has it, or by any other score of pictures.

    grad ln p_t(x) + s grad (f(x) . g(c)),                                                          (1)

with f(x) what an encoder makes of a picture and g(c) what one makes of a text, both of length 1. GLIDE's encoder was
trained on noisy pictures, f(x_t, t); CLIP itself knows clean ones, and sees the estimate, f(D(x_t)). For a score that
is no similarity (a network that says how pleasing a picture is), take `Steered`, of which this is one.

References:
    GLIDE: Towards Photorealistic Image Generation and Editing with Text-Guided Diffusion Models (Nichol et al., 2022),
    section 2.4
    https://arxiv.org/abs/2112.10741
    Learning Transferable Visual Models From Natural Language Supervision (Radford et al., 2021)
    https://arxiv.org/abs/2103.00020
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from reverie.base.errors import UsageError
from reverie.diffusion.denoisers import Denoiser, Times
from reverie.diffusion.guidance.gradient import Steered
from reverie.diffusion.predictions import Data


class SimilarityGuided(Steered):
    """A denoiser guided to where pictures are like a text: equation (1).

    Arguments:
        denoiser: What is guided.
        encode: f: from pictures (B, *D) and times (B,) to vectors (B, E); brought to length 1 here.
        text: g(c), one vector for each sample (B, E), or one for all (1, E); brought to length 1 here.
        scale: s, one number or one per sample (B,); 0 is no guidance.
        clean: The encoder sees the estimate D(x_t); False for one that was trained on noisy pictures.

    Raises:
        UsageError: A scale that is not finite; a text of length 0; on a call, vectors that do not go together.

    Example:
        >>> from reverie.diffusion.oracles import Mixture
        >>> from reverie.diffusion.schedules import EDM
        >>> ball = Mixture(torch.ones(1, 2), torch.ones(1), torch.ones(1), EDM())
        >>> guided = SimilarityGuided(ball, lambda x0, t: x0, torch.tensor([[1.0, 0.0]]), scale=1.0)
        >>> x0 = guided(torch.ones(1, 2), torch.tensor([1 / 80]).double()).x0[0]
        >>> bool(x0[0] > x0[1])
        True
    """

    def __init__(
        self,
        denoiser: Denoiser,
        encode: Callable[[Data, Times], Tensor],
        text: Float[Tensor, "b e"],
        scale: float | Tensor = 1.0,
        clean: bool = True,
    ) -> None:
        super().__init__(denoiser, self.similarity, scale, clean)
        if not bool(torch.isfinite(text).all()) or not bool((text.norm(dim=1) > 0).all()):
            raise UsageError("the text's vectors must be finite, and none of length 0")
        self.encode, self.text = encode, F.normalize(text, dim=1)

    def similarity(self, x: Data, t: Times) -> Float[Tensor, " b"]:
        """Return the cosine of each picture and its text (B,)."""
        found = self.encode(x, t)
        if found.ndim != 2 or found.shape[1] != self.text.shape[1] or len(self.text) not in (1, len(x)):
            raise UsageError(
                f"the pictures' vectors are {tuple(found.shape)}, the text's {tuple(self.text.shape)}; "
                "(B, E) are due, with one text for all or one for each"
            )
        return (F.normalize(found, dim=1) * self.text.to(found)).sum(1)
