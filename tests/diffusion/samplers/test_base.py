"""The state machine: rows at any step share a batch, leave, join, are saved and go on; the loop says what failed."""

from itertools import product

import pytest
import torch
from safetensors.torch import load, save

from reverie.base.errors import NonFiniteError, UsageError
from reverie.base.randomness import Noise
from reverie.diffusion.denoisers import Denoiser, Estimate, FixedBatch, NetworkDenoiser
from reverie.diffusion.registry import grids, samplers
from reverie.diffusion.samplers.adams import DEIS
from reverie.diffusion.samplers.ancestral import DDPM
from reverie.diffusion.samplers.base import Sampler, State, run, sample, start
from reverie.diffusion.samplers.ddim import DDIM
from reverie.diffusion.samplers.runge_kutta import Euler
from reverie.diffusion.samplers.unipc import UniPC
from reverie.diffusion.schedules import EDM, VE, Flow, table

F64 = torch.float64
EVERY = {name: samplers[name]() for name in samplers if name != "mean-flow"}  # which needs a network that takes a span
EVERY |= {
    "ddpm large": DDPM("large"),
    "ddim 0.5": DDIM(0.5),
    "ddim 1": DDIM(1.0),
    "deis lambda": DEIS(variable="lambda"),
}
EVERY |= {"unipc 1": UniPC(1), "unipc 2": UniPC(2), "unipc alone": UniPC(corrector=False), "churned": Euler(churn=3.0)}


@pytest.fixture(params=EVERY)
def sampler(request):
    return EVERY[request.param]


