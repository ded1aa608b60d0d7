r"""A network made ready to be asked many times and never to be trained: its weights in one dtype, laid out for speed.

What changes, and what each change does to the numbers:

- **Convolutions and linear layers** hold their weights once, in the dtype that they compute in, in the order that the
  product reads them: a cast's rounding, and nothing beside it. The first and the last convolution, and what is made of
  the time and the label, stay in float32: they are a thousandth of the work.
- **Convolutions of 3x3** go with fewer multiplications where the library has them (`reverie.kernels.winograd`): in
  bfloat16 a layer's rounding is 4 to 7 times a plain one's; weights take 2.7 to 4 times as much. One that follows the
  doubling of a size reads the image as it was, with a quarter of the multiplications and weights of the same size.
- **Linear layers** go by panels of the library's where it serves them (`reverie.kernels.panels`), and a transformer's
  gated units are done with the product: what is between them is never rounded nor written. Those of a transformer's
  feed-forward part take seven multiplications for eight, and 7/4 times the memory (`reverie.kernels.strassen`), in
  networks of up to a billion numbers.
- **Sums** of a state and what a layer in panels adds to it are taken in the layer's walk, and rounded once.
- **Norms** keep their weights in float32, and take their sums in it.
- **Biases** of a residual block's convolutions, on a GPU, join one that is added anyway: each is a walk over memory.
- **Self-attention** reads its tokens once, for queries, keys and values together.
- **Guidance's two branches**, on a CPU, are one until a context is first looked at: the same image at the same time
  goes once through all that comes before (`UNet.shares`).
- **Attention to a context** works its keys and values out once for each context, as long as that is there: they
  depend on the words alone, and are the same at every step.
- **Eight bits**, where they are asked for: a scale for each output, and the weight made of them in each product.

References:
    bfloat16: Brain floating point, A Study of BFLOAT16 for Deep Learning Training (Kalamkar et al., 2019)
    https://arxiv.org/abs/1905.12322
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reverie.kernels import gated as gated_units
from reverie.kernels import strassen, winograd
from reverie.kernels.packed import Eight, blocks, blocks_of_convolution, convolve, eight, multiply, packs
from reverie.kernels.panels import Panels, panels, product, serves
from reverie.kernels.strassen import Halves
from reverie.kernels.winograd import Transformed
from reverie.networks.attention import Attention, Gate
from reverie.networks.autoencoder import ConvolutionalAutoencoder
from reverie.networks.captioned import Captioned
from reverie.networks.layers import Image, ResidualBlock, Resized, SizeOf, Upsample
from reverie.networks.tiny_autoencoder import TinyAutoencoder
from reverie.networks.unet import UNet

FLOAT32 = ("time_embedding", "class_embedding", "add_embedding", "places", "quant_conv", "post_quant_conv")  # left
ENDS = ("conv_in", "conv_out")  # computed in float32
MOST = 10**9  # numbers of a network that has layers in halves: in a larger one their memory is dearer than the time


class Packing(NamedTuple):
    """What became of a network's weights.

    Arguments:
        numbers: How many numbers of them were packed.
        bytes: What these take now.
        error: The relative error of the weights in eight bits, ||W' - W|| / ||W||; 0 where there are none.
    """

    numbers: int
    bytes: int
    error: float


class Packed(nn.Module):
    """A layer whose weight is held in panels, in halves, in blocks, transformed, in eight bits, or plainly.

    One that has `adds_to` adds to a second tensor, of that dtype and of what it returns, in the same walk.

    Arguments:
        weight: The layer's own.
        bias: One for each output.
        dtype: What it computes in.
        out: What it returns.

    Attributes:
        adds_to: The dtype of what it can be given to add to; None of one that is given nothing.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, out: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.out, self.numbers = dtype, out, weight.numel()
        self.adds_to: torch.dtype | None = None
        # No parameters: what is in blocks can neither be trained nor moved.
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.held: Tensor | Eight | Panels | Transformed = weight.detach().to(dtype)
        self.error = torch.zeros(2, dtype=torch.float64)  # squared, of the weight and what it is relative to

    def hold(self, bits8: bool, weight: Tensor) -> None:
        """Take eight bits of a weight, or its blocks."""
        if bits8:
            self.held = eight(weight.detach(), self.dtype)
            off = self.held.full().float() - weight.detach().float()
            self.error = torch.stack([off.double().square().sum(), weight.detach().double().square().sum()]).cpu()
        elif weight.device.type == "cpu" and packs():
            self.held = self.blocks()

    def blocks(self) -> Tensor:
        """Return the weight in blocks."""
        raise NotImplementedError

    @property
    def full(self) -> Tensor:
        """The weight, as a product takes it."""
        assert not isinstance(self.held, Panels | Transformed)
        return self.held.full() if isinstance(self.held, Eight) else self.held

    @property
    def bytes(self) -> int:
        """What it takes."""
        held = (self.held,) if isinstance(self.held, Tensor) else self.held
        return sum(part.numel() * part.element_size() for part in held if isinstance(part, Tensor))


