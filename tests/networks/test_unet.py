"""The U-Net by itself: sizes, conditions, checkpointing, types of number, and what it refuses."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from reverie.base.errors import ModelFileError, UsageError
from reverie.networks import networks
from reverie.networks.unet import UNet, UNetConfig, modern_names

SMALL = {"in_channels": 2, "channels": (8, 12, 16, 16), "layers": 1, "attention": (False, True, False, True)}
NCSN = {
    "channels": (32, 32, 32, 64),
    "layers": 1,
    "norm_num_groups": 8,
    "time_embedding_type": "fourier",
    "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D", "SkipDownBlock2D"),
    "up_block_types": ("SkipUpBlock2D", "SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"),
}


def build(**settings) -> UNet:
    """Build a network in float64 whose parameters are all random."""
    torch.manual_seed(0)
    unet = UNet(UNetConfig(**settings)).double()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return unet


def images(unet: UNet, *size: int, count: int = 2) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(count, unet.config.in_channels, *size, dtype=torch.float64)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (13, 7), (28, 28), (6, 1), (9, 16)])
@pytest.mark.parametrize(
    "extra",
    [{}, {"downsample_padding": 0}, {"downsample_type": "resnet", "upsample_type": "resnet"}, NCSN],
    ids=["padded all round", "padded right and below", "residual", "ncsn++"],
)
def test_any_size(extra, size):
    unet = build(**(extra if extra is NCSN else {**SMALL, **extra}))
    y = unet(images(unet, *size), torch.tensor([3.0, 20.5]))
    assert y.shape == (2, unet.config.out_channels, *size)
    y.square().sum().backward()
    gradients = [p.grad for p in unet.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in gradients)


def test_one_image_of_one_pixel_with_one_channel_in_a_group():
    unet = build(in_channels=1, channels=(8,), norm_num_groups=8)
    assert unet(images(unet, 1, 1, count=1), torch.zeros(1)).isfinite().all()


def test_parameters_of_the_measured_network():
    unet = UNet(UNetConfig(in_channels=1, channels=(32, 64, 64), attention=(False, True, False)))
    assert sum(p.numel() for p in unet.parameters()) == 1_623_169


def test_with_positions_a_place_is_known_far_from_every_edge():
    """Of an even image, pixels in the middle that no edge reaches are all alike; told where they are, they differ."""
    for positions, alike in ((False, True), (True, False)):
        torch.manual_seed(0)
        unet = UNet(UNetConfig(in_channels=1, channels=(8,), layers=1, middle="none", positions=positions)).eval()
        torch.nn.init.normal_(unet.conv_out.weight)
        middle = unet(torch.ones(1, 1, 24, 24), torch.zeros(1)).detach()[0, 0, 10:14, 10:14]
        assert (float(middle.max() - middle.min()) < 1e-5) == alike


@pytest.mark.parametrize("size", [(8, 12), (7, 9)])
def test_patches_are_a_plain_network_of_their_pixels(size):
    """The same layers, given the pixels of patches as channels, and their result taken apart by hand."""
    unet = build(**SMALL | {"in_channels": 3, "out_channels": 3, "patch": 2}, positions=True)
    plain = build(**SMALL | {"in_channels": 12, "out_channels": 12}, positions=True)
    plain.load_state_dict(unet.state_dict())
    x = images(unet, *size)
    padded = torch.zeros(len(x), 3, *(n + n % 2 for n in size), dtype=x.dtype)
    padded[:, :, : size[0], : size[1]] = x
    corners = [padded[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]  # (B, 3, H / 2, W / 2) each
    times = torch.arange(float(len(x)))
    y = plain(torch.stack(corners, 2).flatten(1, 2), times).unflatten(1, (3, 4))
    whole = torch.empty_like(padded)
    for k, (i, j) in enumerate((i, j) for i in (0, 1) for j in (0, 1)):
        whole[:, :, i::2, j::2] = y[:, :, k]
    assert torch.equal(unet(x, times), whole[:, :, : size[0], : size[1]])


def test_the_output_is_zero_before_training():
    unet = UNet(UNetConfig(**SMALL))
    assert not unet(images(unet, 8, 8).float(), torch.tensor([1.0, 2.0])).any()


@pytest.mark.parametrize("told", ["time", "label", "context"])
def test_each_sample_sees_its_own_condition(told):
    unet = build(**SMALL, num_class_embeds=4, context_dim=6)
    x = images(unet, 8, 8, count=1).repeat(3, 1, 1, 1)
    known = {"time": torch.tensor([5.0] * 3), "label": torch.tensor([2] * 3), "context": torch.ones(3, 4, 6).double()}
    known[told][1] = 3
    y = unet(x, **known)
    torch.testing.assert_close(y[0], y[2], rtol=1e-12, atol=1e-12)
    assert (y[0] - y[1]).abs().max() > 1e-4
    alone = unet(x[1:2], **{name: value[1:2] for name, value in known.items()})
    torch.testing.assert_close(alone[0], y[1], rtol=1e-10, atol=1e-10)


def test_time_is_a_number_and_need_not_be_whole():
    unet = build(**SMALL)
    x = images(unet, 8, 8, count=1).repeat(4, 1, 1, 1)
    y = unet(x, torch.tensor([7.0, 7.25, 7.5, 8.0], dtype=torch.float64))
    steps = (y[1:] - y[:-1]).flatten(1).norm(dim=1)
    assert (steps > 1e-6).all()
    assert torch.equal(y, unet(x, torch.tensor([7.0, 7.25, 7.5, 8.0])))
    torch.testing.assert_close(unet(x, torch.tensor([7, 7, 8, 8])), unet(x, torch.tensor([7.0, 7, 8, 8])))


@pytest.mark.parametrize("extra", [{}, {"context_dim": 6}], ids=["attention", "transformer"])
def test_gradient_checkpointing_changes_no_gradient(extra):
    kept = build(**SMALL, **extra, dropout=0.3)
    again = copy.deepcopy(kept)
    again.gradient_checkpointing = True
    assert (kept.gradient_checkpointing, again.gradient_checkpointing) == (False, True)
    context = {"context": torch.randn(2, 3, 6).double()} if extra else {}
    for unet in (kept, again):
        torch.manual_seed(2)
        unet(images(unet, 8, 8), torch.tensor([1.0, 2.0]), **context).square().sum().backward()
    for (name, one), other in zip(kept.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-12, atol=1e-12, msg=name)


def saved_numbers(unet: UNet) -> int:
    """Count the numbers that a forward pass keeps for the backward pass."""
    total = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        unet(images(unet, 16, 16), torch.tensor([1.0, 2.0]))
    return total


def test_gradient_checkpointing_keeps_less():
    unet = build(**{**SMALL, "layers": 2})
    everything = saved_numbers(unet)
    unet.gradient_checkpointing = True
    assert saved_numbers(unet) < 0.6 * everything


def test_dropout_is_for_training_only():
    unet = build(**SMALL, dropout=0.5)
    x, time = images(unet, 8, 8), torch.tensor([1.0, 2.0])
    assert not torch.equal(unet(x, time), unet(x, time))
    unet.eval()
    assert torch.equal(unet(x, time), unet(x, time))


def test_channels_last_goes_through():
    unet = build(**SMALL, context_dim=6).to(memory_format=torch.channels_last)
    strayed = []

    def look(module: nn.Module, given: tuple, y: torch.Tensor) -> None:
        if isinstance(y, torch.Tensor) and y.ndim == 4 and not y.is_contiguous(memory_format=torch.channels_last):
            strayed.append(type(module).__name__)

    for module in unet.modules():
        module.register_forward_hook(look)
    x = images(unet, 16, 16).contiguous(memory_format=torch.channels_last)
    unet(x, torch.tensor([1.0, 2.0]), context=torch.randn(2, 3, 6).double())
    assert not strayed


def test_mixed_precision_is_close_and_so_are_its_gradients():
    unet = build(**SMALL).float()
    x, time = images(unet, 8, 8).float(), torch.tensor([1.0, 2.0])
    outputs, gradients = [], []
    for half in (False, True):
        unet.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y = unet(x, time)
        y.float().square().sum().backward()
        outputs.append(y)
        gradients.append(torch.cat([p.grad.flatten() for p in unet.parameters()]))
    assert outputs[1].dtype == torch.bfloat16
    for want, got in (outputs, gradients):
        assert (got - want).norm() < 0.05 * want.norm()


def test_all_of_it_in_half_precision():
    unet = build(**SMALL)
    x, time = images(unet, 8, 8), torch.tensor([1.0, 999.0])
    want = unet(x, time)
    got = unet.bfloat16()(x.bfloat16(), time)
    assert got.dtype == torch.bfloat16
    assert (got - want).norm() < 0.05 * want.norm()


@pytest.mark.parametrize("extra", [{"center_input_sample": True}, {"class_embed_type": "identity"}, NCSN])
def test_derivatives_are_right(extra):
    settings = {"in_channels": 1, "channels": (4, 4), "layers": 1}
    unet = build(**(extra if extra is NCSN else {**settings, **extra}))
    identity = unet.config.class_embed_type == "identity"
    label = {"label": torch.randn(1, unet.config.time_channels).double()} if identity else {}
    x = images(unet, 3, 2, count=1).requires_grad_()
    torch.autograd.gradcheck(lambda x: unet(x, torch.tensor([2.0]), **label), (x,), fast_mode=True)


def test_second_derivatives_and_forward_mode():
    """Sliced score matching needs the one, consistency training in continuous time the other."""
    unet = build(in_channels=1, channels=(4, 4), layers=1, attention=(False, True))
    x, time = images(unet, 3, 2, count=1).requires_grad_(), torch.tensor([2.0])
    with sdpa_kernel(SDPBackend.MATH):
        torch.autograd.gradgradcheck(lambda x: unet(x, time), (x,), fast_mode=True)
        direction = torch.ones_like(x)
        _, forward = torch.func.jvp(lambda x: unet(x, time), (x.detach(),), (direction,))
        _, backward = torch.autograd.functional.jvp(lambda x: unet(x, time), (x,), (direction,))
    torch.testing.assert_close(forward, backward)


COMPILE = """
import torch
from reverie.networks.unet import UNet, UNetConfig
unet = UNet(UNetConfig(channels=(8, 8), layers=1, attention=(False, True), num_class_embeds=3, context_dim=6)).double()
torch.nn.init.normal_(unet.conv_out.weight)
given = torch.randn(2, 3, 13, 7).double(), torch.ones(2), torch.tensor([0, 2]), torch.randn(2, 3, 6).double()
compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
torch.testing.assert_close(compiled(*given), unet(*given), rtol=1e-10, atol=1e-10)
"""


@pytest.mark.slow
def test_it_compiles_in_one_graph():
    """In a process of its own: the checks of shapes that tests add cannot be compiled."""
    subprocess.run([sys.executable, "-c", COMPILE], check=True, timeout=200)


def test_a_config_can_be_built_without_memory():
    """The largest plan on the meta device: what a reader of strange checkpoints does first."""
    with torch.device("meta"):
        unet = UNet(UNetConfig(channels=(16384,) * 12, layers=8, attention=(True,) * 12, num_class_embeds=1_000_000))
    assert sum(p.numel() for p in unet.parameters()) > 10**12


def test_registry_builds_it():
    kind = networks["unet"]
    assert kind is UNet
    assert kind(kind.Config(channels=(8, 8))).config.channels == (8, 8)


CLASSES = {**SMALL, "num_class_embeds": 3}
X, T = torch.zeros(2, 2, 8, 8), torch.zeros(2)


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        (SMALL, {"x": torch.zeros(2, 3, 8, 8), "time": T}, r"images are \(2, 3, 8, 8\).*takes \(B, 2, H, W\)"),
        (SMALL, {"x": X, "time": torch.zeros(1)}, r"time is \(1,\).*\(2,\)"),
        (SMALL, {"x": X, "time": T, "label": torch.zeros(2).long()}, "without classes"),
        (SMALL, {"x": X, "time": T, "context": torch.zeros(2, 3, 4)}, "attends to no context"),
        (CLASSES, {"x": X, "time": T}, "needs a label"),
        (CLASSES, {"x": X, "time": T, "label": torch.tensor([0])}, r"label is \(1,\)"),
        (CLASSES, {"x": X, "time": T, "label": torch.tensor([0, 3])}, "label 3 is not one of 0 .. 2"),
        (CLASSES, {"x": X, "time": T, "label": torch.tensor([-1, 0])}, "label -1 is not one of"),
        (CLASSES, {"x": X, "time": T, "label": torch.tensor([0, 1.5])}, "label 1.5 is not one of"),
        ({**SMALL, "context_dim": 4}, {"x": X, "time": T}, "needs a context"),
        ({**SMALL, "context_dim": 4}, {"x": X, "time": T, "context": torch.zeros(2, 3, 5)}, r"must be \(2, L, 4\)"),
        (
            {**SMALL, "time_embedding_type": "learned", "num_train_timesteps": 10},
            {"x": X, "time": torch.tensor([0.5, 3.0])},
            "time 0.5 is not one of 0 .. 9",
        ),
    ],
)
def test_what_does_not_fit_is_refused(settings, given, message):
    unet = UNet(UNetConfig(**settings))

    def refuse() -> None:
        """Go past the shapes in the signature, which tests check first, to the message that a user sees."""
        unet._check(**{"label": None, "context": None, **given})
        unet._embed(given["time"], given.get("label"))

    with pytest.raises(UsageError, match=message):
        refuse()


def test_old_names():
    names = {
        "down_blocks.1.attentions.0.query.weight": "down_blocks.1.attentions.0.to_q.weight",
        "mid_block.attentions.0.proj_attn.bias": "mid_block.attentions.0.to_out.0.bias",
        "mid_block.attentions.0.group_norm.bias": "mid_block.attentions.0.group_norm.bias",
        "time_proj.W": "time_proj.weight",
        "conv_in.weight": "conv_in.weight",
        "key.weight": "key.weight",
    }
    assert list(modern_names({name: torch.zeros(1) for name in names})) == list(names.values())


def test_a_tensor_under_both_its_names():
    assert list(modern_names({"time_proj.W": torch.ones(2), "time_proj.weight": torch.ones(2)})) == ["time_proj.weight"]
    with pytest.raises(ModelFileError, match=r"time_proj.weight twice"):
        modern_names({"time_proj.W": torch.ones(2), "time_proj.weight": torch.zeros(2)})
