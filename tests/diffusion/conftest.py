"""What the tests of the mathematics share: every schedule, small mixtures, networks that know the answer."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from reverie.base.randomness import normal
from reverie.diffusion.grids import karras
from reverie.diffusion.oracle_stack import MixtureStack
from reverie.diffusion.oracles import Gaussian, Mixture, random_mixture
from reverie.diffusion.predictions import Prediction
from reverie.diffusion.registry import samplers, schedules
from reverie.diffusion.samplers.learned import Recipe, as_recipe
from reverie.diffusion.schedules import Schedule, Table, VariancePreserving, table
from reverie.diffusion.trajectories import trajectories
from reverie.diffusion.tuning import padded

EVERY: dict[str, Callable[[], Schedule]] = {name: (lambda name=name: schedules[name]()) for name in schedules}
EVERY |= {
    "linear-50": lambda: table("linear", 50, last=0.2),
    "scaled-linear-zero-snr": lambda: table("scaled-linear", zero_snr=True),
    "cosine-10-zero-snr": lambda: table("cosine", 10, zero_snr=True),
    "cosine-without-offset": lambda: schedules["cosine-continuous"](offset=0.0),
}
TABLES = [name for name in EVERY if isinstance(EVERY[name](), Table)]
PRESERVING = [name for name in EVERY if isinstance(EVERY[name](), VariancePreserving)]


@pytest.fixture
def every() -> dict[str, Callable[[], Schedule]]:
    """All schedules by name."""
    return EVERY


@pytest.fixture(params=EVERY)
def schedule(request) -> Schedule:
    """Each schedule in turn."""
    return EVERY[request.param]()


@pytest.fixture(params=TABLES)
def a_table(request) -> Table:
    """Each table in turn."""
    return EVERY[request.param]()


@pytest.fixture(params=PRESERVING)
def preserving(request) -> VariancePreserving:
    """Each variance-preserving schedule in turn."""
    return EVERY[request.param]()


@pytest.fixture
def times() -> Callable[..., Tensor]:
    """Times within a schedule's range, both ends of it included where asked for."""

    def spread(schedule: Schedule, count: int = 200, end: float = 1.0) -> Tensor:
        return torch.linspace(schedule.t_min, end, count, dtype=torch.float64)

    return spread


@pytest.fixture
def mixture() -> Callable[[Schedule], Mixture]:
    """A mixture of three in two dimensions, so far apart that each point's component is beyond doubt."""

    def make(schedule: Schedule) -> Mixture:
        means = torch.tensor([[-1.5, 0.5], [1.5, -0.5], [0.3, 2.0]], dtype=torch.float64)
        stds = torch.tensor([[0.15, 0.1], [0.1, 0.2], [0.12, 0.12]], dtype=torch.float64)
        return Mixture(means, stds, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), schedule)

    return make


@pytest.fixture
def gaussian() -> Callable[[Schedule], Gaussian]:
    """A Gaussian in two dimensions, its axes correlated."""

    def make(schedule: Schedule) -> Gaussian:
        covariance = torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=torch.float64)
        return Gaussian(torch.tensor([0.3, -0.2], dtype=torch.float64), covariance, schedule)

    return make


class Knowing(nn.Module):
    """A network that outputs an oracle's estimate, encoded, from no more than what a network is given."""

    def __init__(self, oracle: Mixture | Gaussian, prediction: Prediction) -> None:
        super().__init__()
        self.oracle, self.prediction, self.calls = oracle, prediction, 0

    def time(self, clock: Tensor) -> Tensor:
        """Return t, worked out from the network's clock."""
        schedule = self.oracle.schedule
        if self.prediction.name == "edm":
            return schedule.time(-8 * clock)
        return schedule.time_of_timestep(clock) if isinstance(schedule, Table) else clock / 1000

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        self.calls += 1
        t = self.time(time)
        alpha, sigma = self.oracle.schedule.marginal(t)
        x = x / self.prediction.input_scale(alpha, sigma).reshape(-1, *[1] * (x.ndim - 1))
        estimate = self.oracle(x, t)
        return self.prediction.encode(estimate.x0, estimate.eps, alpha, sigma)


@pytest.fixture
def knowing() -> type[Knowing]:
    """The network that knows the answer."""
    return Knowing


# Walks of solvers on mixtures -------------------------------------------------------------------


@pytest.fixture
def no_gradients():
    """As in use: nothing is differentiated."""
    with torch.no_grad():
        yield


@pytest.fixture
def some():
    """Trajectories of some mixtures, of a schedule by name."""

    def make(name, seeds=(0, 1), count=24):
        schedule = schedules[name]()
        scale = schedule.prior_std(torch.ones(1, dtype=torch.float64))
        x = scale * normal((count * len(seeds), 2), seeds[0], "test polish").double()
        return trajectories(MixtureStack([random_mixture(2, seed, schedule) for seed in seeds]), x)

    return make


@pytest.fixture
def usual():
    """A published solver's recipe, for a schedule by name."""

    def make(name, steps=6):
        schedule = schedules[name]()
        return padded(as_recipe(samplers["unipc"](), schedule, karras(schedule, steps)))

    return make


@pytest.fixture
def later(usual):
    """The same, begun a little before its second step, and keeping more than is usual, then less."""

    def make(name, steps=6):
        recipe = usual(name, steps)
        kept = tuple(1.1 - 0.05 * k for k in range(recipe.steps - 1))
        return Recipe((recipe.lam[1] - 0.3, *recipe.lam[1:]), recipe.weights, kept)

    return make
