r"""Do pictures say what their captions say? Two encoders, of pictures and of words, trained until they meet.

    L = 1/2 CE(s f g^T) + 1/2 CE(s g f^T),    f (B, E) of pictures, g (B, E) of their captions, of length 1    (1)

CE is the cross-entropy of the diagonal, s a scale that is learned: of the captions of a batch each picture is to pick
its own, and each caption its picture. It is CLIP, small enough to be trained on the data at hand in minutes. How often
a picture picks its caption among 100 is then a measure of prompts followed, whose ceiling is that of real pictures
which the encoders were not trained on. Figures depend on the encoders: compare only those of one pair.

References:
    Learning Transferable Visual Models From Natural Language Supervision (Radford et al., 2021), figure 3
    https://arxiv.org/abs/2103.00020
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from reverie.base.errors import NonFiniteError, UsageError
from reverie.base.randomness import generator, torch_seed
from reverie.data.words import Vocabulary, make_vocabulary
from reverie.evaluation.features import epochs_of

Images = UInt8[Tensor, "n c h w"]
Vectors = Float[Tensor, "n e"]

WIDTH = 32  # of the first convolution
HOTTEST = math.log(100)  # of ln s


class ImageText(nn.Module):
    """Two encoders of one space.

    Arguments:
        channels: Channels of the pictures.
        vocabulary: The captions'.
        dimensions: E, of the space.

    Example:
        >>> pair = ImageText(3, make_vocabulary(["a star", "a moon"], least=1)).eval()
        >>> pair.similarity(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), ["a star"]).shape
        torch.Size([2, 1])
    """

    def __init__(self, channels: int, vocabulary: Vocabulary, dimensions: int = 128) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        widths = [channels, WIDTH, 2 * WIDTH, 2 * WIDTH, 4 * WIDTH, 8 * WIDTH]
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise(widths)):
            layers += [nn.Conv2d(before, after, 3, stride=1 + i % 2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(after), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32 * WIDTH, dimensions))
        self.embedding = nn.EmbeddingBag(len(vocabulary), 2 * dimensions, mode="mean", padding_idx=0)
        self.mix = nn.Sequential(
            nn.Linear(2 * dimensions, 2 * dimensions), nn.SiLU(), nn.Linear(2 * dimensions, dimensions)
        )
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def of_pictures(self, x: Float[Tensor, "n c h w"]) -> Vectors:
        """Return the vectors (N, E), of length 1, of pictures (N, C, H, W) in [-1, 1]."""
        return F.normalize(self.body(x), dim=1)

    def of_numbers(self, words: Int64[Tensor, "n l"]) -> Vectors:
        """Return the vectors (N, E), of length 1, of captions as the vocabulary's numbers (N, L)."""
        return F.normalize(self.mix(self.embedding(words)), dim=1)

    @torch.no_grad()
    def similarity(self, images: Images, captions: Sequence[str], batch_size: int = 500) -> Float[Tensor, "n m"]:
        """Return the cosine of each picture (N, C, H, W) with each caption (M): (N, M)."""
        pictures = torch.cat([self.of_pictures(part.float() / 127.5 - 1) for part in images.split(batch_size)])
        return pictures @ self.of_numbers(self.vocabulary(list(captions))).mT


