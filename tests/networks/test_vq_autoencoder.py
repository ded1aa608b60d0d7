"""The autoencoder with a codebook against diffusers' own, on the same weights; its config; its codebook."""

import json

import pytest
import torch
from diffusers import VQModel

from reverie.base.errors import ModelFileError, UsageError
from reverie.networks import networks
from reverie.networks.vq_autoencoder import Codebook, VQAutoencoder, VQConfig

LEVELS = 3
CELEBA = {  # of CelebA-HQ's latent diffusion, a sixteenth as wide
    "_class_name": "VQModel",
    "_diffusers_version": "0.1.2",
    "act_fn": "silu",
    "block_out_channels": [8, 16, 32],
    "down_block_types": ["DownEncoderBlock2D"] * LEVELS,
    "in_channels": 3,
    "latent_channels": 3,
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "num_vq_embeddings": 64,
    "out_channels": 3,
    "sample_size": 256,
    "up_block_types": ["UpDecoderBlock2D"] * LEVELS,
}
CONFIGS = {
    "CelebA-HQ's, narrower": {},
    "other channels at the codebook": {"vq_embed_dim": 5},
    "no attention": {"mid_block_add_attention": False},
    "grey": {"in_channels": 1, "out_channels": 1, "layers_per_block": 1},
}


def pair(extra: dict) -> tuple[VQAutoencoder, VQModel]:
    """Return our network and diffusers' with the same random weights."""
    torch.manual_seed(0)
    theirs = VQModel.from_config(CELEBA | extra)
    torch.nn.init.normal_(theirs.quantize.embedding.weight, std=0.3)
    ours = VQAutoencoder(VQConfig.from_diffusers(CELEBA | extra))
    ours.load_state_dict(theirs.state_dict())  # strict: the names are the same
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("extra", CONFIGS.values(), ids=CONFIGS)
def test_gives_what_diffusers_gives(extra):
    ours, theirs = pair(extra)
    x = torch.rand(2, ours.config.in_channels, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        latents = theirs.encode(x).latents
        torch.testing.assert_close(ours.encode(x), latents, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.decode(latents), theirs.decode(latents).sample, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours(x), theirs(x).sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("extra", CONFIGS.values(), ids=CONFIGS)
def test_the_config_comes_back(extra):
    config = VQConfig.from_diffusers(CELEBA | extra)
    written = json.loads(json.dumps(config.to_diffusers()))
    assert VQConfig.from_diffusers(written) == config
    assert {name: written.get(name) for name in extra} == extra
    with torch.device("meta"):
        theirs, ours = VQModel.from_config(written).state_dict(), networks["vq-autoencoder"](config).state_dict()
    assert {name: tensor.shape for name, tensor in theirs.items()} == {n: tensor.shape for n, tensor in ours.items()}


def test_diffusers_defaults_are_ours():
    kept = VQConfig.from_diffusers({})
    with torch.device("meta"):
        theirs = VQModel().config
    said = {name: tuple(value) if isinstance(value, list) else value for name, value in kept.to_diffusers().items()}
    assert {name: theirs[name] for name in said if name not in ("_class_name", "vq_embed_dim")} == {
        name: value for name, value in said.items() if name not in ("_class_name", "vq_embed_dim")
    }
    assert said["vq_embed_dim"] == theirs["latent_channels"]


def test_the_nearest_vector_is_that_of_all_distances():
    torch.manual_seed(0)
    codebook, z = Codebook(20, 4), torch.randn(3, 4, 5, 6)
    vectors = codebook.embedding.weight
    distances = (z.movedim(1, -1)[..., None, :].double() - vectors.double()).square().sum(-1)
    assert torch.equal(codebook.nearest(z), distances.argmin(-1))
    found = codebook(z)
    assert torch.equal(found[1, :, 2, 3], vectors[codebook.nearest(z)[1, 2, 3]])
    assert torch.equal(codebook(found), found)  # what is in the codebook stays
    assert torch.equal(codebook(z[1:2])[0], found[1])
    assert codebook(z.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"norm_type": "spatial"}, "norm_type = 'spatial', which is not supported"),
        ({"lookup_from_codebook": True}, "lookup_from_codebook = True"),
        ({"num_vq_embeddings": 0}, "num_vq_embeddings"),
        ({"vq_embed_dim": 10**9}, "vq_embed_dim"),
        ({"codebook": 4}, "unknown setting 'codebook'"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_name(extra, words):
    with pytest.raises(ModelFileError, match=words):
        VQConfig.from_diffusers(CELEBA | extra)


def test_shapes_that_are_none_are_refused():
    ours, _ = pair({})
    with pytest.raises(UsageError, match="this autoencoder takes"):
        ours.encode(torch.zeros(1, 4, 8, 8))
    with pytest.raises(UsageError, match="this autoencoder takes"):
        ours.decode(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="both 1x1 convolutions"):
        VQConfig(use_quant_conv=False)
