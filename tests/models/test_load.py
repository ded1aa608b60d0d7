"""Loading: devices, dtypes, warnings."""

import pytest
import torch

from reverie.base.errors import UsageError
from reverie.models.formats import write_model
from reverie.models.load import find_device, load


@pytest.fixture
def path(model, tmp_path):
    """Return the folder of a model."""
    return write_model(model, tmp_path / "m")


def test_the_network_may_compute_in_bfloat16(path, model):
    half = load(path, dtype="bfloat16")
    assert half.denoiser.dtype == torch.bfloat16
    assert half.plan(1).dtype == torch.bfloat16
    assert all(parameter.dtype == torch.float32 for parameter in half.denoiser.network.parameters())
    samples = half.sample(2, steps=2)
    assert samples.record["dtype"] == "bfloat16"
    assert torch.equal(samples.images, model.sample(2, steps=2, dtype=torch.bfloat16).images)
    assert not torch.equal(samples.images, model.sample(2, steps=2).images)
    assert load(path, dtype="bfloat16").plan(1, dtype="float32").dtype is None


@pytest.mark.parametrize("device", ["cuda:99", "floppy", "xpu:7"])
def test_a_device_that_is_not_there(path, device):
    with pytest.raises(UsageError, match=f"device {device} is not there") as caught:
        load(path, device=device)
    assert "\n" not in str(caught.value)


def test_auto_is_what_there_is():
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_an_unknown_dtype_is_refused(path):
    with pytest.raises(UsageError, match="dtype is 'float17'"):
        load(path, dtype="float17")


def test_a_sound_model_warns_of_nothing(path, recwarn):
    assert load(str(path)).source == str(path)
    assert not recwarn.list
