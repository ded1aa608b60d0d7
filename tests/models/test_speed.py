"""Speed fast: what it gives, what it records, what it refuses."""

import copy

import pytest
import torch

from reverie import api
from reverie.base.errors import UsageError
from reverie.models import speed
from reverie.models.formats import write_model
from reverie.models.load import load
from reverie.models.pictures import write_pictures
from reverie.models.provenance import again, read_provenance
from reverie.models.speed import Speed, fast_dtype, hasten
from reverie.networks.packed import Packed


@pytest.fixture
def path(classy, tmp_path):
    """Return where a model is."""
    return write_model(classy, tmp_path / "model", "native")


def test_fast_is_near_exact_and_keeps_the_digest(path):
    exact, fast = load(path), load(path, speed="fast")
    assert fast.speed.packed
    assert fast.speed.dtype == fast_dtype(torch.device("cpu"))
    assert (fast.digest, fast.parameters) == (exact.digest, exact.parameters)
    how = {"classes": 1, "guidance": 2.0, "steps": 4, "seed": 3}
    one, two = exact.sample(2, **how).images, fast.sample(2, **how).images
    assert 0 < (one - two).abs().max() < 0.2
    near = load(path, speed="fast", dtype="float32").sample(2, **how).images
    assert (one - near).abs().max() < 1e-4


def test_a_machine_without_bfloat16_computes_in_float32(path, monkeypatch):
    monkeypatch.setattr(speed, "native_bfloat16", lambda: False)
    model = load(path, speed="fast")
    assert model.speed.dtype is None
    assert model.sample(1, steps=1).record["dtype"] == "float32"


def test_both_branches_are_one_call_and_nothing_is_padded(path):
    model, rows = load(path, speed="fast"), []
    model.denoiser.network.register_forward_hook(lambda net, given, out: rows.append(len(given[0])))
    model.sample(3, classes=0, guidance=3.0, steps=2)
    assert rows == [6, 6]
    rows.clear()
    model.sample(3, classes=0, guidance=3.0, steps=4, guidance_interval=(0.3, 0.6))
    assert rows == [3, 3, 6, 3]


def test_the_record_says_so_and_again_makes_it_so(path, tmp_path):
    how = {"classes": 2, "guidance": 2.0, "steps": 3, "cache_every": 2}
    made = load(path, speed="fast", weights="int8").sample(1, **how)
    assert (made.record["speed"], made.record["weights"], made.record["cache_every"]) == ("fast", "int8", 2)
    assert made.record["exact"] is False
    file = write_pictures(made, tmp_path / "out")[0]
    assert read_provenance(file)["settings"]["speed"] == "fast"
    with pytest.warns(RuntimeWarning, match="made fast"):
        assert torch.equal(again(file).images, made.images)


def test_again_does_not_change_a_model_that_it_is_given(path, tmp_path):
    made = load(path, speed="fast").sample(1, steps=2)
    file = write_pictures(made, tmp_path / "out")[0]
    exact = load(path)
    with pytest.warns(RuntimeWarning), pytest.raises(UsageError, match="was made with speed fast"):
        again(file, exact)
    assert exact.speed.name == "exact"
    with pytest.warns(RuntimeWarning):
        assert torch.equal(again(file, load(path, speed="fast")).images, made.images)


def test_an_exact_record_is_not_made_by_a_fast_model(path, tmp_path):
    file = write_pictures(load(path).sample(1, steps=2), tmp_path / "out")[0]
    with pytest.raises(UsageError, match="was made with speed exact"):
        again(file, load(path, speed="fast"))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"speed": "quick"}, "must be one of exact, fast"),
        ({"weights": "int8"}, "ask for speed fast"),
        ({"speed": "fast", "weights": "int4"}, "must be int8"),
    ],
)
def test_what_is_unknown_or_without_effect_is_refused(path, how, said):
    with pytest.raises(UsageError, match=said):
        load(path, **how)


