"""Adapters of low rank: what they change, what they leave, and that training moves nothing else."""

import copy

import pytest
import torch
from torch import nn

from reverie.base.errors import UsageError
from reverie.networks.lora import (
    ATTENTION,
    Factors,
    add_lora,
    base_state_dict,
    lora_state_dict,
    remove_lora,
    trained,
    updated,
)
from reverie.networks.unet import UNet, UNetConfig

CONFIG = UNetConfig(
    in_channels=4, channels=(16, 32), layers=1, attention=(False, True), context_dim=12, num_heads=2, norm_num_groups=4
)
X, TIME, CONTEXT = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 12)


def drawn(unet):
    """What a network draws, as it does when it samples: without gradients, for which some kernels make room."""
    with torch.no_grad():
        return unet(X, TIME, context=CONTEXT)


@pytest.fixture
def unet() -> UNet:
    torch.manual_seed(0)
    network = UNet(CONFIG)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def shake(network: nn.Module) -> None:
    """Give every adapter a change."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, adapter in trained(network):
            adapter.lora_B.copy_(torch.randn(adapter.lora_B.shape, generator=generator))


def test_fresh_adapters_change_nothing_and_only_they_are_trained(unet):
    before = copy.deepcopy(unet.state_dict())
    out = drawn(unet)
    names = add_lora(unet, rank=3)
    assert names
    assert all(name.endswith(ATTENTION) for name in names)
    assert torch.equal(drawn(unet), out)
    base = base_state_dict(unet)
    assert base.keys() == before.keys()
    assert all(torch.equal(base[name], value) for name, value in before.items())
    free = {name for name, parameter in unet.named_parameters() if parameter.requires_grad}
    assert free == {f"{n}.parametrizations.weight.0.lora_{ab}" for n in names for ab in "AB"}

    optimizer = torch.optim.Adam([p for p in unet.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = (unet(X, TIME, context=CONTEXT) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(base_state_dict(unet)[name], value) for name, value in before.items())
    # Every adapter is in use: also those of self-attention, whose weights are read without a call of the layer.
    assert all(adapter.lora_B.abs().max() > 0 for _, adapter in trained(unet))


@pytest.mark.parametrize("alpha", [None, 1.0, 6.0])
def test_merged_weight_is_w_plus_scale_b_a(unet, alpha):
    before = copy.deepcopy(unet.state_dict())
    targets = [*ATTENTION, "conv1", "proj_in", "net.0.proj"]
    names = add_lora(unet, rank=3, alpha=alpha, targets=targets)
    shake(unet)
    factors = {name: (adapter.lora_B.double(), adapter.lora_A.double()) for name, adapter in trained(unet)}
    out = drawn(unet)
    remove_lora(unet, merge=True)
    assert unet.state_dict().keys() == before.keys()
    for name in names:
        b, a = factors[name]
        want = before[f"{name}.weight"].double()
        want = want + (alpha or 3.0) / 3 * torch.einsum("or,r...->o...", b.flatten(1), a)
        got = unet.get_submodule(name).weight
        torch.testing.assert_close(got, want.float(), rtol=1e-6, atol=1e-6)
    assert all(
        torch.equal(unet.state_dict()[n], v) for n, v in before.items() if n.removesuffix(".weight") not in names
    )
    assert torch.equal(drawn(unet), out)


def test_removing_gives_back_the_bits(unet):
    before = copy.deepcopy(unet.state_dict())
    out = drawn(unet)
    add_lora(unet, rank=2, targets=["conv1", "to_q"])
    shake(unet)
    assert not torch.equal(drawn(unet), out)
    remove_lora(unet)
    assert all(torch.equal(unet.state_dict()[name], value) for name, value in before.items())
    assert torch.equal(drawn(unet), out)


def test_bfloat16_weights_are_summed_in_float32():
    weight = torch.ones(1, 1, dtype=torch.bfloat16)
    small = Factors(torch.full((1, 1), 2.0**-8), torch.ones(1, 1))
    # Each of two changes alone is lost in bfloat16's eight bits; together they are not.
    assert updated(weight, [(1.0, small), (1.0, small)]).item() == 1 + 2**-7
    assert updated(weight, []).dtype == torch.bfloat16


def test_autocast_does_not_reach_the_change(unet):
    add_lora(unet, rank=2)
    shake(unet)
    layer = unet.get_submodule(next(trained(unet))[0])
    with torch.autocast("cpu", torch.bfloat16):
        inside = layer.weight.detach()
    assert torch.equal(inside, layer.weight)


def test_factors_with_pixels_of_their_own():
    torch.manual_seed(0)
    up, down, mid = torch.randn(5, 2), torch.randn(2, 3), torch.randn(2, 2, 3, 3)
    want = torch.zeros(5, 3, 3, 3)
    for m in range(2):
        for n in range(2):
            want += up[:, m, None, None, None] * down[n, None, :, None, None] * mid[m, n]
    got = Factors(up[..., None, None], down[..., None, None], 0.5, mid)
    assert got.shape == (5, 3, 3, 3)
    torch.testing.assert_close(got.added(torch.zeros(5, 3, 3, 3), 2.0), want)


def test_saved_names_are_those_of_peft(unet):
    names = add_lora(unet, rank=2, alpha=8, targets=["to_q", "conv1"])
    shake(unet)
    state = lora_state_dict(unet)
    assert state.keys() == {f"unet.{name}.lora_{ab}.weight" for name in names for ab in "AB"}
    for name, adapter in trained(unet):
        product = state[f"unet.{name}.lora_B.weight"].flatten(1) @ state[f"unet.{name}.lora_A.weight"].flatten(1)
        shape = adapter.factors().shape
        torch.testing.assert_close(product.reshape(shape), adapter.factors().added(torch.zeros(shape)).detach())
    assert all(name.startswith("base_model.model.") for name in lora_state_dict(unet, ""))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"alpha": -1.0}, "alpha -1.0"),
        ({"alpha": float("nan")}, "alpha nan"),
        ({"targets": ["to_q", "to_w"]}, "called to_w, did you mean to_v"),
        ({"targets": []}, "no linear layer"),
        ({"targets": ["norm1"]}, "called norm1"),
    ],
)
def test_what_makes_no_adapter_is_refused(unet, settings, message):
    with pytest.raises(UsageError, match=message):
        add_lora(unet, **settings)
    assert all(parameter.requires_grad for parameter in unet.parameters())


def test_adapters_twice_or_none_are_refused(unet):
    with pytest.raises(UsageError, match="no LoRA adapters"):
        remove_lora(unet)
    add_lora(unet)
    with pytest.raises(UsageError, match="already"):
        add_lora(unet)
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(UsageError, match="groups"):
        add_lora(grouped, targets=["0"])


def test_a_copy_of_an_adapted_network_is_its_own(unet):
    add_lora(unet, rank=2)
    shake(unet)
    twin = copy.deepcopy(unet)
    assert torch.equal(twin(X, TIME, context=CONTEXT), unet(X, TIME, context=CONTEXT))
    remove_lora(twin)
    assert next(trained(unet), None) is not None
