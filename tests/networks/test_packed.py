"""A packed network says what the network said."""

import copy

import pytest
import torch
from torch import nn

from reverie.kernels import dispatch
from reverie.kernels.strassen import Halves
from reverie.kernels.winograd import DOUBLED, Transformed
from reverie.networks.autoencoder import Autoencoder, AutoencoderConfig
from reverie.networks.captioned import Captioned, CaptionedConfig
from reverie.networks.layers import Upsample, added
from reverie.networks.mlp import MLP, MLPConfig
from reverie.networks.packed import Packed, PackedUpsample, pack, packable, packed, tile
from reverie.networks.tiny_autoencoder import TinyAutoencoder, TinyAutoencoderConfig
from reverie.networks.unet import Deep, UNet, UNetConfig, keeping_deep
from reverie.networks.vq_autoencoder import VQAutoencoder, VQConfig

NEAR = {torch.float32: 1e-5, torch.bfloat16: 0.02}


def filled(network: nn.Module) -> nn.Module:
    """Return a network whose outputs are not zero."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.Embedding):
            module.reset_parameters()
    return network.eval().requires_grad_(False)


def unet(**config) -> UNet:
    return filled(UNet(UNetConfig(**{"in_channels": 3, "channels": (16, 32), "attention": (False, True), **config})))


def told(network: UNet, rows: int) -> dict[str, torch.Tensor]:
    """Return what a network is asked."""
    draw = torch.Generator().manual_seed(1)
    asked = {"x": torch.randn(rows, 3, 12, 10, generator=draw), "time": 999 * torch.rand(rows, generator=draw)}
    if network.config.context_dim:
        asked["context"] = torch.randn(rows, 7, network.config.context_dim, generator=draw)
    if network.config.num_class_embeds:
        asked["label"] = torch.arange(rows)
    return asked


def off(y, wanted):
    return float((y - wanted).norm() / wanted.norm())


CONFIGS = [
    {},
    {"num_class_embeds": 5, "resnet_time_scale_shift": "scale_shift"},
    {"context_dim": 12},
    {"context_dim": 12, "use_linear_projection": True, "channels": (8, 16, 32), "attention": (True, True, False)},
]


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", list(NEAR))
def test_a_packed_unet_is_the_unet(config, dtype):
    network = unet(**config)
    asked, other = told(network, 3), copy.deepcopy(network)
    packing = pack(other, dtype)
    y = other(**asked)
    assert y.dtype == torch.float32
    assert off(y, network(**asked)) < NEAR[dtype]
    assert packing.error == 0
    assert packing.bytes <= packing.numbers * 4 * 4


@torch.no_grad()
def test_a_bfloat16_network_is_no_further_off_than_autocast():
    network = unet(context_dim=12)
    asked, other = told(network, 2), copy.deepcopy(network)
    pack(other, torch.bfloat16)
    wanted = network(**asked)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = network(**asked)
    assert off(other(**asked), wanted) < 1.3 * off(autocast, wanted)


@torch.no_grad()
def test_eight_bits_take_a_quarter_and_say_how_far_they_are_off():
    network = unet(context_dim=12, channels=(32, 64))
    asked, other = told(network, 2), copy.deepcopy(network)
    packing = pack(other, torch.float32, bits8=True)
    assert packing.bytes < 0.3 * 4 * packing.numbers
    assert 1e-3 < packing.error < 0.01
    assert 1e-4 < off(other(**asked), network(**asked)) < 0.05


@pytest.mark.skipif(not dispatch.candidates() or bool(next(iter(dispatch.candidates().values()))), reason="no library")
@torch.no_grad()
def test_convolutions_of_3x3_are_transformed_and_no_others(monkeypatch):
    network = unet(context_dim=12, channels=(32, 64))
    whole = [module for module in network.modules() if isinstance(module, nn.Conv2d) and tile(module, torch.float32)]
    assert whole
    assert all(conv.kernel_size == (3, 3) and conv.stride == (1, 1) and conv.in_channels >= 32 for conv in whole)
    assert tile(nn.Conv2d(32, 32, 3), torch.float32) is tile(nn.Conv2d(32, 32, 3, 2, 1), torch.float32) is None
    for bits8, mode, count in ((False, "auto", len(whole)), (True, "auto", 0), (False, "plain", 0)):
        monkeypatch.setenv(dispatch.VARIABLE, mode)
        other = copy.deepcopy(network)
        pack(other, torch.float32, bits8)
        held = [module.held for module in other.modules() if isinstance(module, Packed)]
        assert sum(isinstance(weight, Transformed) for weight in held) == count


@pytest.mark.skipif(not dispatch.candidates() or bool(next(iter(dispatch.candidates().values()))), reason="no library")
@torch.no_grad()
@pytest.mark.parametrize("size", [(12, 10), (11, 13), (5, 7)])
def test_doubling_and_its_convolution_are_one_walk(size):
    """Over the image as it was, also where the doubled one is cropped to an odd size."""
    network = unet(channels=(32, 32, 64), attention=(False, False, True))
    other = copy.deepcopy(network)
    pack(other)
    ups = [module for module in other.modules() if isinstance(module, PackedUpsample)]
    assert len(ups) == 2
    assert all(up.held.tile == DOUBLED for up in ups)
    assert not any(isinstance(module, Upsample) for module in other.modules())
    asked = told(network, 2) | {"x": torch.randn(2, 3, *size)}
    assert off(other(**asked), network(**asked)) < 1e-5


@pytest.mark.skipif(not dispatch.candidates() or bool(next(iter(dispatch.candidates().values()))), reason="no library")
@torch.no_grad()
def test_the_feed_forward_part_goes_by_halves_and_no_other_layer(monkeypatch):
    network = unet(channels=(32, 512), context_dim=12, attention=(False, True))
    other = copy.deepcopy(network)
    pack(other)
    by_halves = {name for name, layer in other.named_modules() if isinstance(getattr(layer, "held", None), Halves)}
    assert by_halves
    assert by_halves == {name for name, _ in other.named_modules() if name.endswith(("ff.net.0", "ff.net.2"))}
    asked = told(network, 2)
    assert off(other(**asked), network(**asked)) < 1e-5
    monkeypatch.setattr("reverie.networks.packed.MOST", 1000)  # a large network has none
    pack(network)
    assert not any(isinstance(getattr(layer, "held", None), Halves) for layer in network.modules())


@torch.no_grad()
def test_keys_and_values_of_a_context_are_worked_out_once():
    network = unet(context_dim=12)
    pack(network)
    calls = []
    for module in network.modules():
        if getattr(module, "known", None) is not None:
            module.to_k.register_forward_hook(lambda *_: calls.append(1))
    asked = told(network, 2)
    first = network(**asked)
    once = len(calls)
    assert once > 0
    assert torch.equal(network(**asked), first)
    assert len(calls) == once
    asked["context"] += 1  # the same tensor, of other numbers
    assert not torch.equal(network(**asked), first)
    assert len(calls) == 2 * once
    del asked
    assert all(len(module.known) == 0 for module in network.modules() if getattr(module, "known", None) is not None)


@torch.no_grad()
@pytest.mark.parametrize("unet", [{}, {"positions": True, "patch": 2}], ids=["plain", "places and patches"])
def test_the_words_encoder_stays_as_it_is(unet):
    unet = {"channels": (8, 16), **unet}
    network = filled(Captioned(CaptionedConfig(words={"vocabulary": 9, "length": 4}, unet=unet)))
    tokens = torch.tensor([[1, 2, 0, 0]])
    before, x, t = network.encode(tokens), torch.randn(1, 3, 8, 8), torch.zeros(1)
    wanted = network(x, t, **before)
    pack(network)
    assert torch.equal(network.encode(tokens)["context"], before["context"])
    assert off(network(x, t, **before), wanted) < 1e-5
    assert not any(isinstance(module, Packed) for module in network.words.modules())


@torch.no_grad()
@pytest.mark.parametrize("dtype", list(NEAR))
@pytest.mark.parametrize(
    "network",
    [
        Autoencoder(AutoencoderConfig(channels=(8, 16, 16), latent_channels=4)),
        TinyAutoencoder(TinyAutoencoderConfig(encoder_channels=8, decoder_channels=8)),
        VQAutoencoder(VQConfig(channels=(8, 16, 16), latent_channels=4, entries=1)),
    ],
    ids=["kl", "tiny", "vq"],
)
def test_a_packed_autoencoder_is_the_autoencoder(network, dtype):
    network = filled(copy.deepcopy(network))
    other = copy.deepcopy(network)
    pack(other, dtype)
    latents, images = torch.randn(1, 4, 6, 5), torch.rand(1, 3, 32, 24)
    assert off(other.decode(latents), network.decode(latents)) < 2 * NEAR[dtype]
    one, two = network.encode(images), other.encode(images)
    one, two = (z if isinstance(z, torch.Tensor) else z.mean for z in (one, two))
    assert off(two, one) < 2 * NEAR[dtype]


def test_what_is_not_known_is_not_packed():
    assert packable(MLP(MLPConfig(in_channels=2, out_channels=2))) == []
    skips = {"down_block_types": ["SkipDownBlock2D"] * 2, "up_block_types": ["SkipUpBlock2D"] * 2}
    assert packable(UNet(UNetConfig(channels=(32, 32), **skips))) == []


@torch.no_grad()
def test_a_broken_attention_still_returns_its_values():
    from reverie.networks.attention import pixel_attentions, unmixed

    network = unet()
    asked, other = told(network, 2), copy.deepcopy(network)
    pack(other)
    with unmixed(pixel_attentions(network).values()):
        wanted = network(**asked)
    with unmixed(pixel_attentions(other).values()):
        assert off(other(**asked), wanted) < 1e-5


def guided(network: UNet, rows: int) -> dict[str, torch.Tensor]:
    """Return what guidance asks: the same images at the same times under two contexts each."""
    asked = told(network, 2 * rows)
    return asked | {name: asked[name][:rows].repeat(2, *[1] * (asked[name].ndim - 1)) for name in ("x", "time")}


def batches(network: UNet) -> list[int]:
    """Return a list to which the size of the batch that the first block is given is added at each call."""
    seen: list[int] = []
    network.down_blocks[0].resnets[0].register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    return seen


SHARED = [
    {"context_dim": 12},
    {"context_dim": 12, "attention": (True, True), "positions": True},
    {"context_dim": 12, "attention": (True, False), "use_linear_projection": True},
    {"context_dim": 12, "middle": "none", "attention": (False, True)},
]


@torch.no_grad()
@pytest.mark.parametrize("config", SHARED)
@pytest.mark.parametrize("dtype", list(NEAR))
def test_two_branches_that_share_their_beginning_say_what_they_said_apart(config, dtype):
    network = unet(**config)
    asked = guided(network, 3)
    pack(network, dtype)
    assert network.shares
    seen = batches(network)
    y = network(**asked)
    network.shares = False
    apart = network(**asked)
    assert seen == [3, 6]
    assert not torch.equal(y[:3], y[3:])
    assert off(y, apart) < (1e-6 if dtype == torch.float32 else 1e-2)


@torch.no_grad()
@pytest.mark.parametrize("name", ["x", "time", "pooled"])
def test_branches_that_differ_share_nothing(name):
    network = unet(
        context_dim=12,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=5 + 2 * 4,
    )
    asked = guided(network, 2) | {"pooled": torch.ones(4, 5), "sizes": torch.ones(4, 2)}
    asked[name] = asked[name].clone()
    asked[name][3] += 0.5
    other = copy.deepcopy(network)
    pack(other)
    seen = batches(other)
    assert off(other(**asked), network(**asked)) < 1e-5
    assert seen == [4]


@torch.no_grad()
def test_an_odd_batch_and_one_without_a_context_share_nothing():
    for network, rows in ((unet(), 2), (unet(context_dim=12), 3)):
        asked, other = told(network, rows), copy.deepcopy(network)
        asked = {name: value[:1].expand(rows, *value.shape[1:]) for name, value in asked.items()}
        pack(other)
        seen = batches(other)
        assert off(other(**asked), network(**asked)) < 1e-5
        assert seen == [rows]


@torch.no_grad()
@pytest.mark.parametrize("bits8", [False, True])
@pytest.mark.parametrize("layer", [nn.Linear(32, 34), nn.Conv2d(32, 34, 3, padding=1), nn.Conv2d(32, 34, 1)])
def test_a_layer_adds_what_it_is_given(layer, bits8):
    flat = isinstance(layer, nn.Linear)
    other = packed(layer, torch.float32, bits8, False, False)
    x, z = (torch.randn(2, *((7, c) if flat else (c, 7, 5))) for c in (32, 34))
    assert other.adds_to in (None, torch.float32)
    assert off(added(z, other, x), z + layer(x)) < (0.02 if bits8 else 1e-5)
    assert torch.equal(added(z.double(), other, x), z.double() + other(x))


@torch.no_grad()
@pytest.mark.parametrize("attention", [(False, True), (True, True)])
def test_branches_share_their_beginning_while_deep_features_are_kept(attention):
    network, said = unet(context_dim=12, attention=attention), {}
    asked = guided(network, 2)
    pack(network)
    for shares in (True, False):
        network.shares, deep = shares, Deep()
        with keeping_deep(deep):
            said[shares] = [network(**asked), network(**asked | {"x": 2 * asked["x"]})]
        assert deep.of(asked["x"])
    for together, apart in zip(said[True], said[False], strict=True):
        assert off(together, apart) < 1e-6
