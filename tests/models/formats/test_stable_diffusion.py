"""Stable Diffusion from diffusers' folder: the same pictures as diffusers makes of it."""

import json

import pytest
import torch
from safetensors.torch import save_file

from reverie.base.errors import ModelFileError
from reverie.base.randomness import Noise
from reverie.models.formats import read_model
from reverie.models.load import load

PROMPT, AWAY = "a red cat on mars", "dog"


def theirs(pipeline, seed, shape=(4, 8, 8), **request):
    """Return diffusers' latents after 10 steps of DDIM, from our noise."""
    noise = Noise([seed])(shape, [0])
    side = 4 * shape[1], 4 * shape[2]
    return pipeline(
        prompt=PROMPT, num_inference_steps=10, latents=noise, output_type="latent", height=side[0], width=side[1],
        **request,
    ).images  # fmt: skip


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_the_latents_are_those_of_diffusers(folders, family):
    """Ten guided steps, the same weights and noise: relative 1e-4 in float32."""
    path, pipeline = folders[family]
    model = read_model(path)
    own = latents(model, 3, negative_prompt=AWAY, guidance=5.0)
    other = theirs(pipeline, 3, negative_prompt=AWAY, guidance_scale=5.0)
    assert relative(own, other) < 1e-4


def latents(model, seed, **request):
    """Return our latents after 10 steps of DDIM."""
    from reverie.models.sampling import execute

    request = {
        "sampler": "ddim",
        "grid": "leading",
        "offset": 1,
        "steps": 10,
        "prompt": PROMPT,
        "exact": False,
    } | request
    plan = model.plan(1, seed=seed, **request)
    x, _ = execute(model.denoiser, plan, None, model.conditioner)
    return x


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_without_a_negative_prompt(folders, family):
    """SDXL's pipelines lead away from zeros then, not from the encoding of nothing."""
    path, pipeline = folders[family]
    own = latents(read_model(path), 4, guidance=4.0)
    assert relative(own, theirs(pipeline, 4, guidance_scale=4.0)) < 1e-4


def test_clip_skip_is_diffusers(folders):
    path, pipeline = folders["sdxl"]
    model = read_model(path)
    model.conditioner.skip = 1
    own = latents(model, 5, guidance=1.0)
    assert relative(own, theirs(pipeline, 5, guidance_scale=1.0, clip_skip=1)) < 1e-4


def test_clip_skip_of_one_encoder_ends_with_its_norm(folders):
    path, pipeline = folders["sd1"]
    model = read_model(path)
    model.conditioner.skip = 1
    ids = pipeline.tokenizer(PROMPT, padding="max_length", max_length=77, return_tensors="pt").input_ids
    hidden = pipeline.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
    wanted = pipeline.text_encoder.final_layer_norm(hidden)
    torch.testing.assert_close(model.conditioner.encode([PROMPT])["context"], wanted)


def test_the_picture_is_diffusers(folders):
    """Decoded too, to 1e-3 of the range."""
    path, pipeline = folders["sd1"]
    model = read_model(path)
    request = {"sampler": "ddim", "grid": "leading", "offset": 1, "steps": 4, "guidance": 3.0, "exact": False}
    own = model.sample(1, prompt=PROMPT, seed=1, **request).images
    noise = Noise([1])((4, 8, 8), [0])
    other = pipeline(PROMPT, num_inference_steps=4, guidance_scale=3.0, latents=noise, output_type="pt").images
    assert own.shape == (1, 3, 32, 32)
    torch.testing.assert_close((own + 1) / 2, other, atol=1e-3, rtol=0)


def test_another_size(folders):
    path, pipeline = folders["sd1"]
    own = latents(read_model(path), 6, size=(24, 40), guidance=3.0)
    assert own.shape == (1, 4, 6, 10)
    assert relative(own, theirs(pipeline, 6, (4, 6, 10), guidance_scale=3.0)) < 1e-4


def test_a_long_prompt_alone_and_in_company(folders):
    """Two chunks beside one: each is drawn as if it were alone."""
    model = read_model(folders["sd1"][0])
    long = " ".join(["cat"] * 100)
    request = {"sampler": "ddim", "steps": 2, "guidance": 3.0}
    both = model.sample(3, prompt=[PROMPT, long, PROMPT], seed=[1, 2, 3], **request).images
    for i, prompt in enumerate([PROMPT, long, PROMPT]):
        assert torch.equal(both[i], model.sample(1, prompt=prompt, seed=i + 1, **request).images[0])
    assert "2 chunks" in " ".join(model.conditioner.remarks(long))


