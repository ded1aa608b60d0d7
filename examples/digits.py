"""Train on handwritten digits, draw each of them, and ask a classifier of the real ones what it sees.

    python examples/digits.py --out runs/demo

The classifier is scikit-learn's support vector machine, trained on the 1,797 real digits.
"""

import argparse
from pathlib import Path

import numpy as np
from sklearn.svm import SVC

import reverie as rv
from reverie.data import open_dataset
from reverie.models.pictures import grid_picture

EACH = 20  # samples of each digit that are judged
SHOWN = 8  # and shown


def train_classifier() -> SVC:
    """Return a classifier of the real digits, pixels in [0, 1]."""
    digits = open_dataset("digits")
    everything = range(len(digits))
    labels = digits.labels(everything)
    assert labels is not None
    return SVC(gamma=0.3, C=10).fit(features(digits.images(everything).numpy()), labels.numpy())


def features(images: np.ndarray) -> np.ndarray:
    """Return 8-bit images (N, 1, 8, 8) as rows (N, 64) in [0, 1]."""
    return images.reshape(len(images), -1) / 255


def main() -> None:
    """Train, sample, judge, and write the grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="the run's folder")
    parser.add_argument("--steps", type=int, default=800, help="training steps")
    parser.add_argument("--guidance", type=float, default=2.0, help="classifier-free guidance")
    options = parser.parse_args()

    run = rv.train(
        data="digits", out=str(options.out), steps=options.steps, batch_size=32, resume="auto",
        save_every=500, sample_every=0, validate_every=500,
    )  # fmt: skip
    model = rv.load(run)

    labels = [digit for digit in range(10) for _ in range(EACH)]
    samples = model.sample(len(labels), seed=0, classes=labels, sampler="ddim", steps=50, guidance=options.guidance)
    seen = train_classifier().predict(features(samples.uint8.numpy()))
    right = float((seen == np.array(labels)).mean())

    shown = [digit * EACH + i for i in range(SHOWN) for digit in range(10)]
    names = [model.card.classes[labels[i]] for i in shown]
    picture = options.out / "digits.png"
    grid_picture(samples.uint8[shown], columns=10, labels=names).save(picture)
    print(f"A classifier of the real digits recognises {right:.1%} of {len(labels)} samples as the digit asked for.")
    print(f"The grid is {picture}")


if __name__ == "__main__":
    main()
