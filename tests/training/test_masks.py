"""Masks: a function of their key, of all kinds, and what stands beside the input."""

import torch

from reverie.training.masks import EVERYTHING, beside, random_mask


def test_a_mask_is_its_key_and_nothing_else():
    one, other = random_mask(16, 12, 3, "mask", 7), random_mask(16, 12, 3, "mask", 8)
    assert one.shape == (16, 12)
    assert torch.equal(one, random_mask(16, 12, 3, "mask", 7))
    assert not torch.equal(one, other)


def test_a_share_leaves_nothing_and_none_draws_nothing():
    masks = [random_mask(32, 32, 0, "mask", i) for i in range(500)]
    whole = sum(bool(mask.all()) for mask in masks)
    spread = 4 * (500 * EVERYTHING * (1 - EVERYTHING)) ** 0.5  # false positives: fewer than 1 in 10,000
    assert abs(whole - 500 * EVERYTHING) < spread
    assert all(mask.any() for mask in masks)
    partial = torch.stack([mask for mask in masks if not mask.all()]).float()
    assert 0.1 < float(partial.mean()) < 0.6
    assert float(partial.mean(0).min()) > 0.03  # no corner is never drawn


def test_the_smallest_pictures_have_masks_too():
    assert all(random_mask(1, 1, "mask", i).all() for i in range(20))
    assert all(random_mask(1, 5, "mask", i).any() for i in range(20))


def test_beside_is_the_mask_and_what_it_leaves():
    x0 = torch.rand(3, 2, 8, 8) * 2 - 1
    made = beside(x0, [4, 5, 6], 0, "mask")
    mask = made[:, :1]
    assert made.shape == (3, 3, 8, 8)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(made[:, 1:], x0 * (1 - mask))
    assert torch.equal(mask[1, 0], random_mask(8, 8, 0, "mask", 5).float())
