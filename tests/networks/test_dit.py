"""The diffusion transformer: beside diffusers' on the same weights, and by itself."""

import pytest
import torch
from pydantic import ValidationError

from reverie.base.errors import UsageError
from reverie.networks import networks
from reverie.networks.dit import DiT, DiTConfig, positions


def small(**changes: object) -> DiT:
    """A transformer whose zeros are drawn, so that every part shows in the output."""
    torch.manual_seed(0)
    net = DiT(DiTConfig(**({"in_channels": 2, "width": 16, "depth": 2, "heads": 2} | changes)))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net


def test_registry_builds_it():
    assert networks["dit"] is DiT
    assert networks["dit"].Config is DiTConfig


def test_it_is_diffusers_transformer():
    """The same weights, the same output; theirs has the embedding of the time in each block, ours once."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=2, out_channels=4, num_layers=2, sample_size=6,
        patch_size=2, num_embeds_ada_norm=5, norm_eps=1e-6,
    ).eval()  # fmt: skip
    ours = small(out_channels=4, num_class_embeds=6)
    theirs.load_state_dict(as_diffusers(ours), strict=False)
    x, time, label = torch.randn(3, 2, 6, 6), torch.tensor([0, 500, 999]), torch.tensor([0, 3, 5])
    with torch.no_grad():
        want = theirs(x, time, class_labels=label).sample
        got = ours(x, time, label)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert want.std() > 0.01


def as_diffusers(net: DiT) -> dict[str, torch.Tensor]:
    """The weights by their names in diffusers' DiTTransformer2DModel."""
    given = net.state_dict()
    found = {f"pos_embed.proj.{leaf}": given[f"patches.{leaf}"] for leaf in ("weight", "bias")}
    for i in range(net.config.depth):
        theirs, ours = f"transformer_blocks.{i}", f"blocks.{i}"
        emb = f"{theirs}.norm1.emb"
        found[f"{emb}.class_embedder.embedding_table.weight"] = given["class_embedding.weight"]
        for leaf in ("weight", "bias"):
            for layer in ("linear_1", "linear_2"):
                found[f"{emb}.timestep_embedder.{layer}.{leaf}"] = given[f"time_embedding.{layer}.{leaf}"]
            found[f"{theirs}.norm1.linear.{leaf}"] = given[f"{ours}.modulation.{leaf}"]
            found[f"{theirs}.ff.net.0.proj.{leaf}"] = given[f"{ours}.ff.net.0.{leaf}"]
            found[f"{theirs}.ff.net.2.{leaf}"] = given[f"{ours}.ff.net.2.{leaf}"]
            for part in ("to_q", "to_k", "to_v", "to_out.0"):
                found[f"{theirs}.attn1.{part}.{leaf}"] = given[f"{ours}.attn1.{part}.{leaf}"]
    for leaf in ("weight", "bias"):
        found[f"proj_out_1.{leaf}"] = given[f"modulation_out.{leaf}"]
        found[f"proj_out_2.{leaf}"] = given[f"proj_out.{leaf}"]
    return found


def test_zero_before_training_and_each_block_the_identity():
    net = DiT(DiTConfig(width=16, depth=2, heads=2, context_dim=4))
    x, context = torch.randn(1, 3, 4, 4), torch.randn(1, 5, 4)
    assert not net(x, torch.ones(1), context=context).any()
    tokens = torch.randn(1, 4, 16)
    assert torch.equal(net.blocks[0](tokens, torch.randn(1, 16), context), tokens)


@pytest.mark.parametrize("size", [(1, 1), (5, 8), (7, 3)])
def test_any_size_is_taken(size):
    net = small(patch=3)
    assert net(torch.randn(2, 2, *size), torch.rand(2)).shape == (2, 2, *size)


def test_what_is_cropped_says_nothing():
    """An image that the patch does not divide is the image continued with zeros."""
    net = small()
    x, time = torch.randn(1, 2, 5, 5), torch.ones(1)
    whole = net(torch.nn.functional.pad(x, (0, 1, 0, 1)), time)
    torch.testing.assert_close(net(x, time), whole[:, :, :5, :5])


def test_each_image_has_its_own_time_label_and_context():
    net = small(num_class_embeds=4, context_dim=3).double()
    x, time, label = torch.randn(3, 2, 4, 4).double(), torch.tensor([1.0, 5.0, 5.0]), torch.tensor([0, 0, 3])
    context = torch.randn(3, 5, 3).double()
    together = net(x, time, label, context)
    alone = [net(x[i : i + 1], time[i : i + 1], label[i : i + 1], context[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-10, atol=1e-10)
    assert (net(x, time, label, context.flip(1)) - together).abs().max() < 1e-10  # a context has no order
    assert (net(x, time, label, context.flip(0)) - together).abs().max() > 1e-4
    assert (net(x, time + 1, label, context) - together).abs().max() > 1e-4
    assert (net(x, time, label.flip(0), context)[0] - together[0]).abs().max() > 1e-4


def test_patches_know_their_places():
    """Without positions a transformer of one patch a pixel would commute with any shift."""
    net = small(patch=1)
    x, time = torch.randn(1, 2, 4, 4), torch.ones(1)
    assert (net(x.roll(1, 3), time) - net(x, time).roll(1, 3)).abs().max() > 1e-3
    table = positions(3, 5, 16)
    assert len(torch.unique(table, dim=0)) == 15
    torch.testing.assert_close(table.norm(dim=1), torch.full((15,), 8.0**0.5))


def test_an_embedding_as_label_and_channels_beside():
    net = small(in_channels=5, out_channels=2, class_embed_type="identity")
    x, beside, label = torch.randn(2, 2, 4, 4), torch.randn(2, 3, 4, 4), torch.randn(2, 16)
    got = net(x, torch.ones(2), label, beside=beside)
    torch.testing.assert_close(got, net(torch.cat([x, beside], 1), torch.ones(2), label))


def test_checkpointing_changes_no_gradient():
    net, x, time = small(), torch.randn(2, 2, 4, 4), torch.rand(2)
    grads = []
    for on in (False, True):
        net.gradient_checkpointing = on
        net.zero_grad()
        net(x, time).square().sum().backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"x": torch.zeros(2, 3, 4, 4)}, "takes"),
        ({"label": None}, "needs a label"),
        ({"label": torch.zeros(2, 2)}, "label is"),
        ({"label": torch.tensor([0, 9])}, "label 9"),
        ({"context": torch.zeros(2, 5, 3)}, "attends to no context"),
    ],
)
def test_what_does_not_fit_is_refused(given, says):
    net = small(num_class_embeds=4)
    whole = {"x": torch.zeros(2, 2, 4, 4), "time": torch.zeros(2), "label": torch.zeros(2, dtype=torch.int64)} | given
    with pytest.raises(UsageError, match=says):
        net(**whole)


@pytest.mark.parametrize(
    "wrong", [{"width": 18}, {"heads": 5}, {"num_class_embeds": 2, "class_embed_type": "identity"}]
)
def test_settings_that_do_not_fit_are_refused(wrong):
    with pytest.raises(ValidationError):
        DiTConfig(**({"width": 16, "heads": 2} | wrong))
