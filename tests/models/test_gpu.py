"""A model on a GPU: near what it is on the CPU, a picture's bits its own, and fast near exact."""

import pytest
import torch

from reverie.models.formats import write_model
from reverie.models.load import load

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
HOW = {"classes": 1, "guidance": 2.0, "steps": 5, "seed": 3}


@pytest.fixture
def path(make, tmp_path):
    """Return where a model of three classes is, its channels enough for every kernel."""
    model = make({"channels": [32, 64], "num_class_embeds": 4}, classes=("zero", "one", "two"))
    return write_model(model, tmp_path / "model", "native")


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp-2m", "euler-ancestral", "unipc", "heun", "edm", "auto"])
def test_exact_is_near_the_cpu(path, sampler):
    here, there = load(path, device="cpu"), load(path, device="cuda")
    how = HOW | {"sampler": sampler}
    assert (here.sample(2, **how).images - there.sample(2, **how).images).abs().max() < 2e-3


def test_a_picture_has_the_same_bits_in_any_batch_and_again(path):
    model = load(path, device="cuda")
    many, one = model.sample(5, **HOW).images, model.sample(1, **(HOW | {"seed": 5})).images
    assert torch.equal(many[2:3], one)
    assert torch.equal(model.sample(5, **HOW).images, many)


@pytest.mark.parametrize("weights", [None, "int8"])
def test_fast_is_near_exact_and_the_same_again(path, weights):
    exact, fast = load(path, device="cuda"), load(path, device="cuda", speed="fast", weights=weights)
    assert fast.speed.packed
    assert fast.speed.graphs is not None
    made = fast.sample(2, **HOW).images
    assert 0 < (exact.sample(2, **HOW).images - made).abs().max() < 0.3
    assert torch.equal(fast.sample(2, **HOW).images, made)
    assert len(fast.speed.graphs.recorded) == 1


def test_fast_in_float32_is_nearer(path):
    exact, fast = load(path, device="cuda"), load(path, device="cuda", speed="fast", dtype="float32")
    assert (exact.sample(2, **HOW).images - fast.sample(2, **HOW).images).abs().max() < 0.03  # its products are TF32


def test_what_changes_the_inside_is_asked_itself(path):
    fast = load(path, device="cuda", speed="fast")
    graphs, plain = fast.speed.graphs, fast.sample(1, **HOW).images
    told = {"classes": 1, "steps": 5, "seed": 3}
    kept = len(graphs.recorded)
    assert not torch.equal(fast.sample(1, **HOW, cache_every=2).images, plain)
    assert fast.sample(1, **told, perturbed=2.0).images.isfinite().all()
    assert len(graphs.recorded) == kept
    rows = []
    handle = fast.denoiser.network.register_forward_hook(lambda net, given, out: rows.append(len(given[0])))
    fast.sample(1, **HOW)
    handle.remove()
    assert rows == [2] * 5
