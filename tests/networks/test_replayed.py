"""Recorded calls on a GPU: what the network says, for every set of shapes."""

import pytest
import torch

from reverie.networks import replayed
from reverie.networks.packed import pack
from reverie.networks.replayed import Replayed
from reverie.networks.unet import UNet, UNetConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def network():
    """Return a small U-Net on the GPU, packed."""
    torch.manual_seed(0)
    config = {"in_channels": 3, "channels": (32, 64), "attention": (False, True), "num_class_embeds": 4}
    network = UNet(UNetConfig(**config)).cuda().to(memory_format=torch.channels_last).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    pack(network.requires_grad_(False), torch.bfloat16)
    return network


def told(count, side):
    """Return what a U-Net is given."""
    torch.manual_seed(count)
    x = torch.randn(count, 3, side, side, device="cuda")
    return x, torch.rand(count, device="cuda") * 999, torch.randint(4, (count,), device="cuda")


@torch.no_grad()
def test_an_answer_is_the_networks_own_and_stays(network):
    graphs, kept = Replayed(network), []
    for count, side in ((1, 16), (2, 16), (1, 24), (2, 16), (1, 16)):
        x, time, label = told(count, side)
        for _ in range(2):
            x, time = x + 0.1, time + 1
            kept.append((graphs(x, time, label=label), network(x, time, label=label)))
    assert all(torch.equal(*pair) for pair in kept)
    assert len(graphs.recorded) == 3


@torch.no_grad()
def test_the_longest_unused_goes(network, monkeypatch):
    monkeypatch.setattr(replayed, "MOST", 2)
    graphs = Replayed(network)
    for side in (16, 24, 16, 32):
        x, time, label = told(1, side)
        assert torch.equal(graphs(x, time, label=label), network(x, time, label=label))
    assert sorted(key[0][1][-1] for key in graphs.recorded) == [16, 32]


def test_a_slope_is_that_of_a_call_of_its_own(network):
    x, time, label = told(1, 16)
    x.requires_grad_()
    Replayed(network)(x, time, label=label).sum().backward()
    assert x.grad.abs().sum() > 0