def test_emphasis_changes_the_picture_and_one_does_not(folders):
    model = read_model(folders["sd1"][0])
    plain = latents(model, 7, guidance=1.0)
    assert torch.equal(latents(model, 7, guidance=1.0, prompt="a red (cat:1.0) on mars"), plain)
    assert relative(latents(model, 7, guidance=1.0, prompt="a red (cat:1.4) on mars"), plain) > 1e-4


def test_code_in_a_folder_is_not_run(folders, tmp_path):
    import shutil

    shutil.copytree(folders["sd1"][0], tmp_path / "x")
    index = json.loads((tmp_path / "x" / "model_index.json").read_text())
    (tmp_path / "x" / "model_index.json").write_text(json.dumps(index | {"unet": ["my_code", "UNet"]}))
    with pytest.raises(ModelFileError, match="does not run"):
        read_model(tmp_path / "x")
    (tmp_path / "x" / "model_index.json").write_text(json.dumps(index | {"adapter": ["diffusers", "Thing"]}))
    with pytest.raises(ModelFileError, match="adapter"):
        read_model(tmp_path / "x")


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("text_encoder", {"num_hidden_layers": 10**6}, "num_hidden_layers"),
        ("text_encoder", {"hidden_size": 32}, "text_encoder"),
        ("vae", {"latent_channels": 8}, "vae"),
        ("unet", {"cross_attention_dim": 32}, "unet"),
    ],
)
def test_a_part_of_another_model_is_refused(folders, tmp_path, part, change, said):
    import shutil

    shutil.copytree(folders["sd1"][0], tmp_path / "x")
    config = tmp_path / "x" / part / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ModelFileError, match=said):
        read_model(tmp_path / "x")


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_fast_is_near_exact(folders, family):
    """In float32 to rounding; in bfloat16 within a few hundredths of the latents; keys of the words worked out once."""
    path, _ = folders[family]
    wanted = latents(read_model(path), 3, guidance=5.0)
    for dtype, near in (("float32", 1e-4), ("bfloat16", 0.1)):
        model, calls = load(path, speed="fast", dtype=dtype), []
        keys = [m.to_k for m in model.denoiser.network.modules() if getattr(m, "known", None) is not None]
        for layer in keys:
            layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        assert relative(latents(model, 3, guidance=5.0), wanted) < near, dtype
        assert len(calls) == len(keys) > 0
    picture = load(path, speed="fast", weights="int8").sample(1, prompt=PROMPT, guidance=5.0, steps=2)
    assert picture.record["weights"] == "int8"
    assert picture.images.isfinite().all()


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_fast_model_lets_go_of_its_encoders_and_reads_them_again(folders, family):
    """After the prompts are read the encoders' memory is free; the next prompt, and the same once more, are as ever."""
    kept, model = load(folders[family][0]), load(folders[family][0], speed="fast")
    held = []
    first = model.sample(1, prompt="a cat", steps=1, size=16, callback=lambda _: held.append(model.conditioner.held))
    assert held == [None] * len(held)
    assert held
    for prompt in ("a dog", "a cat"):
        for name, value in model.conditioner.encode([prompt], (16, 16)).items():
            assert torch.equal(value, kept.conditioner.encode([prompt], (16, 16))[name])
    assert torch.equal(model.sample(1, prompt="a cat", steps=1, size=16, seed=int(first.seeds[0])).images, first.images)
    kept.sample(1, prompt="a cat", steps=1, size=16)
    assert kept.conditioner.held is not None  # an exact model keeps what it has


def test_encoders_that_were_changed_are_kept(folders, tmp_path):
    """What a LoRA made of them is in no file that they could be read from."""
    path = tmp_path / "lora.safetensors"
    layer = "text_model.encoder.layers.0.self_attn.q_proj"
    width = load(folders["sd1"][0]).conditioner.encoders[0].config.hidden_size
    weights = {"lora_A.weight": torch.randn(2, width), "lora_B.weight": torch.randn(width, 2)}
    save_file({f"text_encoder.{layer}.{name}": value for name, value in weights.items()}, path)
    model = load(folders["sd1"][0], loras={str(path): 1.0}, speed="fast")
    before = model.conditioner.encode(["a cat"])["context"]
    model.sample(1, prompt="a cat", steps=1, size=16)
    assert model.conditioner.held is not None
    assert torch.equal(model.conditioner.encode(["a cat"])["context"], before)
    assert not torch.equal(load(folders["sd1"][0]).conditioner.encode(["a cat"])["context"], before)
