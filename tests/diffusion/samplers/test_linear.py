"""Recorded steps: the sampler's own, to rounding, on any schedule, prediction and grid; paused, resumed, failing."""

import copy
import pickle
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie.base.errors import NonFiniteError, UsageError
from reverie.base.randomness import Noise, normal
from reverie.diffusion.denoisers import Clipped, Denoiser, Estimate, FixedBatch, NetworkDenoiser
from reverie.diffusion.levels import levels
from reverie.diffusion.predictions import ConsistencyOutput
from reverie.diffusion.registry import grids, predictions, samplers, schedules
from reverie.diffusion.samplers import linear
from reverie.diffusion.samplers.adams import DEIS
from reverie.diffusion.samplers.ancestral import DDPM
from reverie.diffusion.samplers.base import State, one_by_one, run, start
from reverie.diffusion.samplers.ddim import DDIM
from reverie.diffusion.samplers.learned import Learned, Recipe
from reverie.diffusion.samplers.runge_kutta import Euler, Heun
from reverie.diffusion.samplers.unipc import UniPC
from reverie.kernels import dispatch

F64 = torch.float64
LINEAR = {name: samplers[name]() for name in samplers if samplers[name].linear}
LINEAR |= {
    "ddpm large": DDPM("large"),
    "ddim 0.5": DDIM(0.5),
    "churned": Heun(churn=3.0),
    "unipc alone": UniPC(2, corrector=False),
}
LINEAR |= {"unipc 1": UniPC(1, rule="half-h"), "deis lambda": DEIS(4, variable="lambda")}
SCHEDULES = {name: schedules[name]() for name in schedules}
PREDICTIONS = {name: predictions[name]() for name in predictions} | {"consistency": ConsistencyOutput()}


class Net(torch.nn.Module):
    """A network that is not linear, of what it is given and of the time."""

    def forward(self, x, time):
        return torch.tanh(x.roll(1, -1) + 0.3 * x.square().clamp(max=4)) + torch.sin(time)[:, None, None]


def make(schedule, prediction, wrapped="") -> Denoiser:
    denoiser = NetworkDenoiser(Net(), SCHEDULES[schedule], PREDICTIONS[prediction])
    return {"": lambda d: d, "clipped": Clipped, "bucket": lambda d: FixedBatch(d, 2)}[wrapped](denoiser)


def begun(sampler, denoiser, grid, dtype=torch.float32, count=3):
    state = start(sampler, denoiser.schedule, (2, 9), float(grid[0]), Noise(range(count)))
    return sampler.init(state.x.to(dtype), float(grid[0]))


def slowly(sampler, denoiser, state, grid, noise):
    return [after for after, _ in one_by_one(sampler, denoiser, state, grid, noise)]


def test_which_samplers_are_linear():
    others = {"adaptive", "restart", "langevin", "predictor-corrector", "mean-flow"}
    assert {name for name in samplers if not samplers[name].linear} == others


