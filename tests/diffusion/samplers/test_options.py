"""What a sampler's options refuse, and in what words."""

import math

import pytest
import torch

from reverie.base.errors import UsageError
from reverie.base.randomness import Noise
from reverie.diffusion.registry import samplers, schedules

NAN = math.nan
REFUSED = [
    *(("ddpm", {"variance": value}, "variance is '.*'; it must be small, large or learned") for value in ("tiny", "")),
    *(
        (name, {"eta": value}, r"eta is .*; it must lie in \[0, 1\]")
        for name in ("ddim", "euler-ancestral", "dpm2", "dpm2-ancestral")
        for value in (-0.1, 1.01, NAN)
    ),
    *(
        (name, {"eta": value}, r"eta is .*; it must lie in \[0, 10\]")
        for name in ("dpmpp-2m", "dpmpp-2m-sde", "dpmpp-3m", "dpmpp-3m-sde")
        for value in (-0.1, 10.5, NAN)
    ),
    ("dpmpp-2m", {"rule": "half-h"}, "rule is 'half-h'; it must be half or exact"),
    ("dpmpp-3m", {"rule": "half"}, "rule is 'half'; dpmpp-3m knows only exact"),
    ("dpmpp-3m", {"rule": "other"}, "rule is 'other'; it must be"),
    *(("dpmpp-2s", {"r": value}, r"r is .*; it must lie in \(0, 1\]") for value in (0.0, -0.5, 1.5, NAN)),
    *(("unipc", {"order": value}, "order is .*; it must be 1, 2 or 3") for value in (0, 4, -1)),
    ("unipc", {"rule": "b2"}, "rule is 'b2'; it must be half, half-h or exact"),
    *(
        (name, {"order": value}, r"order is .*; it must lie in 1\.\.4")
        for name in ("deis", "lms", "pndm")
        for value in (0, 5)
    ),
    ("deis", {"variable": "rho"}, "variable is 'rho'; it must be t or lambda"),
    *(
        (name, options, "they must obey churn >= 0, noise > 0, 0 <= min <= max")
        for name in ("euler", "heun", "edm", "restart")
        for options in (
            *({"churn": -1.0}, {"churn": NAN}, {"churn_noise": 0.0}, {"churn_noise": -1.0}, {"churn_noise": NAN}),
            *({"churn_min": -0.1}, {"churn_min": 2.0, "churn_max": 1.0}, {"churn_max": NAN}),
        )
    ),
    *(
        ("restart", options, "they must obey 0 < low < high, times >= 1, inner >= 1")
        for options in ({"low": 0.0}, {"low": 0.7}, {"low": NAN}, {"high": 0.1}, {"times": 0}, {"inner": 0})
    ),
    *(
        ("langevin", options, r"moves is at least 1, step_size within \(0, 2\)")
        for options in ({"moves": 0}, {"step_size": 0.0}, {"step_size": 2.0}, {"step_size": -0.1}, {"step_size": NAN})
    ),
    *(
        ("predictor-corrector", options, "they must be at least 1 and above 0")
        for options in ({"corrections": 0}, {"snr": 0.0}, {"snr": -0.16}, {"snr": NAN})
    ),
]
ALLOWED = [
    *(("ddim", {"eta": value}) for value in (0.0, 1.0, 1)),
    *(("dpmpp-2m", {"eta": value}) for value in (0.0, 10.0)),
    *(("dpmpp-2s", {"r": 1.0}), ("dpmpp-2m", {"rule": "exact"}), ("unipc", {"order": 1, "rule": "half-h"})),
    *((name, {"order": value}) for name in ("deis", "lms", "pndm") for value in (1, 4)),
    *(("edm", {"churn": 0.0}), ("edm", {"churn_min": 1.0, "churn_max": 1.0}), ("restart", {"low": 0.1, "high": 0.11})),
    *(("langevin", {"moves": 1, "step_size": 1.99}), ("predictor-corrector", {"corrections": 1, "snr": 1e-3})),
]
LOUD = [
    *("ddpm", "dpmpp-2m-sde", "dpmpp-3m-sde", "edm", "euler-ancestral", "dpm2-ancestral", "restart"),
    *("langevin", "euler-maruyama", "predictor-corrector", "consistency"),
]


def words(value) -> str | None:
    return ",".join(f"{name}={value[name]}" for name in value) if isinstance(value, dict) else None


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "options", "message"), REFUSED, ids=lambda v: words(v) or (v if " " not in v else "-")
)
def test_what_is_out_of_range_is_refused(name, options, message):
    """In a sentence that names the option and its value, and says what it may be."""
    with pytest.raises(UsageError, match=message) as refusal:
        samplers[name](**options)
    for option, value in options.items():
        if option not in ("churn_noise", "churn_min", "churn_max"):
            assert option in str(refusal.value)
        assert str(value) in str(refusal.value)


@pytest.mark.parametrize(("name", "options"), ALLOWED, ids=words)
def test_what_lies_at_the_edge_of_a_range_is_allowed(name, options):
    sampler = samplers[name](**options)
    assert all(getattr(sampler, option) == value for option, value in options.items())


@pytest.mark.parametrize("name", samplers)
def test_a_sampler_says_whether_it_is_stochastic(name):
    assert samplers[name]().stochastic == (name in LOUD)


@pytest.mark.parametrize(
    ("name", "options", "loud"),
    [
        *(("ddim", {"eta": 0.1}, True), ("euler-ancestral", {"eta": 0.0}, False)),
        *(("dpmpp-2m", {"eta": 0.1}, True), ("dpmpp-2m-sde", {"eta": 0.0}, False), ("dpmpp-3m", {"eta": 1.0}, True)),
        *(("dpm2", {"eta": 0.1}, True), ("dpm2-ancestral", {"eta": 0.0}, False)),
        *(("heun", {"churn": 1.0}, True), ("edm", {"churn": 0.0}, False), ("euler", {"churn": 1.0}, True)),
    ],
    ids=words,
)
def test_an_option_makes_a_sampler_stochastic_or_not(name, options, loud):
    assert samplers[name](**options).stochastic == loud


@pytest.mark.parametrize("name", [name for name in samplers if not samplers[name].tells])
def test_what_says_that_it_is_deterministic_draws_no_noise_and_what_does_not_draws_some(name, line):
    class Counting(Noise):
        drawn = 0

        def __call__(self, shape, draws):
            Counting.drawn += 1
            return torch.zeros(len(draws), *shape)

    oracle, sampler = line(schedules["flow"]()), samplers[name]()
    state = sampler.init(torch.zeros(1, 1, dtype=torch.float64), 0.6)
    sampler.step(oracle, state, 0.05, Counting([0]), 19)
    assert (Counting.drawn > 0) == sampler.stochastic
