"""An optimizer's state, there and back."""

import json

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from reverie.base.errors import ModelFileError, UsageError
from reverie.training.optimizers import flatten_optimizer, restore_optimizer

KINDS = {
    "Adam": lambda p: Adam(p, lr=1e-2, betas=(0.8, 0.95)),
    "AMSGrad": lambda p: Adam(p, lr=1e-2, amsgrad=True),
    "AdamW": lambda p: AdamW(p, lr=0.1 + 0.2, weight_decay=0.03),
    "AdamW fused": lambda p: AdamW(p, lr=1e-2, fused=True),
    "AdamW for each": lambda p: AdamW(p, lr=1e-2, foreach=True),
    "AdamW, tensor lr": lambda p: AdamW(p, lr=torch.tensor(0.3), foreach=False),
    "SGD": lambda p: SGD(p, lr=1e-2),
    "SGD, momentum": lambda p: SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
}


def network(width: int = 5) -> nn.Module:
    """A convolution in channels-last, a norm and a layer that no gradient reaches."""
    torch.manual_seed(0)
    parts = {"conv": nn.Conv2d(2, width, 3), "norm": nn.GroupNorm(1, width), "unused": nn.Linear(2, 2)}
    return nn.ModuleDict(parts).to(memory_format=torch.channels_last)


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    """Steps whose data is a function of the step."""
    for step in steps:
        x = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model["norm"](model["conv"](x)).square().mean().backward()
        optimizer.step()


