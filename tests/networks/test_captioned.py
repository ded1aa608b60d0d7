"""The U-Net with an encoder of words."""

import pytest
import torch
from pydantic import ValidationError

from reverie.base.errors import UsageError
from reverie.networks.captioned import Captioned, CaptionedConfig

UNET = {"unet": {"channels": (8, 16), "attention": (False, True)}}
DIT = {"dit": {"width": 16, "depth": 2, "heads": 2}}


def make(inner=UNET, **words):
    torch.manual_seed(0)
    config = CaptionedConfig(words={"vocabulary": 9, "length": 5, "width": 16, **words}, **inner)
    net = Captioned(config).eval()
    for p in net.parameters():  # the zeros of the start would hide everything
        torch.nn.init.normal_(p, std=0.2)
    return net


@pytest.mark.parametrize("inner", [UNET, DIT])
def test_the_words_and_their_order_decide_the_picture(inner):
    net, x, time = make(inner), torch.randn(1, 3, 8, 8), torch.tensor([500.0])
    said = [torch.tensor([row]) for row in ([1, 2, 0, 0, 0], [2, 1, 0, 0, 0], [1, 3, 0, 0, 0], [0, 0, 0, 0, 0])]
    pictures = [net(x, time, tokens=tokens) for tokens in said]
    for i, a in enumerate(pictures):
        for b in pictures[:i]:
            assert (a - b).abs().max() > 1e-4


def test_words_encoded_beforehand_are_the_same_words():
    net, x, time = make(), torch.randn(2, 3, 8, 8), torch.tensor([500.0, 3.0])
    tokens = torch.tensor([[1, 2, 3, 0, 0], [4, 0, 0, 0, 0]])
    assert torch.equal(net(x, time, tokens=tokens), net(x, time, **net.encode(tokens)))


def test_the_encoder_is_the_equations():
    """Equations (1) and (2) in float64, with the attention written out."""
    net = make(heads=2).double()
    tokens = torch.tensor([[1, 2, 3, 0, 0]])
    words = net.words
    e = words.embedding.weight[tokens] + words.position
    for block in words.blocks:
        h = torch.nn.functional.layer_norm(e, (16,), block.norm1.weight, block.norm1.bias)
        q, k, v = (
            layer(h).unflatten(-1, (2, 8)).transpose(1, 2)
            for layer in (block.attn.to_q, block.attn.to_k, block.attn.to_v)
        )
        seen = ((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        e = e + block.attn.to_out[0](seen)
        h = torch.nn.functional.layer_norm(e, (16,), block.norm2.weight, block.norm2.bias)
        inner, gate = block.ff.net[0].proj(h).chunk(2, -1)
        e = e + block.ff.net[2](inner * torch.nn.functional.gelu(gate))
    context = torch.nn.functional.layer_norm(e, (16,), words.norm.weight, words.norm.bias)
    found, pooled = words(tokens)
    torch.testing.assert_close(found, context)
    torch.testing.assert_close(pooled, words.pool(context.mean(1)))


@pytest.mark.parametrize("inner", [UNET, DIT])
def test_every_parameter_has_a_gradient(inner):
    net = make(inner)
    net(torch.randn(2, 3, 8, 8), torch.rand(2), tokens=torch.ones(2, 5, dtype=torch.int64)).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("given", [{}, {"tokens": torch.zeros(1, 5).long(), "context": torch.zeros(1, 5, 16)}])
def test_one_of_tokens_and_context(given):
    with pytest.raises(UsageError, match="one of the two"):
        make()(torch.zeros(1, 3, 8, 8), torch.zeros(1), **given)


def test_wrong_tokens_are_refused():
    with pytest.raises(UsageError, match=r"must be \(B, 5\)"):
        make().encode(torch.zeros(1, 4).long())
    with pytest.raises(UsageError, match="tokens 9"):
        make().encode(torch.full((1, 5), 9))
    with pytest.raises(ValidationError, match="heads"):
        make(heads=3)


@pytest.mark.parametrize("inner", [{}, UNET | DIT])
def test_there_is_one_network_of_images(inner):
    with pytest.raises(ValidationError, match="unet or dit"):
        make(inner)
