"""What the tests of the mathematics share: every schedule, small mixtures, networks that know the answer."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from reverie.diffusion.oracles import Gaussian, Mixture
from reverie.diffusion.predictions import Prediction
from reverie.diffusion.registry import schedules
from reverie.diffusion.schedules import Schedule, Table, VariancePreserving, table

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
