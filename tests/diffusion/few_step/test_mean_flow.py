"""MeanFlow: its identity holds for the average velocity in closed form, and for nothing near it."""

import pytest
import torch
from torch import nn

from reverie.base.errors import UsageError
from reverie.diffusion.denoisers import Denoiser, Estimate, NetworkDenoiser
from reverie.diffusion.few_step.mean_flow import MeanFlow, average_velocity
from reverie.diffusion.few_step.slopes import along
from reverie.diffusion.predictions import per_sample
from reverie.diffusion.process import diffuse
from reverie.diffusion.schedules import EDM, Flow
from reverie.networks.numbered import Numbered, NumberedConfig

F64 = torch.float64
COUNT = 40


class Average(Denoiser):
    """(z_t - z_r) / (t - r) along a Gaussian's flow, times a factor; v itself where the span is 0."""

    def __init__(self, oracle, factor=1.0):
        super().__init__()
        self.oracle, self.schedule = oracle, oracle.schedule
        self.factor = nn.Parameter(torch.tensor(factor, dtype=F64))

    def forward(self, x, t, condition=None):
        span = condition["span"]
        now = self.oracle(x, t)
        far = (x - self.oracle.flow(x, t, t - span)) / per_sample(span.clamp(min=1e-9), x)
        u = torch.where(per_sample(span, x) > 0, self.factor * far, now.eps - now.x0)
        return Estimate(x - per_sample(t, x) * u, x + per_sample(1 - t, x) * u)


@pytest.fixture
def points(gaussian):
    oracle = gaussian(Flow())
    random = torch.Generator().manual_seed(0)
    t = torch.linspace(0.2, 0.95, COUNT, dtype=F64)
    r = t * torch.rand(COUNT, dtype=F64, generator=random)
    x = diffuse(oracle.schedule, oracle.draw(COUNT, 1), t, torch.randn(COUNT, 2, dtype=F64, generator=random))
    now = oracle(x, t)
    return oracle, x, t, r, now.eps - now.x0


def test_the_identity_holds_for_the_average_velocity(points):
    oracle, x, t, r, v = points
    u, aim = MeanFlow().sides(Average(oracle), x, t, r, v)
    torch.testing.assert_close(u, aim, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x - (t - r)[:, None] * u, oracle.flow(x, t, r), rtol=1e-9, atol=1e-9)


def test_and_for_no_multiple_of_it(points):
    oracle, x, t, r, v = points
    u, aim = MeanFlow().sides(Average(oracle, 1.1), x, t, r, v)
    assert (u - aim).abs().mean() > 0.01


def test_with_no_span_it_is_flow_matching(points):
    oracle, x, t, _, v = points
    _, aim = MeanFlow().sides(Average(oracle), x, t, t, v + 0.5)
    torch.testing.assert_close(aim, v + 0.5)


def test_the_gradient_leads_to_the_average_velocity(gaussian):
    """Expected over 4000 pairs, with the samples' own velocities: the slope in the factor has its sign."""
    oracle = gaussian(Flow())
    x0, eps = oracle.draw(4000, 3), torch.randn(4000, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    t, r = torch.full((4000,), 0.8, dtype=F64), torch.full((4000,), 0.3, dtype=F64)
    slopes = {}
    for factor in (0.6, 1.0, 1.4):
        denoiser = Average(oracle, factor)
        MeanFlow(constant=1e6).loss(denoiser, x0, t, r, eps).mean().backward()
        slopes[factor] = denoiser.factor.grad.item()
    assert slopes[0.6] < 0 < slopes[1.4]
    assert abs(slopes[1.0]) < 0.1 * slopes[1.4]


def test_the_spans_are_drawn_by_torch_and_a_share_of_them_is_0():
    """4000 draws at a share of 0.3: within 4.5 standard errors, a false alarm in 150,000."""
    t = torch.full((4000,), 0.5, dtype=F64)
    torch.manual_seed(1)
    late, early = MeanFlow(spans=0.3).ends(t)
    assert bool((early <= late).all())
    assert bool(((early == 0.5) | (late == 0.5)).all())
    assert abs((early < late).double().mean() - 0.3) < 4.5 * (0.3 * 0.7 / 4000) ** 0.5
    torch.manual_seed(1)
    assert torch.equal(MeanFlow(spans=0.3).ends(t)[0], late)


@pytest.mark.parametrize("kind", ["mlp", "unet"])
def test_the_slope_of_a_network_is_that_of_small_differences(kind):
    torch.manual_seed(0)
    inner = {"mlp": {"in_channels": 2, "width": 16}} if kind == "mlp" else {
        "unet": {"in_channels": 1, "channels": (8, 8), "layers": 1, "attention": (True, False)}
    }  # fmt: skip
    network = Numbered(NumberedConfig(numbers=("span",), **inner)).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    denoiser = NetworkDenoiser(network, Flow(), "velocity")
    shape = (3, 2) if kind == "mlp" else (3, 1, 8, 8)
    x, v = torch.randn(shape, dtype=F64), torch.randn(shape, dtype=F64)
    t, span, one = torch.tensor([0.3, 0.6, 0.9], dtype=F64), torch.tensor([0.1, 0.0, 0.5], dtype=F64), torch.ones(3)

    def u(x, t, span):
        return average_velocity(denoiser, x, t, span)

    value, slope = along(u, [x, t, span], [v, one.double(), one.double()])
    h = 1e-5  # the sinusoids' float32 leaves about 1e-7 / h
    ahead, behind = u(x + h * v, t + h, span + h), u(x - h * v, t - h, span - h)
    torch.testing.assert_close(value, u(x, t, span))
    scale = slope.abs().max().item()
    torch.testing.assert_close(slope, ((ahead - behind) / (2 * h)).detach(), rtol=0, atol=0.05 * scale)
    assert value.requires_grad
    assert not slope.requires_grad


def test_other_schedules_are_refused(points):
    oracle, x, t, r, v = points
    with pytest.raises(UsageError, match="schedule flow"):
        MeanFlow().sides(Average(type(oracle)(torch.zeros(2), torch.eye(2), EDM())), x, t, r, v)


@pytest.mark.parametrize("options", [{"spans": 0.0}, {"spans": 1.5}, {"std": 0.0}, {"constant": 0.0}])
def test_what_is_refused(options):
    with pytest.raises(UsageError, match="positive"):
        MeanFlow(**options)
