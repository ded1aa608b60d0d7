r"""The U-Net: down through the levels, across the bottom, and up again with what was left on the way.

    emb = act(W_2 silu(W_1 features(time)) + embedding(label) + mlp([pooled, features(sizes)]))             (1)
    x_0 = conv(x);  x_{l+1} = down_l(x_l, emb);  y_L = middle(x_L, emb);  y_l = up_l([y_{l+1}, x_l], emb)       (2)
    out = conv(silu(norm(y_0)))                                                                             (3)

With patches of p pixels a side, x is (B, C p^2, H / p, W / p) in (2), and out is taken apart again: the first level
has p^2 times fewer places, which leaves time for more channels.

With positions, x_0 = conv(x) + (W + M emb) waves(place): convolutions see the edge of an image alone, and little of
it in the middle, so that words for a place have nothing else to hold on to.

Its parameters have the names and shapes of diffusers' UNet2DModel (with a context, of the layers of
UNet2DConditionModel), so that weights go from one to the other as they are. It takes images of any size:
an odd size is halved upwards, and the doubled image is cropped to what it came from.

What Stable Diffusion's U-Nets take beside the image and the time: a context (the text's tokens); SDXL
also `pooled`, one vector for the whole text, and `sizes`, six numbers: height and width of the original,
top and left of the crop, height and width that are asked for.

References:
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), appendix B
    https://arxiv.org/abs/2006.11239
    Diffusion Models Beat GANs on Image Synthesis (Dhariwal & Nichol, 2021), section 3
    https://arxiv.org/abs/2105.05233
    High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al., 2022), section 3.3
    https://arxiv.org/abs/2112.10752
    SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis (Podell et al., 2023), section 2.2
    https://arxiv.org/abs/2307.01952
    Simple diffusion: End-to-end diffusion for high resolution images (Hoogeboom et al., 2023), for patches
    https://arxiv.org/abs/2301.11093
    Latent Consistency Models (Luo et al., 2023), section 4.2, for the vector beside the time
    https://arxiv.org/abs/2310.04378
    An Intriguing Failing of Convolutional Neural Networks and the CoordConv Solution (Liu et al., 2018)
    https://arxiv.org/abs/1807.03247
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Real
from torch import Tensor, nn

from reverie.base.errors import ModelFileError, UsageError
from reverie.kernels.dispatch import readable
from reverie.networks.checks import check_context, check_images, check_label
from reverie.networks.layers import (
    ACTIVATIONS,
    Conv2d,
    Fourier,
    GroupNorm,
    Places,
    Sinusoids,
    TimeEmbedding,
    checked,
    repeated,
    zeroed,
)
from reverie.networks.skip_blocks import SkipDownBlock, SkipUpBlock
from reverie.networks.unet_blocks import Block, DownBlock, MiddleBlock, UpBlock
from reverie.networks.unet_config import UNetConfig

__all__ = ["Deep", "UNet", "UNetConfig", "keeping_deep", "modern_names"]


@dataclass
class Deep:
    """What comes up to the first level from those below it; None before it was worked out.

    Arguments:
        state: It (B, C, H, W).
    """

    state: Tensor | None = None

    def of(self, x: Float[Tensor, "b c h w"]) -> bool:
        """Whether it is there, and of so many samples."""
        return self.state is not None and len(self.state) == len(x)


_DEEP: ContextVar[Deep | None] = ContextVar("deep", default=None)


@contextmanager
def keeping_deep(deep: Deep) -> Iterator[None]:
    """A block in which a U-Net keeps what its lower levels say, or, where it is kept already, does not ask them.

    Arguments:
        deep: Where it is kept.

    Example:
        >>> unet, deep = UNet(UNetConfig(in_channels=1, channels=(8, 16))), Deep()
        >>> with keeping_deep(deep):
        ...     first, second = (unet(torch.zeros(1, 1, 8, 8), torch.zeros(1)) for _ in range(2))
        >>> torch.equal(first, second), deep.state.shape
        (True, torch.Size([1, 16, 8, 8]))
    """
    token = _DEEP.set(deep)
    try:
        yield
    finally:
        _DEEP.reset(token)


class UNet(nn.Module):
    """A U-Net: images and one time for each in, images out.

    Arguments:
        config: What it is made of.

    Attributes:
        shares: Whether the half of a batch of which the other half is a copy, but for the contexts, stands for both
            until a context is first looked at: so are the two branches of guidance. The result is the same; its last
            bits, where they depend on the batch's size, are not.

    Example:
        >>> unet = UNet(UNetConfig(in_channels=1, channels=(8, 16), attention=(False, True), num_class_embeds=11))
        >>> unet(torch.zeros(2, 1, 13, 7), time=torch.tensor([0.0, 999.0]), label=torch.tensor([3, 10])).shape
        torch.Size([2, 1, 13, 7])
    """

    Config = UNetConfig

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.shares = False
        first = config.channels[0]
        self.conv_in = nn.Conv2d(config.in_channels * config.patch**2, first, 3, padding=1)
        self.places = Places(first, config.time_channels) if config.positions else None
        self.time_proj = self._time_features()
        features = 2 * first if config.time_embedding_type == "fourier" else first
        # diffusers' two classes differ here: the activation inside is SiLU in the one, the config's in the other.
        act = "silu" if config.context_dim is None else config.act_fn
        self.act = ACTIVATIONS[config.act_fn]
        self.act_out = act
        self.time_embedding = TimeEmbedding(features, config.time_channels, act, config.time_cond_proj_dim)
        self.class_embedding: nn.Module | None = None
        if config.class_embed_type == "timestep":
            self.class_embedding = TimeEmbedding(features, config.time_channels, act)
        elif config.class_embed_type == "identity":
            self.class_embedding = nn.Identity()
        elif config.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(config.num_class_embeds, config.time_channels)

        self.add_time_proj: nn.Module | None = None
        self.add_embedding: nn.Module | None = None
        if config.addition_time_embed_dim is not None and config.projection_class_embeddings_input_dim is not None:
            self.add_time_proj = Sinusoids(config.addition_time_embed_dim, config.flip_sin_to_cos, config.freq_shift)
            self.add_embedding = TimeEmbedding(config.projection_class_embeddings_input_dim, config.time_channels)

        levels = range(len(config.channels))
        self.down_blocks = nn.ModuleList(
            [
                (SkipDownBlock if "Skip" in kind else DownBlock)(config, kind, level)
                for level, kind in zip(levels, config.down_types, strict=True)
            ]
        )
        self.mid_block = None if config.middle == "none" else MiddleBlock(config)
        self.up_blocks = nn.ModuleList(
            [
                (SkipUpBlock if "Skip" in kind else UpBlock)(config, kind, level)
                for level, kind in zip(reversed(levels), config.up_types, strict=True)
            ]
        )
        self.conv_norm_out = GroupNorm(config.groups(first), first, config.norm_eps)
        self.conv_out = zeroed(Conv2d(first, config.out_channels * config.patch**2, 3, padding=1))

    def _time_features(self) -> nn.Module:
        config, first = self.config, self.config.channels[0]
        if config.time_embedding_type == "fourier":
            return Fourier(first)
        if config.time_embedding_type == "learned":
            assert config.num_train_timesteps is not None
            return nn.Embedding(config.num_train_timesteps, first)
        return Sinusoids(first, config.flip_sin_to_cos, config.freq_shift)

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether the inside of each layer is computed again for the gradients instead of being kept."""
        return any(block.checkpointing for block in self.modules() if isinstance(block, Block))

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        for block in self.modules():
            if isinstance(block, Block):
                block.checkpointing = on

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        time: Real[Tensor, " b"],
        label: Real[Tensor, "b ..."] | None = None,
        context: Float[Tensor, "b l d"] | None = None,
        pooled: Float[Tensor, "b p"] | None = None,
        sizes: Real[Tensor, "b s"] | None = None,
        time_cond: Float[Tensor, "b e"] | None = None,
        beside: Float[Tensor, "b k h w"] | None = None,
    ) -> Float[Tensor, "b out h w"]:
        """Return one image for each of the images x, at their times.

        Arguments:
            x: Images (B, C, H, W) of any size.
            time: One time for each (B,), not necessarily a whole number.
            label: One class for each (B,), where the config has classes; with class_embed_type "timestep"
                a number (B,), with "identity" an embedding (B, time_channels).
            context: What the transformers attend to (B, L, D), where the config has context_dim.
            pooled: One vector for each (B, P), where addition_embed_type is "text_time": SDXL's has 1280.
            sizes: A few numbers for each (B, S), with it; P + S addition_time_embed_dim is
                projection_class_embeddings_input_dim, so that SDXL's takes six and its refiner five.
            time_cond: A vector that joins the time (B, E), where the config has time_cond_proj_dim.
            beside: Further channels of the images (B, K, H, W), put after those of x: together they are
                in_channels, as where a mask and a masked image tell what to paint.

        Raises:
            UsageError: Something is missing, is not wanted, or has the wrong shape.
        """
        x = x if beside is None else with_channels(x, beside)
        self._check(x, time, label, context)
        self._check_added(len(x), pooled, sizes, time_cond)
        emb = self._embed(time, label, pooled, sizes, time_cond)
        x = 2 * x - 1 if self.config.center_input_sample else x
        size = x.shape[2:]
        x = patches(x, self.config.patch)
        count = len(x)
        if self.shares and context is not None and same_halves(x, emb):
            x = x[: count // 2]
        image: Tensor | None = x
        x = self.conv_in(x)
        if self.places is not None:
            x = x + self.places(x, emb[: len(x)])
        skips = [x]
        deep = None if torch.compiler.is_compiling() else _DEEP.get()
        if deep is not None and deep.state is not None:
            self.down_blocks[0](x, emb, context, skips, image)
            skips.pop()  # what the next level would start from
            x, image = deep.state, None
        else:
            x, image = self._below(x, emb, context, skips, image)
        if deep is not None:
            deep.state = x
        x, image = self.up_blocks[-1](x, emb, context, skips, image)
        x = self.conv_out(self.conv_norm_out(repeated(x, count), self.act_out))
        if image is not None:
            x = x + image
        if self.config.time_embedding_type == "fourier":
            x = (x / time[:, None, None, None]).to(x.dtype)
        return x if self.config.patch == 1 else F.pixel_shuffle(x, self.config.patch)[..., : size[0], : size[1]]

    def _below(
        self, x: Tensor, emb: Tensor, context: Tensor | None, skips: list[Tensor], image: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return what comes up to the first level: all of (2) but its last block."""
        for block in self.down_blocks:
            x, image = block(x, emb, context, skips, image)
        if self.mid_block is not None:
            x = self.mid_block(x, emb, context)
        image = None
        for block in self.up_blocks[:-1]:
            x, image = block(x, emb, context, skips, image)
        return x, image

    def _embed(
        self,
        time: Tensor,
        label: Tensor | None,
        pooled: Tensor | None = None,
        sizes: Tensor | None = None,
        time_cond: Tensor | None = None,
    ) -> Float[Tensor, "b t"]:
        """Return the embedding of the time and all that joins it, activated: equation (1)."""
        emb = self.time_embedding(self._features(time), time_cond)
        if label is not None and self.class_embedding is not None:
            if isinstance(self.class_embedding, nn.Embedding):
                emb = emb + self.class_embedding(checked(label, self.class_embedding, "label"))
            elif self.config.class_embed_type == "timestep":
                emb = emb + self.class_embedding(self._features(label))
            else:
                emb = emb + label.to(emb.dtype)
        if pooled is not None and sizes is not None and self.add_time_proj and self.add_embedding:
            numbers = self.add_time_proj(sizes.flatten()).reshape(len(sizes), -1)
            emb = emb + self.add_embedding(torch.cat([pooled.to(emb.dtype), numbers.to(emb.dtype)], 1))
        return self.act(emb)

    def _features(self, time: Tensor) -> Tensor:
        if isinstance(self.time_proj, nn.Embedding):
            return self.time_proj(checked(time, self.time_proj, "time"))
        return self.time_proj(time)

    def _check(self, x: Tensor, time: Tensor, label: Tensor | None, context: Tensor | None) -> None:
        config, count = self.config, len(x)
        check_images(x, time, config.in_channels)
        width = (config.time_channels,) if config.class_embed_type == "identity" else ()
        check_label(label, (count, *width) if self.class_embedding is not None else None)
        check_context(context, count, config.context_dim)

    def _check_added(self, count: int, pooled: Tensor | None, sizes: Tensor | None, time_cond: Tensor | None) -> None:
        config, total = self.config, self.config.projection_class_embeddings_input_dim
        for name, given in (("pooled", pooled), ("sizes", sizes)):
            if (given is None) != (total is None):
                wanted = f"needs {name} for each image" if given is None else f"takes no {name}; give none"
                raise UsageError(f"this network {wanted}")
        if pooled is not None and sizes is not None and total is not None:
            each = config.addition_time_embed_dim or 0
            fits = pooled.ndim == sizes.ndim == 2 and len(pooled) == len(sizes) == count
            if not fits or pooled.shape[1] + each * sizes.shape[1] != total:
                raise UsageError(
                    f"pooled is {tuple(pooled.shape)} and sizes {tuple(sizes.shape)}; they must be ({count}, P) and "
                    f"({count}, S) with P + {each} S = {total}"
                )
        if (time_cond is None) != (config.time_cond_proj_dim is None):
            wanted = "needs time_cond for each image" if time_cond is None else "takes no time_cond; give none"
            raise UsageError(f"this network {wanted}")
        if time_cond is not None and time_cond.shape != (count, config.time_cond_proj_dim):
            raise UsageError(
                f"time_cond is {tuple(time_cond.shape)}; it must be ({count}, {config.time_cond_proj_dim})"
            )


def same_halves(*tensors: Tensor) -> bool:
    """Whether the second half of each batch is the first, where its numbers can be looked at.

    Example:
        >>> same_halves(torch.tensor([1.0, 2.0, 1.0, 2.0])), same_halves(torch.tensor([1.0, 1.0, 2.0, 2.0]))
        (True, False)
    """
    return (
        readable(*tensors) and all(len(x) % 2 == 0 for x in tensors) and all(torch.equal(*x.chunk(2)) for x in tensors)
    )


def patches(x: Float[Tensor, "b c h w"], patch: int) -> Float[Tensor, "b c2 h2 w2"]:
    """Return images with the pixels of each patch as channels of one: (B, C p^2, H / p, W / p).

    A side that the patch does not divide is continued with zeros first.

    Example:
        >>> patches(torch.zeros(1, 3, 5, 8), 2).shape
        torch.Size([1, 12, 3, 4])
    """
    if patch == 1:
        return x
    height, width = x.shape[2:]
    return F.pixel_unshuffle(F.pad(x, (0, -width % patch, 0, -height % patch)), patch)


def with_channels(x: Tensor, beside: Tensor) -> Tensor:
    """Return images with further channels put after their own.

    Raises:
        UsageError: They are of another number or size.
    """
    if x.ndim != 4 or beside.ndim != 4 or (len(x), *x.shape[2:]) != (len(beside), *beside.shape[2:]):
        raise UsageError(f"beside is {tuple(beside.shape)}; it must be of the number and size of x, {tuple(x.shape)}")
    return torch.cat([x, beside.to(x.dtype)], 1)


# What attention and Fourier features were called in older checkpoints of diffusers.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def modern_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of diffusers with the names of an older version brought up to date.

    Raises:
        ModelFileError: A tensor is there under its old name and, different, under its new one.

    Example:
        >>> list(modern_names({"mid_block.attentions.0.query.weight": torch.zeros(1)}))
        ['mid_block.attentions.0.to_q.weight']
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        new = modern_name(name)
        if new in renamed and not torch.equal(renamed[new], tensor):
            raise ModelFileError(f"the checkpoint has {new} twice, under its old name too, with different values")
        renamed[new] = tensor
    return renamed


def modern_name(name: str) -> str:
    """Return the present name of one tensor."""
    if name == "time_proj.W":
        return "time_proj.weight"
    owner, _, leaf = name.rpartition(".")
    place, _, layer = owner.rpartition(".")
    if layer not in OLD_NAMES or ".attentions." not in f".{place}.":
        return name
    return f"{place}.{OLD_NAMES[layer]}.{leaf}"
