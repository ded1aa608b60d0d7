r"""The autoencoder of latent diffusion: images to a Gaussian over latents, and latents to images.

    (mean, log_variance) = quant(encoder(x)),    z = mean + exp(log_variance / 2) eps                       (1)
    x' = decoder(post_quant(z))                                                                             (2)
    KL(q(z | x) || N(0, 1)) = 1/2 sum(mean^2 + exp(log_variance) - 1 - log_variance)                        (3)

Each level of the encoder after the first halves the size; the decoder doubles it as often. In the middle of
both, where the image is smallest, every pixel may attend to every other.

Its parameters have the names and shapes of diffusers' AutoencoderKL, so that weights go from one to the
other as they are. It takes images of any size: one that the factor does not divide is continued to the
right and to the bottom by its last column and row, and what is decoded is cropped by whoever knows the size.

References:
    High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al., 2022), section 3.1 and appendix G
    https://arxiv.org/abs/2112.10752
    Auto-Encoding Variational Bayes (Kingma & Welling, 2014), section 3 and appendix B
    https://arxiv.org/abs/1312.6114
    Taming Transformers for High-Resolution Image Synthesis (Esser et al., 2021), appendix
    https://arxiv.org/abs/2012.09841
"""

from itertools import pairwise
from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from reverie.base.errors import UsageError
from reverie.networks.attention import SpatialAttention
from reverie.networks.autoencoder_config import AutoencoderConfig
from reverie.networks.layers import AnyImage, Downsample, GroupNorm, Image, ResidualBlock, Upsample

__all__ = ["Autoencoder", "AutoencoderConfig", "Moments"]

EPS = 1e-6  # of every norm, in every autoencoder of this kind
LEAST, MOST = -30.0, 20.0  # of a log-variance


class Moments(NamedTuple):
    """A Gaussian over latents, each number of which is independent of the others.

    Arguments:
        mean: Its mean (B, c, h, w).
        log_variance: The logarithm of its variance (B, c, h, w).
    """

    mean: Float[Tensor, "b c h w"]
    log_variance: Float[Tensor, "b c h w"]

    @classmethod
    def of(cls, numbers: Float[Tensor, "b c2 h w"]) -> "Moments":
        """Read the encoder's output (B, 2 c, h, w): means, then log-variances, which are kept within -30 .. 20."""
        mean, log_variance = numbers.chunk(2, 1)
        return cls(mean, log_variance.clamp(LEAST, MOST))

    def sample(self, noise: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return the latents of some noise (B, c, h, w): equation (1)."""
        return self.mean + (0.5 * self.log_variance).exp() * noise

    def divergence(self) -> Float[Tensor, " b"]:
        """Return how far each Gaussian is from the standard one (B,), in nats: equation (3)."""
        terms = self.mean.square() + self.log_variance.exp() - 1 - self.log_variance
        return 0.5 * terms.flatten(1).sum(1)


def residual(config: AutoencoderConfig, in_channels: int, out_channels: int) -> ResidualBlock:
    """Build a residual block, which knows no time."""
    return ResidualBlock(in_channels, out_channels, None, groups=config.norm_num_groups, eps=EPS, act=config.act_fn)


class Level(nn.Module):
    """One level: residual blocks, then what halves or doubles the size.

    Arguments:
        config: The network's.
        in_channels, out_channels: Channels before and after.
        layers: Residual blocks.
        down, up: How the level ends, if not as it is.
    """

    def __init__(
        self, config: AutoencoderConfig, in_channels: int, out_channels: int, layers: int, down: bool, up: bool
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * layers
        self.resnets = nn.ModuleList([residual(config, i, o) for i, o in pairwise(widths)])
        self.downsamplers = nn.ModuleList([Downsample(out_channels, padding=0)]) if down else None
        self.upsamplers = nn.ModuleList([Upsample(out_channels)]) if up else None

    def forward(self, x: Image) -> AnyImage:
        for part in (*self.resnets, *(self.downsamplers or ()), *(self.upsamplers or ())):
            x = part(x)
        return x


class Middle(nn.Module):
    """A residual block, attention where there is one, and another residual block."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels = config.channels[-1]
        self.resnets = nn.ModuleList([residual(config, channels, channels) for _ in range(2)])
        self.attentions = nn.ModuleList()
        if config.attention:
            self.attentions.append(SpatialAttention(channels, 1, channels, config.norm_num_groups, EPS))

    def forward(self, x: Image) -> Image:
        for part in (self.resnets[0], *self.attentions, self.resnets[1]):
            x = part(x)
        return x


class Encoder(nn.Module):
    """Images (B, C, H, W), the factor dividing both sizes, to numbers (B, k, h, w), two for each of a Gaussian's."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels = config.channels
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            [
                Level(config, before, here, config.layers, down=level < len(channels) - 1, up=False)
                for level, (before, here) in enumerate(pairwise((channels[0], *channels)))
            ]
        )
        self.mid_block = Middle(config)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[-1], EPS)
        self.conv_out = nn.Conv2d(channels[-1], config.encoded[0], 3, padding=1)

    def forward(self, x: Image) -> AnyImage:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(self.mid_block(x), "silu"))


class Decoder(nn.Module):
    """Latents (B, c, h, w) to images (B, C, H, W)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels = config.channels[::-1]
        self.conv_in = nn.Conv2d(config.decoded[1], channels[0], 3, padding=1)
        self.mid_block = Middle(config)
        self.up_blocks = nn.ModuleList(
            [
                Level(config, before, here, config.layers + 1, down=False, up=level < len(channels) - 1)
                for level, (before, here) in enumerate(pairwise((channels[0], *channels)))
            ]
        )
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[-1], EPS)
        self.conv_out = nn.Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Image) -> AnyImage:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(x, "silu"))


