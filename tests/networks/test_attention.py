"""Attention over pixels: its formula, its views, and its context."""

import torch
from torch import Tensor

from reverie.networks.attention import Attention, SpatialAttention, SpatialTransformer, to_image, to_tokens


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def scattered(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for parameter in module.double().parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def test_an_image_in_channels_last_is_read_without_a_copy():
    x = randn(2, 6, 3, 5).contiguous(memory_format=torch.channels_last)
    tokens = to_tokens(x)
    assert tokens.data_ptr() == to_image(tokens, x).data_ptr() == x.data_ptr()
    assert torch.equal(to_image(tokens, x), x)
    assert torch.equal(tokens[:, 1 * 5 + 2], x[:, :, 1, 2])


def test_the_fused_product_is_the_three_products():
    attention = scattered(Attention(6, heads=2, head_dim=4))
    x = randn(2, 5, 6)
    torch.testing.assert_close(attention(x), attention(x, context=x))


def test_heads_may_leave_channels_over():
    attention = scattered(Attention(7, heads=2, head_dim=3, context_dim=5))
    assert attention.to_q.weight.shape == (6, 7)
    assert attention(randn(2, 4, 7), randn(2, 9, 5)).shape == (2, 4, 7)


def test_spatial_attention():
    module = scattered(SpatialAttention(4, heads=1, head_dim=4, groups=2, scale_out=2.0))
    x = randn(2, 4, 3, 5)
    tokens = module.group_norm(x).flatten(2).mT
    q, k, v = module.to_q(tokens), module.to_k(tokens), module.to_v(tokens)
    seen = module.to_out[0]((q @ k.mT / 2).softmax(-1) @ v)
    torch.testing.assert_close(module(x), (x + seen.mT.reshape(x.shape)) / 2)


def test_new_attention_is_the_identity():
    x = randn(2, 8, 3, 5)
    assert torch.equal(SpatialAttention(8, 2, 4, groups=4).double()(x), x)
    transformer = SpatialTransformer(8, 2, 4, context_dim=6, groups=4).double()
    assert torch.equal(transformer(x, randn(2, 7, 6)), x)


def test_pixels_in_another_order_are_attended_to_alike():
    module = scattered(SpatialTransformer(8, 2, 4, context_dim=6, groups=4, linear_projection=True))
    x, context = randn(2, 8, 3, 5), randn(2, 7, 6)
    torch.testing.assert_close(module(x.flip(2, 3), context.flip(1)), module(x, context).flip(2, 3))
    assert (module(x, context) - module(x, context + 1)).abs().max() > 1e-3