def test_what_a_fast_model_can_not_do(path, tmp_path):
    model = load(path, speed="fast")
    with pytest.raises(UsageError, match="can't be saved"):
        write_model(model, tmp_path / "other", "native")
    with pytest.raises(UsageError, match="can't be moved"):
        model.to("meta")
    with pytest.raises(UsageError, match="fast already"):
        hasten(model)
    with pytest.raises(UsageError, match="exact is asked for"):
        model.sample(1, exact=True)
    with pytest.raises(UsageError, match="load it with that dtype"):
        model.sample(1, dtype="float16")


SKIPS = {
    "in_channels": 3,
    "channels": [32, 32],
    "attention": [],
    "down_block_types": ["SkipDownBlock2D"] * 2,
    "up_block_types": ["SkipUpBlock2D"] * 2,
}


def test_a_network_that_is_not_known_computes_under_autocast(make):
    model = make(SKIPS, shape=(3, 8, 8))
    assert not hasten(model, torch.bfloat16, chosen=True).packed
    assert not any(isinstance(module, Packed) for module in model.denoiser.network.modules())
    assert model.sample(1, steps=1).record["dtype"] == "bfloat16"
    with pytest.raises(UsageError, match="no effect on a unet"):
        hasten(make(SKIPS, shape=(3, 8, 8)), None, "int8")
    with pytest.raises(UsageError, match="no lower levels"):
        model.sample(1, steps=2, cache_every=2)


def test_the_api_takes_it(path):
    assert api.sample(path, 1, steps=1, speed="fast").record["speed"] == "fast"


def test_autoguidance_asks_both_models_alike(path):
    fast, exact = load(path, speed="fast"), load(path)
    how = {"classes": 1, "auto_guidance": 2.0, "steps": 2}
    images = fast.sample(1, bad=path, **how).images
    assert torch.equal(fast.sample(1, bad=load(path, speed="fast"), **how).images, images)
    with pytest.raises(UsageError, match="load both alike"):
        fast.sample(1, bad=exact, **how)


# The lower levels used again ------------------------------------------------------------------------


def test_lower_levels_are_asked_at_every_other_call(path):
    model, calls = load(path, speed="fast"), []
    model.denoiser.network.mid_block.register_forward_hook(lambda *_: calls.append(1))
    whole = model.sample(2, steps=6, sampler="ddim").images
    assert len(calls) == 6
    calls.clear()
    less = model.sample(2, steps=6, sampler="ddim", cache_every=2).images
    assert len(calls) == 3
    assert 0 < (less - whole).abs().mean() < 0.2
    assert torch.equal(model.sample(2, steps=6, sampler="ddim", cache_every=1).images, whole)


def test_the_error_grows_with_the_interval(path):
    model = load(path, speed="fast", dtype="float32")
    whole = model.sample(4, steps=24, sampler="ddim").images
    errors = [(model.sample(4, steps=24, sampler="ddim", cache_every=n).images - whole).norm() for n in (2, 4, 12)]
    assert errors == sorted(errors)


def test_guidance_in_an_interval_asks_all_where_the_rows_change(path):
    model, rows = load(path, speed="fast"), []
    model.denoiser.network.mid_block.register_forward_hook(lambda net, given, out: rows.append(len(given[0])))
    model.sample(1, classes=0, guidance=3.0, steps=8, sampler="ddim", guidance_interval=(0.3, 0.7), cache_every=8)
    assert rows == [1, 2, 1]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"cache_every": 0}, "whole number in 2"),
        ({"cache_every": 2, "perturbed": 1.0}, "does not go with perturbed"),
    ],
)
def test_reuse_is_refused_where_it_has_no_meaning(path, how, said):
    with pytest.raises(UsageError, match=said):
        load(path, speed="fast").sample(1, steps=2, **how)


def test_reuse_is_refused_of_an_exact_model(path):
    with pytest.raises(UsageError, match="ask for speed fast"):
        load(path).sample(1, steps=2, cache_every=2)


def test_words_say_what_was_done(path):
    assert "laid out once" in load(path, speed="fast").speed.words()
    assert "% off" in load(path, speed="fast", weights="int8").speed.words()
    assert Speed("fast", torch.bfloat16).words() == "fast: bfloat16 under autocast, batches of any size"
    assert copy.copy(Speed()) == Speed()
