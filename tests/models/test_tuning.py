"""`tune`: a solver for a model, kept in its card, used by "auto", and made again from a picture's record."""

import json

import pytest
import torch

import reverie as rv
from reverie.base.errors import UsageError
from reverie.models.automatic import choose
from reverie.models.builders import build
from reverie.models.card import Card, CodecSpec, FittedSolver, NetworkSpec, SamplingDefaults, ScheduleSpec
from reverie.models.codec import build_codec
from reverie.models.model import Model
from reverie.models.pictures import write_pictures
from reverie.models.rewrite import store_solvers, with_solvers
from reverie.models.tuning import tune_model


@pytest.fixture(scope="module", autouse=True)
def in_haste():
    """Trajectories and borders in fewer steps: what is fitted is smooth."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reverie.models.tuning.FINE", 32)
        patch.setattr("reverie.models.tuning.QUICK", 2)
        yield


@pytest.fixture(scope="module")
def model(in_haste):
    torch.manual_seed(0)
    card = Card(
        shape=(1, 8, 8),
        network=NetworkSpec(config={"in_channels": 1, "channels": [8, 8]}),
        schedule=ScheduleSpec(name="cosine"),
        prediction="v",
        code="test",
    )
    return Model(build(card), card)


@pytest.fixture(scope="module")
def fitted(model):
    return tune_model(model, [3, 2], samples=4, walks=1, rounds=1)


def test_each_number_of_steps_has_its_solver_judged_on_other_samples(fitted):
    assert [solver.steps for solver in fitted] == [2, 3]
    for solver in fitted:
        assert 0 < solver.error < solver.best_published


@pytest.mark.parametrize("rounds", [0, 2])
def test_one_step_can_be_fitted_and_polishing_left_out(model, rounds):
    (solver,) = tune_model(model, [1], samples=4, walks=1, rounds=rounds)
    assert solver.steps == 1
    assert 0 < solver.error < 1


def test_a_table_of_few_times_is_its_own_exact_solution(model):
    card = model.card.model_copy(update={"schedule": ScheduleSpec(name="cosine", options={"timesteps": 6})})
    short = Model(build(card), card)
    (solver,) = tune_model(short, [2], samples=4, walks=1, rounds=1)
    assert 0 < solver.error <= solver.best_published
    with pytest.raises(UsageError, match=r"steps is 6; .* in 1\.\.5"):
        tune_model(short, [6], samples=4)


def test_auto_takes_the_models_own_and_the_picture_can_be_made_again(model, fitted, tmp_path):
    rv.save(model, tmp_path / "m")
    assert store_solvers(tmp_path / "m", fitted).name == "reverie.json"
    own = rv.load(tmp_path / "m")
    assert own.card.sampling.fitted == tuple(fitted)
    samples = own.sample(2, sampler="auto", steps=3)
    assert samples.record["sampler"] == "fitted"
    assert samples.record["recipe"]["lam"] == list(fitted[1].lam)
    assert "fitted, 3 steps on own: 3 evaluations each" in own.plan(1, sampler="auto", steps=3).sentence()
    (path, _) = write_pictures(samples, tmp_path)
    store_solvers(tmp_path / "m", [FittedSolver(lam=(0.0, 1.0, 2.0), weights=((1.0,),) * 3)])  # another one since then
    assert torch.equal(rv.again(path).images[0], samples.images[0])


def test_without_one_it_takes_what_is_shipped_and_without_that_unipc(model):
    assert model.sample(1, sampler="auto", steps=5).record["recipe"] is not None
    far = model.plan(1, sampler="auto", steps=333)
    assert (far.sampler_name, far.grid_name) == ("unipc", "log-snr")


def test_of_two_the_one_of_the_nearest_guidance(fitted, model):
    strong = fitted[0].model_copy(update={"guidance": 4.0, "lam": (-9.0, 1.0)})
    card = with_solvers(model.card, [*fitted, strong])
    assert [(solver.steps, solver.guidance) for solver in card.sampling.fitted] == [(2, None), (2, 4.0), (3, None)]
    again = with_solvers(card, [strong.model_copy(update={"error": 9.0})])
    assert [solver.error for solver in again.sampling.fitted if solver.guidance] == [9.0]
    for w, lam in ((None, fitted[0].lam), (1.0, fitted[0].lam), (2.4, fitted[0].lam), (3.0, strong.lam)):
        assert choose(card, model.denoiser.schedule, 2, w).sampler.recipe.lam == lam


def test_of_a_model_with_classes_the_guidance_is_the_cards_where_none_is_given(model):
    config = model.card.network.config | {"num_class_embeds": 3}
    sampling = SamplingDefaults(guidance=2.0)
    card = model.card.model_copy(
        update={"classes": ("a", "b"), "network": NetworkSpec(config=config), "sampling": sampling}
    )
    classy = Model(build(card), card)
    found = [tune_model(classy, [2], samples=2, walks=1, rounds=1, guidance=w)[0].guidance for w in (None, 0.0)]
    assert found == [2.0, 0.0]
    with pytest.raises(UsageError, match="no classes to guide to"):
        tune_model(model, [2], guidance=2.0)


def test_a_run_keeps_it_in_its_card(tmp_path, fitted, model):
    (tmp_path / "card.json").write_text(model.card.model_dump_json())
    store_solvers(tmp_path, fitted)
    assert len(json.loads((tmp_path / "card.json").read_text())["sampling"]["fitted"]) == 2


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"sampler": "auto", "grid": "karras", "steps": 4}, "auto brings a grid of its own"),
        ({"sampler": "auto", "eta": 1.0, "steps": 4}, "eta has no effect"),
    ],
)
def test_what_would_have_no_effect_beside_auto_is_refused(model, request_, said):
    with pytest.raises(UsageError, match=said):
        model.plan(1, **request_)


def test_what_cannot_be_fitted_or_kept_is_refused(model, fitted, tmp_path):
    with pytest.raises(UsageError, match="steps is 128"):
        tune_model(model, [128])
    with pytest.raises(UsageError, match="no card of reverie's"):
        store_solvers(tmp_path, fitted)
    assert not list(tmp_path.iterdir())


def test_from_python(model):
    own = rv.tune(model, 2, samples=4, walks=2, rounds=1)
    assert [solver.steps for solver in own.card.sampling.fitted] == [2]
    assert model.card.sampling.fitted == ()
    assert (own.denoiser, own.digest, own.source) == (model.denoiser, model.digest, model.source)


def test_a_tuned_model_of_latents_still_has_its_codec(make):
    codec = build_codec(CodecSpec(config={"channels": [8, 8], "latent_channels": 4}))
    model = make({"in_channels": 4}, shape=(4, 8, 8), schedule=ScheduleSpec(name="cosine"))
    model.codec = codec
    own = rv.tune(model, 2, samples=4, walks=2, rounds=0)
    assert own.codec is codec
    assert own.sample(1, steps=2).images.shape == (1, 3, 16, 16)