class PackedLinear(Packed):
    """A linear layer: y = x W^T + b; or gated units of two halves of its outputs, y = h gelu(g).

    Arguments:
        weight: W (O, I).
        bias: b (O,).
        dtype: What it computes in.
        bits8: Hold the weight in eight bits.
        gated: Return the gated units.
        halves: Whether it may be held in halves, which is for samples of many rows.

    Example:
        >>> layer = nn.Linear(4, 2)
        >>> x = torch.randn(3, 5, 4)
        >>> torch.allclose(PackedLinear(layer.weight, layer.bias, torch.float32)(x), layer(x), atol=1e-6)
        True
    """

    def __init__(
        self,
        weight: Float[Tensor, "o i"],
        bias: Float[Tensor, " o"] | None,
        dtype: torch.dtype,
        bits8: bool = False,
        gated: bool = False,
        halves: bool = True,
    ) -> None:
        super().__init__(weight, bias, dtype, dtype)
        self.gated = gated
        if not bits8 and halves and by_halves(weight, dtype, gated):
            self.held, self.adds_to = strassen.halves(weight, bias, dtype, gated), None if gated else dtype
        elif not bits8 and by_panels(weight, dtype):
            self.held, self.adds_to = panels(weight, bias, dtype, gated), None if gated else dtype
        else:
            self.hold(bits8, weight)

    def blocks(self) -> Tensor:
        assert isinstance(self.held, Tensor)
        return blocks(self.held)

    def forward(self, x: Float[Tensor, "... i"], onto: Float[Tensor, "... o"] | None = None) -> Float[Tensor, "... o"]:
        assert onto is None or self.adds_to
        x = x.to(self.dtype)
        if isinstance(self.held, Halves):
            return strassen.product(x, self.held, onto)
        if isinstance(self.held, Panels):
            return product(x, self.held, onto)
        y = multiply(x, self.full, self.bias)
        return gated_units(y) if self.gated else y


class PackedConv2d(Packed):
    """A convolution of images, in channels-last; 1x1 is a linear layer of the pixels, and 3x3 may be Winograd's.

    Arguments:
        conv: The convolution, of one group and without dilation.
        dtype: What it computes in.
        bits8: Hold the weight in eight bits.
        out: What it returns; dtype, where None.

    Example:
        >>> conv = nn.Conv2d(3, 4, 3, padding=1)
        >>> x = torch.randn(2, 3, 5, 6).to(memory_format=torch.channels_last)
        >>> torch.allclose(PackedConv2d(conv, torch.float32)(x), conv(x), atol=1e-6)
        True
    """

    def __init__(
        self, conv: nn.Conv2d, dtype: torch.dtype, bits8: bool = False, out: torch.dtype | None = None
    ) -> None:
        super().__init__(conv.weight, conv.bias, dtype, out or dtype)
        self.stride, self.padding = conv.stride, conv.padding
        self.pixelwise = conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0)
        if not bits8 and (pixels := tile(conv, dtype)):
            self.held = winograd.transform(conv.weight, pixels, dtype)
            self.bias = None if conv.bias is None else conv.bias.detach().float()
            return
        weight = conv.weight.flatten(1) if self.pixelwise else conv.weight.to(memory_format=torch.channels_last)
        if self.pixelwise and not bits8 and by_panels(weight, dtype):
            self.held = panels(weight, conv.bias, dtype)
            self.adds_to = dtype if self.out == dtype else None
            return
        self.held = weight.detach().to(dtype)
        self.hold(bits8, weight)

    def blocks(self) -> Tensor:
        assert isinstance(self.held, Tensor)
        return blocks(self.held) if self.pixelwise else blocks_of_convolution(self.held, self.stride, self.padding)  # type: ignore[arg-type]

    def forward(
        self, x: Float[Tensor, "b i h w"], onto: Float[Tensor, "b o h2 w2"] | None = None
    ) -> Float[Tensor, "b o h2 w2"]:
        assert onto is None or self.adds_to
        x = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
        if isinstance(self.held, Transformed):
            return winograd.convolve(x, self.held, self.bias).to(self.out)
        if self.pixelwise and isinstance(self.held, Panels):
            rows = None if onto is None else onto.permute(0, 2, 3, 1)
            return product(x.permute(0, 2, 3, 1), self.held, rows).permute(0, 3, 1, 2).to(self.out)
        if self.pixelwise:
            return multiply(x.permute(0, 2, 3, 1), self.full, self.bias).permute(0, 3, 1, 2).to(self.out)
        return convolve(x, self.full, self.bias, self.stride, self.padding).to(self.out)  # type: ignore[arg-type]


