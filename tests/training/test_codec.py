"""An autoencoder's training: its losses, its run, and what comes of it."""

import io

import pytest
import torch

from reverie.base.errors import ModelFileError, UsageError
from reverie.data import open_dataset
from reverie.models.checkpoints import CheckpointStore
from reverie.models.formats.codec_file import read_codec
from reverie.networks.autoencoder import Autoencoder, AutoencoderConfig
from reverie.networks.discriminator import Discriminator
from reverie.training.codec import CodecRun, factor_for, network_for, train_codec
from reverie.training.codec_config import CodecConfig
from reverie.training.codec_update import CodecUpdate, balance
from reverie.training.config import TrainConfig
from reverie.training.metrics import Console
from reverie.training.trainer import train

QUICK = {
    "widths": (8, 8), "batch_size": 8, "save_every": 3, "sample_every": 4, "sample_count": 4, "validate_every": 4,
    "log_every": 2, "limit": 60, "device": "cpu", "dtype": "float32", "warmup": 0,
}  # fmt: skip


def quick(folder, **settings) -> CodecConfig:
    return CodecConfig(out=str(folder), **(QUICK | settings))


def go(folder, resume="no", **settings) -> str:
    stream = io.StringIO()
    train_codec(quick(folder, **settings), resume, stream)
    return stream.getvalue()


def tensors(folder) -> dict[str, torch.Tensor]:
    checkpoint = CheckpointStore(folder / "checkpoints").latest()
    return {f"{g}/{name}": value for g in checkpoint.groups for name, value in checkpoint.tensors(g).items()}


def make_update(**settings) -> CodecUpdate:
    torch.manual_seed(0)
    config = quick("x", **({"perceptual": 0.0} | settings))
    network = Autoencoder(AutoencoderConfig(in_channels=1, channels=(8, 8), latent_channels=2, layers=1))
    critic = Discriminator(1, width=8, layers=2) if config.adversarial else None
    return CodecUpdate(network, critic, None, config, None, 1e-3)


def test_the_loss_is_the_sum_of_its_terms():
    update, x = make_update(kl=0.5), torch.rand(4, 1, 8, 8)
    noise = torch.randn(4, 2, 4, 4)
    made, moments = update.network(x, noise)
    want = {"pixels": (made - x).abs().mean(), "divergence": 0.5 * moments.divergence().mean() / 64}
    report = update(x, noise, 0)
    assert report.loss == pytest.approx(float(sum(want.values()).detach()), rel=1e-5)
    assert report.parts == {name: pytest.approx(float(value.detach()), rel=1e-5) for name, value in want.items()}


def test_the_divergence_pulls_the_latents_to_a_standard_normal():
    """With a large weight the posterior becomes the prior; with none it does not."""
    found = {}
    for kl in (0.0, 100.0):
        update = make_update(kl=kl)
        for step in range(60):
            update(torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(step)), torch.zeros(8, 2, 4, 4), step)
        found[kl] = float(update.network.encode(torch.rand(8, 1, 8, 8)).divergence().mean().detach())
    assert found[100.0] < 0.2 < found[0.0]


def test_the_critics_gradient_is_as_large_as_the_pixels():
    w = torch.nn.Parameter(torch.randn(5))
    a, b = (w * torch.randn(5)).sum(), (1e-2 * w * torch.randn(5)).sum()
    scale = balance(a, b, w)
    size = [torch.autograd.grad(loss, w, retain_graph=True)[0].norm() for loss in (a, scale * b)]
    assert float(size[1] / size[0]) == pytest.approx(1, rel=0.02)


def test_a_critic_is_heard_when_its_time_has_come():
    update = make_update(adversarial=0.5, adversarial_after=1)
    x, noise = torch.rand(4, 1, 16, 16), torch.randn(4, 2, 8, 8)
    before = [p.clone() for p in update.critic.parameters()]
    assert "adversarial" not in update(x, noise, 0).parts
    assert all(torch.equal(a, b) for a, b in zip(before, update.critic.parameters(), strict=True))
    assert {"adversarial", "critic"} <= update(x, noise, 1).parts.keys()
    assert any(not torch.equal(a, b) for a, b in zip(before, update.critic.parameters(), strict=True))
    assert all(p.requires_grad and p.grad is None for p in update.critic.parameters())


