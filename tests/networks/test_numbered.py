"""Numbers beside the time: at first without effect, then with one, and refused where there is no place for them."""

import pytest
import torch
from pydantic import ValidationError

from reverie.base.errors import UsageError
from reverie.networks import networks
from reverie.networks.numbered import Numbered, NumberedConfig

UNET = {"in_channels": 1, "channels": (8, 8), "layers": 1, "num_class_embeds": 4, "norm_num_groups": 2}


def wild(network):
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


@pytest.mark.parametrize("inside", [{"unet": UNET}, {"mlp": {"in_channels": 3, "num_class_embeds": 4}}])
def test_it_begins_as_the_network_inside(inside):
    (name, settings), = inside.items()  # fmt: skip
    bare = wild(networks[name](networks[name].Config(**settings)))
    network = Numbered(NumberedConfig(numbers=("span", "guidance"), **inside))
    missing = network.inner.load_state_dict(bare.state_dict(), strict=False)
    assert missing.missing_keys == ["time_embedding.cond_proj.weight"]
    x = torch.randn(2, 1, 8, 8) if name == "unet" else torch.randn(2, 3)
    time, label = torch.tensor([3.0, 700.0]), torch.tensor([0, 3])
    span = torch.tensor([0.1, 0.9])
    due = bare(x, time, label=label)
    torch.testing.assert_close(network(x, time, label=label, span=span), due)
    torch.nn.init.normal_(network.inner.time_embedding.cond_proj.weight)
    one, other = network(x, time, label=label, span=span), network(x, time, label=label, span=span / 2)
    assert (one - other).abs().max() > 1e-3
    assert torch.equal(
        network(x, time, label=label), network(x, time, label=label, span=0 * span, guidance=0 * span + 1)
    )


def test_a_number_that_it_does_not_take_is_refused():
    network = Numbered(NumberedConfig(numbers=("span",), mlp={"in_channels": 3}))
    with pytest.raises(UsageError, match="takes span beside its time, and no guidance"):
        network(torch.zeros(1, 3), torch.zeros(1), guidance=torch.ones(1))


@pytest.mark.parametrize("inside", [{}, {"unet": UNET, "mlp": {}}])
def test_one_network_inside(inside):
    with pytest.raises(UsageError, match="one network inside"):
        Numbered(NumberedConfig(numbers=("span",), **inside))


def test_unknown_numbers_are_refused():
    with pytest.raises(ValidationError):
        NumberedConfig(numbers=("colour",), mlp={})


def test_the_networks_alone_say_what_they_lack():
    mlp = networks["mlp"](networks["mlp"].Config(time_cond_proj_dim=4))
    with pytest.raises(UsageError, match=r"time_cond must be \(2, 4\)"):
        mlp(torch.zeros(2, 2), torch.zeros(2))
    with pytest.raises(UsageError, match="time_cond must be left out"):
        networks["mlp"](networks["mlp"].Config())(torch.zeros(2, 2), torch.zeros(2), time_cond=torch.zeros(2, 4))
    config = networks["unet"].Config(channels=(8, 8), time_cond_proj_dim=4)
    with pytest.raises(UsageError, match="UNet2DModel"):
        config.to_diffusers()
