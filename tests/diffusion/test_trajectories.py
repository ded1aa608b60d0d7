"""Exact trajectories, against the map of a Gaussian, which is known."""

import pytest
import torch

from reverie.base.randomness import normal
from reverie.diffusion.oracles import Gaussian
from reverie.diffusion.registry import schedules
from reverie.diffusion.trajectories import trajectories

F64 = torch.float64


def known(name):
    """A Gaussian, and starts."""
    schedule = schedules[name]()
    mean, covariance = torch.tensor([0.3, -0.2], dtype=F64), torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=F64)
    x = schedule.prior_std(torch.ones(1, dtype=F64)) * normal((5, 2), 0, "test tuning").double()
    return Gaussian(mean, covariance, schedule), x


def distance(name, substeps, k):
    """How far node k is from where it should be."""
    oracle, x = known(name)
    found = trajectories(oracle, x, substeps=substeps)
    t = torch.tensor([found.known[k].t], dtype=F64).expand(5)
    return float((found.x[k] - oracle.flow(x, torch.ones(5, dtype=F64), t)).abs().max() / max(float(x.abs().max()), 1))


@pytest.mark.parametrize("name", ["linear", "cosine", "flow", "edm"])
def test_exact_trajectories_are_exact(name):
    assert max(distance(name, 1, k) for k in (40, 100, 127)) < 2e-3


def test_substeps_keep_the_nodes_and_are_nearer():
    oracle, x = known("linear")
    one, three = (trajectories(oracle, x, 20, substeps=n) for n in (1, 3))
    assert [level.lam for level in one.known] == pytest.approx([level.lam for level in three.known], abs=1e-9)
    assert three.x.shape == one.x.shape == (20, 5, 2)
    assert distance("linear", 3, 100) < distance("linear", 1, 100) / 5


def test_samples_count_evenly_where_nothing_is_said():
    oracle, x = known("linear")
    found = trajectories(oracle, x, 20)
    assert found.share.tolist() == [0.2] * 5
    assert found.numbers == 2
    assert found.rows([1, 3]).share.tolist() == [0.5] * 2
