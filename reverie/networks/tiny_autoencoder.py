r"""The tiny autoencoder: the latents of a large one, read and written by plain convolutions in a blink.

    z = layers((x + 1) / 2),    x' = 2 layers(3 tanh(z / 3)) - 1                                            (1)
    block(x) = relu(x + conv_3(act(conv_2(act(conv_1(x))))))                                                (2)
    block(x) = the same of x + W_2 relu(norm(W_1 x)), where it has a norm                                   (3)

It was trained to give the latents of another autoencoder, whose codec it can replace; there is no
distribution over its latents. Its parameters have the names of diffusers' AutoencoderTiny. The files of
the original are two, one for each half, whose names are places in a list: `original_name` translates them.

References:
    TAESD: Tiny AutoEncoder for Stable Diffusion (Bohan, 2023)
    https://github.com/madebyollin/taesd
    AutoencoderTiny
    https://huggingface.co/docs/diffusers/api/models/autoencoder_tiny
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reverie.base.errors import ModelFileError
from reverie.networks.autoencoder import check_channels, padded
from reverie.networks.layers import ACTIVATIONS, AnyImage, GroupNorm, Image, Resized, double
from reverie.networks.tiny_autoencoder_config import TinyAutoencoderConfig

__all__ = ["TinyAutoencoder", "TinyAutoencoderConfig", "config_of_original", "original_name"]

GROUPS, WIDER = 4, 4  # of the norm: its groups, and its channels over the block's


class Act(nn.Module):
    """An activation by name, as a layer."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.act = ACTIVATIONS[name]

    def forward(self, x: Image) -> Image:
        return self.act(x)


class Double(nn.Module):
    """Each pixel repeated 2x2."""

    def forward(self, x: Image) -> Resized:
        return double(x)


