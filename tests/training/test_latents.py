"""Training on latents: encoded once, of variance about one, resumed bit for bit, decoded when sampled."""

import io
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from reverie.base.errors import ModelFileError, UsageError
from reverie.data import open_dataset
from reverie.models.formats import write_model
from reverie.models.formats.codec_file import read_codec
from reverie.models.load import load
from reverie.training.config import TrainConfig
from reverie.training.latents import Latents
from reverie.training.metrics import Console
from reverie.training.trainer import Run, train
from tests.training.test_start import assert_same, killed

QUICK = {
    "data": "shapes:16,count=40", "batch_size": 4, "save_every": 2, "sample_every": 0, "validate_every": 3,
    "log_every": 2, "device": "cpu", "dtype": "float32",
}  # fmt: skip
SMALL = {"widths": (8, 8), "layers": 1}


def go(folder, resume="no", **settings):
    report = io.StringIO()
    train(TrainConfig(out=str(folder), **settings), resume, report)
    return report.getvalue()


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A small autoencoder of diffusers', its weights random."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae") / "vae"
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    AutoencoderKL(block_out_channels=[8, 8], latent_channels=4, norm_num_groups=4, **blocks).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory, vae):
    folder = tmp_path_factory.mktemp("latents") / "run"
    settings = QUICK | {"sample_every": 2, "sample_count": 4, "sample_steps": 2}
    report = go(folder, codec=vae, steps=3, **settings, **SMALL)
    return folder, report


def test_the_latents_are_the_codecs_and_of_variance_one(vae):
    pictures, codec = open_dataset("shapes:16,count=40"), read_codec(vae)
    latents = Latents(pictures, codec, mirrored=True, say=lambda line: None)
    spec = latents.measure()
    z = latents.images(range(40))
    assert z.shape == (40, 4, 8, 8)
    assert abs(float(z.mean())) < 1e-3
    assert abs(float(z.std()) - 1) < 1e-3
    x = pictures.images([3, 5]).float() / 127.5 - 1
    torch.testing.assert_close(latents.images([3, 5]), codec.encode(x), rtol=1e-4, atol=1e-5)
    turned = latents.turned([3, 5], torch.tensor([True, False]))
    torch.testing.assert_close(turned[:1], codec.encode(x[:1].flip(-1)), rtol=1e-4, atol=1e-5)
    assert torch.equal(turned[1:], latents.images([5]))
    assert (spec.scale, spec.shift) == (codec.scale, codec.shift)
    assert latents.fingerprint == pictures.fingerprint


def test_a_run_carries_its_codec_and_is_sampled_as_pictures(run):
    folder, report = run
    assert "encoding 40 pictures to latents of 4x8x8" in report
    assert "latents: 4x8x8 by autoencoder" in report
    assert "no samples" not in report
    assert len(list((folder / "samples").glob("*.png"))) == 2
    newest = max((folder / "checkpoints").iterdir())
    pictures = [load(path).sample(2, steps=2, seed=1).uint8 for path in (folder, folder / "model", newest)]
    assert pictures[0].shape == (2, 3, 16, 16)
    assert all(torch.equal(pictures[0], other) for other in pictures)
    card = load(folder).card
    assert (card.shape, card.sampling.clip) == ((4, 8, 8), False)
    assert card.codec.digest


@pytest.mark.parametrize("flip", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, vae, flip):
    shutil.copytree(vae, tmp_path / "vae")
    settings = QUICK | SMALL | {"flip": flip, "codec": str(tmp_path / "vae")}
    go(tmp_path / "whole", steps=4, **settings)
    go(tmp_path / "twice", steps=4, **settings)
    killed(tmp_path / "twice")
    shutil.rmtree(tmp_path / "vae")  # a run has its own
    assert "encoding" not in go(tmp_path / "twice", "yes")
    assert_same(tmp_path / "whole", tmp_path / "twice")
    killed(tmp_path / "twice")
    (tmp_path / "twice" / "latents.safetensors").unlink()  # they are made again, the same
    assert "encoding" in go(tmp_path / "twice", "yes")
    assert_same(tmp_path / "whole", tmp_path / "twice")


def test_a_codec_that_is_missing_or_another_is_named(tmp_path, run):
    shutil.copytree(run[0], tmp_path / "run")
    file = tmp_path / "run" / "codec.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-4] + b"\x00\x00\x00\x3f")
    with pytest.raises(ModelFileError, match="another codec"):
        load(tmp_path / "run")
    file.unlink()
    with pytest.raises(ModelFileError, match=r"codec\.safetensors is missing"):
        load(tmp_path / "run")


def test_a_model_of_latents_is_gone_on_with_and_lends_its_codec(tmp_path, run):
    path, theirs = str(run[0]), load(run[0])
    lent = Run(TrainConfig(out=str(tmp_path / "lent"), codec=path, **QUICK, **SMALL), False, Console(io.StringIO()))
    assert lent.plan.card.codec == theirs.card.codec
    assert "encoding" in go(tmp_path / "more", start=path, steps=1, **QUICK)
    assert load(tmp_path / "more").card.codec == theirs.card.codec
    with pytest.raises(UsageError, match="model of latents, in which --fill"):
        go(tmp_path / "fills", start=path, fill=True, steps=1, **QUICK)


def test_what_does_not_fit_is_refused(tmp_path, vae):
    with pytest.raises(UsageError, match="encodes 3 channels"):
        go(tmp_path / "run", codec=vae, steps=1, **(QUICK | {"channels": 1}), **SMALL)
    with pytest.raises(UsageError, match="multiple of 2"):
        go(tmp_path / "run", codec=vae, steps=1, **(QUICK | {"data": "shapes:17,count=20"}), **SMALL)
    with pytest.raises(UsageError, match="there is no codec"):
        go(tmp_path / "run", codec="nowhere", steps=1, **QUICK, **SMALL)
    assert not (tmp_path / "run").exists()


def test_formats_that_have_no_place_for_a_codec_say_so(tmp_path, run):
    model = load(run[0])
    for kind, what in (("diffusers", "a shift of the latents"), ("single-file", "a codec")):
        with pytest.raises(UsageError, match=f"cannot express {what}"):
            write_model(model, tmp_path / "out.safetensors", kind)
    write_model(model, tmp_path / "native", "native")
    assert torch.equal(load(tmp_path / "native").sample(1, steps=1).uint8, model.sample(1, steps=1).uint8)


def test_a_tiny_autoencoder_of_diffusers_is_read(tmp_path):
    torch.manual_seed(0)
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    theirs = AutoencoderTiny(latent_channels=4, **blocks, **widths).eval()
    theirs.save_pretrained(tmp_path / "vae")
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    for path in (tmp_path, tmp_path / "vae"):
        with torch.no_grad():
            torch.testing.assert_close(read_codec(str(path)).encode(x), theirs.encode(x).latents)
    go(tmp_path / "run", codec=str(tmp_path), steps=1, **QUICK, **SMALL)
    assert load(tmp_path / "run").sample(1, steps=1).uint8.shape == (1, 3, 16, 16)