class PackedUpsample(Packed):
    """Each pixel repeated 2x2, then a convolution, in one walk over the image as it was.

    Arguments:
        conv: The convolution, of 3x3.
        dtype: What it computes in.
    """

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__(conv.weight, conv.bias, dtype, dtype)
        self.held: Transformed = winograd.transform(conv.weight, winograd.DOUBLED, dtype)
        self.bias = None if conv.bias is None else conv.bias.detach().float()

    def forward(self, x: Image, like: SizeOf | None = None) -> Resized:
        """Double x, and crop it to the size of `like` where that is given."""
        x = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
        return winograd.convolve(x, self.held, self.bias, None if like is None else (like.shape[2], like.shape[3]))


def by_panels(weight: Float[Tensor, "o i"], dtype: torch.dtype) -> bool:
    """Whether a matrix is held in panels here."""
    return weight.device.type == "cpu" and serves(weight.shape[1], dtype)


def by_halves(weight: Float[Tensor, "o i"], dtype: torch.dtype, gated: bool) -> bool:
    """Whether a matrix is held in halves here."""
    outer, inner = weight.shape
    return weight.device.type == "cpu" and strassen.serves(inner, outer, dtype, gated)


def tile(conv: nn.Conv2d, dtype: torch.dtype, doubled: bool = False) -> winograd.Tile | None:
    """Return the tile that a convolution, of an image that may be doubled first, is computed by; None if plainly."""
    whole = conv.kernel_size == (3, 3) and conv.stride == (1, 1) and conv.padding == (1, 1)
    whole = whole and conv.weight.device.type == "cpu"
    return winograd.tile(conv.in_channels, conv.out_channels, dtype, doubled=doubled) if whole else None


def packable(network: nn.Module) -> list[nn.Module]:
    """Return the parts of a network that `pack` takes; none of one that it does not know.

    Example:
        >>> from reverie.networks.unet import UNetConfig
        >>> len(packable(UNet(UNetConfig(channels=(8, 16))))), packable(nn.Linear(2, 2))
        (1, [])
    """
    if isinstance(network, Captioned):
        return packable(network.image)  # its words are read once for a picture
    if isinstance(network, UNet):
        # NCSN++ carries its input beside the state, in float32.
        plain = not any("Skip" in kind for kind in (*network.config.down_types, *network.config.up_types))
        return [network] if plain else []
    if isinstance(network, ConvolutionalAutoencoder):
        return [network.encoder, network.decoder]
    return [network.encoder, network.decoder] if isinstance(network, TinyAutoencoder) else []


