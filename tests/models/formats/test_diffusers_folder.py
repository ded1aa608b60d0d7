"""diffusers' folders: theirs open here, ours open there, and both draw the same from the same noise."""

import filecmp
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.schedulers import scheduling_ddpm
from safetensors.torch import load_file, save_file

from reverie.base import storage
from reverie.base.errors import ModelFileError, StorageError, UsageError
from reverie.base.randomness import Noise
from reverie.models.card import DataRecord, SamplingDefaults, ScheduleSpec, TrainingRecord
from reverie.models.fold import fold_class
from reverie.models.formats import read_model, recognise, write_model

WEIGHTS = "diffusion_pytorch_model.safetensors"
PLACES = ("pipelines.ddpm.pipeline_ddpm", "pipelines.ddim.pipeline_ddim", "schedulers.scheduling_ddpm",
          "schedulers.scheduling_ddim")  # fmt: skip


@pytest.fixture
def our_noise(monkeypatch):
    """Return a function after which diffusers draws the noise of our seeds, draw by draw."""

    def feed(seeds: list[int]) -> None:
        draws = iter(range(10_000))
        noise = Noise(seeds)

        def randn_tensor(shape, **ignored):
            return noise(tuple(shape)[1:], [next(draws)] * len(seeds))

        for place in PLACES:
            monkeypatch.setattr(f"diffusers.{place}.randn_tensor", randn_tensor)

    return feed


def drawn(pipeline, count: int, **options) -> torch.Tensor:
    """Return what a pipeline draws, in [-1, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=count, output_type="np", **options).images
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2) * 2 - 1


def files(folder: Path) -> list[str]:
    """Return the files of a folder, relative to it."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


# Ours, there ----------------------------------------------------------------------------------------

T = 16


def table(name: str = "linear", **options) -> ScheduleSpec:
    """Return a short table, which ends in noise as a long one does."""
    return ScheduleSpec(name=name, options={"timesteps": T, **options})


CARDS = {
    "linear": {"schedule": table(last=0.6)},
    "cosine": {"schedule": table("cosine")},
    "scaled-linear": {"schedule": table("scaled-linear", last=0.5)},
    "sigmoid": {"schedule": table("sigmoid")},
    "sigmoid-in-beta": {"schedule": table("sigmoid-in-beta", last=0.5)},
    "table": {"schedule": ScheduleSpec(name="table", betas=tuple(0.02 + 0.02 * i for i in range(T)))},
    "zero-snr-v": {"schedule": table(zero_snr=True), "prediction": "v"},
    "x0": {"schedule": table(last=0.6), "prediction": "x0"},
    "learned": {"schedule": table(last=0.6), "network": {"out_channels": 2}, "learned_variance": True},
    "large": {"schedule": table(last=0.6), "sampling": SamplingDefaults(sampler="ddpm", options={"variance": "large"})},
    "clip": {"schedule": table(last=0.6), "sampling": SamplingDefaults(clip=0.7)},
    "threshold": {"schedule": table(last=0.6), "sampling": SamplingDefaults(threshold=0.8)},
    "tall": {"schedule": table(last=0.6), "shape": (1, 8, 4)},
}


