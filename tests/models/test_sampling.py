"""Sampling: the same sample whatever its batch, the steps that were asked for, and nothing but finite numbers."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from reverie.base.errors import NonFiniteError, OutOfMemoryError
from reverie.base.randomness import Noise
from reverie.diffusion.registry import grids
from reverie.diffusion.samplers.base import run, start
from reverie.diffusion.samplers.ddim import DDIM
from reverie.models import memory
from reverie.models.model import Model
from reverie.models.sampling import Progress
from reverie.models.settling import bucket_rows


def calls(model: Model, run) -> list[int]:
    """Return the rows of each call of the network while something runs."""
    rows: list[int] = []
    hook = model.denoiser.network.register_forward_hook(lambda net, given, out: rows.append(len(given[0])))
    try:
        run()
    finally:
        hook.remove()
    return rows


# The same sample, bit for bit -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_sample_does_not_depend_on_its_batch(classy, dtype, sampler):
    """Sample i of a seed has the same bits for any batch size, any number of samples, and guided."""
    settings = {"seed": 5, "sampler": sampler, "steps": 2, "guidance": 2.5, "dtype": dtype}
    labels = [i % 3 for i in range(20)]
    whole = classy.sample(20, classes=labels, **settings).images
    for batch_size, n in ((1, 3), (3, 2), (3, 7), (8, 20)):
        part = classy.sample(n, classes=labels[:n], batch_size=batch_size, **settings).images
        assert torch.equal(part, whole[:n]), (batch_size, n)


def test_a_sample_does_not_depend_on_how_many_there_are(model):
    whole = model.sample(40, seed=3, steps=1).images
    assert all(torch.equal(model.sample(n, seed=3, steps=1).images, whole[:n]) for n in range(1, 21))


def test_picture_i_of_a_seed_is_picture_0_of_its_own_seed(model):
    together = model.sample(6, seed=100, sampler="ddpm", steps=4)
    for i in range(6):
        alone = model.sample(1, seed=100 + i, sampler="ddpm", steps=4)
        assert torch.equal(alone.images[0], together.images[i])
        assert alone.seeds.tolist() == [together.seeds[i]]


def test_seeds_may_come_in_any_order(model):
    seeds = [7, 3, 2**63 - 1, 0, 3]
    permuted = model.sample(5, seed=seeds, steps=3, sampler="ddpm").images
    for row, seed in zip(permuted, seeds, strict=True):
        assert torch.equal(row, model.sample(1, seed=seed, steps=3, sampler="ddpm").images[0])


def test_a_sample_does_not_depend_on_what_was_drawn_before(model):
    first = model.sample(2, steps=3).images
    model.sample(5, seed=9, steps=2, sampler="ddpm")
    torch.manual_seed(123)
    assert torch.equal(model.sample(2, steps=3).images, first)


def test_seeds_that_differ_give_other_samples(model):
    x = model.sample(4, steps=3).images
    assert all(not torch.equal(a, b) for a, b in pairwise(x))


def test_the_threads_of_exact_mode_are_recorded(model):
    assert model.sample(1, steps=1).record["threads"] == torch.get_num_threads()


def test_free_batches_agree_to_rounding(model):
    exact = model.sample(5, steps=4).images
    for batch_size in (1, 5):
        torch.testing.assert_close(
            model.sample(5, steps=4, exact=False, batch_size=batch_size).images, exact, atol=1e-4, rtol=0
        )


# What runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("grid", ["leading", "trailing", "linspace", "karras", "log-snr"])
def test_so_many_steps_are_so_many_evaluations(model, grid, steps):
    """The network is called `steps` times, and the plan says so."""
    assert calls(model, lambda: model.sample(3, steps=steps, grid=grid)) == [bucket_rows((1, 8, 8))] * steps
    assert model.plan(3, steps=steps, grid=grid).evaluations == steps


def test_all_entries_of_a_table_are_so_many_evaluations(model):
    assert len(calls(model, lambda: model.sample(1, steps=40, sampler="ddpm"))) == 40


def test_guidance_evaluates_twice_and_its_two_ends_once(classy):
    free = {"classes": 0, "steps": 3, "exact": False}
    assert calls(classy, lambda: classy.sample(2, guidance=2.0, **free)) == [4, 4, 4]
    assert calls(classy, lambda: classy.sample(2, guidance=1.0, **free)) == [2, 2, 2]
    assert calls(classy, lambda: classy.sample(2, guidance=0.0, **free)) == [2, 2, 2]
    assert classy.plan(2, guidance=2.0, classes=0, steps=3).evaluations == 6


def test_guidance_is_as_its_formula_says(classy):
    """w = 0 draws without the class, w = 1 with it, and between them lies what is between, in one step."""
    settings = {"seed": 1, "steps": 1, "clip": False}
    none = classy.sample(2, **settings).images
    ends = {w: classy.sample(2, classes="two", guidance=w, **settings).images for w in (0.0, 0.5, 1.0)}
    assert torch.equal(ends[0.0], none)
    assert not torch.equal(ends[1.0], none)
    inside = (ends[0.5].abs() < 1) & (ends[0.0].abs() < 1) & (ends[1.0].abs() < 1)  # where nothing was cut off
    assert inside.any()
    torch.testing.assert_close(ends[0.5][inside], ((ends[0.0] + ends[1.0]) / 2)[inside], atol=1e-5, rtol=0)


def test_labels_reach_the_samples_they_were_given_for(classy):
    mixed = classy.sample(3, seed=[4, 4, 4], classes=["two", 0, "1"], steps=2)
    for row, label in zip(mixed.images, ("two", "zero", "one"), strict=True):
        assert torch.equal(row, classy.sample(1, seed=4, classes=label, steps=2).images[0])
    assert mixed.labels.tolist() == [2, 0, 1]
    assert [mixed.class_of(i) for i in range(3)] == ["two", "zero", "one"]


def test_the_loop_is_the_one_of_the_mathematics(model):
    """Free of buckets and clipping, a model draws what the one loop draws."""
    schedule, noise = model.denoiser.schedule, Noise([0, 1, 2])
    grid = grids["trailing"](schedule, 5).expand(3, -1)
    *_, last = run(DDIM(0.5), model.denoiser, start(DDIM(0.5), schedule, (1, 8, 8), grid[:, 0], noise), grid, noise)
    got = model.sample(3, steps=5, eta=0.5, exact=False, clip=False).images
    assert torch.equal(got, last.x.clamp(-1, 1))


def test_x0_stays_within_the_limit(model):
    seen: list[float] = []
    watch = lambda progress: seen.append(float(progress.state.x0.abs().max()))  # noqa: E731
    model.sample(2, steps=4, clip=0.5, callback=watch)
    assert max(seen) <= 0.5
    seen.clear()
    model.sample(2, steps=4, clip=False, callback=watch)
    assert max(seen) > 1
    seen.clear()
    model.sample(2, steps=4, threshold=0.9, callback=watch)
    assert max(seen) <= 1 + 1e-6


def test_dropout_is_off_and_comes_back(make):
    model = make({"dropout": 0.5})
    model.denoiser.network.train()
    first = model.sample(2, steps=2).images
    assert torch.equal(model.sample(2, steps=2).images, first)
    assert model.denoiser.network.training


# Progress and cancellation --------------------------------------------------------------------------


def test_every_step_of_every_batch_is_reported(model):
    seen: list[Progress] = []
    model.sample(5, steps=3, batch_size=2, callback=seen.append)
    assert [(p.batch, p.step, p.done, p.total) for p in seen] == [
        (batch, step, 3 * batch + step, 9) for batch in range(3) for step in (1, 2, 3)
    ]
    assert [len(p.state.x) for p in seen] == [2, 2, 2, 2, 2, 2, 1, 1, 1]


def test_it_stops_between_steps(model):
    def stop(progress: Progress) -> None:
        if progress.done == 2:
            raise KeyboardInterrupt

    def interrupted() -> None:
        with pytest.raises(KeyboardInterrupt):
            model.sample(3, steps=10, callback=stop)

    assert len(calls(model, interrupted)) == 2


def test_intermediates_are_kept_where_asked(model):
    samples = model.sample(5, steps=6, intermediates=3, batch_size=2, clip=False)
    assert [passed.step for passed in samples.intermediates] == [2, 4, 6]
    assert all(passed.x.shape == passed.x0.shape == (5, 1, 8, 8) for passed in samples.intermediates)
    assert torch.equal(samples.intermediates[-1].x.clamp(-1, 1), samples.images)
    assert samples.intermediates[-1].t == 0
    assert [passed.step for passed in model.sample(1, steps=6, intermediates=[5, 1]).intermediates] == [1, 5]
    assert model.sample(1, steps=6).intermediates == ()


# Numbers and memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [math.nan, math.inf, 1e30])
def test_weights_that_are_not_numbers_end_it_with_the_step(model, factor):
    """Exit code 5, naming the step and its noise level."""
    with torch.no_grad():
        for parameter in model.denoiser.network.parameters():
            parameter.mul_(factor)
    with pytest.raises(NonFiniteError, match=r"step 1 \(sigma") as caught:
        model.sample(2, steps=3)
    assert caught.value.exit_code == 5


def test_more_than_there_is_memory_for_is_refused_before_it_is_taken(model, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 10**6)

    def greedy() -> None:
        with pytest.raises(OutOfMemoryError, match=r"100000 samples of \(1, 8, 8\) would take .* lower n"):
            model.sample(100_000, steps=1)

    assert calls(model, greedy) == []
    model.sample(1, steps=1)


def test_an_allocation_that_fails_says_what_to_lower(model):
    class Greedy(nn.Module):
        def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            return torch.empty(2**60)

    model.denoiser.network = Greedy()
    with pytest.raises(OutOfMemoryError, match=r"not enough memory for 1 sample of .*lower"):
        model.sample(1, steps=1)


def test_other_faults_are_not_taken_for_memory(model):
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            return x @ torch.zeros(3, 3)

    model.denoiser.network = Broken()
    with pytest.raises(RuntimeError, match=r"mat|size"):
        model.sample(1, steps=1)
