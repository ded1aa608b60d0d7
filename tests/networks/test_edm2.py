"""EDM2's network: against a plain statement of it in float64, and what the paper promises of it."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from reverie.base.errors import UsageError
from reverie.networks import networks
from reverie.networks.edm2 import EDM2, SIZES, EDM2Config, sized
from reverie.networks.edm2_layers import MPWeight, magnitude

SMALL = {"in_channels": 2, "channels": (8, 12, 16), "layers": 2, "attention": (False, True, False), "head_dim": 4,
         "num_class_embeds": 5}  # fmt: skip


def awake(network: EDM2, seed: int = 0) -> EDM2:
    """Draw the gains that start at zero, and give weights lengths of their own."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 0:
                parameter.copy_(0.5 + torch.rand(()))
            else:
                parameter.mul_(1 + torch.rand(()))
    return network


# A plain statement of the paper's equations and figure 21 ---------------------------------------


class Plain:
    """The whole network as nested functions of a state dict, written from the paper alone."""

    def __init__(self, network: EDM2) -> None:
        self.w, self.config = {k: v.detach().double() for k, v in network.state_dict().items()}, network.config

    def linear(self, name: str, x: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
        w = self.w[f"{name}.weight"]
        flat = w.flatten(1)
        n = flat.shape[1]
        w = (flat / (flat.norm(dim=1, keepdim=True) + 1e-4 * math.sqrt(n))).reshape(w.shape) * gain
        return x @ w.T if w.ndim == 2 else F.conv2d(x, w, padding="same")

    @staticmethod
    def silu(x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x) / 0.596

    @staticmethod
    def add(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
        return ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)

    @staticmethod
    def concatenate(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
        na, nb = a.shape[1], b.shape[1]
        c = math.sqrt((na + nb) / ((1 - t) ** 2 + t**2))
        return torch.cat([c * (1 - t) / math.sqrt(na) * a, c * t / math.sqrt(nb) * b], 1)

    @staticmethod
    def norm(x: torch.Tensor, dim: int) -> torch.Tensor:
        return x / (x.square().mean(dim, keepdim=True).sqrt() + 1e-4)

    def attention(self, name: str, x: torch.Tensor) -> torch.Tensor:
        b, c, h, w = x.shape
        heads = {12: 3, 16: 4}[c]
        qkv = self.norm(self.linear(f"{name}.qkv", x).reshape(b, 3, heads, c // heads, h * w), 3)
        q, k, v = qkv.unbind(1)
        share = (q.mT @ k / math.sqrt(c // heads)).softmax(-1)
        return self.linear(f"{name}.out", (v @ share.mT).reshape(b, c, h, w))

    def block(self, name: str, x: torch.Tensor, emb: torch.Tensor, encoder: bool) -> torch.Tensor:
        skip = f"{name}.conv_skip.weight" in self.w
        if encoder:
            x = self.norm(self.linear(f"{name}.conv_skip", x) if skip else x, 1)
        y = self.linear(f"{name}.conv_1", self.silu(x))
        y = y * (self.linear(f"{name}.emb_linear", emb, float(self.w[f"{name}.emb_gain"])) + 1)[:, :, None, None]
        y = self.linear(f"{name}.conv_2", self.silu(y))
        if not encoder and skip:
            x = self.linear(f"{name}.conv_skip", x)
        x = self.add(x, y, 0.3)
        if f"{name}.attention.qkv.weight" in self.w:
            x = self.add(x, self.attention(f"{name}.attention", x), 0.3)
        return x

    @staticmethod
    def halve(x: torch.Tensor) -> torch.Tensor:
        h, w = -(-x.shape[2] // 2), -(-x.shape[3] // 2)
        out = torch.empty(*x.shape[:2], h, w, dtype=x.dtype)
        for i in range(h):
            for j in range(w):
                out[:, :, i, j] = x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((2, 3))
        return out

    def __call__(self, x: torch.Tensor, time: torch.Tensor, label: torch.Tensor | None) -> torch.Tensor:
        f, p = self.w["fourier.frequencies"], self.w["fourier.phases"]
        emb = self.linear("emb_noise", math.sqrt(2) * torch.cos(2 * math.pi * (time[:, None] * f + p)))
        if label is not None:
            count = self.config.num_class_embeds
            onehot = torch.eye(count, dtype=torch.float64)[label] * math.sqrt(count)
            emb = self.add(emb, self.linear("emb_label", onehot), 0.5)
        emb = self.silu(emb)

        x = self.linear("conv_in", torch.cat([x, torch.ones_like(x[:, :1])], 1))
        states, e, d = [x], 0, 0
        for level in range(len(self.config.channels)):
            if level:
                x = self.block(f"encoder.{e}", self.halve(x), emb, True)
                states.append(x)
                e += 1
            for _ in range(self.config.layers):
                x = self.block(f"encoder.{e}", x, emb, True)
                states.append(x)
                e += 1
        for _ in range(2):
            x = self.block(f"decoder.{d}", x, emb, False)
            d += 1
        for level in reversed(range(len(self.config.channels))):
            if level < len(self.config.channels) - 1:
                height, width = states[-1].shape[2:]
                x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, :height, :width]
                x = self.block(f"decoder.{d}", x, emb, False)
                d += 1
            for _ in range(self.config.layers + 1):
                x = self.block(f"decoder.{d}", self.concatenate(x, states.pop(), 0.5), emb, False)
                d += 1
        assert not states
        return self.linear("conv_out", x, float(self.w["out_gain"]))


@pytest.mark.parametrize("size", [(8, 8), (13, 7), (28, 28)])
@pytest.mark.parametrize("labels", [5, None])
def test_the_network_is_the_papers(size, labels):
    network = awake(EDM2(EDM2Config(**SMALL | {"num_class_embeds": labels}))).double().eval()
    rng = np.random.default_rng(0)
    x, time = torch.from_numpy(rng.standard_normal((3, 2, *size))), torch.tensor([-1.5, 0.0, 1.1]).double()
    label = None if labels is None else torch.tensor([4, 0, 2])
    want = Plain(network)(x, time, label)
    assert float(want.square().mean().sqrt()) > 0.3
    torch.testing.assert_close(network(x, time, label), want, rtol=1e-9, atol=1e-9)


def test_each_part_of_the_network_counts():
    """The comparison above would find a part that is left out of both: every parameter changes the output."""
    network = awake(EDM2(EDM2Config(**SMALL)))
    x, time, label = torch.randn(2, 2, 9, 8), torch.tensor([-0.5, 0.4]), torch.tensor([1, 3])
    network(x, time, label).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad.abs().max() > 1e-9, name


# What the paper says ------------------------------------------------------------------------------

MILLIONS = {"xs": 125, "s": 280, "m": 498, "l": 777, "xl": 1119, "xxl": 1523}  # its table 2


@pytest.mark.parametrize("size", list(SIZES))
def test_sizes_are_the_papers(size):
    with torch.device("meta"):
        network = EDM2(sized(size))
    assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6) == MILLIONS[size]


def test_attention_of_the_papers_networks_is_where_the_image_is_16_or_8():
    with torch.device("meta"):
        network = EDM2(sized("xs"))
    attends = [block.attention is not None for block in network.encoder]
    assert attends == [False] * 3 + ([False] + [False] * 3) + ([False] + [True] * 3) * 2
    assert [block.attention is not None for block in network.decoder][:6] == [True, False, True, True, True, True]
    assert {block.attention.heads for block in network.encoder if block.attention is not None} == {6, 8}


def magnitudes(network: EDM2, x: torch.Tensor, time: torch.Tensor, label: torch.Tensor) -> dict[str, float]:
    """Return the magnitude of what each block and each weighted layer gives."""
    seen: dict[str, float] = {}
    for name, module in network.named_modules():
        if isinstance(module, MPWeight) or (name.startswith(("encoder.", "decoder.")) and name.count(".") == 1):
            module.register_forward_hook(
                lambda _, __, out, name=name: seen.__setitem__(name, float(out.detach().square().mean().sqrt()))
            )
    network(x, time, label)
    return seen


def test_at_the_start_every_activation_has_magnitude_one():
    """Blocks within 20 %, layers within 35 %: the zeros around an 8x8 image alone take 8 % at each convolution,
    attention averages, and what SiLU gives has a mean. Drift would add up: 21 blocks of 10 % make a factor of 7."""
    torch.manual_seed(0)
    config = EDM2Config(in_channels=3, channels=(64, 96, 128), num_class_embeds=10, layers=2)
    network = EDM2(config)
    x, time = torch.randn(8, 3, 32, 32), torch.randn(8) * 0.3
    seen = magnitudes(network, x, time, torch.arange(8))
    assert seen.pop("conv_out") == 0
    blocks = {name: value for name, value in seen.items() if name.count(".") == 1}
    assert len(blocks) == len(network.encoder) + len(network.decoder)
    assert all(0.8 < value < 1.2 for value in blocks.values()), blocks
    layers = {n: v for n, v in seen.items() if n not in blocks and "emb_linear" not in n and "attention" not in n}
    assert all(0.65 < value < 1.35 for value in layers.values()), layers


def test_at_the_start_weights_are_of_length_one_and_the_output_is_zero():
    torch.manual_seed(0)
    network = EDM2(EDM2Config(**SMALL))
    for module in network.modules():
        if isinstance(module, MPWeight):
            torch.testing.assert_close(module.effective().flatten(1).norm(dim=1), torch.ones(len(module.weight)),
                                       rtol=0, atol=2e-4)  # fmt: skip
    assert not network(torch.randn(1, 2, 8, 8), torch.zeros(1), torch.tensor([0])).any()
    assert not [name for name, _ in network.named_parameters() if "bias" in name]


def test_the_output_does_not_depend_on_the_scale_of_any_weight():
    network = awake(EDM2(EDM2Config(**SMALL))).double()
    args = torch.randn(2, 2, 8, 8).double(), torch.tensor([-0.5, 0.4]), torch.tensor([1, 3])
    before = network(*args)
    with torch.no_grad():
        for i, module in enumerate(m for m in network.modules() if isinstance(m, MPWeight)):
            module.weight.mul_(0.5 + i % 4)
    assert (network(*args) - before).abs().max() < 2e-2 * before.abs().max()
    for module in network.modules():
        if isinstance(module, MPWeight):
            module.after_update()
            assert (magnitude(module.weight, range(1, module.weight.ndim)) - 1).abs().max() < 3e-4
    assert (network(*args) - before).abs().max() < 2e-2 * before.abs().max()


def test_gradients_are_orthogonal_to_weights():
    network = awake(EDM2(EDM2Config(**SMALL))).double()
    y = network(torch.randn(2, 2, 8, 8).double(), torch.tensor([-0.5, 0.4]), torch.tensor([1, 3]))
    (y * torch.randn_like(y)).sum().backward()
    for name, module in network.named_modules():
        if isinstance(module, MPWeight):
            cosine = torch.cosine_similarity(module.weight.flatten(1), module.weight.grad.flatten(1))
            assert cosine.abs().max() < 1e-3, name


def test_the_constant_channel_is_a_bias():
    """At an input of zero the output is not zero: the ones come through."""
    network = awake(EDM2(EDM2Config(**SMALL)))
    assert network(torch.zeros(1, 2, 8, 8), torch.zeros(1), torch.tensor([0])).abs().max() > 0.05


def test_activations_are_clipped():
    network = awake(EDM2(EDM2Config(**SMALL | {"clip": 0.5})))
    seen = []
    network.encoder[0].register_forward_hook(lambda _, __, out: seen.append(out))
    network(torch.randn(1, 2, 8, 8), torch.zeros(1), torch.tensor([0]))
    assert float(seen[0].detach().abs().max()) == 0.5


# As a network of the house ------------------------------------------------------------------------


def test_registry_builds_it():
    assert networks["edm2"] is EDM2
    assert networks["edm2"].Config is EDM2Config


def test_each_image_has_its_own_time_and_class():
    network = awake(EDM2(EDM2Config(**SMALL))).double().eval()
    x, time, label = torch.randn(1, 2, 8, 8).double(), torch.tensor([0.1, 0.6, 0.6]).double(), torch.tensor([0, 0, 3])
    y = network(x.expand(3, -1, -1, -1), time, label)
    assert (y[0] - y[1]).abs().max() > 1e-3
    assert (y[1] - y[2]).abs().max() > 1e-3
    torch.testing.assert_close(y[1:2], network(x, time[1:2], label[1:2]), rtol=1e-10, atol=1e-10)


def test_checkpointing_changes_nothing():
    network = awake(EDM2(EDM2Config(**SMALL)))
    args = torch.randn(2, 2, 8, 8), torch.tensor([-0.5, 0.4]), torch.tensor([1, 3])
    grads = []
    for on in (False, True):
        network.gradient_checkpointing = on
        network.zero_grad()
        network(*args).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in network.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_dropout_is_for_training_only():
    network = awake(EDM2(EDM2Config(**SMALL | {"dropout": 0.5})))
    args = torch.randn(1, 2, 8, 8), torch.zeros(1), torch.tensor([0])
    assert not torch.equal(network(*args), network(*args))
    network.eval()
    assert torch.equal(network(*args), network(*args))


def test_bfloat16_is_near():
    network = awake(EDM2(EDM2Config(**SMALL))).eval()
    args = torch.randn(2, 2, 8, 8), torch.tensor([-0.5, 0.4]), torch.tensor([1, 3])
    want = network(*args)
    with torch.autocast("cpu", torch.bfloat16):
        got = network(*args)
    assert got.dtype == torch.bfloat16
    assert (got - want).abs().max() < 0.1 * want.abs().max()


def test_config_settles():
    config = EDM2Config(in_channels=1, channels=(8, 16, 24))
    assert (config.out_channels, config.attention, config.embedding) == (1, (False, True, True), 24)
    assert EDM2Config(**config.model_dump()) == config
    assert [config.heads(channels) for channels in (8, 64, 96, 160, 320)] == [1, 1, 1, 2, 5]
    assert config.heads(128) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"attention": (True,)},
        {"head_dim": 0},
        {"channels": ()},
        {"dropout": 1.0},
        {"residual_share": 0.0},
        {"clip": 0.0},
        {"unknown": 1},
    ],
)
def test_wrong_configs(wrong):
    with pytest.raises(ValidationError):
        EDM2Config(**SMALL | wrong)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(2, 3, 8, 8)}, "takes \\(B, 2, H, W\\)"),
        ({"time": torch.zeros(3)}, "time is"),
        ({"label": None}, "needs a label"),
        ({"label": torch.zeros(3)}, "label is \\(3,\\)"),
        ({"label": torch.tensor([0, 5])}, "label 5 is not one of 0 .. 4"),
        ({"label": torch.tensor([0.5, 1.0])}, "label 0.5"),
    ],
)
def test_refusals(unchecked, change, words):
    args = {"x": torch.zeros(2, 2, 8, 8), "time": torch.zeros(2), "label": torch.tensor([0, 1])}
    with pytest.raises(UsageError, match=words):
        EDM2(EDM2Config(**SMALL))(**args | change)
    with pytest.raises(UsageError, match="without classes"):
        EDM2(EDM2Config(**SMALL | {"num_class_embeds": None}))(**args)
