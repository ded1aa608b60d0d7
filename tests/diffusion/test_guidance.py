"""Classifier-free guidance: D_u + w (D_c - D_u), both ends, and conditions that stay with their rows."""

import pytest
import torch

from reverie.base.errors import UsageError
from reverie.diffusion.denoisers import Denoiser, Estimate
from reverie.diffusion.guidance.classifier_free import ClassifierFree, Conditioned
from reverie.diffusion.oracles import Mixture
from reverie.diffusion.schedules import Flow, table

F64 = torch.float64


class Labelled(Denoiser):
    """The exact denoiser of one component of a mixture by its label, or of all of it where the label is -1."""

    def __init__(self, mixture):
        super().__init__()
        self.mixture, self.schedule, self.calls = mixture, mixture.schedule, 0
        self.parts = [
            Mixture(m[None], s[None], torch.ones(1, dtype=F64), mixture.schedule)
            for m, s in zip(mixture.means, mixture.stds, strict=True)
        ]

    def forward(self, x, t, condition=None):
        self.calls += 1
        rows = [
            (self.mixture if label < 0 else self.parts[label])(x[i : i + 1], t[i : i + 1])
            for i, label in enumerate(condition["label"].tolist())
        ]
        x0, eps = torch.cat([row.x0 for row in rows]), torch.cat([row.eps for row in rows])
        return Estimate(x0, eps, condition["label"].reshape(-1, 1).double().expand_as(x))


X, T = torch.randn(3, 2, dtype=F64, generator=torch.Generator().manual_seed(0)), torch.tensor([0.2, 0.6, 1.0]).double()
ASKED, NOTHING = {"label": torch.tensor([0, 2, 1])}, {"label": torch.full((3,), -1)}


def test_both_ends_and_beyond(mixture):
    """w = 0 is unconditional and w = 1 conditional, to the bit; w = 2 goes as far again."""
    model = Labelled(mixture(table("linear")))
    with_label, without = model(X, T, ASKED), model(X, T, NOTHING)
    at = {w: ClassifierFree(model, ASKED, NOTHING, float(w))(X, T) for w in (0, 1, 2, -1)}
    for field in ("x0", "eps"):
        c, u = getattr(with_label, field), getattr(without, field)
        assert torch.equal(getattr(at[0], field), u)
        assert torch.equal(getattr(at[1], field), c)
        torch.testing.assert_close(getattr(at[2], field), 2 * c - u, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(getattr(at[-1], field), 2 * u - c, rtol=1e-12, atol=1e-12)
    assert torch.equal(at[2].fraction, with_label.fraction)


def test_the_guided_estimate_still_makes_up_x(schedule, mixture):
    guided = ClassifierFree(Labelled(mixture(schedule)), ASKED, NOTHING, 3.0)
    t = torch.tensor([schedule.t_min, 0.5, 0.99], dtype=F64)
    estimate = guided(X, t)
    alpha, sigma = (value[:, None] for value in schedule.marginal(t))
    torch.testing.assert_close(alpha * estimate.x0 + sigma * estimate.eps, X, rtol=1e-9, atol=1e-9)


def test_guidance_of_the_score_is_guidance_of_the_density(mixture):
    """eps_u + w (eps_c - eps_u) is -sigma grad of (1 - w) ln p(x) + w ln p(x | c)."""
    model = Labelled(mixture(table("linear")))
    leaf = X.clone().requires_grad_()
    log = torch.stack([model.parts[k].log_prob(leaf, T)[i] for i, k in enumerate(ASKED["label"].tolist())])
    tilted = 2.5 * log + (1 - 2.5) * model.mixture.log_prob(leaf, T)
    (slope,) = torch.autograd.grad(tilted.sum(), leaf)
    estimate = ClassifierFree(model, ASKED, NOTHING, 2.5)(X, T)
    torch.testing.assert_close(estimate.eps, -model.schedule.sigma(T)[:, None] * slope, rtol=1e-9, atol=1e-9)


def test_each_sample_may_have_its_own_guidance_and_all_take_one_call(mixture):
    model = Labelled(mixture(Flow()))
    scales = torch.tensor([0.0, 1.0, 4.0])
    t = T.clamp(max=0.9)
    together = ClassifierFree(model, ASKED, NOTHING, scales)(X, t)
    assert model.calls == 1
    for i, w in enumerate(scales.tolist()):
        row = {"label": ASKED["label"][i : i + 1]}, {"label": NOTHING["label"][i : i + 1]}
        alone = ClassifierFree(model, *row, w)(X[i : i + 1], t[i : i + 1])
        torch.testing.assert_close(together.x0[i : i + 1], alone.x0, rtol=1e-12, atol=1e-12)


def test_a_bound_condition_is_given_row_for_row(mixture):
    model = Labelled(mixture(Flow()))
    t = T.clamp(max=0.9)
    assert torch.equal(Conditioned(model, ASKED)(X, t).x0, model(X, t, ASKED).x0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: ClassifierFree(m, ASKED, NOTHING, float("nan")), "guidance is nan"),
        (lambda m: ClassifierFree(m, ASKED, NOTHING, torch.tensor([1.0, float("inf"), 1.0])), "finite"),
        (lambda m: ClassifierFree(m, ASKED, {"text": NOTHING["label"]}, 1.0), r"\['label'\], its opposite \['text'\]"),
        (lambda m: ClassifierFree(m, ASKED, {"label": torch.tensor([-1])}, 1.0), r"label is \(3,\)"),
        (lambda m: ClassifierFree(m, ASKED, NOTHING, torch.ones(2))(X, T), "guidance has 2 numbers for 3 samples"),
        (lambda m: ClassifierFree(m, ASKED, NOTHING, 1.0)(X[:2], T[:2]), "6 rows where the batch calls for 4"),
        (lambda m: Conditioned(m, ASKED)(X[:2], T[:2]), "3 rows where the batch calls for 2"),
        (lambda m: Conditioned(m, ASKED)(X, T, ASKED), "bound already"),
        (lambda m: ClassifierFree(m, ASKED, NOTHING, 1.0)(X, T, ASKED), "bound already"),
    ],
)
def test_what_does_not_fit_is_refused(make, message, mixture):
    with pytest.raises(UsageError, match=message):
        make(Labelled(mixture(table("linear"))))
