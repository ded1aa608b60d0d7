"""diffusers' folder of latent diffusion without words: theirs opens here, ours there, and both draw the same."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel, VQModel
from diffusers.pipelines.deprecated import LDMPipeline
from safetensors.torch import load_file

from reverie.base.errors import ModelFileError, UsageError
from reverie.base.randomness import Noise
from reverie.models.card import ScheduleSpec
from reverie.models.formats import read_model, recognise, write_model
from reverie.models.formats.codec_file import read_codec
from reverie.models.formats.conversion import convert

LEVELS = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "latent_channels": 3,
}
WEIGHTS = ("unet/diffusion_pytorch_model.safetensors", "vqvae/diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module", params=["vq", "kl"])
def theirs(request, tmp_path_factory):
    """A small pipeline of diffusers' with random weights, and where it was saved."""
    torch.manual_seed(0)
    coder = VQModel(num_vq_embeddings=32, **LEVELS) if request.param == "vq" else AutoencoderKL(**LEVELS)
    if request.param == "vq":
        torch.nn.init.normal_(coder.quantize.embedding.weight)
    unet = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195, clip_sample=False)
    pipeline = LDMPipeline(vqvae=coder.eval(), unet=unet.eval(), scheduler=scheduler)
    folder = tmp_path_factory.mktemp("ldm") / request.param
    pipeline.save_pretrained(folder)
    return folder, pipeline


def drawn(pipeline, seeds, monkeypatch) -> torch.Tensor:
    """Return what a pipeline draws in 10 steps from our noise, in [-1, 1]."""
    place = "diffusers.pipelines.deprecated.latent_diffusion_uncond.pipeline_latent_diffusion_uncond.randn_tensor"
    noise = Noise(seeds)
    monkeypatch.setattr(place, lambda shape, **ignored: noise(tuple(shape)[1:], [0] * len(seeds)))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=len(seeds), num_inference_steps=10, output_type="np").images
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2) * 2 - 1


def test_their_folder_draws_here_what_it_draws_there(theirs, monkeypatch):
    folder, pipeline = theirs
    assert recognise(folder).name == "latent-diffusion"
    model = read_model(folder)
    want = drawn(pipeline, [3, 4], monkeypatch)
    got = model.sample(2, seed=3, sampler="ddim", steps=10, exact=False).images.clamp(-1, 1)
    assert got.shape == (2, 3, 16, 16)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    assert got.std() > 0.05


def test_our_folder_draws_there_what_it_draws_here(theirs, tmp_path, monkeypatch):
    model = read_model(theirs[0])
    write_model(model, tmp_path / "m", "diffusers")
    pipeline = LDMPipeline.from_pretrained(tmp_path / "m")
    want = drawn(pipeline, [5], monkeypatch)
    again = read_model(tmp_path / "m")
    assert again.card == model.card
    got = again.sample(1, seed=5, sampler="ddpm", steps=10, grid="leading", exact=False)
    assert got.images.shape == want.shape


def test_there_and_back_every_tensor_is_equal(theirs, tmp_path):
    folder, _ = theirs
    convert(folder, tmp_path / "native", "native")
    convert(tmp_path / "native", tmp_path / "back", "diffusers")
    for name in WEIGHTS:
        before, after = load_file(folder / name), load_file(tmp_path / "back" / name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    for name in ("unet/config.json", "vqvae/config.json"):
        before, after = (json.loads((place / name).read_text()) for place in (folder, tmp_path / "back"))
        kept = {key: value for key, value in after.items() if not key.startswith("_")}
        if before.get("vq_embed_dim", 0) is None:  # which stands for as many as the latents have
            before["vq_embed_dim"] = before["latent_channels"]
        assert {key: before.get(key, value) for key, value in kept.items()} == kept


def test_its_autoencoder_is_a_codec(theirs):
    folder, pipeline = theirs
    codec = read_codec(str(folder / "vqvae"))
    z = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = pipeline.vqvae.decode(z / pipeline.vqvae.config.scaling_factor).sample
    torch.testing.assert_close(codec.decode(z), want, atol=1e-5, rtol=1e-5)


def test_what_is_damaged_or_foreign_is_refused(theirs, tmp_path):
    folder, _ = theirs
    shutil.copytree(folder, tmp_path / "m")
    index = json.loads((tmp_path / "m" / "model_index.json").read_text())

    def refused(words: str, **changes) -> None:
        (tmp_path / "m" / "model_index.json").write_text(json.dumps(index | changes))
        with pytest.raises(ModelFileError, match=words) as caught:
            read_model(tmp_path / "m")
        assert "\n" not in str(caught.value)

    refused("its vqvae comes from 'mine', code that reverie does not run", vqvae=["mine", "VQModel"])
    refused("is a pipeline of bert, scheduler, unet, vqvae; what is read has scheduler, unet, vqvae", bert=["x", "y"])
    (tmp_path / "m" / "vqvae" / "config.json").write_text('{"_class_name": "VQModel", "norm_type": "spatial"}')
    refused("norm_type = 'spatial', which is not supported")
    (tmp_path / "m" / "vqvae" / "config.json").write_text('{"_class_name": "Custom"}')
    refused("the autoencoder is a Custom")


def test_another_codec_beside_our_card_is_refused(theirs, tmp_path):
    model = read_model(theirs[0])
    write_model(model, tmp_path / "m", "diffusers")
    config = json.loads((tmp_path / "m" / "vqvae" / "config.json").read_text())
    (tmp_path / "m" / "vqvae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 2.0}))
    with pytest.raises(ModelFileError, match=r"another codec than reverie\.json tells of"):
        read_model(tmp_path / "m")


def test_what_it_has_no_words_for_is_refused(theirs, make, tmp_path):
    model = read_model(theirs[0])
    shifted = model.card.codec.model_copy(update={"shift": 0.1})
    model.card = model.card.model_copy(update={"codec": shifted})
    with pytest.raises(UsageError, match="cannot express a shift of the latents"):
        write_model(model, tmp_path / "a", "diffusers")
    with pytest.raises(UsageError, match="cannot express a model without a codec"):
        write_model(make(schedule=ScheduleSpec(options={"timesteps": 9})), tmp_path / "b", "latent-diffusion")
