"""Networks seen as denoisers: an oracle in a network's clothes gives the oracle's estimate; corrections and buckets."""

import pytest
import torch
from torch import nn

from reverie.base.errors import UsageError
from reverie.diffusion.denoisers import Clipped, Denoiser, Estimate, FixedBatch, NetworkDenoiser, Thresholded
from reverie.diffusion.guidance.classifier_free import ClassifierFree
from reverie.diffusion.process import diffuse
from reverie.diffusion.registry import predictions
from reverie.diffusion.schedules import Flow, Table, table

F64 = torch.float64


def close(got, want, tolerance=1e-9):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", predictions)
def test_an_oracle_in_a_networks_clothes(schedule, name, mixture, knowing):
    """All that a network is given (c_in x, its clock) and all that it says (F) carry the estimate through."""
    oracle, prediction = mixture(schedule), predictions[name]()
    if schedule.zero_terminal_snr and not prediction.at_zero_signal:
        with pytest.raises(UsageError, match=f"{name}-prediction has no meaning .*predict v, x0 or velocity"):
            NetworkDenoiser(knowing(oracle, prediction), schedule, name)
        return
    denoiser = NetworkDenoiser(knowing(oracle, prediction), schedule, name)
    t = torch.cat([torch.tensor([schedule.t_min, 1.0], dtype=F64), torch.linspace(0.05, 0.95, 6, dtype=F64)])
    if isinstance(schedule, Table):
        t = schedule.time_of_timestep(schedule.timestep(t).round())
    x = diffuse(schedule, oracle.draw(8), t, torch.randn(8, 2, dtype=F64, generator=torch.Generator().manual_seed(0)))
    got, want = denoiser(x, t), oracle(x, t)
    # Near no signal, the oracle's modes are told apart by differences that a decoded x_0 has lost a few digits of.
    close(got.x0, want.x0, 1e-8)
    close(got.eps, want.eps, 1e-8)
    assert got.fraction is None
    close(denoiser.output(x, t), prediction.encode(want.x0, want.eps, *schedule.marginal(t)), 1e-8)


class Linear(nn.Module):
    """A small network that notes what it was called with."""

    def __init__(self, outputs=3):
        super().__init__()
        self.layer, self.seen = nn.Linear(3, outputs, bias=False), []

    def forward(self, x, time, shift=None):
        result = self.layer(x.movedim(1, -1)).movedim(-1, 1)
        self.seen.append((len(x), time, shift, result.dtype))
        return result if shift is None else result + shift


def test_learned_variance_is_the_second_half_of_the_channels():
    network, x, t = Linear(6), torch.randn(2, 3, 4), torch.tensor([0.2, 0.7], dtype=F64)
    estimate = NetworkDenoiser(network, Flow(), "velocity", learned_variance=True)(x, t)
    mean, fraction = network(x, t).chunk(2, dim=1)
    close(estimate.fraction, (fraction + 1) / 2, 1e-6)
    close(estimate.eps - estimate.x0, mean, 1e-5)


@pytest.mark.parametrize(("outputs", "learned"), [(6, False), (3, True), (1, False), (4, True)])
def test_an_output_of_the_wrong_shape_is_refused_before_it_broadcasts(outputs, learned):
    denoiser = NetworkDenoiser(Linear(outputs), Flow(), "v", learned_variance=learned)
    with pytest.raises(UsageError, match=rf"the network gives \(2, {outputs}, 4\) .*learned_variance is {learned}"):
        denoiser(torch.randn(2, 3, 4), torch.tensor([0.2, 0.7], dtype=F64))


def test_a_network_of_one_channel_may_not_answer_with_two():
    class Double(nn.Module):
        def forward(self, x, time):
            return torch.cat([x, x], 1)

    with pytest.raises(UsageError, match="learned_variance is False"):
        NetworkDenoiser(Double(), Flow(), "v")(torch.randn(2, 1, 4, 4), torch.ones(2, dtype=F64))