def test_a_step_that_is_not_finite_changes_nothing():
    update = make_update(adversarial=0.5, adversarial_after=0)
    before = [p.clone() for p in (*update.network.parameters(), *update.critic.parameters())]
    report = update(torch.full((2, 1, 16, 16), torch.nan), torch.zeros(2, 2, 8, 8), 0)
    assert "nan" in report.skipped
    after = [*update.network.parameters(), *update.critic.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert update.counted == 0


@pytest.mark.parametrize("settings", [{}, {"adversarial": 0.5, "adversarial_after": 2}])
def test_a_resumed_run_is_the_run_bit_for_bit(tmp_path, settings):
    go(tmp_path / "whole", steps=6, **settings)
    go(tmp_path / "parts", steps=3, **settings)
    assert "resuming" in go(tmp_path / "parts", "yes", steps=6)
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_its_result_is_a_vae_that_diffusers_opens_and_training_takes(tmp_path):
    said = go(tmp_path / "codec", steps=4)
    assert "latents 4x4x4" in said
    assert "PSNR" in said
    assert (tmp_path / "codec" / "samples" / "step-00000004.png").is_file()
    codec = read_codec(str(tmp_path / "codec"))
    theirs = pytest.importorskip("diffusers").AutoencoderKL.from_pretrained(tmp_path / "codec" / "vae")
    x = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(x).latent_dist.mean, codec.network.encode(x).mean, atol=1e-5, rtol=0)
    assert theirs.config.scaling_factor == codec.scale
    run = train(
        TrainConfig(
            out=str(tmp_path / "run"), codec=str(tmp_path / "codec"), steps=1, widths=(8, 8), layers=1, limit=20,
            sample_every=0, validate_every=0, device="cpu",
        ),
        "no",
        io.StringIO(),
    )  # fmt: skip
    assert (run / "model").is_dir()


def test_it_learns(tmp_path):
    """After 60 steps on digits a picture is nearer to its reconstruction than to any constant."""
    go(
        tmp_path / "run",
        steps=60,
        widths=(16, 16),
        sample_every=0,
        batch_size=32,
        limit=400,
        learning_rate=3e-3,
        ema=0.9,
    )
    images = open_dataset("digits").images(range(32)).float() / 127.5 - 1
    network = read_codec(str(tmp_path / "run")).network
    with torch.no_grad():
        error = (network(images)[0] - images).square().mean()
    assert error < 0.25 * (images - images.mean()).square().mean()


def test_sizes_follow_from_the_data():
    digits, shapes = open_dataset("digits"), open_dataset("shapes:32,count=4")
    assert network_for(CodecConfig(out="x"), digits).factor == 1
    assert network_for(CodecConfig(out="x"), shapes).channels == (32, 64, 128)
    assert network_for(CodecConfig(out="x", factor=2), digits).factor == 2
    assert factor_for(128) == 8
    with pytest.raises(UsageError, match="does not divide 8x8"):
        network_for(CodecConfig(out="x", factor=16), digits)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"adversarial_after": 5}, "no effect without"), ({"factor": 8, "widths": (8, 8)}, "factor of 2, not 8")],
)
def test_what_does_not_go_together_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        CodecConfig(out="x", **settings)


def test_another_run_is_not_resumed(tmp_path):
    go(tmp_path / "run", steps=1)
    with pytest.raises(ModelFileError, match="latent_channels is 4 there, 3 here"):
        go(tmp_path / "run", "yes", steps=2, latent_channels=3)
    with pytest.raises(UsageError, match="holds a run already"):
        go(tmp_path / "run", steps=2)


def test_making_a_run_writes_nothing(tmp_path):
    CodecRun(quick(tmp_path / "run", steps=1), False, Console(io.StringIO()))
    assert not (tmp_path / "run").exists()
