"""The times that training looks at: uniform, log-normal, and by importance without bias.

Statistical tests have fixed seeds and a false-positive rate of 1e-5 each.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from reverie.base.errors import ModelFileError, UsageError
from reverie.diffusion.schedules import EDM, Flow, Table, table
from reverie.diffusion.times import ImportanceTimes, LogNormalTimes, UniformTimes, stratified

F64 = torch.float64
RATE = 1e-5


@given(st.integers(1, 200), st.integers(0, 1000))
def test_stratified_numbers_are_one_from_each_stratum(count, seed):
    u = stratified(count, seed, "time")
    assert u.dtype == F64
    assert sorted((u * count).floor().long().tolist()) == list(range(count))


def test_each_place_of_a_stratified_batch_is_uniform():
    """No place of the batch has times of its own: the order is random, and each u uniform."""
    draws = np.stack([stratified(4, seed, "time").numpy() for seed in range(3000)])
    for place in range(4):
        assert stats.kstest(draws[:, place], "uniform").pvalue > RATE
    assert abs(np.corrcoef(draws[:, 0], np.arange(3000))[0, 1]) < stats.norm.isf(RATE / 2) / math.sqrt(3000)


def test_a_batch_of_stratified_times_is_less_noisy():
    means = [stratified(16, seed).square().mean().item() for seed in range(300)]
    assert np.std(means) < 0.25 * math.sqrt(4 / 45 / 16)
    assert abs(np.mean(means) - 1 / 3) < 5 * np.std(means) / math.sqrt(300)


def test_uniform_times_of_a_table_are_its_timesteps_each_as_likely(a_table):
    times = UniformTimes(a_table)
    t = times(a_table.timesteps, 0, "time").t
    assert sorted(a_table.timestep(t).tolist()) == list(range(a_table.timesteps))
    few = torch.cat([times(3, 0, "time", step).t for step in range(300)])
    groups = (a_table.timestep(few) * 10 / a_table.timesteps).floor().long()
    assert stats.chisquare(torch.bincount(groups, minlength=10).numpy()).pvalue > RATE


def test_uniform_times_of_a_continuous_schedule_span_its_range(schedule):
    if not isinstance(schedule, Table):
        t = UniformTimes(schedule)(1000, 0).t
        width = 1 - schedule.t_min
        assert t.dtype == F64
        assert bool(((t >= schedule.t_min) & (t < 1)).all())
        assert bool(((t.sort().values - schedule.t_min) / width - torch.arange(1000) / 1000 < 1e-3).all())


def test_the_last_u_stays_on_the_table():
    last = torch.tensor([1.0, np.nextafter(1, 0)], dtype=F64)
    assert UniformTimes(table("linear", 10)).times(last).tolist() == [1, 1]


def test_draws_are_a_function_of_the_key_and_weigh_nothing():
    times = UniformTimes(Flow())
    a, b, c = times(5, 0, "time", 3), times(5, 0, "time", 3), times(5, 0, "time", 4)
    assert torch.equal(a.t, b.t)
    assert not torch.equal(a.t, c.t)
    assert a.factor.tolist() == [1] * 5


@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (-0.4, 1.0)])
def test_log_normal_times(mean, std):
    schedule = EDM()
    times = LogNormalTimes(schedule, mean, std)
    single = torch.cat([times(1, seed).t for seed in range(2000)])
    assert stats.kstest(schedule.sigma(single).log().numpy(), "norm", (mean, std)).pvalue > RATE


def test_log_normal_times_stay_within_any_schedule(schedule):
    times = LogNormalTimes(schedule)
    draw = times(500, 0)
    assert bool(((draw.t >= schedule.t_min * (1 - 1e-12)) & (draw.t <= 1)).all())
    assert draw.factor.tolist() == [1] * 500
    if isinstance(schedule, Table):
        assert torch.equal(schedule.timestep(draw.t), schedule.timestep(draw.t).round())


# Importance -----------------------------------------------------------------------------------


def taught(schedule, loss, bins=None, history=10, floor=0.001):
    """An importance sampler that has seen enough of a loss that depends on t."""
    times = ImportanceTimes(schedule, bins, history, floor)
    for step in range(1000):
        t = UniformTimes(schedule)(500, 7, step).t
        times.learn(t, loss(t))
        if int(times.counts.min()) >= history:
            return times
    raise AssertionError("never learned")


def steep(t):
    return 0.05 + t**3


def test_until_every_bin_has_its_history_times_are_uniform():
    times = ImportanceTimes(Flow(), bins=4, history=2)
    times.learn(torch.tensor([0.1, 0.1, 0.4, 0.4, 0.6, 0.6, 0.9], dtype=F64), torch.ones(7) * 9)
    assert times.probabilities.tolist() == [0.25] * 4
    times.learn(torch.tensor([0.9], dtype=F64), torch.ones(1))
    assert times.probabilities.tolist() != [0.25] * 4


@pytest.mark.parametrize("make", [Flow, lambda: table("linear"), lambda: table("linear", 50)])
def test_bins_are_drawn_by_the_root_of_the_mean_square_loss(make):
    schedule = make()
    times = taught(schedule, steep, bins=10, floor=0.0)
    size = times.losses.square().mean(1).sqrt()
    torch.testing.assert_close(times.probabilities, size / size.sum())
    drawn = torch.cat([times(100, seed).t for seed in range(60)])
    observed = torch.bincount(times.bin(drawn), minlength=10)
    assert stats.chisquare(observed.numpy(), (times.probabilities * 6000).numpy()).pvalue > RATE
    if isinstance(schedule, Table):
        assert torch.equal(schedule.timestep(drawn), schedule.timestep(drawn).round())


@pytest.mark.parametrize("make", [Flow, lambda: table("linear"), lambda: table("linear", 50)])
def test_importance_is_unbiased(make):
    """The mean of factor * f over its draws is the mean of f over uniform times, for an f that it was not taught."""

    def f(t):
        return torch.cos(3 * t) + t

    schedule = make()
    times = taught(schedule, steep, bins=10)
    draws = [times(50, 1, seed) for seed in range(200)]
    estimates = torch.stack([(d.factor * f(d.t)).mean() for d in draws])
    uniform = UniformTimes(schedule)
    every = uniform.times((torch.arange(100_000, dtype=F64) + 0.5) / 100_000)
    error = estimates.std() / math.sqrt(len(draws))
    assert abs(estimates.mean() - f(every).mean()) < stats.norm.isf(RATE / 2) * error
    assert sum(times.probabilities) == pytest.approx(1)
    naive = torch.stack([f(d.t).mean() for d in draws])
    assert abs(naive.mean() - f(every).mean()) > 10 * error  # without the factor it would be biased


def test_importance_of_its_own_loss_has_less_variance():
    times = taught(Flow(), lambda t: t**8, bins=20)
    mine = torch.cat([(d.factor * d.t**8)[:1] for d in (times(8, 0, s) for s in range(500))])
    plain = torch.cat([(d.t**8)[:1] for d in (UniformTimes(Flow())(8, 0, s) for s in range(500))])
    assert mine.std() < 0.3 * plain.std()


def test_a_time_falls_into_its_bin(schedule):
    bins = 10 if isinstance(schedule, Table) else 7
    times = ImportanceTimes(schedule, bins)
    u = torch.linspace(0, 0.999, 500, dtype=F64)
    t = UniformTimes(schedule).times(u)
    if isinstance(schedule, Table):
        want = (schedule.timestep(t) * bins / schedule.timesteps).floor().long()
    else:
        want = (u * bins).floor().long()
    assert torch.equal(times.bin(t), want)


def test_the_history_keeps_the_last_losses():
    times = ImportanceTimes(Flow(), bins=1, history=3)
    for value in (1.0, 2.0, 3.0, 4.0):
        times.learn(torch.tensor([0.5], dtype=F64), torch.tensor([value]))
    assert times.losses.tolist() == [[2, 3, 4]]
    times.learn(torch.tensor([0.5, 0.5], dtype=F64), torch.tensor([math.nan, math.inf]))
    assert times.losses.tolist() == [[2, 3, 4]]
    assert bool(times.probabilities.isfinite().all())


def test_what_was_learned_is_saved_and_taken_up():
    times = taught(Flow(), steep, bins=5)
    other = ImportanceTimes(Flow(), bins=5)
    other.load(times.state())
    assert torch.equal(other(20, 3).t, times(20, 3).t)
    assert torch.equal(other(20, 3).factor, times(20, 3).factor)
    times.learn(torch.tensor([0.5], dtype=F64), torch.tensor([99.0]))
    assert not torch.equal(other.losses, times.losses)


def test_a_checkpoint_of_another_shape_is_refused():
    with pytest.raises(ModelFileError, match="keep bins and history"):
        ImportanceTimes(Flow(), bins=5).load(ImportanceTimes(Flow(), bins=6).state())
    with pytest.raises(ModelFileError, match="keep bins and history"):
        ImportanceTimes(Flow(), bins=5).load({})
    with pytest.raises(ModelFileError, match=r"learns nothing, yet the checkpoint holds \['losses'\]"):
        UniformTimes(Flow()).load({"losses": torch.zeros(1)})
    UniformTimes(Flow()).load(UniformTimes(Flow()).state())


@pytest.mark.parametrize(("entries", "bins"), [(1000, 100), (50, 50), (10, 10), (250, 50), (128, 64), (997, 1)])
def test_without_a_number_of_bins_a_table_gets_its_largest_divisor_up_to_100(entries, bins):
    assert len(ImportanceTimes(table("linear", entries)).counts) == bins


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImportanceTimes(Flow(), 0), "bins is 0"),
        (lambda: ImportanceTimes(table("linear"), 7), "divide the table's 1000 entries"),
        (lambda: ImportanceTimes(table("linear", 10), 20), "divide the table's 10 entries"),
        (lambda: ImportanceTimes(Flow(), history=0), "history is 0"),
        (lambda: ImportanceTimes(Flow(), floor=1.5), "floor 1.5"),
        (lambda: LogNormalTimes(EDM(), std=0.0), "std is 0.0"),
    ],
)
def test_settings_without_meaning_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()