CASES = (
    st.sampled_from(sorted(LINEAR)),
    st.sampled_from(sorted(SCHEDULES)),
    st.sampled_from(sorted(PREDICTIONS)),
    st.sampled_from(sorted(grids)),
    st.integers(1, 17),
    st.sampled_from(["", "clipped", "bucket"]),
    st.sampled_from([torch.float32, F64]),
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(*CASES)
def test_they_are_the_samplers_own_steps(name, schedule, prediction, spacing, steps, wrapped, dtype):
    compare(name, schedule, prediction, spacing, steps, wrapped, dtype)


@pytest.mark.slow
@settings(max_examples=500, deadline=None, derandomize=True)
@given(*CASES)
def test_they_are_the_samplers_own_steps_in_many_cases(name, schedule, prediction, spacing, steps, wrapped, dtype):
    compare(name, schedule, prediction, spacing, steps, wrapped, dtype)


def compare(name, schedule, prediction, spacing, steps, wrapped, dtype):
    sampler, denoiser = LINEAR[name], None
    try:
        denoiser = make(schedule, prediction, wrapped)
    except UsageError:
        return  # a prediction that has no meaning on this schedule
    grid, noise = grids[spacing](denoiser.schedule, steps), Noise([3, 1, 2])
    state = begun(sampler, denoiser, grid, dtype)
    assert linear.recorded(sampler, denoiser, state, grid) is not None
    found = list(run(sampler, denoiser, state, grid, noise))
    # Each step by itself, from where the recorded one began: a network amplifies what rounding differs by.
    for left, (before, after) in zip(reversed(range(steps)), pairwise([state, *found]), strict=True):
        with torch.no_grad():
            want = sampler.step(denoiser, before, after.t, noise, left)
        assert torch.equal(after.t, want.t)
        assert torch.equal(after.k, want.k)
        assert after.memory.keys() == want.memory.keys()
        pairs = {"x": (after.x, want.x), "x0": (after.x0, want.x0)}
        pairs |= {key: (after.memory[key], want.memory[key]) for key in want.memory}
        for key, (a, b) in pairs.items():
            assert a.dtype == b.dtype, key
            # Large numbers that cancel: x over alpha less the noise over alpha, in the step's own arithmetic.
            (here,) = levels(denoiser.schedule, [float(before.t[0])])
            size = max(float(y.abs().max()) for y in (before.x, want.x0, b)) if a.shape == before.x.shape else 0
            scale = max(size, 1.0) / (min(here.alpha, 1.0) or 1.0)
            tolerance = (2e-4 if dtype == torch.float32 else 1e-11) * scale
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", LINEAR)
def test_a_run_cut_anywhere_goes_on_with_the_same_bits(name):
    sampler, denoiser, noise = LINEAR[name], make("linear", "v"), Noise([0, 1, 2])
    grid = grids["trailing"](denoiser.schedule, 9)
    whole = list(run(sampler, denoiser, begun(sampler, denoiser, grid), grid, noise))
    for k in (1, 4, 8):
        half = whole[k - 1]
        kept = dict(sorted(half.memory.items(), reverse=True))  # another order, as a file's may be
        again = State(half.x.clone(), half.t.clone(), half.k.clone(), half.x0.clone(), kept)
        *_, last = run(sampler, denoiser, again, grid[k:], noise)
        assert torch.equal(last.x, whole[-1].x)
        assert torch.equal(last.x0, whole[-1].x0)
        one = half.rows([2])
        *_, alone = run(sampler, denoiser, one, grid[k:], noise.rows([2]))
        assert torch.equal(alone.x[0], whole[-1].x[2])


@pytest.mark.parametrize("name", LINEAR)
def test_without_previews_all_else_has_the_same_bits(name):
    sampler, denoiser, noise = LINEAR[name], make("linear", "v"), Noise([0, 1, 2])
    grid = grids["trailing"](denoiser.schedule, 7)
    both = [list(run(sampler, denoiser, begun(sampler, denoiser, grid), grid, noise, p)) for p in (True, False)]
    for with_it, without in zip(*both, strict=True):
        assert not bool(without.x0.any())
        assert torch.equal(without.x, with_it.x)
        assert torch.equal(without.t, with_it.t)
        assert torch.equal(without.k, with_it.k)
        assert without.memory.keys() == with_it.memory.keys()
        assert all(torch.equal(value, with_it.memory[key]) for key, value in without.memory.items())


def test_a_state_is_copied_and_pickled_as_its_tensors():
    sampler, denoiser, noise = LINEAR["dpmpp-3m"], make("linear", "v"), Noise([0, 1, 2])
    grid = grids["trailing"](denoiser.schedule, 6)
    states = list(run(sampler, denoiser, begun(sampler, denoiser, grid), grid, noise))
    for again in (pickle.loads(pickle.dumps(states[2])), copy.deepcopy(states[2]), replace(states[2])):
        *_, last = run(sampler, denoiser, again, grid[3:], noise)
        assert torch.equal(last.x, states[-1].x)
    with pytest.raises(AttributeError, match="a state has no y"):
        _ = states[2].y


def test_a_network_that_writes_into_its_time_is_told_the_right_one_in_the_next_run():
    class Writing(torch.nn.Module):
        def forward(self, x, time):
            told.append(time.clone())
            time.zero_()
            return torch.tanh(x)

    told, denoiser = [], NetworkDenoiser(Writing(), SCHEDULES["linear"], "v")
    grid = grids["trailing"](denoiser.schedule, 5)
    for _ in range(2):
        list(run(DDIM(), denoiser, begun(DDIM(), denoiser, grid), grid, Noise([0, 1, 2])))
    assert torch.equal(torch.stack(told[:5]), torch.stack(told[5:]))


def test_rows_that_go_different_ways_take_their_own_steps():
    denoiser, sampler, noise = make("linear", "v"), UniPC(), Noise([0, 1])
    grid = grids["trailing"](denoiser.schedule, 6)
    state = begun(sampler, denoiser, grid, count=2)
    assert linear.recorded(sampler, denoiser, state, grid.expand(2, -1)) is not None
    assert linear.recorded(sampler, denoiser, state, torch.stack([grid, grid**2])) is None
    *_, ahead = run(sampler, denoiser, state, grid[:3], noise)
    mixed = replace(State.join([ahead.rows([0]), state.rows([1])]), t=ahead.t)
    assert linear.recorded(sampler, denoiser, mixed, grid[2:]) is None
    assert linear.recorded(sampler, denoiser, state.rows([]), grid) is None


@dataclass(frozen=True)
class Normed(DDIM):
    """A step that is not linear, of a sampler whose was."""

    def move(self, denoiser, state, step, noise):
        return replace(state, x=state.x / state.x.norm())


def test_a_step_of_its_own_is_not_taken_to_be_linear():
    assert DDIM.linear
    assert not Normed.linear
    assert Euler.linear


def test_what_is_learned_of_the_variance_is_left_to_the_step():
    """DDPM's learned variance is no weight of the times."""

    class Wide(torch.nn.Module):
        def forward(self, x, time):
            return torch.cat([torch.tanh(x), torch.tanh(3 * x)], 1)

    denoiser = NetworkDenoiser(Wide(), SCHEDULES["linear"], "eps", learned_variance=True)
    grid, noise = grids["trailing"](denoiser.schedule, 5), Noise([0, 1, 2])
    for sampler, known in ((DDPM("learned"), False), (DDPM(), True)):
        state = begun(sampler, denoiser, grid)
        assert (linear.recorded(sampler, denoiser, state, grid) is not None) == known
        found = list(run(sampler, denoiser, state, grid, noise))[-1]
        want = slowly(sampler, denoiser, state, grid, noise)[-1]
        torch.testing.assert_close(found.x, want.x, rtol=1e-3, atol=1e-3)


def test_a_step_that_is_refused_is_refused_when_its_turn_comes():
    sampler = Learned(Recipe((-5.0, 0.0), ((1.0,), (1.5, -0.5))))
    denoiser, noise = make("linear", "v"), Noise([0, 1, 2])
    right = sampler.recipe.grid(denoiser.schedule)
    assert linear.recorded(sampler, denoiser, begun(sampler, denoiser, right), right) is not None
    wrong = torch.cat([right[:2], right[1:] / 2])
    loop = run(sampler, denoiser, begun(sampler, denoiser, wrong), wrong, noise)
    next(loop)
    with pytest.raises(UsageError, match="is not one of this fitted solver"):
        next(loop)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", ["ddim", "dpmpp-2m", "heun", "ddpm"])
def test_what_is_not_finite_is_named(name, dtype):
    class Failing(torch.nn.Module):
        def forward(self, x, time):
            bad = (time < 500) & (torch.arange(len(x)) == 1)
            return torch.where(bad[:, None, None], torch.nan, 0.1 * x)

    sampler, denoiser = LINEAR[name], NetworkDenoiser(Failing(), SCHEDULES["linear"], "v")
    grid, noise = grids["trailing"](denoiser.schedule, 5), Noise([0, 1, 2])
    state = begun(sampler, denoiser, grid, dtype)
    due = [bool(after.x.isfinite().all()) for after in slowly(sampler, denoiser, state, grid, noise)].index(False) + 1
    with pytest.raises(NonFiniteError, match=rf"step {due} \(sigma .*\) gave .* in sample 1 and 0 others"):
        list(run(sampler, denoiser, state, grid, noise))


def test_hooks_on_the_denoiser_are_called():
    denoiser, asked = make("linear", "v"), []
    denoiser.register_forward_hook(lambda module, inputs, estimate: asked.append(estimate.x0))
    grid = grids["trailing"](denoiser.schedule, 4)
    states = list(run(DDIM(), denoiser, begun(DDIM(), denoiser, grid), grid, Noise([0, 1, 2])))
    assert len(asked) == 4
    assert torch.equal(states[-1].x0, asked[-1])


def test_the_plain_twin_serves_without_the_library(monkeypatch):
    denoiser, noise = make("flow", "velocity"), Noise([0, 1, 2])
    grid = grids["trailing"](denoiser.schedule, 6)
    results = []
    for mode in ("auto", "plain"):
        monkeypatch.setenv(dispatch.VARIABLE, mode)
        *_, last = run(UniPC(), denoiser, begun(UniPC(), denoiser, grid), grid, noise)
        results.append(last.x)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_steps_are_worked_out_once_and_the_shape_of_an_output_is_checked():
    denoiser, noise = make("linear", "v"), Noise([0, 1, 2])
    grid = grids["trailing"](denoiser.schedule, 7)
    linear.moves.cache_clear()
    for _ in range(3):
        list(run(DDIM(), denoiser, begun(DDIM(), denoiser, grid), grid, noise))
    assert (linear.moves.cache_info().misses, linear.moves.cache_info().hits) == (1, 2)

    class Short(torch.nn.Module):
        def forward(self, x, time):
            return x[:, :1]

    short = NetworkDenoiser(Short(), SCHEDULES["linear"], "v")
    with pytest.raises(UsageError, match="the network gives"):
        list(run(DDIM(), short, begun(DDIM(), short, grid), grid, noise))


def test_outputs_in_another_layout_or_dtype_are_taken():
    class Odd(torch.nn.Module):
        def forward(self, x, time):
            return torch.tanh(x).double().to(memory_format=torch.channels_last)

    class Even(torch.nn.Module):
        def forward(self, x, time):
            return torch.tanh(x).double().float()

    grid, noise, ends = grids["trailing"](SCHEDULES["linear"], 4), Noise([0]), []
    x = normal((1, 3, 4, 4), 0, "start")
    for network in (Odd(), Even()):
        denoiser = NetworkDenoiser(network, SCHEDULES["linear"], "v")
        *_, last = run(DDIM(), denoiser, DDIM().init(x, 1.0), grid, noise)
        assert last.x.dtype == torch.float32
        ends.append(last.x)
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-6)


def test_an_estimate_without_noise_of_its_own_is_an_estimate():
    class Point(Denoiser):
        schedule = SCHEDULES["linear"]

        def forward(self, x, t, condition=None):
            return Estimate(torch.ones_like(x), torch.zeros_like(x))

    grid = grids["trailing"](Point.schedule, 3)
    *_, last = run(DDIM(), Point(), begun(DDIM(), Point(), grid), grid, Noise([0, 1, 2]))
    assert torch.equal(last.x, torch.ones_like(last.x))
