"""The handwritten digits that come with scikit-learn, embedded: 1797 grey images of 8x8 with their labels.

The images are the test part of the UCI data set, by E. Alpaydin and C. Kaynak (1998), under CC BY 4.0, as
scikit-learn (BSD-3-Clause) distributes them. Their values, counts of dark pixels from 0 to 16, are scaled to
0..255 by round(v 255 / 16). tools/make_digits.py writes digits.npz.

References:
    Optical Recognition of Handwritten Digits (Alpaydin & Kaynak, 1998)
    https://doi.org/10.24432/C50P49
"""

from importlib.resources import files

import numpy as np

from reverie.base.errors import UsageError
from reverie.data.arrays import ArrayImages
from reverie.data.options import Options


def open_digits(argument: str, options: Options) -> ArrayImages:
    """Return the digits.

    Raises:
        UsageError: They were given an argument.

    Example:
        >>> open_digits("", Options()).classes
        ('0', '1', '2', '3', '4', '5', '6', '7', '8', '9')
    """
    if argument:
        raise UsageError(f"digits:{argument}: digits takes no argument; write digits")
    with files("reverie.data").joinpath("digits.npz").open("rb") as file, np.load(file) as stored:
        counts, labels = stored["images"], stored["labels"]
    pixels = np.rint(counts * (255 / 16)).astype(np.uint8)
    return ArrayImages("digits", pixels[..., None], options, labels)