@pytest.mark.parametrize("name", CARDS)
def test_their_ddpm_pipeline_draws_what_we_draw(make, tmp_path, our_noise, name):
    """The whole chain, from the same weights and noise: to 1e-4."""
    model = make(**CARDS[name])
    write_model(model, tmp_path / "m")
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "m")
    our_noise([3, 4])
    want = drawn(pipeline, 2, num_inference_steps=T)
    got = model.sample(2, seed=3, sampler="ddpm", steps=T).images
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["linear", "zero-snr-v", "x0", "clip", "threshold"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_their_ddim_pipeline_draws_what_we_draw(make, tmp_path, our_noise, name, eta):
    """Eight steps of a table of 16, trailing. Theirs keeps eps beside a clipped x_0 unless told not to."""
    model = make(**CARDS[name])
    write_model(model, tmp_path / "m")
    pipeline = DDIMPipeline.from_pretrained(tmp_path / "m")
    our_noise([5])
    want = drawn(pipeline, 1, num_inference_steps=8, eta=eta, use_clipped_model_output=True)
    got = model.sample(1, seed=5, sampler="ddim", steps=8, eta=eta).images
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_their_pictures_are_our_pictures(make, tmp_path, our_noise):
    """As bytes, equal but for rounding where a number lies between two."""
    model = make({"in_channels": 3}, shape=(3, 8, 8))
    write_model(model, tmp_path / "m")
    our_noise([0, 1])
    pipeline = DDIMPipeline.from_pretrained(tmp_path / "m")
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(batch_size=2, num_inference_steps=8, use_clipped_model_output=True).images
    ours = model.sample(2, steps=8).pil()
    apart = np.array([np.abs(np.asarray(a, int) - np.asarray(b, int)) for a, b in zip(theirs, ours, strict=True)])
    assert apart.max() <= 1
    assert (apart > 0).mean() < 0.01


def test_a_class_folded_in_is_drawn_by_their_pipeline(classy, tmp_path, our_noise):
    write_model(fold_class(classy, "two"), tmp_path / "m")
    pipeline = DDIMPipeline.from_pretrained(tmp_path / "m")
    our_noise([1, 2])
    want = drawn(pipeline, 2, num_inference_steps=8, use_clipped_model_output=True)
    got = classy.sample(2, seed=1, classes="two", guidance=1.0, steps=8).images
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


PAGES = {
    "plain": {},
    "classes": {"network": {"num_class_embeds": 4}, "classes": ("zero", "one", "two")},
    "learned": {"network": {"out_channels": 2}, "learned_variance": True},
    "both": {"network": {"out_channels": 2, "num_class_embeds": 2}, "learned_variance": True, "classes": ("zero",)},
}


@pytest.mark.parametrize("name", PAGES)
def test_the_code_on_a_models_page_draws_what_we_draw(make, tmp_path, our_noise, monkeypatch, name):
    """The README's own code, run as it stands: ours, and diffusers'."""
    model = make(schedule=table(last=0.6), **PAGES[name])
    write_model(model, tmp_path / "m")
    ours, theirs = ((tmp_path / "m" / "README.md").read_text().split("```python")[i].split("```")[0] for i in (1, 2))
    space: dict = {}
    monkeypatch.chdir(tmp_path)
    exec(ours.replace("PATH", str(tmp_path / "m")), space)
    assert len(space["samples"]) == 4
    assert (tmp_path / "sample.png").is_file()

    count = 1 if model.card.classes else 4
    our_noise(list(range(count)))
    start = Noise([0])((1, 8, 8), [0])
    monkeypatch.setattr(torch, "randn", lambda *shape: draw_first(start))
    exec(theirs.replace("PATH", str(tmp_path / "m")), space)
    settings = {"classes": "zero", "guidance": 1.0} if model.card.classes else {}
    sampler = "ddpm" if model.card.learned_variance else "ddim"
    got = model.sample(count, sampler=sampler, steps=T, **settings)
    if model.card.classes:
        torch.testing.assert_close(got.images, space["x"].clamp(-1, 1), atol=1e-4, rtol=0)
    else:
        apart = [
            np.abs(np.asarray(a, int) - np.asarray(b, int)) for a, b in zip(space["pictures"], got.pil(), strict=True)
        ]
        assert np.array(apart).max() <= 1


def draw_first(start: torch.Tensor) -> torch.Tensor:
    """Return the noise that a loop starts from, as diffusers' own noise begins with it too."""
    scheduling_ddpm.randn_tensor(start.shape)
    return start


# Theirs, here ---------------------------------------------------------------------------------------


def their_unet(**options) -> UNet2DModel:
    """Return a U-Net of theirs with random weights."""
    torch.manual_seed(0)
    settings = {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4, "attention_head_dim": 8,
    }  # fmt: skip
    return UNet2DModel(**settings | options)


THEIRS = {
    "leading": DDPMScheduler(num_train_timesteps=T),
    "linspace": DDPMScheduler(num_train_timesteps=T, timestep_spacing="linspace", beta_schedule="scaled_linear"),
    "v": DDPMScheduler(num_train_timesteps=T, prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2"),
    "unclipped": DDPMScheduler(num_train_timesteps=T, clip_sample=False, prediction_type="sample"),
    "trained": DDPMScheduler(trained_betas=[0.02 + 0.02 * i for i in range(T)], num_train_timesteps=T),
}


@pytest.mark.parametrize("name", THEIRS)
def test_their_folder_draws_here_what_it_draws_there(tmp_path, our_noise, name):
    pipeline = DDPMPipeline(their_unet(), THEIRS[name])
    pipeline.save_pretrained(tmp_path / "m")
    our_noise([0, 1])
    want = drawn(pipeline, 2, num_inference_steps=T)
    model = read_model(tmp_path / "m")
    assert model.card.sampling.sampler == "ddpm"
    assert model.plan(1).steps == T
    torch.testing.assert_close(model.sample(2).images, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_fewer_steps_are_the_same_there_and_here(tmp_path, our_noise, spacing):
    pipeline = DDIMPipeline(their_unet(), DDIMScheduler(num_train_timesteps=T, timestep_spacing=spacing))
    pipeline.save_pretrained(tmp_path / "m")
    our_noise([0])
    want = drawn(pipeline, 1, num_inference_steps=8, eta=1.0, use_clipped_model_output=True)
    model = read_model(tmp_path / "m")
    assert (model.card.sampling.sampler, model.card.sampling.grid) == ("ddim", spacing)
    torch.testing.assert_close(model.sample(1, steps=8, eta=1.0).images, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "how", ["variant", "shards", "shards-of-a-variant", "bin", "bare", "bare-beside-scheduler", "old-names"]
)
def test_every_way_of_keeping_the_weights(tmp_path, how):
    """fp16 files, shards, PyTorch's own, a network without its pipeline, names of an older version."""
    pipeline = DDPMPipeline(their_unet(), DDPMScheduler(num_train_timesteps=T))
    folder = tmp_path / "m"
    if how == "variant":
        pipeline.unet.half().float()  # what is kept in 16 bits comes back as those
        pipeline.save_pretrained(folder, variant="fp16")
    elif how.startswith("shards"):
        pipeline.save_pretrained(folder, max_shard_size="20KB", variant="fp16" if "variant" in how else None)
        assert len(list((folder / "unet").glob("*-of-*"))) > 2
    elif how == "bin":
        pipeline.save_pretrained(folder, safe_serialization=False)
    elif how.startswith("bare"):
        pipeline.unet.save_pretrained(folder)
        if how == "bare-beside-scheduler":
            pipeline.scheduler.save_pretrained(folder)
    else:
        pipeline.save_pretrained(folder)
        path = folder / "unet" / WEIGHTS
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        state = load_file(path)
        for new, name in old.items():
            state = {key.replace(f".{new}.", f".{name}."): value for key, value in state.items()}
        assert any(".query." in key for key in state)
        save_file(state, path)
    model = read_model(folder)
    theirs, ours = pipeline.unet.state_dict(), model.denoiser.network.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    assert bool(model.warnings) == (how == "bare")
    assert model.denoiser.schedule.timesteps == (1000 if how == "bare" else T)


def test_their_classes_are_numbered(tmp_path):
    """A label for no class is not supposed; a scheduler that ends early is said to."""
    unet = their_unet(num_class_embeds=3)
    DDIMPipeline(unet, DDIMScheduler(num_train_timesteps=T, set_alpha_to_one=False)).save_pretrained(tmp_path / "m")
    model = read_model(tmp_path / "m")
    assert model.card.classes == ("0", "1", "2")
    assert not model.card.unconditional
    assert any("without names" in line for line in model.warnings)
    assert any("set_alpha_to_one" in line for line in model.warnings)
    model.sample(1, classes="2", steps=1)


def test_a_cache_of_the_hub_is_read_through_its_links(tmp_path):
    """There a snapshot's files are links to blobs beside it."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    DDPMPipeline(their_unet(), DDPMScheduler()).save_pretrained(snapshot)
    blobs.mkdir()
    weights = snapshot / "unet" / WEIGHTS
    shutil.move(weights, blobs / "feed")
    weights.symlink_to("../../../blobs/feed")
    assert read_model(snapshot).parameters > 0


# There and back -------------------------------------------------------------------------------------


def test_a_round_trip_is_equal_to_the_byte(make, tmp_path):
    model = make(
        {"num_class_embeds": 3}, classes=("a|b", "ü"), data=DataRecord(name="digits", fingerprint="12", count=7),
        training=TrainingRecord(steps=5), sampling=SamplingDefaults(guidance=2.0, clip=True),
    )  # fmt: skip
    write_model(model, tmp_path / "a")
    back = read_model(tmp_path / "a")
    assert (back.card, back.digest) == (model.card, model.digest)
    write_model(back, tmp_path / "b")
    write_model(read_model(tmp_path / "b"), tmp_path / "native", kind="native")
    write_model(read_model(tmp_path / "native"), tmp_path / "one.safetensors")
    write_model(read_model(tmp_path / "one.safetensors"), tmp_path / "c", kind="diffusers")
    for other in ("b", "c"):
        assert files(tmp_path / other) == files(tmp_path / "a")
        same, differing, odd = filecmp.cmpfiles(tmp_path / "a", tmp_path / other, files(tmp_path / "a"), shallow=False)
        assert (differing, odd) == ([], [])
        assert len(same) == 6


def test_their_weights_come_back_equal_to_the_byte(tmp_path):
    pipeline = DDPMPipeline(their_unet(), DDPMScheduler(num_train_timesteps=T, beta_end=0.3))
    pipeline.save_pretrained(tmp_path / "theirs")
    write_model(read_model(tmp_path / "theirs"), tmp_path / "ours")
    a, b = tmp_path / "theirs" / "unet", tmp_path / "ours" / "unet"
    assert (a / WEIGHTS).read_bytes() == (b / WEIGHTS).read_bytes()
    again = DDPMPipeline.from_pretrained(tmp_path / "ours")
    kept = {name: value for name, value in pipeline.unet.config.items() if not name.startswith("_")}
    ours = {name: again.unet.config[name] for name in kept}
    assert {name for name in kept if _plain(kept[name]) != _plain(ours[name])} == set()
    assert torch.equal(again.scheduler.betas, pipeline.scheduler.betas)


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


# Refusals -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(make, tmp_path) -> Path:
    """Return the folder of a model."""
    return write_model(make(), tmp_path / "m")


def edit(path: Path, **values) -> None:
    """Change settings of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "AutoencoderKL"]},
         r"vae/config\.json cannot be read"),
        ("model_index.json", {"_class_name": "os.system"}, r"a os\.system"),
        ("model_index.json", {"unet": ["pipeline", "Evil"]}, "comes from 'pipeline', code that reverie does not run"),
        ("unet/config.json", {"_class_name": "UNet3DModel"}, "UNet3DModel"),
        ("unet/config.json", {"auto_map": {"AutoModel": "evil.Evil"}}, "auto_map"),
        ("unet/config.json", {"_class_name": ["os", "system"]}, "system"),
        ("unet/config.json", {"block_out_channels": [10**9, 10**9]}, "16384"),
        ("unet/config.json", {"layers_per_block": 10**6}, "layers_per_block"),
        ("unet/config.json", {"block_out_channels": [8, 24]}, "tensors do not fit"),
        ("unet/config.json", {"sample_size": None}, "sample_size"),
        ("unet/config.json", {"out_channels": 2}, "1 channels to 2"),
        ("unet/config.json", {"class_embed_type": "identity"}, "identity"),
        ("scheduler/scheduler_config.json", {"_class_name": "subprocess.run"}, r"a subprocess\.run; the ones"),
        ("scheduler/scheduler_config.json", {"beta_end": 7}, "beta"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, "100000"),
        ("scheduler/scheduler_config.json", {"beta_shedule": "linear"}, "'beta_shedule', did you mean beta_schedule"),
    ],
)  # fmt: skip
def test_a_strangers_configuration_is_refused(folder, file, values, words):
    """Exit code 4, one line, nothing imported, no memory taken."""
    (folder / "reverie.json").unlink()
    edit(folder / file, **values)
    with pytest.raises(ModelFileError, match=words) as caught:
        read_model(folder)
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)


