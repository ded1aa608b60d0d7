"""Averages against their closed forms."""

import math

import pytest
import torch
from torch import nn

from reverie.base.errors import ModelFileError, UsageError
from reverie.models.checkpoints import CheckpointStore
from reverie.training.ema import EMA


def scalar(value: float = 0.0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model of one weight."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.tensor([value], dtype=dtype))
    return model


def put(model: nn.Module, value: float) -> None:
    """Set every weight."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def network(seed: int = 0) -> nn.Module:
    """Weights, and a buffer that counts."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)


def wander(model: nn.Module, emas: list[EMA], steps: range) -> None:
    """Steps of a random walk, and forwards that move the buffers."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
            model(torch.randn(2, 2, 5, 5, generator=generator))
        for ema in emas:
            ema.update(step)


# The formula ----------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_constant_weights(decay, steps):
    """From w_0, with weights w: ema_n = w + decay^n (w_0 - w)."""
    model = scalar(3.0)
    ema = EMA(model, decay, warmup=False)
    put(model, -2.0)
    for step in range(steps):
        ema.update(step)
    assert ema.state()["weight"].item() == pytest.approx(-2 + decay**steps * 5, rel=1e-12)


@pytest.mark.parametrize("steps", [1, 10, 2000])
def test_a_linear_ramp(steps):
    """With w_t = b t, the average lags by b decay / (1 - decay), reached as decay^t."""
    b, decay = 0.25, 0.98
    model = scalar(0.0)
    ema = EMA(model, decay, warmup=False)
    for step in range(steps):
        put(model, b * step)
        ema.update(step)
    lag = b * decay / (1 - decay)
    lag -= (b + lag) * decay**steps  # the start is at 0, where the ramp was at -b one step before
    assert ema.state()["weight"].item() == pytest.approx(b * (steps - 1) - lag, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 20, 60])
def test_warm_up_forgets_the_start_as_a_binomial(steps):
    """prod_t (1 + t) / (10 + t) over t < n is 9! n! / (n + 9)!, one over (n + 9 choose 9)."""
    model = scalar(1.0)
    ema = EMA(model, decay=0.9999)
    put(model, 0.0)
    for step in range(steps):
        ema.update(step)
    assert ema.state()["weight"].item() == pytest.approx(1 / math.comb(steps + 9, 9), rel=1e-9)


def test_the_decay_grows_and_stays():
    ema = EMA(scalar(), decay=0.99)
    decays = [ema.decay_at(step) for step in range(2000)]
    assert decays[:3] == [1 / 10, 2 / 11, 3 / 12]
    assert decays == sorted(decays)
    reached = (10 * 0.99 - 1) / (1 - 0.99)  # as the module says
    assert all((decay == 0.99) == (step >= reached - 1e-6) for step, decay in enumerate(decays))
    assert EMA(scalar(), 0.99, warmup=False).decay_at(0) == 0.99


def test_low_precision_weights_are_averaged_in_float32():
    """In bfloat16, 1 - 0.001 would round back to 1 for ever."""
    model = scalar(1.0, torch.bfloat16)
    ema = EMA(model, decay=0.999, warmup=False)
    put(model, 0.0)
    for step in range(100):
        ema.update(step)
    average = ema.state()["weight"]
    assert average.dtype == torch.float32
    assert average.item() == pytest.approx(0.999**100, rel=1e-5)


def test_another_profile_is_a_subclass():
    """The power function of EDM2, which forgets the start at once and weights step i by (i/n)^gamma."""

    class Power(EMA):
        def decay_at(self, step):
            return (1 - 1 / (step + 1)) ** (3 + 1)

    model = scalar(7.0)
    ema = Power(model)
    for step in range(400):
        put(model, step + 1.0)
        ema.update(step)
    assert ema.state()["weight"].item() == pytest.approx(400 * 4 / 5, rel=5e-3)  # the integral of x 4 x^3


def test_one_pass_over_all_weights(monkeypatch):
    calls = []
    lerp = torch._foreach_lerp_
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda *args: (calls.append(len(args[0])), lerp(*args)))
    model = network()
    wander(model, [EMA(model)], range(3))
    assert calls == [4, 4, 4]


@pytest.mark.parametrize("decay", [1.0, 1.5, -0.1, float("nan")])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(UsageError, match=r"the decay of an average is .*; it must lie in \[0, 1\)"):
        EMA(scalar(), decay)


# Buffers, several, names ----------------------------------------------------------------------


def test_buffers_are_copied():
    model = network()
    ema = EMA(model)
    model[1].running_var = torch.full((4,), 9.0)  # replaced, not filled
    wander(model, [ema], range(3))
    assert ema.state()["1.num_batches_tracked"].item() == 3
    assert torch.equal(ema.state()["1.running_var"], model[1].running_var)


def test_a_model_without_weights_or_with_counting_ones_only():
    model = nn.Module()
    model.count = nn.Parameter(torch.tensor([1]), requires_grad=False)
    ema = EMA(model)
    model.count.fill_(5)
    ema.update(0)
    assert ema.state() == {"count": torch.tensor([5])}


def test_several_averages_do_not_meet():
    model, alone = network(), network()
    decays = [0.5, 0.99, 0.9999]
    emas = [EMA(model, decay) for decay in decays]
    single = EMA(alone, 0.99)
    wander(model, emas, range(30))
    wander(alone, [single], range(30))
    assert [ema.name for ema in emas] == ["ema-0.5", "ema-0.99", "ema-0.9999"]
    assert all(torch.equal(tensor, single.state()[name]) for name, tensor in emas[1].state().items())
    assert not torch.equal(emas[0].state()["0.weight"], emas[2].state()["0.weight"])


def test_an_average_follows_and_does_not_lead():
    model, alone = network(), network()
    wander(model, [EMA(model), EMA(model, 0.5)], range(5))
    wander(alone, [], range(5))
    assert all(torch.equal(tensor, alone.state_dict()[name]) for name, tensor in model.state_dict().items())


# There and back -------------------------------------------------------------------------------


def test_a_resumed_average_is_the_same_bit_for_bit(tmp_path):
    """10 updates equal 4, a checkpoint on the disk, and 6 more: no counter that could be lost."""
    model = network()
    ema = EMA(model, 0.999)
    wander(model, [ema], range(4))
    store = CheckpointStore(tmp_path)
    store.save(4, {"model": model.state_dict(), ema.name: ema.state()}, {})
    wander(model, [ema], range(4, 10))

    found = store.latest()
    again = network(seed=1)
    again.load_state_dict(found.tensors("model"))
    resumed = EMA(again, 0.999)
    resumed.load(found.tensors(resumed.name))
    wander(again, [resumed], range(4, 10))
    expected, got = ema.state(), resumed.state()
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_the_state_is_weights_that_a_model_loads():
    model = network()
    ema = EMA(model)
    wander(model, [ema], range(3))
    other = network(seed=1)
    other.load_state_dict(ema.state())
    assert torch.equal(other[0].weight, ema.state()["0.weight"])


def test_tied_weights_are_one_average_under_both_names():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    ema = EMA(model, 0.5, warmup=False)
    before = model["a"].weight.detach().clone()
    put(model, 4.0)
    ema.update(0)
    state = ema.state()
    assert state["a.weight"] is state["b.weight"]
    torch.testing.assert_close(state["b.weight"], (before + 4) / 2)
    with ema.applied(model):
        assert torch.equal(model["b"].weight, state["a.weight"])
    assert (model["a"].weight == 4).all()


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "dtype"])
def test_a_state_of_another_model_is_refused_whole(change):
    ema = EMA(network())
    before = {name: tensor.clone() for name, tensor in ema.state().items()}
    state = {name: tensor + 1 for name, tensor in before.items()}
    if change == "missing":
        del state["1.weight"]
    elif change == "extra":
        state["2.weight"] = torch.zeros(1)
    else:
        state["1.weight"] = torch.zeros(5) if change == "shape" else torch.zeros(4).bfloat16()
    with pytest.raises(ModelFileError, match=r"runs/a: 1 of \d tensors do not fit: "):
        ema.load(state, source="runs/a")
    assert all(torch.equal(tensor, before[name]) for name, tensor in ema.state().items())


# Swapped in -----------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_the_models_own_weights_come_back_however_the_block_ends(error):
    model = network()
    ema = EMA(model)
    wander(model, [ema], range(5))
    own, pointers = snapshot(model), [parameter.data_ptr() for parameter in model.parameters()]
    try:
        with ema.applied(model) as averaged:
            assert averaged is model
            assert all(torch.equal(tensor, ema.state()[name]) for name, tensor in model.state_dict().items())
            assert torch.is_grad_enabled()
            model(torch.randn(2, 2, 5, 5))  # moves the buffers of the batch norm
            if error:
                raise error
    except (ValueError, KeyboardInterrupt):
        assert error
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers  # optimizers hold on to them


def test_a_failure_while_swapping_in_is_undone(monkeypatch):
    model = network()
    ema = EMA(model)
    wander(model, [ema], range(5))
    own = snapshot(model)
    average = ema._weights.pop("1.weight")
    ema._weights["1.weight"] = average.to("meta")  # cannot be copied from
    with pytest.raises(Exception, match="meta"), ema.applied(model):
        pytest.fail("the block must not run")
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())
    ema._weights["1.weight"] = average
    ema.update(5)  # and the model counts as its own again


def test_no_average_is_taken_of_an_average():
    model = network()
    first, second = EMA(model), EMA(model, 0.5)
    with first.applied(model):
        for ema in (first, second):
            with pytest.raises(RuntimeError, match="the model holds an average"):
                ema.update(0)
        with second.applied(model):
            pass
        with pytest.raises(RuntimeError, match="the model holds an average"):
            first.update(0)
    first.update(0)


def test_the_average_goes_into_another_model_in_its_own_type():
    model = network()
    ema = EMA(model)
    wander(model, [ema], range(3))
    other = network(seed=1).bfloat16()
    with ema.applied(other):
        assert torch.equal(other[0].weight, ema.state()["0.weight"].bfloat16())
        ema.update(3)  # the followed one has its own weights
    with pytest.raises(UsageError, match="follows a model of other tensors"), ema.applied(scalar()):
        pass
