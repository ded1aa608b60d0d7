"""Layer norm beside its formula."""

import pytest
import torch

from reverie.kernels.layer_norm import layer_norm


@pytest.mark.parametrize("weighed", [False, True])
def test_it_is_the_formula(weighed):
    x = 5 + torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight, bias = torch.randn(2, 6, dtype=torch.float64) if weighed else (None, None)
    wanted = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-3).sqrt()
    wanted = wanted * weight + bias if weighed else wanted
    assert torch.allclose(layer_norm(x, weight, bias, 1e-3), wanted, rtol=1e-12)


def test_none_of_nothing():
    assert layer_norm(torch.zeros(0, 3)).shape == (0, 3)
