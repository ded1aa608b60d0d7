"""The network for points."""

import pytest
import torch
from pydantic import ValidationError

from reverie.base.errors import UsageError
from reverie.networks import networks
from reverie.networks.mlp import MLP, MLPConfig


def awake(mlp: MLP) -> MLP:
    """Draw the weights that start at zero."""
    for module in (mlp.linear_out, *[layer.linear_2 for layer in mlp.layers]):
        torch.nn.init.normal_(module.weight, std=0.1)
    return mlp


def test_registry_builds_it():
    assert networks["mlp"] is MLP
    assert networks["mlp"].Config is MLPConfig


@pytest.mark.parametrize("features", ["sinusoids", "fourier"])
def test_it_learns_a_function_of_point_time_and_class(features):
    """y = x (sin of a multiple of the time) + class; a linear function of the point would leave an error above 0.3."""
    torch.manual_seed(0)
    mlp = MLP(MLPConfig(in_channels=2, width=32, num_class_embeds=3, time_features=features))
    optimizer = torch.optim.Adam(mlp.parameters(), 1e-2)
    for step in range(150):
        x, time, label = torch.randn(128, 2), torch.rand(128), torch.randint(3, (128,))
        want = x * (3 * time).sin()[:, None] + label[:, None]
        loss = (mlp(x, time * (1000 if features == "sinusoids" else 1), label) - want).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 0:
            start = loss.item()
    assert loss.item() < 0.05 < start / 10


def test_each_point_has_its_own_time_and_class():
    torch.manual_seed(0)
    mlp = awake(MLP(MLPConfig(in_channels=3, out_channels=5, num_class_embeds=4)).double())
    x, time, label = torch.randn(3, 3).double(), torch.tensor([1.0, 5.0, 5.0]), torch.tensor([0, 0, 3])
    y = mlp(x[:1].expand(3, -1), time, label)
    assert y.shape == (3, 5)
    assert (y[0] - y[1]).abs().max() > 1e-3
    assert (y[1] - y[2]).abs().max() > 1e-3
    together = mlp(x, time, label)
    alone = torch.cat([mlp(x[i : i + 1], time[i : i + 1], label[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)


def test_the_output_is_zero_before_training():
    assert not MLP(MLPConfig())(torch.randn(4, 2), torch.rand(4)).any()


def test_dropout_is_for_training_only():
    mlp = awake(MLP(MLPConfig(dropout=0.5)))
    x, time = torch.randn(4, 2), torch.rand(4)
    assert not torch.equal(mlp(x, time), mlp(x, time))
    mlp.eval()
    assert torch.equal(mlp(x, time), mlp(x, time))


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        ({}, (torch.zeros(2, 3), torch.zeros(2), None), r"points are \(2, 3\).*\(B, 2\)"),
        ({}, (torch.zeros(2, 2), torch.zeros(1), None), r"time is \(1,\)"),
        ({}, (torch.zeros(2, 2), torch.zeros(2), torch.zeros(2).long()), "without classes"),
        ({"num_class_embeds": 3}, (torch.zeros(2, 2), torch.zeros(2), None), "needs a label"),
        ({"num_class_embeds": 3}, (torch.zeros(2, 2), torch.zeros(2), torch.zeros(1).long()), r"label is \(1,\)"),
    ],
)
def test_what_does_not_fit_is_refused(settings, given, message):
    with pytest.raises(UsageError, match=message):
        MLP(MLPConfig(**settings))._check(*given)


def test_a_label_without_a_row_is_refused():
    with pytest.raises(UsageError, match=r"label 7 is not one of 0 .. 2"):
        MLP(MLPConfig(num_class_embeds=3))(torch.zeros(1, 2), torch.zeros(1), torch.tensor([7]))


@pytest.mark.parametrize("wrong", [{"width": 0}, {"layers": 10**9}, {"dropout": float("nan")}, {"wdith": 8}])
def test_a_wrong_config_is_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        MLPConfig(**wrong)


def test_a_config_survives_json():
    config = MLPConfig(in_channels=3, num_class_embeds=4)
    assert MLPConfig.model_validate_json(config.model_dump_json()) == config
    assert config.out_channels == 3