def test_rows_at_different_times_are_as_if_each_were_alone(schedule, sampler, mixture):
    """Four samples, each on times of its own, from t = 1 and to t = 0 and within."""
    oracle, noise = mixture(schedule), Noise([7, 5, 5, 8])
    ends = torch.tensor([[1.0, 0.3], [0.8, 0.75], [0.3, 0.0], [1.0, 0.0]], dtype=F64)
    grid = ends[:, :1] + (ends[:, 1:] - ends[:, :1]) * torch.linspace(0, 1, 5, dtype=F64) ** torch.tensor(
        [[1], [1], [2], [0.5]]
    )
    grid[:, -1] = ends[:, 1]
    x = torch.randn(4, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    *_, together = run(sampler, oracle, sampler.init(x, grid[:, 0]), grid, noise)
    assert torch.equal(together.t, grid[:, -1])
    assert together.k.tolist() == [4] * 4
    for i in range(4):
        *_, alone = run(sampler, oracle, sampler.init(x[i : i + 1], grid[i, 0].item()), grid[i], noise.rows([i]))
        torch.testing.assert_close(alone.x, together.x[i : i + 1], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(alone.x0, together.x0[i : i + 1], rtol=1e-11, atol=1e-11)


def test_rows_leave_and_join(sampler, mixture):
    """Three samples of 6 steps and two of 4, which join two steps late and leave when done: each as if alone."""
    oracle = mixture(table("linear"))
    plans = [grids["trailing"](oracle.schedule, n) for n in (6, 6, 6, 4, 4)]
    seeds = [3, 1, 4, 1, 5]
    want = [sample(sampler, oracle, (2,), plan, Noise([seed])) for plan, seed in zip(plans, seeds, strict=True)]
    first, late = (
        start(sampler, oracle.schedule, (2,), 1.0, Noise([seeds[i] for i in rows])) for rows in ([0, 1, 2], [3, 4])
    )
    state, alive, done = first, [0, 1, 2], {}
    for tick in range(8):
        if tick == 2:
            state, alive = State.join([state, late]), [*alive, 3, 4]
        if tick == 3:  # any order will do
            order = [4, 2, 0, 3, 1]
            state, alive = state.rows(order), [alive[i] for i in order]
        s = torch.stack([plans[i][k + 1] for i, k in zip(alive, state.k.tolist(), strict=True)])
        left = [len(plans[i]) - k - 2 for i, k in zip(alive, state.k.tolist(), strict=True)]
        with torch.no_grad():
            state = sampler.step(oracle, state, s, Noise([seeds[i] for i in alive]), left)
        done |= {i: state.x[row] for row, i in enumerate(alive) if s[row] == 0}
        stay = [row for row, i in enumerate(alive) if i not in done]
        state, alive = state.rows(stay), [alive[row] for row in stay]
        if not alive:
            break
    for i, x in enumerate(want):  # by recorded steps, whose rounding is another
        torch.testing.assert_close(done[i], x[0], rtol=1e-4, atol=1e-5)


def test_a_saved_state_goes_on_as_if_nothing_had_happened(sampler, mixture):
    oracle, noise = mixture(table("linear")), Noise([0, 1, 2])
    grid = grids["trailing"](oracle.schedule, 8)
    states = list(run(sampler, oracle, start(sampler, oracle.schedule, (2,), 1.0, noise), grid, noise))
    half = states[3]
    names = ("x", "t", "k", "x0")
    everything = {name: getattr(half, name) for name in names} | half.memory
    kept = load(save({name: value.clone() for name, value in everything.items()}))
    again = State(*(kept.pop(name) for name in names), memory=kept)
    *_, last = run(sampler, oracle, again, grid[4:], noise)
    assert torch.equal(last.x, states[-1].x)
    assert torch.equal(last.k, states[-1].k)


class Counting(Denoiser):
    """Notes when it is asked."""

    def __init__(self, denoiser):
        super().__init__()
        self.denoiser, self.schedule, self.asked = denoiser, denoiser.schedule, []

    def forward(self, x, t, condition=None):
        self.asked.append(t.tolist())
        return self.denoiser(x, t, condition)


def test_asked_for_n_steps_it_runs_n_each_from_where_the_last_one_ended(schedule, sampler, mixture):
    """On every grid: as many evaluations as steps, each at the time where the step before it ended."""
    oracle, noise = mixture(schedule), Noise([0, 1])
    for spacing, steps in product(grids, (1, 3)):
        counting, grid = Counting(oracle), grids[spacing](schedule, steps)
        states = list(run(sampler, counting, start(sampler, schedule, (2,), grid[0].item(), noise), grid, noise))
        assert len(states) == steps
        asked, due = len(counting.asked), sampler.count(schedule, grid)
        assert asked >= due if sampler.adaptive else asked == due
        if len(counting.asked) == steps and not getattr(sampler, "churn", 0):
            assert [rows[0] for rows in counting.asked] == grid[:-1].tolist()
        assert [state.t[0].item() for state in states] == grid[1:].tolist()
        assert states[-1].k.tolist() == [steps, steps]
        assert bool(states[-1].x.isfinite().all())


def test_a_sample_does_not_depend_on_its_batch(sampler, mixture):
    oracle = mixture(table("linear"))
    grid = grids["trailing"](oracle.schedule, 10)
    together = sample(sampler, oracle, (2,), grid, Noise([0, 1, 2, 3, 4, 5, 6]))
    for seeds in ([5], [5, 2], [2, 9, 5, 5]):
        x = sample(sampler, oracle, (2,), grid, Noise(seeds))
        for seed, row in zip(seeds, x, strict=True):
            if seed < 7:
                torch.testing.assert_close(row, together[seed], rtol=1e-5, atol=1e-6)


def test_in_double_precision_it_is_the_same_to_rounding(sampler, mixture):
    oracle = mixture(table("linear"))
    grid = grids["trailing"](oracle.schedule, 10)
    x = torch.randn(5, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    *_, among = run(sampler, oracle, sampler.init(x, 1.0), grid, Noise(range(5)))
    for i in range(5):
        *_, alone = run(sampler, oracle, sampler.init(x[i : i + 1], 1.0), grid, Noise([i]))
        torch.testing.assert_close(alone.x[0], among.x[i], rtol=1e-11, atol=1e-12)


def test_in_a_fixed_bucket_a_networks_sample_has_the_same_bits_in_any_company(sampler):
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(12, 64), torch.nn.SiLU(), torch.nn.Linear(64, 12))

    class Net(torch.nn.Module):
        def forward(self, x, time):
            return layers(x)

    denoiser = FixedBatch(NetworkDenoiser(Net(), table("linear"), "v"), 4)
    grid = grids["trailing"](denoiser.schedule, 5)
    together = sample(sampler, denoiser, (12,), grid, Noise(range(6)))
    for i in (0, 5):
        assert torch.equal(sample(sampler, denoiser, (12,), grid, Noise([i]))[0], together[i])


# The start ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "std"), [(EDM, 80.0), (VE, 50.0), (Flow, 1.0), (lambda: table("linear"), 1.0)])
def test_sampling_starts_from_the_schedules_noise(make, std, sampler):
    noise = Noise([3, 4])
    state = start(sampler, make(), (3, 2), 1.0, noise)
    torch.testing.assert_close(state.x, std * noise((3, 2), [0, 0]), rtol=1e-4, atol=0)
    assert state.t.tolist() == [1, 1]
    assert state.k.tolist() == [0, 0]
    assert state.x.dtype == torch.float32
    assert state.t.dtype == F64
    assert not bool(state.x0.any())


def test_each_sample_may_walk_its_own_grid(sampler, mixture):
    """Rows that begin at different times begin with the noise of their own."""
    oracle, noise = mixture(EDM()), Noise([3, 4])
    grid = torch.stack([grids["trailing"](oracle.schedule, 4), 0.5 * grids["trailing"](oracle.schedule, 4)])
    x = sample(sampler, oracle, (2,), grid, noise)
    for i in range(2):
        torch.testing.assert_close(
            x[i], sample(sampler, oracle, (2,), grid[i], noise.rows([i]))[0], rtol=1e-5, atol=1e-5
        )


# The loop -------------------------------------------------------------------------------------


def test_each_state_is_a_preview(mixture):
    """Intermediates on request: whoever looks at what is yielded has the noisy and the clean, as often as wanted."""
    oracle, noise = mixture(table("linear")), Noise([0])
    grid = grids["trailing"](oracle.schedule, 12)
    states = list(run(DDIM(), oracle, start(DDIM(), oracle.schedule, (2,), 1.0, noise), grid, noise))
    previews = [state.x0 for state in states[::3]]
    assert len(previews) == 4
    assert torch.equal(states[-1].x0, states[-1].x)
    distances = [(state.x0 - states[-1].x).norm().item() for state in states]
    assert distances[0] > distances[6] > distances[-1] == 0


def test_between_two_steps_the_callers_gradients_are_left_alone(mixture):
    """Two loops interleaved, one of them abandoned: gradients are recorded for the caller all the while, not inside."""
    oracle, noise = mixture(table("linear")), Noise([0])
    grid = grids["trailing"](oracle.schedule, 5)
    weight = torch.ones(1, requires_grad=True)

    class Weighted(Denoiser):
        schedule = oracle.schedule

        def forward(self, x, t, condition=None):
            estimate = oracle(x, t)
            return Estimate(estimate.x0 * weight, estimate.eps * weight)

    def begin():
        return run(DDIM(), Weighted(), start(DDIM(), oracle.schedule, (2,), 1.0, noise), grid, noise)

    first, second = begin(), begin()
    for loop in (first, second, first):
        state = next(loop)
        assert not state.x.requires_grad
        assert torch.is_grad_enabled()
    del first
    assert (weight * 2).requires_grad
    list(second)
    assert torch.is_grad_enabled()


class Failing(Denoiser):
    """Gives NaN for the second sample from some time on."""

    def __init__(self, schedule, below):
        super().__init__()
        self.schedule, self.below = schedule, below

    def forward(self, x, t, condition=None):
        bad = (t < self.below) & (torch.arange(len(x)) == 1)
        x0 = torch.where(bad[:, None], torch.nan, 0 * x)
        return Estimate(x0, x0)


def test_numbers_that_are_not_finite_end_the_loop_with_the_step_and_its_noise(sampler):
    schedule, noise = Flow(), Noise([0, 1, 2])
    grid = grids["trailing"](schedule, 5)
    loop = run(sampler, Failing(schedule, 0.5), start(sampler, schedule, (2,), 1.0, noise), grid, noise)
    taken = []
    # A step of several evaluations meets the NaN one step before, at its end.
    said = r"step (3 \(sigma 0\.6\)|4 \(sigma 0\.4\)) .* in sample 1 and 0 others"
    if sampler.adaptive:  # it meets the NaN within the step, and says so itself
        with pytest.raises(NonFiniteError, match=r"the ODE is not finite .* in sample 1, and 0 others"):
            taken.extend(loop)
        return
    with pytest.raises(NonFiniteError, match=said) as caught:
        taken.extend(loop)
    assert len(taken) == (2 if "step 3" in str(caught.value) else 3)
    assert len(taken) == 3 or sampler.count(schedule, grid) > 5 or getattr(sampler, "churn", 0)
    assert caught.value.exit_code == 5


def test_large_numbers_are_finite(sampler):
    """A sum that overflows is no sign of a state that did."""
    if sampler.adaptive:
        pytest.skip("its error is measured in squares, which do overflow")

    class Large(Denoiser):
        schedule = Flow()

        def forward(self, x, t, condition=None):
            return Estimate(torch.full_like(x, 3e38), torch.zeros_like(x))

    noise = Noise([0])
    list(run(sampler, Large(), start(sampler, Flow(), (8,), 1.0, noise), torch.tensor([1.0, 0.0], dtype=F64), noise))


@pytest.mark.parametrize("s", [0.5, 0.6, -0.1, float("nan")])
def test_a_step_goes_towards_the_data(sampler, s, mixture):
    with pytest.raises(UsageError, match="a step goes from t to s with 0 <= s < t"):
        sampler.step(mixture(Flow()), sampler.init(torch.zeros(1, 2, dtype=F64), 0.5), s, Noise([0]))


def test_a_grid_that_begins_elsewhere_is_refused(mixture):
    oracle, noise = mixture(Flow()), Noise([0])
    state = start(DDIM(), Flow(), (2,), 0.5, noise)
    with pytest.raises(UsageError, match=r"the samples are at t = \[0.5\]"):
        next(run(DDIM(), oracle, state, grids["trailing"](Flow(), 4), noise))
    with pytest.raises(UsageError, match="not one of 1 times"):
        next(run(DDIM(), oracle, state, torch.tensor([0.5], dtype=F64), noise))


def test_unknown_samplers_have_a_nearest_name():
    assert samplers["ddpm"] is DDPM
    assert samplers["ddim"] is DDIM
    assert all(issubclass(samplers[name], Sampler) for name in samplers)
    with pytest.raises(UsageError, match="there is no sampler 'dimm', did you mean ddim"):
        samplers["dimm"]
