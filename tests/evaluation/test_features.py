"""The small classifier: it learns, it repeats itself, its file is its own."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor

from reverie.base.errors import ModelFileError, NonFiniteError, StorageError, UsageError
from reverie.evaluation.features import SmallClassifier, train_classifier
from reverie.evaluation.frechet import frechet


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 digits (N, 1, 8, 8) with their labels."""
    data = load_digits()
    images = torch.from_numpy(data.images * (255 / 16)).round().to(torch.uint8)[:, None]
    return images, torch.from_numpy(data.target)


@pytest.fixture(scope="module")
def classifier(digits) -> SmallClassifier:
    images, labels = digits
    return train_classifier(images[:1400], labels[:1400], epochs=8, batch_size=64, about={"data": "digits"})


def test_recognises_digits_that_it_has_not_seen(classifier, digits):
    images, labels = digits
    assert classifier.accuracy(images[1400:], labels[1400:]) > 0.93


def test_distance_grows_with_noise(classifier, digits):
    images, real = digits[0][:700], classifier.features(digits[0][700:1400])
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    noisy = [(images + size * noise).clamp(0, 255).to(torch.uint8) for size in (0, 25, 50, 100)]
    distances = [frechet(classifier.features(x), real) for x in noisy]
    assert distances == sorted(distances)
    assert distances[-1] > 2 * distances[0]


def test_features_do_not_depend_on_the_batch(classifier, digits):
    images = digits[0][:50]
    torch.testing.assert_close(classifier.features(images, batch_size=7), classifier.features(images))


def test_features_leave_the_mode_as_it_was(digits):
    classifier = SmallClassifier(1, 10).train()
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    classifier.features(digits[0][:8])
    assert classifier.training
    assert all(torch.equal(before[name], value) for name, value in classifier.state_dict().items())


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32), (3, 7)])
def test_takes_any_image_size(channels, size):
    images = torch.zeros(2, channels, size, size + 1, dtype=torch.uint8)
    assert SmallClassifier(channels, 5).features(images).shape == (2, 64)


def test_the_seed_fixes_the_weights_and_nothing_else_does(digits):
    images, labels = digits[0][:200], digits[1][:200]
    torch.manual_seed(1)
    one = train_classifier(images, labels, seed=3, epochs=1)
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    two = train_classifier(images, labels, seed=3, epochs=1)
    other = train_classifier(images, labels, seed=4, epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.head.weight, other.head.weight)
    torch.manual_seed(1)
    assert torch.equal(state, torch.random.get_rng_state())  # training drew nothing from the global state


def test_progress_is_told_of_each_step(digits):
    seen: list[tuple[int, int]] = []
    train_classifier(
        digits[0][:100], digits[1][:100], epochs=2, batch_size=64, progress=lambda step, of, _: seen.append((step, of))
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_file_gives_the_same_classifier(classifier, digits, tmp_path):
    path = tmp_path / "classifier.safetensors"
    classifier.save(path)
    again = SmallClassifier.load(path)
    assert torch.equal(again.features(digits[0][:20]), classifier.features(digits[0][:20]))
    assert again.about == classifier.about
    assert again.about["data"] == "digits"
    assert again.about["epochs"] == "8"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


# Refusals -------------------------------------------------------------------------------------


def test_a_damaged_or_foreign_file_is_refused(tmp_path):
    path = tmp_path / "classifier.safetensors"
    with pytest.raises(ModelFileError, match="not a readable safetensors file"):
        SmallClassifier.load(path)
    SmallClassifier(1, 10).save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelFileError, match="not a readable safetensors file"):
        SmallClassifier.load(path)
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(ModelFileError, match="not a classifier"):
        SmallClassifier.load(path)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "classifier.safetensors"
    SmallClassifier(1, 10).save(path)
    metadata = {"format": "reverie small classifier 1", "channels": "3", "classes": "10"}
    save_file(load_file(path), path, metadata)
    with pytest.raises(ModelFileError, match="do not fit"):
        SmallClassifier.load(path)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    path = tmp_path / "missing" / "classifier.safetensors"
    with pytest.raises(StorageError, match=r"missing/classifier\.safetensors"):
        SmallClassifier(1, 10).save(path)


def test_wrong_data_is_refused(digits):
    images, labels = digits
    with pytest.raises(UsageError, match="10 images and 9 labels"):
        train_classifier(images[:10], labels[:9])
    with pytest.raises(UsageError, match="have 3 channels; this classifier takes 1"):
        SmallClassifier(1, 10).features(images[:4].expand(-1, 3, -1, -1))


def test_a_loss_that_is_not_finite_ends_the_training(digits):
    with pytest.raises(NonFiniteError, match="loss is"):
        train_classifier(digits[0][:256], digits[1][:256], learning_rate=1e30, epochs=4)
