"""Attention over pixels: its formula, its views, and its context."""

from threading import Thread

import pytest
import torch
from torch import Tensor

from reverie.networks.attention import (
    Attention,
    SpatialAttention,
    SpatialTransformer,
    pixel_attentions,
    to_image,
    to_tokens,
    unmixed,
)
from reverie.networks.edm2_layers import CosineAttention


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


# Unmixed -------------------------------------------------------------------------------------------


def test_unmixed_each_pixel_sees_its_own_value_alone():
    """The map of attention is the identity: what remains is linear, out(value(norm(x))), pixel by pixel."""
    module, x = scattered(SpatialAttention(4, heads=2, head_dim=2, groups=2)), randn(2, 4, 3, 5)
    before = module(x)
    with unmixed([module]):
        found = module(x)
    value = module.to_out[0](module.to_v(module.group_norm(x).flatten(2).mT))
    torch.testing.assert_close(found, x + value.mT.reshape(x.shape))
    assert (found - before).abs().max() > 1e-2
    assert torch.equal(module(x), before)


def test_a_transformer_still_looks_at_its_context_unmixed():
    module = scattered(SpatialTransformer(8, 2, 4, context_dim=6, blocks=2, groups=4))
    places = pixel_attentions(module)
    assert list(places) == ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]
    x, context = randn(2, 8, 3, 5), randn(2, 7, 6)
    with unmixed(places.values()):
        found = module(x, context)
        assert (found - module(x, context + 1)).abs().max() > 1e-3
        # With no norm over pixels in between, a pixel that changes changes none but itself.
        tokens, block = randn(1, 6, 8), module.transformer_blocks[0]
        other = tokens.clone()
        other[:, 2, 0] += 1  # not all channels alike, which the norm would take out
        moved = (block(other, context[:1]) - block(tokens, context[:1])).abs().amax((0, 2)) > 0
        assert moved.tolist() == [False, False, True, False, False, False]
    assert (found - module(x, context)).abs().max() > 1e-3
    assert ((block(other, context[:1]) - block(tokens, context[:1])).abs().amax((0, 2)) > 0).all()


def test_edm2s_attention_takes_it_too():
    module, x = CosineAttention(8, heads=2).double(), randn(1, 8, 2, 3)
    other = x.clone()
    other[..., 0, 0] += 1
    assert (module(other) - module(x)).abs().amax(1)[0].min() > 0
    with unmixed(pixel_attentions(module).values()):
        assert ((module(other) - module(x)).abs().amax(1)[0] > 0).sum() == 1


def test_it_ends_with_its_block_nests_and_is_of_one_thread_alone():
    one, two = (scattered(SpatialAttention(4, heads=1, head_dim=4)) for _ in range(2))
    x = randn(1, 4, 2, 2)
    plain, elsewhere = one(x), []
    with pytest.raises(ValueError, match="on purpose"), unmixed([one]):
        raise ValueError("on purpose")
    assert torch.equal(one(x), plain)
    with unmixed([one]):
        with unmixed([two]):
            both = one(x), two(x)
        inner = one(x), two(x)
        thread = Thread(target=lambda: elsewhere.append(one(x)))
        thread.start()
        thread.join()
    assert torch.equal(both[0], inner[0])
    assert not torch.equal(both[1], inner[1])
    assert not torch.equal(inner[0], plain)
    assert torch.equal(elsewhere[0], plain)