def test_the_condition_reaches_the_network_by_keyword():
    network, x, t = Linear(), torch.randn(2, 3), torch.tensor([0.2, 0.7], dtype=F64)
    denoiser, shift = NetworkDenoiser(network, table("linear"), "eps"), torch.randn(2, 3)
    close(denoiser(x, t, {"shift": shift}).eps, denoiser(x, t).eps + shift, 1e-6)
    assert network.seen[0][2] is shift
    assert network.seen[0][1].tolist() == [199, 699]
    assert network.seen[0][1].dtype == torch.float32


def test_only_the_network_runs_in_low_precision():
    network, x, t = Linear(), torch.randn(2, 3), torch.tensor([0.2, 0.7], dtype=F64)
    estimate = NetworkDenoiser(network, table("linear"), "eps", dtype=torch.bfloat16)(x, t)
    assert network.seen[-1][3] == torch.bfloat16
    assert estimate.x0.dtype == estimate.eps.dtype == torch.float32
    plain = NetworkDenoiser(network, table("linear"), "eps")
    plain(x, t)
    assert network.seen[-1][3] == torch.float32
    with torch.autocast("cpu", torch.bfloat16):  # the caller's own choice is left alone
        plain(x, t)
    assert network.seen[-1][3] == torch.bfloat16


def test_unknown_predictions_have_a_nearest_name():
    with pytest.raises(UsageError, match="did you mean velocity"):
        NetworkDenoiser(Linear(), Flow(), "velocty")


# Corrections ----------------------------------------------------------------------------------


class Fixed(Denoiser):
    """The same estimate of x_0 for all, with the noise that goes with it."""

    def __init__(self, x0, schedule):
        super().__init__()
        self.x0, self.schedule, self.rows = x0, schedule, []

    def forward(self, x, t, condition=None):
        self.rows.append(len(x))
        alpha, sigma = (v.reshape(-1, *[1] * (x.ndim - 1)) for v in self.schedule.marginal(t))
        x0 = self.x0.to(x).expand_as(x)
        return Estimate(x0, (x - alpha * x0) / sigma, 0 * x + 0.3)


def test_clipping_keeps_x0_in_range_and_the_noise_in_agreement(schedule):
    x0 = torch.tensor([-3.0, -0.5, 0.2, 1.7], dtype=F64)
    x, t = torch.randn(2, 4, dtype=F64), torch.tensor([0.4, 0.9], dtype=F64)
    plain = Fixed(x0, schedule)
    clipped = Clipped(plain)(x, t)
    close(clipped.x0, x0.clamp(-1, 1).expand(2, 4))
    close(schedule.alpha(t)[:, None] * clipped.x0 + schedule.sigma(t)[:, None] * clipped.eps, x)
    assert bool((clipped.fraction == 0.3).all())
    loose = Clipped(plain, limit=5)(x, t)
    close(loose.x0, plain(x, t).x0)
    close(loose.eps, plain(x, t).eps)