def test_a_card_and_a_network_that_disagree(folder):
    edit(folder / "unet" / "config.json", act_fn="gelu")
    with pytest.raises(ModelFileError, match=r"describes another network than reverie.json does .act_fn differ"):
        read_model(folder)


def test_code_beside_the_weights_is_never_run(folder, tmp_path):
    canary = tmp_path / "canary"
    code = f"from pathlib import Path\nPath({str(canary)!r}).touch()\n"
    for name in ("pipeline.py", "unet/modeling.py", "scheduler/scheduler.py", "setup.py", "conftest.py"):
        (folder / name).write_text(code)
    assert read_model(folder).parameters > 0
    assert not canary.exists()


def test_a_flipped_bit_is_found(folder):
    path = folder / "unet" / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelFileError, match=r"its checksum differs .*delete reverie.json"):
        read_model(folder)
    (folder / "reverie.json").unlink()
    read_model(folder)


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/etc/passwd", "a/b.safetensors", "..", "c:\\x", "\x00", "a" * 300]
)
def test_names_that_leave_the_folder(folder, name, tmp_path):
    """An index of shards and reverie.json name files; nothing outside is opened."""
    unet = folder / "unet"
    (unet / "evil.safetensors").write_bytes((unet / WEIGHTS).read_bytes())
    shutil.copy(unet / WEIGHTS, tmp_path / "evil.safetensors")
    sealed = json.loads((folder / "reverie.json").read_text())
    digest = next(iter(sealed["files"].values()))
    (folder / "reverie.json").write_text(json.dumps(sealed | {"files": {f"unet/{name}": digest}}))
    with pytest.raises(ModelFileError):
        read_model(folder)
    (folder / "reverie.json").unlink()
    (unet / WEIGHTS).unlink()
    (unet / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"conv_in.weight": name}}))
    with pytest.raises(ModelFileError, match="leaves its folder"):
        read_model(folder)


