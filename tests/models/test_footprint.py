"""Memory is stated before it is taken, from the network's own sizes."""

import pytest
import torch
from torch import nn

from reverie.base.errors import OutOfMemoryError
from reverie.models import memory
from reverie.models.card import CodecSpec
from reverie.models.codec import build_codec
from reverie.models.footprint import codec_bytes, step_bytes, weights_bytes, working_bytes
from reverie.models.formats import write_model
from reverie.models.load import load
from reverie.models.speed import hasten
from reverie.networks.dit import DiT, DiTConfig
from reverie.networks.edm2 import EDM2, EDM2Config
from reverie.networks.unet import UNet, UNetConfig


def test_a_step_grows_with_rows_and_pixels(model):
    network = model.denoiser.network
    small, large = (step_bytes(network, model.plan(1, steps=1, size=side, exact=False)) for side in (16, 32))
    assert large == 4 * small
    assert step_bytes(network, model.plan(3, steps=1, size=16, exact=False)) == 3 * small
    assert step_bytes(network, model.plan(1, steps=1, size=16)) == model.plan(1, steps=1, size=16).bucket * small


def test_guidance_asks_twice_and_bfloat16_takes_half(classy):
    plain, guided = (classy.plan(2, steps=1, classes=0, guidance=w, exact=False) for w in (1.0, 2.0))
    network = classy.denoiser.network
    whole = step_bytes(network, guided)
    assert whole == 2 * step_bytes(network, plain)
    assert (
        2 * step_bytes(network, classy.plan(2, steps=1, classes=0, guidance=2.0, exact=False, dtype="bfloat16"))
        == whole
    )
    hasten(classy, torch.bfloat16, chosen=True)
    assert 2 * step_bytes(network, classy.plan(2, steps=1, classes=0, guidance=2.0)) == whole


@pytest.mark.parametrize(("context", "channels", "side"), [(None, (64, 128), 64), (32, (64, 64), 64)])
@torch.no_grad()
def test_the_estimate_of_a_step_is_near_what_it_takes(make, context, channels, side):
    how = {"channels": channels, "context_dim": context, "attention": (bool(context), False)}
    config = UNetConfig(in_channels=4, out_channels=4, **how)
    network = UNet(config).eval().to(memory_format=torch.channels_last)
    told = {} if context is None else {"context": torch.randn(2, 7, context)}
    near(make, network, side, told)


@pytest.mark.parametrize(
    "network",
    [
        DiT(DiTConfig(in_channels=4, width=128, depth=2, heads=4)),
        EDM2(EDM2Config(in_channels=4, out_channels=4, channels=(32, 64), attention=(False, True), layers=1)),
    ],
    ids=["dit", "edm2"],
)
@torch.no_grad()
def test_so_is_that_of_other_networks(make, network):
    near(make, network.eval(), 64, {})


def near(make, network, side, told):
    """Counted by PyTorch's own allocator, within a factor of two."""
    x = torch.randn(2, 4, side, side)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        network(x, torch.zeros(2), **told)
    now = peak = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    plan = make().plan(2, steps=1, exact=False)
    object.__setattr__(plan, "shape", (4, side, side))
    assert peak / 2 < step_bytes(network, plan) < 2 * peak


def test_decoding_is_bounded_by_a_tile():
    codec = build_codec(CodecSpec(config={"channels": [16, 32], "latent_channels": 4}))
    whole, tiled, larger = (codec_bytes(codec, (4, side, side)) for side in (96, 100, 200))
    assert tiled < whole
    picture = 4 * 3 * 2 * 2
    assert larger - tiled == 3 * picture * (200**2 - 100**2)


def test_weights_are_counted_once(model):
    layer = nn.Linear(3, 2)
    assert weights_bytes(nn.ModuleList([layer, layer]), None) == 32
    before = weights_bytes(model.denoiser.network)
    hasten(model, torch.bfloat16, chosen=True)
    assert 0.4 * before < weights_bytes(model.denoiser.network) < 0.7 * before


def test_what_exceeds_what_is_free_is_refused_with_the_numbers(model, monkeypatch):
    plan = model.plan(1, steps=1, size=512)
    assert working_bytes(model.denoiser.network, None, plan) > 2**20
    monkeypatch.setattr(memory, "free_memory", lambda device: 2**20)
    with pytest.raises(
        OutOfMemoryError, match=r"would take .* at the least, and 1\.0 MB are free; lower .* the size"
    ) as e:
        model.execute(plan)
    assert e.value.exit_code == 7


def test_a_fast_model_copies_no_weights_before_they_are_packed(model, tmp_path, monkeypatch):
    """The network that is packed still has its numbers in the file: laid out nowhere else on the way."""
    path, seen = write_model(model, tmp_path / "model", "native"), []
    monkeypatch.setattr("reverie.models.load.hasten", lambda made, *_: seen.append(made))
    load(path, speed="fast")
    conv = seen[0].denoiser.network.down_blocks[0].resnets[0].conv1.weight
    assert conv.is_contiguous()
    assert not conv.is_contiguous(memory_format=torch.channels_last)
    assert (
        load(path)
        .denoiser.network.down_blocks[0]
        .resnets[0]
        .conv1.weight.is_contiguous(memory_format=torch.channels_last)
    )