def train_image_text(
    images: Images,
    captions: Sequence[str],
    seed: int = 0,
    epochs: int = 40,
    batch_size: int = 256,
    learning_rate: float = 2e-3,
    flip: bool = True,
    progress: Callable[[int, int, float], None] | None = None,
) -> ImageText:
    """Return encoders trained on pictures and their captions by (1); the same arguments give the same weights.

    Arguments:
        images: Pictures (N, C, H, W).
        captions: One for each.
        seed: Of the first weights, the order, the shifts and the words left out.
        epochs: Passes over the pictures.
        batch_size: Pictures in a step.
        learning_rate: The peak of the learning rate's one cycle.
        flip: Mirror half of the pictures.
        progress: Called after each step with (step, steps, loss).

    Raises:
        UsageError: There are fewer than two pictures, or not a caption for each.
        NonFiniteError: The loss became NaN or infinite.
    """
    if len(images) < 2 or len(images) != len(captions):
        raise UsageError(f"{len(images)} pictures and {len(captions)} captions; there must be one for each, and two")
    vocabulary = make_vocabulary(captions)
    numbers = vocabulary(list(captions))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(seed, "image-text", "weights"))
        pair = ImageText(images.shape[1], vocabulary)
    steps = epochs * -(-len(images) // batch_size)
    optimizer = torch.optim.AdamW(pair.parameters(), weight_decay=0.1)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    pair.train()
    for step, rows in enumerate(epochs_of(len(images), batch_size, epochs, seed, "image-text"), start=1):
        x, words = altered(images[rows], numbers[rows], flip, seed, step)
        loss = contrast(pair.of_pictures(x), pair.of_numbers(words), pair.scale, numbers[rows])
        if not loss.isfinite():
            raise NonFiniteError(f"the encoders' loss is {loss.item()} at step {step}; lower learning_rate")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycle.step()
        with torch.no_grad():
            pair.scale.clamp_(max=HOTTEST)
        if progress:
            progress(step, steps, loss.item())
    return pair.eval()


def altered(
    images: Images, numbers: Int64[Tensor, "n l"], flip: bool, seed: int, step: int
) -> tuple[Float[Tensor, "n c h w"], Int64[Tensor, "n l"]]:
    """Return pictures in [-1, 1], shifted and mirrored, and captions of which a tenth of the words is left out."""
    draw = generator(seed, "image-text", "altered", step)
    down, right = (int(k) for k in draw.integers(-2, 3, 2))
    x = images.float() / 127.5 - 1
    x = F.pad(x, (2, 2, 2, 2), mode="replicate")[:, :, 2 + down :, 2 + right :][:, :, : x.shape[2], : x.shape[3]]
    if flip:
        mirrored = torch.from_numpy(draw.random(len(x)) < 0.5)[:, None, None, None]
        x = torch.where(mirrored, x.flip(-1), x)
    left_out = torch.from_numpy(draw.random(numbers.shape) < 0.1)
    return x, numbers.masked_fill(left_out, 0)


def contrast(
    pictures: Vectors, words: Vectors, scale: Float[Tensor, ""], captions: Int64[Tensor, "n l"]
) -> Float[Tensor, ""]:
    """Return the loss (1); a caption that stands in the batch twice is right for each of its pictures.

    Example:
        >>> eye, scale, captions = torch.eye(2), torch.tensor(5.0), torch.tensor([[1], [2]])
        >>> bool(contrast(eye, eye, scale, captions) < contrast(eye, eye.flip(0), scale, captions))
        True
    """
    logits = scale.exp() * pictures @ words.mT
    same = (captions[:, None] == captions[None]).all(-1).to(logits)
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.mT, target)) / 2


class Share(NamedTuple):
    """A share of pictures, and its standard error."""

    value: float
    error: float


def retrieval(
    pair: ImageText, images: Images, captions: Sequence[str], pool: Sequence[str], among: int = 100, seed: int = 0
) -> Share:
    """Return how often a picture is nearest to its own caption among so many, the others drawn from a pool.

    Arguments:
        pair: The encoders.
        images: Pictures (N, C, H, W).
        captions: What each is to show.
        pool: Captions that the others are drawn from; those equal to a picture's own are passed over.
        among: How many each picks from, its own among them.
        seed: Of the draw.

    Raises:
        UsageError: The pool holds too few captions.
    """
    distinct = sorted(set(pool))
    if len(distinct) < among:
        raise UsageError(f"the pool has {len(distinct)} different captions; {among} are due")
    own = pair.similarity(images, captions).diagonal()
    others = pair.similarity(images, distinct)
    right = 0
    for i, caption in enumerate(captions):
        order = generator(seed, "retrieval", i).permutation(len(distinct))
        drawn = [int(k) for k in order if distinct[k] != caption][: among - 1]
        right += bool((others[i, drawn] < own[i]).all())
    share = right / len(captions)
    return Share(share, math.sqrt(share * (1 - share) / len(captions)))
