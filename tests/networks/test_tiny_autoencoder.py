"""The tiny autoencoder against diffusers' own; its config; the original's two files."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import save_file

from reverie.base.errors import ModelFileError, UsageError
from reverie.models.formats.taesd import read_taesd
from reverie.networks import networks
from reverie.networks.tiny_autoencoder import TinyAutoencoder, TinyAutoencoderConfig, original_name

SMALL = {"encoder_block_out_channels": [16] * 4, "decoder_block_out_channels": [16] * 4}
CONFIGS = {
    "taesd, narrower": SMALL,
    "16 latent channels": {**SMALL, "latent_channels": 16},
    "wider decoder": {**SMALL, "decoder_block_out_channels": [24] * 4},
    "two levels": {
        "encoder_block_out_channels": [16] * 2,
        "decoder_block_out_channels": [16] * 2,
        "num_encoder_blocks": [2, 1],
        "num_decoder_blocks": [0, 2],
    },
    "gelu": {**SMALL, "act_fn": "gelu"},
}


def randomise(network: torch.nn.Module, seed: int = 0) -> None:
    """Give a network random weights that neither vanish nor explode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.7 * noise / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.1 * noise)


@pytest.mark.parametrize("extra", CONFIGS.values(), ids=CONFIGS)
def test_gives_what_diffusers_gives(extra):
    theirs = AutoencoderTiny.from_config({"_class_name": "AutoencoderTiny", **extra}).eval()
    randomise(theirs)
    ours = TinyAutoencoder(TinyAutoencoderConfig.from_diffusers(json.loads(json.dumps(dict(theirs.config)))))
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    z = 3 * torch.randn(2, ours.config.latent_channels, 4, 6, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(x), theirs.encode(x).latents, rtol=1e-5, atol=1e-5)
        decoded = theirs.decode(z).sample
        assert decoded.std() > 0.05
        torch.testing.assert_close(ours.decode(z), decoded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("extra", CONFIGS.values(), ids=CONFIGS)
def test_the_config_comes_back(extra):
    config = TinyAutoencoderConfig.from_diffusers(extra)
    written = json.loads(json.dumps(config.to_diffusers()))
    assert TinyAutoencoderConfig.from_diffusers(written) == config
    assert {name: written[name] for name in extra} == extra
    assert (
        dict(AutoencoderTiny.from_config(written).config).items()
        >= {name: value for name, value in written.items() if not name.startswith("_")}.items()
    )


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"encoder_block_out_channels": [64, 64, 64, 32]}, "levels that differ in width"),
        ({"encoder_block_out_channels": [64]}, "has 1 levels, and there are blocks for 4"),
        ({"upsample_fn": "bilinear"}, "upsample_fn = 'bilinear', which is not supported"),
        ({"num_decoder_blocks": [3, 3, 10**9, 1]}, "num_decoder_blocks.2: Input should be less"),
        ({"latents": 4}, "unknown setting 'latents'"),
        ({"_class_name": "AutoencoderKL"}, "is a AutoencoderKL"),
    ],
)
def test_what_is_not_supported_is_refused(extra, message):
    with pytest.raises(ModelFileError, match=message):
        TinyAutoencoderConfig.from_diffusers(extra)


def test_diffusers_has_no_words_for_the_norm():
    with pytest.raises(UsageError, match="no norm"):
        TinyAutoencoderConfig(norm=True).to_diffusers()


@pytest.mark.parametrize("size", [(1, 1), (9, 16), (13, 7)])
def test_takes_any_size(size):
    tiny = TinyAutoencoder(TinyAutoencoderConfig(encoder_channels=8, decoder_channels=8))
    assert tiny.encode(torch.zeros(1, 3, *size)).shape == (1, 4, -(-size[0] // 8), -(-size[1] // 8))
    assert tiny(torch.zeros(1, 3, *size)).shape == (1, 3, *size)


def originals(tiny: TinyAutoencoder) -> dict[str, dict[str, torch.Tensor]]:
    """Return the tensors of the original's two files."""
    files: dict[str, dict[str, torch.Tensor]] = {"encoder": {}, "decoder": {}}
    for name, tensor in tiny.state_dict().items():
        half, _, place, rest = name.split(".", 3)
        files[half][f"{int(place) + (half == 'decoder')}.{rest}"] = tensor
    return files


@pytest.mark.parametrize("config", [{}, {"norm": True, "latent_channels": 32, "encoder_blocks": (1, 2, 0, 3)}])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_reads_the_originals_two_files(tmp_path: Path, config: dict, suffix: str):
    tiny = TinyAutoencoder(TinyAutoencoderConfig(encoder_channels=8, decoder_channels=12, **config))
    randomise(tiny)
    paths = {half: tmp_path / f"{half}.{suffix}" for half in ("encoder", "decoder")}
    for half, tensors in originals(tiny).items():
        halved = {name: tensor.half() for name, tensor in tensors.items()}  # as they are published
        torch.save(halved, paths[half]) if suffix == "pth" else save_file(halved, paths[half])
        assert {original_name(name, half) for name in tensors} <= tiny.state_dict().keys()
    read = read_taesd(*paths.values())
    assert read.config == tiny.config
    for name, tensor in read.state_dict().items():
        assert torch.equal(tensor, tiny.state_dict()[name].half().float()), name


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path):
    tiny = TinyAutoencoder(TinyAutoencoderConfig(encoder_channels=8, decoder_channels=8))
    files = originals(tiny)
    for half, tensors in files.items():
        save_file(tensors, tmp_path / half)
    with pytest.raises(ModelFileError, match="not the two files of a tiny autoencoder"):
        read_taesd(tmp_path / "decoder", tmp_path / "encoder")
    files["encoder"]["99.weight"] = torch.zeros(1)
    save_file(files["encoder"], tmp_path / "more")
    with pytest.raises(ModelFileError):
        read_taesd(tmp_path / "more", tmp_path / "decoder")
    files["decoder"]["1.weight"] = torch.full_like(files["decoder"]["1.weight"], torch.nan)
    save_file(files["decoder"], tmp_path / "nan")
    with pytest.raises(ModelFileError, match=r"NaN or infinity: decoder.layers.0.weight"):
        read_taesd(tmp_path / "encoder", tmp_path / "nan")
    with pytest.raises(ModelFileError, match="cannot be read"):
        read_taesd(tmp_path / "none", tmp_path / "decoder")


def test_is_in_the_registry():
    assert networks["tiny-autoencoder"] is TinyAutoencoder
