"""Speed and the promise, measured: the measures see what they are there to see."""

import pytest
import torch
from torch import nn

from reverie.cli import measure
from reverie.cli.measure import BUCKET, Runner, promise, small_unet, speeds


@pytest.fixture(autouse=True)
def one_size(monkeypatch):
    monkeypatch.setattr(measure, "SIZES", (16,))


def test_the_small_unets_output_is_not_zero():
    """As a U-Net starts, its last layer is zero: every claim would hold of it."""
    network = small_unet()
    run = Runner(network, torch.float32)
    out = run(*run.inputs(16))
    assert out.std() > 0.01
    assert (out[0] != out[1]).any()
    assert not network.training


def test_the_small_unet_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    want = torch.rand(4)
    torch.manual_seed(3)
    small_unet()
    assert torch.equal(torch.rand(4), want)


def test_what_holds_here():
    """RELIABILITY 4.1: at a fixed batch shape a row's bits are its own."""
    held = {(claim.claim, claim.dtype): claim.holds for claim in promise()}
    for dtype in ("float32", "bfloat16"):
        assert held["from run to run", dtype] is True
        assert held["in any place, among any others", dtype] is True
    assert len(held) == 8


class Neighbourly(nn.Module):
    """A network that looks at its neighbours."""

    def forward(self, x, t):
        return x + x.mean(0, keepdim=True)


class Placed(nn.Module):
    """A network that looks at the place."""

    def forward(self, x, t):
        return x + torch.arange(len(x))[:, None, None, None]


class Counting(nn.Module):
    """A network that looks at the size of the batch."""

    def forward(self, x, t):
        return x * (1 if len(x) == BUCKET else 1.0001)


class Restless(nn.Module):
    """A network that is never the same twice."""

    def forward(self, x, t):
        return x + torch.rand(())


class Threaded(nn.Module):
    """A network that looks at the number of threads."""

    def forward(self, x, t):
        return x * torch.get_num_threads()


class Honest(nn.Module):
    """A network whose rows are their own."""

    def forward(self, x, t):
        return 2 * x + t[:, None, None, None]


@pytest.mark.parametrize(
    ("network", "want"),
    [
        (Honest, (True, True, True)),
        (Neighbourly, (True, False, False)),
        (Placed, (True, False, True)),
        (Counting, (True, True, False)),
        (Restless, (False, False, False)),
    ],
)
def test_each_claim_fails_where_it_should(network, want):
    run = Runner(network(), torch.float32)
    assert (run.repeats(16), run.unmoved(16), run.any_batch(16)) == want


def test_threads_are_compared_where_there_are_several(monkeypatch):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert Runner(Honest(), torch.float32).any_threads() is True
        assert Runner(Threaded(), torch.float32).any_threads() is False
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        assert Runner(Threaded(), torch.float32).any_threads() is None
    finally:
        torch.set_num_threads(before)


def test_speeds_are_work_over_time(monkeypatch):
    """With every run a second long, the figures are the operations themselves."""

    def once(work, seconds):
        work()
        return 1.0

    monkeypatch.setattr(measure, "best_time", once)
    found = speeds()
    assert found["convolution"]["float32"] == round(2 * 8 * 64 * 64 * 9 * 32 * 32 / 1e9, 1)
    assert found["matrix_product"]["bfloat16"] == round(2 * 768**3 / 1e9, 1)
    assert found["training"] == {"float32": 8.0, "bfloat16": 8.0}
    assert (found["bfloat16_gain"], found["recommended"]) == (1.0, "float32")


@pytest.mark.parametrize(
    ("times", "dtype"), [((1.0, 0.5), "bfloat16"), ((1.0, 2.0), "float32"), ((1, 0.95), "float32")]
)
def test_the_faster_dtype_is_recommended_where_it_is_worth_it(monkeypatch, times, dtype):
    monkeypatch.setattr(measure, "convolution", lambda dtype, seconds: 1.0)
    monkeypatch.setattr(measure, "product", lambda dtype, seconds: 1.0)
    monkeypatch.setattr(measure, "training", lambda kind, seconds: 1 / times[kind == torch.bfloat16])
    assert speeds()["recommended"] == dtype


def test_the_best_of_several_runs_counts(monkeypatch):
    clock = iter([0.0, 5.0, 10.0, 11.0, 20.0, 22.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    calls = []
    assert measure.best_time(lambda: calls.append(1), 7.0) == 1.0
    assert len(calls) == 4  # one to begin with, then until the seconds are over


def test_fast_is_measured():
    found = measure.fast(0.01)
    assert found["gain"] > 0
    assert 0 < found["error"] < 0.05
    assert found["dtype"] in measure.DTYPES
