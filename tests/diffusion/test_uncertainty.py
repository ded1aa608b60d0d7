"""The learned weight of noise levels: against its equation, its minimum and its gradient."""

import pytest
import torch
from torch import nn

from reverie.base.errors import UsageError
from reverie.diffusion.denoisers import Denoiser, Estimate
from reverie.diffusion.objectives import Simple
from reverie.diffusion.oracles import random_mixture
from reverie.diffusion.schedules import EDM, Cosine
from reverie.diffusion.uncertainty import Weighed


class Line(nn.Module):
    """u = a + b c."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.3).double()), nn.Parameter(torch.tensor(-0.7).double())

    def forward(self, clock: torch.Tensor) -> torch.Tensor:
        return self.a + self.b * clock


class Off(Denoiser):
    """A denoiser whose estimate lies off the truth, by a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule, self.offset = EDM(), nn.Parameter(torch.tensor(0.5).double())
        self.exact = random_mixture(4, 0, self.schedule)

    def forward(self, x, t, condition=None):
        estimate = self.exact(x, t)
        sigma = self.schedule.sigma(t)[:, None]
        return Estimate(estimate.x0 + self.offset, estimate.eps - self.offset / sigma)


def examples(count: int = 6) -> tuple[torch.Tensor, ...]:
    denoiser = Off()
    x0 = denoiser.exact.draw(count, seed=1)
    sigma = torch.tensor([0.01, 0.1, 0.5, 1.0, 5.0, 50.0]).double()[torch.arange(count) % 6]
    eps = torch.randn(count, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x0, sigma / 80, eps, sigma


def test_it_is_the_loss_over_exp_u_plus_u_with_edms_clock():
    denoiser, line = Off(), Line()
    x0, t, eps, sigma = examples()
    plain = Simple("edm")(denoiser, x0, t, eps)
    u = 0.3 - 0.7 * sigma.log() / 4
    torch.testing.assert_close(Weighed(Simple("edm"), line)(denoiser, x0, t, eps), plain / u.exp() + u)


def test_on_edms_output_edms_weight_is_one():
    """The paper's w (D - y)^2, w = (s^2 + d^2) / (s d)^2."""
    denoiser, (x0, t, eps, sigma) = Off(), examples()
    estimate = denoiser(x0 + sigma[:, None] * eps, t)
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    want = weight * (estimate.x0 - x0).square().mean(1)
    torch.testing.assert_close(Simple("edm")(denoiser, x0, t, eps), want)


def test_its_minimum_is_the_logarithm_of_the_mean_loss():
    """Of a u that is one constant, in closed form."""
    denoiser, (x0, t, eps, _) = Off(), examples()
    denoiser.offset.data.fill_(0.02)
    mean = Simple("edm")(denoiser, x0, t, eps).mean().detach()
    line = Line()
    line.b.data.zero_()
    for _ in range(200):
        (grad,) = torch.autograd.grad(Weighed(Simple("edm"), line)(denoiser, x0, t, eps).mean(), line.a)
        line.a.data -= 0.3 * grad
    assert float(line.a.detach()) == pytest.approx(float(mean.log()), abs=1e-9)


def test_both_the_network_and_u_get_a_gradient():
    denoiser, line = Off(), Line()
    x0, t, eps, _ = examples()
    weighed = Weighed(Simple("edm"), line)
    weighed(denoiser, x0, t, eps).mean().backward()
    plain = torch.autograd.grad(
        (Simple("edm")(denoiser, x0, t, eps) / line(t.mul(80).log() / 4).exp()).mean(), denoiser.offset
    )
    torch.testing.assert_close(denoiser.offset.grad, plain[0])
    assert float(line.a.grad) != 0
    assert float(line.b.grad) != 0
    assert weighed.learned is line


def test_a_clock_without_end_is_refused():
    with pytest.raises(UsageError, match="zero signal"):
        Weighed(Simple("v"), Line())(
            random_mixture(4, 0, Cosine()), torch.zeros(1, 4).double(), torch.tensor([0.5]).double(),
            torch.zeros(1, 4).double(),
        )  # fmt: skip