def test_dynamic_thresholding_is_imagens():
    """s = max(quantile of |x_0|, 1) within each sample; x_0 clipped to [-s, s] and divided by s."""
    random = torch.Generator().manual_seed(0)
    x0 = torch.randn(3, 2, 4, 4, dtype=F64, generator=random) * torch.tensor([0.2, 1.0, 5.0]).reshape(3, 1, 1, 1)
    x, t = torch.randn(3, 2, 4, 4, dtype=F64, generator=random), torch.tensor([0.4, 0.9, 1.0], dtype=F64)
    schedule = table("linear")
    got = Thresholded(Fixed(x0, schedule), quantile=0.9)(x, t)
    for i in range(3):
        s = max(1.0, x0[i].abs().flatten().quantile(0.9).item())
        close(got.x0[i], x0[i].clamp(-s, s) / s, 1e-12)
    close(got.x0[0], x0[0], 1e-12)
    assert got.x0.abs().max() <= 1
    alpha, sigma = (v.reshape(3, 1, 1, 1) for v in schedule.marginal(t))
    close(alpha * got.x0 + sigma * got.eps, x)
    half = Thresholded(Fixed(x0, schedule), quantile=0.9, limit=0.5)(x, t)
    assert half.x0.abs().max() == 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: Clipped(d, 0.0), "limit is 0.0"),
        (lambda d: Clipped(d, float("nan")), "limit is nan"),
        (lambda d: Thresholded(d, 0.0), "quantile is 0.0"),
        (lambda d: Thresholded(d, 1.1), "quantile is 1.1"),
        (lambda d: Thresholded(d, 0.9, -1.0), "limit is -1.0"),
        (lambda d: FixedBatch(d, 0), "size is 0"),
    ],
)
def test_settings_without_meaning_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make(Fixed(torch.zeros(1), Flow()))


# Buckets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_a_bucket_pads_and_gives_the_same(size, mixture):
    oracle = mixture(Flow())
    x, t = torch.randn(5, 2, dtype=F64), torch.linspace(0.1, 0.9, 5, dtype=F64)
    fixed = Fixed(torch.zeros(1), Flow())
    assert FixedBatch(fixed, size)(x, t).fraction.shape == x.shape
    assert fixed.rows == [size] * -(-5 // size)
    got, want = FixedBatch(oracle, size)(x, t), oracle(x, t)
    close(got.x0, want.x0, 1e-13)
    close(got.eps, want.eps, 1e-13)


def test_in_a_bucket_a_row_has_the_same_bits_in_any_company():
    """A network whose matrix products choose their blocking by the batch, alone and among others."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(48, 256), nn.SiLU(), nn.Linear(256, 48))

    class Net(nn.Module):
        def forward(self, x, time):
            return layers(x)

    x, t = torch.randn(7, 48), torch.linspace(0.1, 0.9, 7, dtype=F64)
    denoiser = FixedBatch(NetworkDenoiser(Net(), Flow(), "velocity"), 4)
    with torch.no_grad():
        among = denoiser(x, t)
        for i in range(7):
            alone = denoiser(x[i : i + 1], t[i : i + 1])
            assert torch.equal(alone.x0[0], among.x0[i])
            assert torch.equal(alone.eps[0], among.eps[i])


def test_a_bucket_carries_conditions_with_their_rows_inside_guidance():
    network = Linear()
    x, t, shift = torch.randn(5, 3), torch.linspace(0.1, 0.9, 5, dtype=F64), torch.randn(5, 3)
    plain = NetworkDenoiser(network, Flow(), "velocity")
    close(FixedBatch(plain, 4)(x, t, {"shift": shift}).x0, plain(x, t, {"shift": shift}).x0, 1e-6)
    network.seen.clear()
    nothing = {"shift": torch.zeros(5, 3)}
    guided = ClassifierFree(FixedBatch(plain, 4), {"shift": shift}, nothing, 2.0)
    want = ClassifierFree(plain, {"shift": shift}, nothing, 2.0)(x, t)
    network.seen.clear()
    close(guided(x, t).x0, want.x0, 1e-5)
    assert [rows for rows, *_ in network.seen] == [4, 4, 4]


def test_a_bucket_around_what_binds_rows_is_refused_with_the_way_out():
    guided = ClassifierFree(
        NetworkDenoiser(Linear(), Flow(), "v"), {"shift": torch.ones(5, 3)}, {"shift": torch.zeros(5, 3)}, 2.0
    )
    x, t = torch.randn(5, 3), torch.linspace(0.1, 0.9, 5, dtype=F64)
    with pytest.raises(UsageError, match="put FixedBatch around the network's denoiser, inside the guidance"):
        FixedBatch(guided, 4)(x, t)
    assert FixedBatch(guided, 5)(x, t).x0.shape == x.shape
