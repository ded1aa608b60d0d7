"""The codec: scale and shift, tiles without a seam, and no black pictures."""

import pytest
import torch
from torch import nn

from reverie.base.errors import ModelFileError, NonFiniteError, UsageError
from reverie.models.card import CodecSpec
from reverie.models.codec import Codec, build_codec, cuts, ramp


class Linear(nn.Module):
    """An autoencoder in closed form: each latent is the mean of 2x2 pixels, and decoding repeats it."""

    factor = 2

    class config:  # noqa: N801
        latent_channels = 3

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), gain))

    def encode(self, x):
        return nn.functional.avg_pool2d(x, 2)

    def decode(self, z):
        return self.weight * z.repeat_interleave(2, 2).repeat_interleave(2, 3)


def smooth(height, width, seed=0):
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


def test_scale_and_shift_are_undone():
    codec = Codec(Linear(), scale=0.25, shift=0.5)
    x = smooth(4, 6).repeat_interleave(2, 2).repeat_interleave(2, 3)
    z = codec.encode(x)
    torch.testing.assert_close(z, 0.25 * (nn.functional.avg_pool2d(x, 2) - 0.5))
    torch.testing.assert_close(codec.decode(z), x)


@pytest.mark.parametrize("size", [(17, 40), (100, 33), (64, 65), (97, 130)])
def test_tiles_of_a_local_codec_are_the_whole(size):
    """Where a pixel depends on its own latent alone, a mean of tiles is exact: each tile where it belongs."""
    z = smooth(*size)
    torch.testing.assert_close(Codec(Linear(), tile=32).decode(z), Codec(Linear()).decode(z))
    x = smooth(2 * size[0], 2 * size[1], seed=1)
    torch.testing.assert_close(Codec(Linear(), tile=32).encode(x), Codec(Linear()).encode(x))


def test_the_weights_of_tiles_meet():
    """Every pixel is in a tile that counts, and no step of the weights is larger than the ramp's."""
    for size in (65, 100, 300):
        total = torch.zeros(size)
        for start, end in cuts(size, 64, 16, 1):
            total[start:end] += ramp(start, end, size, 16, 1, 1)
        assert total.min() > 0.5
    assert ramp(0, 64, 64, 16, 1, 1).unique().tolist() == [1.0]


def test_tiles_of_an_autoencoder_leave_no_seam():
    """Across tiles' edges the picture steps no more than elsewhere: of a decoder with norms and random weights."""
    torch.manual_seed(0)
    codec = build_codec(CodecSpec(config={"channels": [32, 32], "latent_channels": 4, "layers": 1})).freeze()
    z = torch.randn(1, 4, 96, 96)
    codec.tile = 48
    parts, whole = codec.decode(z), codec.network.decode(z)
    off = (parts - whole)[0].abs().mean(0)
    steps = (parts - whole).diff(dim=3).abs().mean((0, 1, 2))
    assert off.mean() < 0.05 * whole.std()
    assert steps.max() < 0.05 * whole.diff(dim=3).abs().mean()


def test_overflow_in_half_precision_is_made_again_in_full():
    codec = Codec(Linear(1e6), dtype=torch.float16)
    codec.network.decode = lambda z: (z * 1e6).to(torch.float16) if torch.is_autocast_enabled("cpu") else z * 1e6
    with pytest.warns(RuntimeWarning, match="again in float32"):
        picture = codec.decode(torch.ones(1, 3, 2, 2))
    assert picture.isfinite().all()


def test_what_is_never_finite_is_an_error():
    with pytest.raises(NonFiniteError, match="of the picture are not finite"):
        Codec(Linear(float("nan"))).decode(torch.ones(1, 3, 2, 2))


def test_a_posterior_is_drawn_from_by_noise():
    torch.manual_seed(0)
    codec = build_codec(CodecSpec(config={"channels": [8, 8], "latent_channels": 4}, scale=2.0))
    x, noise = torch.rand(1, 3, 8, 8), torch.randn(1, 4, 4, 4)
    moments = codec.network.encode(x)
    torch.testing.assert_close(codec.encode(x), 2 * moments.mean)
    torch.testing.assert_close(codec.encode(x, noise), 2 * moments.sample(noise))
    assert codec.latent_shape(9, 8) == (4, 5, 4)


def test_wrong_settings_are_refused():
    with pytest.raises(UsageError, match="tile is 16"):
        Codec(Linear(), tile=16)
    with pytest.raises(ModelFileError, match="no autoencoder"):
        build_codec(CodecSpec(config={"width": 3}))