def bits(model: nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Everything that another step would depend on."""
    tensors, _ = flatten_optimizer(optimizer, model.named_parameters())
    return {name: tensor.clone() for name, tensor in {**model.state_dict(), **tensors}.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_bit_for_bit(kind):
    """10 steps equal 4, through JSON, and 6 more."""
    model = network()
    optimizer = KINDS[kind](model.parameters())
    train(model, optimizer, range(4))
    tensors, record = flatten_optimizer(optimizer, model.named_parameters())
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, optimizer, range(4, 10))

    again = network()
    again.load_state_dict(weights)
    resumed = KINDS[kind](again.parameters())
    changes = restore_optimizer(resumed, again.named_parameters(), tensors, json.loads(json.dumps(record)))
    assert changes == []
    train(again, resumed, range(4, 10))
    expected, found = bits(model, optimizer), bits(again, resumed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_without_its_state_training_goes_elsewhere():
    """The test above can fail."""
    model, again = network(), network()
    optimizer = KINDS["AdamW"](model.parameters())
    train(model, optimizer, range(4))
    again.load_state_dict(model.state_dict())
    train(model, optimizer, range(4, 6))
    train(again, KINDS["AdamW"](again.parameters()), range(4, 6))
    assert not torch.equal(model["conv"].weight, again["conv"].weight)


def test_nothing_is_cast_and_nothing_is_shared():
    """torch's own load_state_dict would cast float32 moments to a bfloat16 parameter's type."""
    model = nn.Linear(3, 3, bias=False).bfloat16()
    optimizer = AdamW(model.parameters())
    optimizer.state[model.weight] = {
        "step": torch.tensor(4.0), "exp_avg": torch.randn(3, 3), "exp_avg_sq": torch.rand(3, 3)
    }  # fmt: skip
    tensors, record = flatten_optimizer(optimizer, model.named_parameters())
    resumed = AdamW(model.parameters())
    restore_optimizer(resumed, model.named_parameters(), tensors, record)
    state = resumed.state[model.weight]
    assert state["exp_avg"].dtype == torch.float32
    assert torch.equal(state["exp_avg"], tensors["weight/exp_avg"])
    state["exp_avg"].zero_()
    assert tensors["weight/exp_avg"].any()


def test_moments_take_the_strides_of_their_parameter():
    model = network()
    optimizer = KINDS["Adam"](model.parameters())
    train(model, optimizer, range(1))
    tensors, record = flatten_optimizer(optimizer, model.named_parameters())
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}  # as files have them
    resumed = KINDS["Adam"](model.parameters())
    restore_optimizer(resumed, model.named_parameters(), tensors, record)
    weight = model["conv"].weight
    assert resumed.state[weight]["exp_avg"].stride() == weight.stride()


def test_the_order_of_parameters_is_no_matter_of_names():
    """Two layers of one shape, built the other way round: each gets its own moments, or an error, never the other's."""
    first = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    optimizer = AdamW(first.parameters())
    (first["a"](torch.ones(1, 2)) + 5 * first["b"](torch.ones(1, 2))).sum().backward()
    optimizer.step()
    tensors, record = flatten_optimizer(optimizer, first.named_parameters())
    turned = nn.ModuleDict({"b": nn.Linear(2, 2, bias=False), "a": nn.Linear(2, 2, bias=False)})
    with pytest.raises(ModelFileError, match="grouped otherwise"):
        restore_optimizer(AdamW(turned.parameters()), turned.named_parameters(), tensors, record)


def test_several_groups_keep_their_options():
    model = network()

    def make():
        groups = [{"params": model["conv"].parameters(), "lr": 1e-3}, {"params": model["norm"].parameters()}]
        return AdamW(groups, lr=0.1)

    optimizer = make()
    optimizer.param_groups[0]["lr"] = 5e-4
    optimizer.param_groups[1]["initial_lr"] = 0.2
    tensors, record = flatten_optimizer(optimizer, model.named_parameters())
    resumed = make()
    restore_optimizer(resumed, model.named_parameters(), tensors, json.loads(json.dumps(record)))
    assert resumed.param_groups[0]["lr"] == 5e-4
    assert resumed.param_groups[1]["initial_lr"] == 0.2
    assert resumed.param_groups[1]["betas"] == (0.9, 0.999)


def test_a_kept_option_stays_and_is_said():
    model = network()
    tensors, record = flatten_optimizer(Adam(model.parameters(), lr=1e-3), model.named_parameters())
    resumed = Adam(model.parameters(), lr=5e-4, weight_decay=0.1)
    changes = restore_optimizer(resumed, model.named_parameters(), tensors, record, keep=["lr", "betas"])
    assert changes == ["lr: 0.001 when saved, 0.0005 from here on"]
    assert resumed.param_groups[0]["lr"] == 5e-4
    assert resumed.param_groups[0]["weight_decay"] == 0
    with pytest.raises(UsageError, match="Adam has no option 'learning_rate' to keep"):
        restore_optimizer(resumed, model.named_parameters(), tensors, record, keep=["learning_rate"])


# What does not fit ----------------------------------------------------------------------------


@pytest.fixture
def saved():
    model = network()
    optimizer = KINDS["AdamW"](model.parameters())
    train(model, optimizer, range(2))
    return flatten_optimizer(optimizer, model.named_parameters())


def refused(make, saved, model=None) -> str:
    """The message, and a look at the optimizer: nothing was taken."""
    model = model or network()
    optimizer = make(model.parameters())
    with pytest.raises(ModelFileError) as caught:
        restore_optimizer(optimizer, model.named_parameters(), *saved, source="runs/a (optimizer)")
    assert not optimizer.state
    assert caught.value.exit_code == 4
    assert str(caught.value).startswith("runs/a (optimizer): ")
    return str(caught.value)


def test_a_model_of_another_width_is_refused(saved):
    message = refused(KINDS["AdamW"], saved, network(width=7))
    assert "4 of 6 tensors do not fit: conv.weight is float32 (5, 2, 3, 3), not float32 (7, 2, 3, 3)" in message


def test_another_optimizer_is_refused(saved):
    assert "it is the state of AdamW, not of SGD" in refused(KINDS["SGD"], saved)


def test_missing_and_foreign_tensors_are_refused(saved):
    tensors, record = saved
    less = {name: tensor for name, tensor in tensors.items() if name != "conv.bias/exp_avg"}
    assert "conv.bias/exp_avg is missing" in refused(KINDS["AdamW"], (less, record))
    more = tensors | {"old.weight/exp_avg": torch.zeros(1)}
    assert "old.weight/exp_avg has no place" in refused(KINDS["AdamW"], (more, record))


@pytest.mark.parametrize("record", [{}, {"class": "AdamW"}, {"class": "AdamW", "groups": [3]}])
def test_a_record_of_something_else_is_refused(saved, record):
    assert "it is not the state of an optimizer" in refused(KINDS["AdamW"], (saved[0], record))


def test_a_parameter_without_a_name_is_refused():
    model = network()
    optimizer = AdamW([*model.parameters(), nn.Parameter(torch.zeros(64, 3))])
    with pytest.raises(UsageError, match=r"the optimizer has a parameter \(64, 3\) that the model has not"):
        flatten_optimizer(optimizer, model.named_parameters())


def test_a_state_of_another_kind_is_refused():
    model = nn.Linear(2, 1)
    optimizer = SGD(model.parameters())
    optimizer.state[model.weight]["history"] = [torch.zeros(1)]
    with pytest.raises(UsageError, match="SGD keeps a list as history, which cannot be saved"):
        flatten_optimizer(optimizer, model.named_parameters())
