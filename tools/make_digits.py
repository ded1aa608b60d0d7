"""Write reverie/data/digits.npz from scikit-learn's handwritten digits: python tools/make_digits.py"""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

TARGET = Path(__file__).parents[1] / "reverie" / "data" / "digits.npz"


def main() -> None:
    """Write images (1797, 8, 8), values 0 to 16, and labels (1797,), both uint8."""
    digits = load_digits()
    np.savez_compressed(TARGET, images=digits.images.astype(np.uint8), labels=digits.target.astype(np.uint8))
    print(f"{TARGET}: {TARGET.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