class Block(nn.Module):
    """Three convolutions beside a shortcut: equations (2) and (3).

    Arguments:
        channels: Channels in and out.
        act: The activation between the convolutions.
        norm: Whether there is a branch with a norm before them.
    """

    def __init__(self, channels: int, act: str, norm: bool = False) -> None:
        super().__init__()
        convs = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convs[0], Act(act), convs[1], Act(act), convs[2])
        self.pool = None
        if norm:
            wide = WIDER * channels
            self.pool = nn.Sequential(
                nn.Conv2d(channels, wide, 1, bias=False),
                GroupNorm(GROUPS, wide),
                Act("relu"),
                nn.Conv2d(wide, channels, 1, bias=False),
            )

    def forward(self, x: Image) -> Image:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class Half(nn.Module):
    """The layers of the encoder or of the decoder, in a row."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Image) -> AnyImage:
        return self.layers(x)


def encoder(config: TinyAutoencoderConfig) -> Half:
    """Build the encoder: a convolution with stride 2 before each level but the first."""
    width = config.encoder_channels
    layers: list[nn.Module] = []
    last = len(config.encoder_blocks) - 1
    for level, count in enumerate(config.encoder_blocks):
        if level == 0:
            layers.append(nn.Conv2d(config.in_channels, width, 3, padding=1))
        else:
            layers.append(nn.Conv2d(width, width, 3, padding=1, stride=2, bias=False))
        layers += [Block(width, config.act_fn, config.norm and level == last) for _ in range(count)]
    return Half([*layers, nn.Conv2d(width, config.latent_channels, 3, padding=1)])


def decoder(config: TinyAutoencoderConfig) -> Half:
    """Build the decoder: each level but the last ends with pixels doubled and a convolution."""
    width = config.decoder_channels
    layers: list[nn.Module] = [nn.Conv2d(config.latent_channels, width, 3, padding=1), Act(config.act_fn)]
    last = len(config.decoder_blocks) - 1
    for level, count in enumerate(config.decoder_blocks):
        layers += [Block(width, config.act_fn, config.norm and level == 0) for _ in range(count)]
        if level < last:
            layers += [Double(), nn.Conv2d(width, width, 3, padding=1, bias=False)]
    return Half([*layers, nn.Conv2d(width, config.out_channels, 3, padding=1)])


class TinyAutoencoder(nn.Module):
    """The tiny autoencoder: images to latents and back.

    Arguments:
        config: What it is made of.

    Example:
        >>> tiny = TinyAutoencoder(TinyAutoencoderConfig(encoder_channels=8, decoder_channels=8))
        >>> tiny.encode(torch.zeros(2, 3, 24, 33)).shape, tiny.decode(torch.zeros(2, 4, 3, 5)).shape
        (torch.Size([2, 4, 3, 5]), torch.Size([2, 3, 24, 40]))
    """

    Config = TinyAutoencoderConfig

    def __init__(self, config: TinyAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder(config)
        self.decoder = decoder(config)

    @property
    def factor(self) -> int:
        """How many pixels a side of one pixel of the latents stands for."""
        return self.config.factor

    def encode(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        """Return the latents of each image.

        Arguments:
            images: Images (B, C, H, W) in [-1, 1], of any size.

        Returns:
            Latents (B, c, ceil(H / factor), ceil(W / factor)).

        Raises:
            UsageError: They are no images of as many channels as the config says.
        """
        check_channels(images, self.config.in_channels, "images")
        return self.encoder((padded(images, self.factor) + 1) / 2)

    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        """Return the image of each row of latents.

        Arguments:
            latents: Latents (B, c, h, w).

        Returns:
            Images (B, C, h factor, w factor), about [-1, 1]: nothing keeps them within it.

        Raises:
            UsageError: They are no latents of as many channels as the config says.
        """
        check_channels(latents, self.config.latent_channels, "latents")
        return 2 * self.decoder(3 * torch.tanh(latents / 3)) - 1

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h w"]:
        """Return images encoded and decoded again, of their own size."""
        return self.decode(self.encode(images))[:, :, : images.shape[2], : images.shape[3]]


# The original's two files ---------------------------------------------------------------------


def original_name(name: str, half: str) -> str:
    """Return our name of a tensor of the original's.

    The decoder's list begins with the tanh of equation (1), which is no layer here.

    Arguments:
        name: The name there: "1.weight".
        half: Which of the two files: "encoder" or "decoder".

    Example:
        >>> original_name("1.conv.0.weight", "encoder"), original_name("1.weight", "decoder")
        ('encoder.layers.1.conv.0.weight', 'decoder.layers.0.weight')
    """
    place, _, rest = name.partition(".")
    if not place.isdecimal() or len(place) > 6:
        return name
    return f"{half}.layers.{int(place) - (half == 'decoder')}.{rest}"


def config_of_original(
    encoder: Mapping[str, Sequence[int]], decoder: Mapping[str, Sequence[int]]
) -> TinyAutoencoderConfig:
    """Return the config of the original's two files.

    Arguments:
        encoder: The shape of each tensor of the encoder, by its name there.
        decoder: The same of the decoder.

    Raises:
        ModelFileError: They are no such files.
    """
    try:
        down, up = levels(encoder), levels(decoder)
        last = max(int(name.partition(".")[0]) for name in encoder)
        return TinyAutoencoderConfig(
            in_channels=encoder["0.weight"][1],
            out_channels=decoder[f"{max(int(name.partition('.')[0]) for name in decoder)}.weight"][0],
            latent_channels=encoder[f"{last}.weight"][0],
            encoder_channels=encoder["0.weight"][0],
            decoder_channels=decoder["1.weight"][0],
            encoder_blocks=down,
            decoder_blocks=up,
            norm=any(".pool." in name for name in encoder),
        )
    except (KeyError, IndexError, ValueError) as error:
        raise ModelFileError(f"these are not the two files of a tiny autoencoder: {str(error)[:200]}") from None


def levels(shapes: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
    """Return how many blocks there are at each level: one ends at a convolution that has no bias.

    Example:
        >>> levels({"0.weight": (), "0.bias": (), "1.conv.0.weight": (), "2.weight": (), "3.conv.0.weight": ()})
        (1, 1)
    """
    counts = [0]
    for place in sorted({int(name.partition(".")[0]) for name in shapes}):
        if f"{place}.conv.0.weight" in shapes:
            counts[-1] += 1
        elif f"{place}.bias" not in shapes:
            counts.append(0)
    return tuple(counts)
