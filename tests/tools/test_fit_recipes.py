"""The tool that fits the package's solvers keeps none that trained networks don't bear."""

import importlib.util
from pathlib import Path

import pytest
import torch

import reverie as rv
from reverie.diffusion.grids import uniform_log_snr
from reverie.diffusion.registry import schedules
from reverie.diffusion.samplers.learned import Recipe, as_recipe
from reverie.diffusion.samplers.unipc import UniPC
from reverie.models.builders import build
from reverie.models.card import Card, NetworkSpec, ScheduleSpec
from reverie.models.model import Model

FILE = Path(__file__).parents[2] / "tools" / "fit_recipes.py"


@pytest.fixture(scope="module")
def tool():
    """The tool as a module, its networks solved in fewer steps."""
    spec = importlib.util.spec_from_file_location("fit_recipes", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.EXACT, module.SAMPLES, module.TAUGHT = 40, 3, 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reverie.models.tuning.FINE", 16)
        patch.setattr("reverie.models.tuning.QUICK", 2)
        yield module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A network of classes, which knows nothing."""
    torch.manual_seed(0)
    card = Card(
        shape=(1, 8, 8),
        network=NetworkSpec(config={"in_channels": 1, "channels": [8, 8], "num_class_embeds": 4}),
        schedule=ScheduleSpec(name="linear"),
        prediction="v",
        classes=("a", "b", "c"),
        code="test",
    )
    path = tmp_path_factory.mktemp("network") / "model"
    rv.save(Model(build(card), card), path)
    return path


def test_the_best_is_of_those_that_networks_bear(tool):
    found = {
        tool.UNIPC: tool.Judged(0.0, -1.0, -1.0, [1.0, 1.0]),
        "rough": tool.Judged(-9.0, -5.0, -5.0, [0.2, 1.3]),
        "fine": tool.Judged(-3.0, -2.0, -2.0, [1.0, 1.1]),
        "finer": tool.Judged(-2.9, -2.0, -2.0, [0.9, 1.0]),
        "uneven": tool.Judged(-5.0, -8.0, -0.9, [0.5, 0.5]),
    }
    assert tool.chosen(found) == "finer"
    assert tool.chosen({word: one._replace(farther=[]) for word, one in found.items()}) == "rough"
    assert tool.chosen({word: found[word] for word in (tool.UNIPC, "uneven")}) == tool.UNIPC
    assert tool.chosen({"rough": found["rough"]}) == tool.UNIPC


def test_a_solver_between_two_others(tool):
    first, second = Recipe((-3.0, 0.0), ((1.0,), (1.0,))), Recipe((-3.0, 1.0), ((0.8,), (1.4, -0.4)))
    found = tool.between(first, second, 0.25)
    assert found.lam == (-3.0, 0.25)
    assert found.weights[0] == pytest.approx((0.95,))
    assert found.weights[1] == pytest.approx((1.1, -0.1))


def test_a_network_says_how_much_farther_a_solver_is(tool, folder):
    network, schedule = tool.Network(str(folder)), schedules["linear"]()
    same = as_recipe(UniPC(3), schedule, uniform_log_snr(schedule, 6))
    worse = Recipe(same.lam, tuple(tuple(1.5 * weight for weight in row) for row in same.weights))
    assert network.farther(same) == pytest.approx(1, abs=1e-3)
    assert network.farther(worse) > 1.5


def test_a_network_that_is_fitted_to_counts_for_its_part(tool, folder):
    even, stages = tool.taught_by(rv.load(folder), 60.0)
    assert len(even.end) == 2
    assert len(stages) == tool.STAGES
    assert all(sum(one.part for one in stage) == pytest.approx(60) for stage in stages)
    assert not torch.equal(stages[0][0].end, stages[1][0].end)
