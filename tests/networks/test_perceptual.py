"""The distance by a random network, and the critic of patches."""

import pytest
import torch

from reverie.networks.discriminator import Discriminator, hinge
from reverie.networks.perceptual import Perceptual


def pattern(size: int = 32) -> torch.Tensor:
    x = torch.linspace(0, 25, size)
    return (x.sin()[:, None] * x.cos()).expand(1, 3, size, size)


def test_it_is_a_distance_for_each_image_and_always_the_same():
    torch.manual_seed(0)
    x, y = torch.rand(3, 3, 20, 17), torch.rand(3, 3, 20, 17)
    distance = Perceptual(3)
    torch.testing.assert_close(distance(x, y), distance(y, x))
    assert torch.equal(distance(x, x), torch.zeros(3))
    torch.testing.assert_close(distance(x, y)[1:2], distance(x[1:2], y[1:2]))
    torch.manual_seed(1)
    assert torch.equal(Perceptual(3)(x, y), distance(x, y))  # whatever torch's generator is at
    assert not any(parameter.requires_grad for parameter in distance.parameters())


def test_a_lost_pattern_is_farther_than_the_same_error_in_brightness():
    """Both differ from the picture by the same mean square; the one that people see is the blur."""
    picture = pattern()
    blurred = picture.mean((2, 3), keepdim=True).expand_as(picture)
    error = (picture - blurred).square().mean().sqrt()
    assert Perceptual(3)(picture, blurred) > 1.5 * Perceptual(3)(picture, picture + error)


def test_its_gradient_leads_to_the_picture():
    picture = pattern(16)
    guess = torch.zeros_like(picture).requires_grad_()
    distance, optimizer = Perceptual(3), torch.optim.Adam([guess], 0.05)
    for _ in range(80):
        optimizer.zero_grad()
        loss = distance(guess, picture).sum() + (guess - picture).abs().mean()
        loss.backward()
        optimizer.step()
    assert distance(guess, picture) < 0.2 * distance(torch.zeros_like(picture), picture)


@pytest.mark.parametrize("size", [(16, 16), (33, 40)])
def test_the_critic_scores_patches(size):
    critic = Discriminator(1, width=8, layers=3)
    scores = critic(torch.randn(2, 1, *size))
    assert scores.shape == (2, 1, size[0] // 8, size[1] // 8)
    far = torch.randn(1, 1, 64, 64)
    near = far.clone()
    near[..., 48:] = 0
    norms = critic.norms
    critic.norms = torch.nn.ModuleList(torch.nn.Identity() for _ in norms)  # which see the whole image
    assert torch.equal(critic(far)[..., :3], critic(near)[..., :3])  # a patch's score knows its patch alone


def test_hinge_is_content_beyond_the_margin():
    scores = torch.tensor([[[[2.0, 0.0]]]])
    assert float(hinge(scores, -scores)) == 0.5  # of each side one patch is one short: (1/2 + 1/2) / 2
    assert float(hinge(2 * torch.ones(1, 1, 1, 1), -2 * torch.ones(1, 1, 1, 1))) == 0