def pack(network: nn.Module, dtype: torch.dtype = torch.float32, bits8: bool = False) -> Packing:
    """Make a network ready to be asked many times, where it is. It can't be trained, moved or saved after that.

    Arguments:
        network: One of those that `packable` knows parts of.
        dtype: What it is to compute in: float32 or bfloat16.
        bits8: Hold its weights in eight bits.

    Returns:
        What became of its weights.

    Example:
        >>> from reverie.networks.unet import UNetConfig
        >>> network = UNet(UNetConfig(in_channels=1, channels=(8, 16))).eval()
        >>> pack(network).numbers > 0, network(torch.zeros(2, 1, 8, 8), torch.zeros(2)).shape
        (True, torch.Size([2, 1, 8, 8]))
    """
    for part in packable(network):
        small = sum(tensor.numel() for tensor in part.parameters()) <= MOST
        if isinstance(part, UNet):
            part.shares = part.conv_in.weight.device.type == "cpu"  # a recorded call can't look
        for block in [module for module in part.modules() if isinstance(module, ResidualBlock)]:
            if block.conv1.weight.is_cuda:
                join_biases(block)
        for attention in [module for module in part.modules() if isinstance(module, Attention)]:
            pack_attention(attention, dtype, bits8)
        for parent, name, up in [] if bits8 else list(children(part, Upsample)):
            if tile(up.conv, dtype, doubled=True):
                setattr(parent, name, PackedUpsample(up.conv, dtype))
        ends = end_layers(part)
        for parent, name, layer in list(layers_of(part)):
            halves = small and not isinstance(parent, ResidualBlock)  # whose linear layer is given the time
            setattr(parent, name, packed(layer, dtype, bits8, layer is ends[0], layer is ends[1], halves))
    done = [module for module in network.modules() if isinstance(module, Packed)]
    off, whole = sum((module.error for module in done), torch.zeros(2, dtype=torch.float64)).tolist()
    numbers, size = sum(module.numbers for module in done), sum(module.bytes for module in done)
    return Packing(numbers, size, (off / whole) ** 0.5 if whole else 0.0)


def join_biases(block: ResidualBlock) -> None:
    """Move the biases of a block's convolutions into its time's and its shortcut's: the sums are the same."""
    time: Any = None if block.scale_shift else block.time_emb_proj
    conv: Any
    for conv, other in ((block.conv1, time), (block.conv2, block.conv_shortcut)):
        if conv.bias is not None and other is not None and other.bias is not None:
            other.bias = nn.Parameter(other.bias + conv.bias, requires_grad=False)
            conv.bias = None


def pack_attention(attention: Attention, dtype: torch.dtype, bits8: bool) -> None:
    """Join the queries, keys and values of a self-attention; have another remember what it made of a context."""
    if not attention.over_pixels:
        if attention.to_k.weight.device.type == "cpu":  # a recorded call can't tell a new context from an old one
            attention.remember()
        return
    parts = [attention.to_q, attention.to_k, attention.to_v]
    bias = None if attention.to_q.bias is None else torch.cat([part.bias for part in parts])
    attention.join(PackedLinear(torch.cat([part.weight.detach() for part in parts]), bias, dtype, bits8))


def layers_of(part: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Yield the layers that are packed, each with what holds it and its name there."""
    for parent, name, layer in children(part, nn.Conv2d | nn.Linear | Gate):
        if not isinstance(parent, Gate) and not left(part, layer):
            yield parent, name, layer


def children(part: nn.Module, kind: Any) -> Iterator[tuple[nn.Module, str, Any]]:
    """Yield the modules of a kind in a network, each with what holds it and its name there."""
    for parent in part.modules():
        yield from ((parent, name, module) for name, module in parent.named_children() if isinstance(module, kind))


def left(part: nn.Module, layer: nn.Module) -> bool:
    """Whether a layer is of those that stay as they are."""
    owners = [owner for name in FLOAT32 if (owner := getattr(part, name, None)) is not None]
    return any(layer is module for owner in owners for module in owner.modules())


def end_layers(part: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return the first and the last convolution of a part."""
    if hasattr(part, ENDS[0]):
        first, last = (getattr(part, name) for name in ENDS)
        return first, last
    convs = [module for module in part.modules() if isinstance(module, nn.Conv2d)]
    return convs[0], convs[-1]


def packed(layer: nn.Module, dtype: torch.dtype, bits8: bool, first: bool, last: bool, halves: bool = True) -> Packed:
    """Return a layer, packed: in float32 where it is the first or the last, and then never in eight bits."""
    if isinstance(layer, Gate):
        return PackedLinear(layer.proj.weight, layer.proj.bias, dtype, bits8, gated=True, halves=halves)
    if isinstance(layer, nn.Linear):
        return PackedLinear(layer.weight, layer.bias, dtype, bits8, halves=halves)
    assert isinstance(layer, nn.Conv2d)
    if first or last:
        return PackedConv2d(layer, torch.float32, out=torch.float32 if last else dtype)
    return PackedConv2d(layer, dtype, bits8)
