"""A class folded into the weights gives that class's samples."""

import pytest
import torch

from reverie.base.errors import UsageError
from reverie.models.fold import fold_class


@pytest.mark.parametrize("name", ["zero", "two", 1, None])
def test_it_draws_what_the_class_draws(classy, name):
    alone = fold_class(classy, name)
    want = classy.sample(3, classes=name, guidance=None if name is None else 1.0, steps=3, clip=False)
    got = alone.sample(3, steps=3, clip=False)
    assert alone.card.classes == ()
    torch.testing.assert_close(got.images, want.images, atol=1e-5, rtol=0)


def test_classes_differ(classy):
    assert not torch.equal(
        fold_class(classy, 0).sample(1, steps=2).images, fold_class(classy, 1).sample(1, steps=2).images
    )


def test_it_leaves_the_model_as_it_was(classy):
    before = classy.digest
    fold_class(classy, "one")
    assert classy.digest == before


def test_a_model_without_classes_is_refused(model, classy):
    with pytest.raises(UsageError, match="U-Net of classes"):
        fold_class(model)
    with pytest.raises(UsageError, match="no class 'nine'"):
        fold_class(classy, "nine")
