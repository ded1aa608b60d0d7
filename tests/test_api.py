"""reverie from Python: `import reverie as rv`, and what it takes."""

import os
import subprocess
import sys

import pytest
import torch

import reverie as rv
from reverie.models.builders import build
from reverie.models.card import Card, NetworkSpec, ScheduleSpec


@pytest.fixture
def model() -> rv.Model:
    """Return a small model of two classes."""
    torch.manual_seed(0)
    config = {"in_channels": 1, "channels": [8, 8], "layers": 1, "num_class_embeds": 3}
    table = ScheduleSpec(options={"timesteps": 20})
    card = Card(shape=(1, 8, 8), network=NetworkSpec(config=config), schedule=table, classes=("a", "b"))
    return rv.Model(build(card), card)


def python(code: str) -> str:
    """Return what a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    return done.stdout.strip()


# The import -----------------------------------------------------------------------------------------


def test_the_import_costs_nothing_and_brings_nothing():
    """Under 50 ms, of the best of three, and neither torch nor anything else that is heavy."""
    code = (
        "import sys, time; began = time.perf_counter(); import reverie as rv; took = time.perf_counter() - began; "
        "heavy = {'torch', 'numpy', 'pydantic', 'PIL', 'diffusers', 'click'} & set(sys.modules); "
        "print(took, sorted(heavy), rv.__version__)"
    )
    said = [python(code).split(maxsplit=1) for _ in range(3)]
    assert min(float(took) for took, _ in said) < 0.05
    assert {rest for _, rest in said} == {f"[] {rv.__version__}"}


def test_registries_of_the_mathematics_are_listed_without_torch():
    code = "import sys, reverie as rv; print(*rv.samplers, *rv.networks, *rv.sources, 'torch' in sys.modules)"
    words = python(code).split()
    assert {"ddpm", "ddim", "unet", "mlp", "digits", "folder"} <= set(words)
    assert words[-1] == "False"


def test_every_name_is_there():
    for name in rv.__all__:
        assert getattr(rv, name) is not None, name
    assert set(rv.__all__) <= set(dir(rv))
    assert not hasattr(rv, "nothing")
    with pytest.raises(AttributeError, match="no attribute 'smaple'"):
        _ = rv.smaple


def test_networks_is_the_registry_and_the_room():
    """The package of that name is imported by others; it answers by name all the same."""
    import reverie.networks.unet

    assert rv.networks["unet"] is reverie.networks.unet.UNet is rv.UNet
    assert "unet" in rv.networks
    assert {"unet", "mlp", "numbered"} <= set(rv.networks)
    with pytest.raises(rv.UsageError, match="no network 'unett', did you mean unet"):
        _ = rv.networks["unett"]


def test_the_registries():
    assert rv.samplers["ddim"] is rv.DDIM
    assert {"linear", "cosine", "flow"} <= set(rv.schedules)
    assert {"leading", "trailing", "linspace"} <= set(rv.grids)
    assert {"eps", "x0", "v"} <= set(rv.predictions)


# Load, sample, save, again --------------------------------------------------------------------------


def test_a_model_or_its_path_is_sampled(model, tmp_path):
    rv.save(model, tmp_path / "m")
    settings = {"classes": "b", "guidance": 2.0, "steps": 3, "seed": 4}
    want = rv.sample(model, 2, **settings)
    got = rv.sample(tmp_path / "m", 2, device="cpu", **settings)
    assert torch.equal(got.images, want.images)
    assert [picture.size for picture in got.pil()] == [(8, 8), (8, 8)]
    assert torch.equal(rv.load(tmp_path / "m").sample(2, **settings).images, want.images)
    path = rv.write_pictures(got, tmp_path / "out")[1]
    assert torch.equal(rv.again(path).images[0], want.images[1])
    assert rv.describe(tmp_path / "m")["classes"] == ["a", "b"]
    assert rv.read_provenance(path)["program"] == "reverie"


def test_what_is_wrong_is_refused(model, tmp_path):
    with pytest.raises(rv.UsageError, match="temperature has no effect here"):
        rv.sample(model, 1, temperature=2)
    with pytest.raises(rv.UsageError, match="there is no"):
        rv.sample(tmp_path / "none")
    with pytest.raises(rv.UsageError, match="holds a model already"):
        rv.save(model, rv.save(model, tmp_path / "m"))


def test_training_refuses_what_it_does_not_know(tmp_path):
    """By name, all at once, with nothing made."""
    with pytest.raises(rv.UsageError, match="train has no option 'learing_rate', did you mean learning_rate"):
        rv.train(data="digits", out=str(tmp_path / "run"), learing_rate=1e-3)
    with pytest.raises(rv.UsageError, match=r"steps: .*; batch_size: .*"):
        rv.train(data="digits", out=str(tmp_path / "run"), steps=0, batch_size=0)
    with pytest.raises(rv.UsageError, match="resume is 'maybe'"):
        rv.train(resume="maybe", data="digits", out=str(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_trained_loaded_and_sampled(tmp_path):
    """From data to pictures, and the folder that it leaves is a model as well."""
    pytest.importorskip("sklearn")
    quiet = {"sample_every": 0, "validate_every": 0, "preset": "tiny", "limit": 64, "batch_size": 8, "save_every": 2}
    run = rv.train(data="digits", out=tmp_path / "run", steps=4, **quiet)
    model = rv.load(run)
    assert model.card.training.steps == 4
    assert model.digest == rv.load(run / "model").digest
    samples = rv.sample(model, 2, classes=7, steps=2, guidance=1.5)
    path = rv.write_pictures(samples, tmp_path / "out")[0]
    assert torch.equal(rv.again(path).images[0], samples.images[0])
    assert rv.describe(run)["checkpoints"]["step-00000004"] == "verified"


# The loop of every textbook -------------------------------------------------------------------------


def test_the_textbook_loop():
    """Draw t, add noise, predict, mse, backward; then step from T to 0: with `rv.` alone."""
    torch.manual_seed(0)
    schedule = rv.schedules["linear"](timesteps=50, last=0.3)
    network = rv.MLP(rv.MLPConfig(in_channels=2))
    denoiser = rv.NetworkDenoiser(network, schedule, "eps")
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    losses = []
    for step in range(100):
        x0 = torch.tensor([0.8, -0.4]) + 0.1 * rv.normal((64, 2), "data", step)
        t = schedule.time_of_timestep(torch.randint(50, (64,)))
        eps = torch.randn_like(x0)
        loss = (denoiser.output(rv.diffuse(schedule, x0, t, eps), t) - eps).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])

    sampler, noise = rv.DDPM(), rv.Noise(range(64))
    grid = rv.grids["trailing"](schedule, 50)
    state = rv.start(sampler, schedule, (2,), 1.0, noise)
    with torch.no_grad():
        for s in grid[1:]:
            state = sampler.step(denoiser, state, float(s), noise)
    assert (state.x.mean(0) - torch.tensor([0.8, -0.4])).abs().max() < 0.4