def test_a_link_out_of_the_folder(folder, tmp_path):
    weights = folder / "unet" / WEIGHTS
    shutil.move(weights, tmp_path / "elsewhere.safetensors")
    weights.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(ModelFileError, match=r"a link to .* outside its folder"):
        read_model(folder)


@pytest.mark.parametrize("left", ["nothing", "two"])
def test_weights_that_are_not_there_or_there_twice(folder, left):
    (folder / "reverie.json").unlink()
    weights = folder / "unet" / WEIGHTS
    if left == "nothing":
        weights.unlink()
    else:
        weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
        shutil.copy(weights.with_name("diffusion_pytorch_model.fp16.safetensors"),
                    weights.with_name("diffusion_pytorch_model.bf16.safetensors"))  # fmt: skip
    with pytest.raises(ModelFileError, match=r"has no diffusion_pytorch_model|has the variants"):
        read_model(folder)


def test_a_missing_shard_is_named(tmp_path):
    DDPMPipeline(their_unet(), DDPMScheduler()).save_pretrained(tmp_path / "m", max_shard_size="20KB")
    gone = sorted((tmp_path / "m" / "unet").glob("*-of-*"))[1]
    gone.unlink()
    with pytest.raises(ModelFileError, match=f"lacks 1 of .*{gone.name}"):
        read_model(tmp_path / "m")


