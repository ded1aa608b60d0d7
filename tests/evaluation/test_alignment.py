"""Encoders of pictures and words, and what they measure."""

import math

import pytest
import torch

from reverie.base.errors import UsageError
from reverie.data import open_dataset
from reverie.data.words import make_vocabulary
from reverie.evaluation.alignment import ImageText, Share, contrast, retrieval, train_image_text


class Knows(ImageText):
    """Encoders that know: a picture's first pixel is the place of its caption in a list."""

    def __init__(self, captions):
        super().__init__(1, make_vocabulary(captions, least=1))
        self.captions = captions

    def similarity(self, images, captions, batch_size=500):
        shown = [self.captions[int(image[0, 0, 0])] for image in images]
        return torch.tensor([[float(a == b) for b in captions] for a in shown])


def numbered(numbers):
    return torch.tensor(numbers, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 4, 4)


def test_retrieval_counts_what_is_nearest():
    captions = [f"number {i}" for i in range(20)]
    pair = Knows(captions)
    assert retrieval(pair, numbered(range(20)), captions, captions, among=10) == Share(1.0, 0.0)
    half = retrieval(pair, numbered([0, 1, 7, 8]), captions[:4], captions, among=20)
    assert half == Share(0.5, 0.25)
    with pytest.raises(UsageError, match="20 different captions; 21"):
        retrieval(pair, numbered([0]), captions[:1], captions, among=21)


def test_encoders_that_know_nothing_pick_by_chance():
    """400 pictures among 4: a share outside of 4.5 standard errors of a quarter is seen once in 150,000 draws."""
    torch.manual_seed(0)
    captions = [f"word{i}" for i in range(400)]
    pair = ImageText(1, make_vocabulary(captions, least=1)).eval()
    images = torch.randint(0, 256, (400, 1, 8, 8), dtype=torch.uint8)
    found = retrieval(pair, images, captions, captions, among=4, seed=3)
    assert abs(found.value - 0.25) < 4.5 * math.sqrt(0.25 * 0.75 / 400)


def test_the_loss_is_the_cross_entropy_of_the_diagonal_both_ways():
    torch.manual_seed(0)
    f, g = (torch.nn.functional.normalize(torch.randn(5, 7), dim=1) for _ in range(2))
    scale, target = torch.tensor(1.3), torch.arange(5)
    logits = scale.exp() * f @ g.T
    want = (torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(contrast(f, g, scale, target[:, None]), want)
    twice = contrast(f, g, scale, torch.tensor([[0], [0], [1], [2], [3]]))  # two pictures of one caption
    assert twice != want


@pytest.mark.slow
def test_trained_encoders_tell_pictures_that_they_have_not_seen():
    """Shapes of known words: chance among 20 is 5 %."""
    data = open_dataset("shapes:16,count=900,groups=1")
    images, captions = data.images(range(900)), [data.caption(i) for i in range(900)]
    pair = train_image_text(images[:700], captions[:700], epochs=25, batch_size=100, flip=False)
    found = retrieval(pair, images[700:], captions[700:], captions[700:], among=20)
    assert found.value > 0.4


def test_training_is_a_function_of_its_arguments():
    data = open_dataset("shapes:16,count=20,groups=1")
    images, captions = data.images(range(20)), [data.caption(i) for i in range(20)]
    first, second = (train_image_text(images, captions, epochs=1, batch_size=10) for _ in range(2))
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    with pytest.raises(UsageError, match="one for each"):
        train_image_text(images, captions[:3])
