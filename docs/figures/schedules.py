"""The figure of the schedules page: log SNR against time.

python docs/figures/schedules.py
"""

from pathlib import Path

import matplotlib
import torch

import reverie as rv

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "reverie"  # the same bytes each time
from matplotlib import pyplot as plt  # noqa: E402 - after the choice of what draws

FILE = Path(__file__).parent.parent / "images" / "schedules.svg"


def main() -> None:
    """Draw the figure."""
    t = torch.linspace(0.002, 0.998, 250, dtype=torch.float64)
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for i, name in enumerate(rv.schedules):
        axes.plot(t, rv.schedules[name]().log_snr(t), label=name, linestyle="-" if i < 6 else "--", linewidth=1.2)
    axes.set(xlabel="t", ylabel="log SNR", xlim=(0, 1), ylim=(-15, 15))
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.legend(fontsize=7, ncols=2, frameon=False)
    FILE.parent.mkdir(exist_ok=True)
    figure.savefig(FILE, metadata={"Date": None})


if __name__ == "__main__":
    main()