def padded(images: Image, factor: int) -> AnyImage:
    """Continue images (B, C, H, W) by their last row and column, until the factor divides both sizes.

    Example:
        >>> import torch
        >>> padded(torch.zeros(1, 3, 13, 16), 8).shape
        torch.Size([1, 3, 16, 16])
    """
    down, right = -images.shape[2] % factor, -images.shape[3] % factor
    return F.pad(images, (0, right, 0, down), mode="replicate") if down or right else images


def check_channels(x: Tensor, channels: int, what: str) -> None:
    """Refuse what is no batch of images of so many channels.

    Raises:
        UsageError: It is none.
    """
    if x.ndim != 4 or x.shape[1] != channels or 0 in x.shape:
        raise UsageError(f"the {what} are {tuple(x.shape)}; this autoencoder takes (B, {channels}, H, W)")


class ConvolutionalAutoencoder(nn.Module):
    """The two halves, and the 1x1 convolutions between them; what stands in the middle is its subclasses' affair.

    Arguments:
        config: What it is made of.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(*config.encoded, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(*config.decoded, 1) if config.use_post_quant_conv else None

    @property
    def factor(self) -> int:
        """How many pixels a side of one pixel of the latents stands for."""
        return self.config.factor

    @property
    def last_layer(self) -> nn.Parameter:
        """The weights that an image is made by in the end, on which its losses are weighed against each other."""
        weight = self.decoder.conv_out.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def numbers(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k h2 w2"]:
        """Return what the encoder says of images (B, C, H, W), from which their latents are read.

        Raises:
            UsageError: They are no images of as many channels as the config says.
        """
        check_channels(images, self.config.in_channels, "images")
        numbers = self.encoder(padded(images, self.factor))
        return numbers if self.quant_conv is None else self.quant_conv(numbers)

    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        """Return the image of each row of latents: equation (2).

        Arguments:
            latents: Latents (B, c, h, w).

        Returns:
            Images (B, C, h factor, w factor), about [-1, 1]: nothing keeps them within it.

        Raises:
            UsageError: They are no latents of as many channels as the config says.
        """
        check_channels(latents, self.config.latent_channels, "latents")
        return self.decoder(latents if self.post_quant_conv is None else self.post_quant_conv(latents))


class Autoencoder(ConvolutionalAutoencoder):
    """The autoencoder: images to latents and back.

    Arguments:
        config: What it is made of.

    Example:
        >>> import torch
        >>> autoencoder = Autoencoder(AutoencoderConfig(channels=(8, 8, 8, 8), latent_channels=4))
        >>> moments = autoencoder.encode(torch.zeros(2, 3, 24, 33))
        >>> moments.mean.shape, autoencoder.decode(moments.mean).shape
        (torch.Size([2, 4, 3, 5]), torch.Size([2, 3, 24, 40]))
    """

    Config = AutoencoderConfig

    def encode(self, images: Float[Tensor, "b c h w"]) -> Moments:
        """Return the Gaussian over the latents of each image: equation (1).

        Arguments:
            images: Images (B, C, H, W) in [-1, 1], of any size.

        Returns:
            Its moments (B, c, ceil(H / factor), ceil(W / factor)).

        Raises:
            UsageError: They are no images of as many channels as the config says.
        """
        return Moments.of(self.numbers(images))

    def forward(
        self, images: Float[Tensor, "b c h w"], noise: Float[Tensor, "b _ _ _"] | None = None
    ) -> tuple[Float[Tensor, "b c2 h w"], Moments]:
        """Return images encoded and decoded again, of their own size, and the moments between.

        Arguments:
            images: Images (B, C, H, W) in [-1, 1].
            noise: What the latents are drawn by (B, c, h, w); None takes their mean.
        """
        moments = self.encode(images)
        latents = moments.mean if noise is None else moments.sample(noise)
        return self.decode(latents)[:, :, : images.shape[2], : images.shape[3]], moments