# Writing --------------------------------------------------------------------------------------------


def test_nothing_is_overwritten_unasked(make, folder, tmp_path):
    model, before = make(seed=1), {name: (folder / name).read_bytes() for name in files(folder)}
    with pytest.raises(UsageError, match="holds a model already"):
        write_model(model, folder)
    with pytest.raises(UsageError, match="holds no native model"):
        write_model(model, folder, kind="native", overwrite=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"notes\.txt is no part of the model"):
        write_model(model, folder, overwrite=True)
    assert {name: (folder / name).read_bytes() for name in before} == before
    (folder / "notes.txt").unlink()
    write_model(model, folder, overwrite=True)
    assert read_model(folder).digest == model.digest
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "photo.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="not empty"):
            write_model(model, tmp_path / "other", overwrite=overwrite)


@pytest.mark.parametrize("breaks", ["put", "rename"])
def test_a_disk_that_fails_leaves_what_was_there(make, folder, tmp_path, monkeypatch, breaks):
    before = read_model(folder).digest

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, breaks, fail)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(StorageError, match="no space left") as caught:
            write_model(make(seed=1), target, overwrite=True)
        assert caught.value.exit_code == 6
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert read_model(folder).digest == before


@pytest.mark.parametrize(
    "card",
    [
        {"prediction": "velocity"},
        {"schedule": ScheduleSpec(name="flow"), "prediction": "v"},
        {"schedule": ScheduleSpec(name="edm"), "prediction": "edm"},
    ],
)
def test_what_diffusers_has_no_words_for_goes_to_our_own_folder(make, tmp_path, card):
    model = make(**card)
    with pytest.raises(UsageError, match="a diffusers model cannot express"):
        write_model(model, tmp_path / "m", kind="diffusers")
    assert not (tmp_path / "m").exists()
    write_model(model, tmp_path / "m")
    assert recognise(tmp_path / "m").name == "native"
    back = read_model(tmp_path / "m")
    assert torch.equal(back.sample(1, steps=2).images, model.sample(1, steps=2).images)
