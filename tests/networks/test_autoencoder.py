"""The autoencoder of latent diffusion against diffusers' own, on the same weights; its config; any size."""

import json

import pytest
import torch
from diffusers import AutoencoderKL

from reverie.base.errors import ModelFileError, UsageError
from reverie.networks import networks
from reverie.networks.autoencoder import Autoencoder, AutoencoderConfig, Moments
from reverie.networks.unet import modern_names

LEVELS = 4
STABLE = {  # Stable Diffusion's, an eighth as wide
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [16, 32, 64, 64],
    "down_block_types": ["DownEncoderBlock2D"] * LEVELS,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * LEVELS,
}
ONE = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"], "block_out_channels": [16]}
CONFIGS = {
    "stable diffusion, narrower": {},
    "no convolutions beside the latents": {"use_quant_conv": False, "use_post_quant_conv": False},
    "only one of them": {"use_quant_conv": False},
    "one level": ONE,
    "no attention": {"mid_block_add_attention": False},
    "16 latent channels, one layer": {"latent_channels": 16, "layers_per_block": 1, "norm_num_groups": 4},
    "grey to colour": {"in_channels": 1},
    "gelu": {"act_fn": "gelu"},
}


def pair(extra: dict, seed: int = 0) -> tuple[Autoencoder, AutoencoderKL]:
    """Return our network and diffusers' with the same random weights."""
    config = STABLE | extra
    theirs = AutoencoderKL.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter.copy_(noise / fan_in**0.5 if parameter.ndim > 1 else ("norm" in name) * 1.0 + 0.1 * noise)
    ours = Autoencoder(AutoencoderConfig.from_diffusers(config))
    ours.load_state_dict(theirs.state_dict())  # strict: the names are the same
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("extra", CONFIGS.values(), ids=CONFIGS)
def test_gives_what_diffusers_gives(extra):
    ours, theirs = pair(extra)
    x = torch.rand(2, ours.config.in_channels, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        mine, wanted = ours.encode(x), theirs.encode(x).latent_dist
        torch.testing.assert_close(mine.mean, wanted.mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mine.log_variance, wanted.logvar, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mine.divergence(), wanted.kl(), rtol=1e-5, atol=1e-5)
        decoded = theirs.decode(wanted.mean).sample
        assert decoded.std() > 0.1
        torch.testing.assert_close(ours.decode(wanted.mean), decoded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("extra", CONFIGS.values(), ids=CONFIGS)
def test_the_config_comes_back(extra):
    config = AutoencoderConfig.from_diffusers(STABLE | extra)
    written = json.loads(json.dumps(config.to_diffusers()))
    assert AutoencoderConfig.from_diffusers(written) == config
    assert {name: written.get(name) for name in STABLE | extra} == {**STABLE, **extra, "_diffusers_version": None}
    with torch.device("meta"):
        theirs = AutoencoderKL.from_config(written).state_dict()
        ours = Autoencoder(config).state_dict()
    assert {name: tensor.shape for name, tensor in theirs.items()} == {n: tensor.shape for n, tensor in ours.items()}


def test_diffusers_defaults_are_ours():
    kept = AutoencoderConfig.from_diffusers({})
    with torch.device("meta"):
        assert (
            dict(AutoencoderKL().config).items()
            >= {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in kept.to_diffusers().items()
                if not name.startswith("_")
            }.items()
        )


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * LEVELS}, "down_block_types is .* must be a list of Down"),
        ({"up_block_types": ["UpDecoderBlock2D"]}, "has 4 levels and up_block_types 1"),
        ({"block_out_channels": "wide"}, "block_out_channels: Input should be a valid tuple"),
        ({"block_out_channels": [16, 32, 64, 10**9]}, "block_out_channels.3: Input should be less"),
        ({"norm_num_groups": 7}, "does not divide 16 channels"),
        ({"latent_channel": 4}, "unknown setting 'latent_channel', did you mean latent_channels"),
        ({"_class_name": "AutoencoderDC"}, "is a AutoencoderDC"),
        ({"layers_per_block": 0}, "layers_per_block: Input should be greater"),
    ],
)
def test_what_is_not_supported_is_refused(extra, message):
    with pytest.raises(ModelFileError, match=message):
        AutoencoderConfig.from_diffusers(STABLE | extra)


def test_old_names_of_the_attention_are_read():
    ours, _ = pair({})
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in ours.state_dict().items():
        for here, there in new.items():
            name = name.replace(f".{here}.", f".{there}.")
        old[name] = tensor
    assert old.keys() != ours.state_dict().keys()
    assert modern_names(old).keys() == ours.state_dict().keys()


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (8, 16), (13, 8), (33, 17)])
def test_takes_any_size(size):
    ours, _ = pair({"layers_per_block": 1})
    x = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        decoded, moments = ours(x)
        assert moments.mean.shape == (1, 4, -(-size[0] // 8), -(-size[1] // 8))
        assert decoded.shape == x.shape
        # What is added repeats the last row and column.
        height, width = (8 * n for n in moments.mean.shape[2:])
        rows, columns = torch.arange(height).clamp(max=size[0] - 1), torch.arange(width).clamp(max=size[1] - 1)
        larger = ours.encode(x[:, :, rows][..., columns])
        torch.testing.assert_close(larger.mean, moments.mean, rtol=0, atol=0)


def test_latents_are_drawn_by_their_noise():
    ours, _ = pair({})
    x = torch.zeros(2, 3, 16, 16)
    moments = ours.encode(x)
    noise = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(3))
    drawn = moments.sample(noise)
    torch.testing.assert_close((drawn - moments.mean) / noise, (moments.log_variance / 2).exp())
    torch.testing.assert_close(ours(x, noise)[0], ours.decode(drawn)[:, :, :16, :16])


def test_the_log_variance_is_kept_within_bounds():
    wild = Moments.of(torch.tensor([0.0, -1e9, 0.0, 1e9]).reshape(1, 4, 1, 1)[:, [0, 2, 1, 3]])
    assert wild.log_variance.flatten().tolist() == [-30.0, 20.0]


def test_the_divergence_is_that_of_two_gaussians():
    mean, scale = torch.tensor(0.7), torch.tensor(0.3)
    moments = Moments(mean.expand(1, 1, 1, 2), 2 * scale.log().expand(1, 1, 1, 2))
    normal = torch.distributions.Normal
    wanted = 2 * torch.distributions.kl_divergence(normal(mean, scale), normal(0.0, 1.0))
    torch.testing.assert_close(moments.divergence(), wanted[None])


def test_gradients_are_those_of_diffusers():
    ours, theirs = pair({"layers_per_block": 1})
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    ours(x)[0].square().mean().backward()
    theirs(x).sample.square().mean().backward()
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-3, atol=1e-5, msg=name)


def test_what_does_not_fit_is_refused(unchecked):
    ours, _ = pair({})
    with pytest.raises(UsageError, match=r"the images are \(1, 4, 8, 8\); this autoencoder takes \(B, 3, H, W\)"):
        ours.encode(torch.zeros(1, 4, 8, 8))
    with pytest.raises(UsageError, match="the latents are"):
        ours.decode(torch.zeros(4, 8, 8))


def test_is_in_the_registry():
    assert networks["autoencoder"] is Autoencoder
    assert networks["autoencoder"].Config is AutoencoderConfig
