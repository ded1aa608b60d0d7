r"""Models that know no classes and no words, guided by a classifier and by a small CLIP: does the guide get its way?

    python benchmarks/steering.py --digits RUN --mnist FOLDER --emoji RUN --noto FOLDER --json steering.json \
        --figure steering.svg --out pictures

draws digits of an unconditional model of MNIST, guided to labels by a classifier of noisy digits that is trained here
(equation 1 of reverie.diffusion.guidance.classifier, on x_t), and emoji of an unconditional model, guided to names by
encoders of pictures and words that are trained here on clean pictures (equation 1 of
reverie.diffusion.guidance.similarity, on the estimate), at several scales. Judges are others than the guides: the share
of digits that the classifier of benchmarks/mnist.py takes for the label, with their Frechet distance; the cosine of
emoji and name by encoders of another seed, and how often these pick the name among 100. Either part may be left out.

References:
    Diffusion Models Beat GANs on Image Synthesis (Dhariwal & Nichol, 2021), section 4
    https://arxiv.org/abs/2105.05233
    GLIDE (Nichol et al., 2022), section 2.4
    https://arxiv.org/abs/2112.10741
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from mnist import Judge, load_split
from report import machine, table, versions
from torch import Tensor, nn

import reverie as rv
from reverie.base.randomness import generator, torch_seed
from reverie.data import open_dataset
from reverie.diffusion.denoisers import Denoiser
from reverie.diffusion.guidance.classifier import ClassifierGuided
from reverie.diffusion.guidance.similarity import SimilarityGuided
from reverie.diffusion.samplers.base import sample
from reverie.evaluation.alignment import ImageText, retrieval, train_image_text
from reverie.models.pictures import grid_picture

PACKAGES = ("reverie", "torch", "numpy")
Pictures = UInt8[Tensor, "n c h w"]


# The guide of digits --------------------------------------------------------------------------


class Noisy(nn.Module):
    """A classifier of noisy digits, told how noisy they are: logits (B, 10) of x (B, 1, 28, 28) and sigma (B,)."""

    def __init__(self) -> None:
        super().__init__()
        widths, layers = (2, 32, 64, 128), []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, 10))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.to(x)[:, None, None, None]
        told = (level.log() / 4).expand(-1, 1, *x.shape[2:])
        return self.body(torch.cat([x / (level**2 + 1) ** 0.5, told], 1))


def train_noisy(images: Pictures, labels: Tensor, steps: int, seed: int = 0, batch_size: int = 128) -> Noisy:
    """Return a classifier trained on digits with noise of levels from a log-normal, its middle at sigma 1."""
    torch.manual_seed(torch_seed(seed, "noisy classifier"))
    network, random = Noisy(), generator(seed, "noisy classifier", "digits")
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.from_numpy(random.integers(0, len(images), batch_size))
        sigma = (1.5 * torch.randn(batch_size)).exp()
        x = images[rows].float() / 127.5 - 1
        loss = nn.functional.cross_entropy(
            network(x + sigma[:, None, None, None] * torch.randn_like(x), sigma), labels[rows]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycle.step()
    return network.eval().requires_grad_(False)


# The two parts --------------------------------------------------------------------------------


def draw(denoiser: Denoiser, shape: Sequence[int], steps: int, seeds: Sequence[int]) -> Pictures:
    """Return samples of a guided denoiser as bytes, by DPM-Solver++(2M)."""
    grid = rv.grids["karras"](denoiser.schedule, steps)
    with torch.no_grad():
        x = sample(rv.samplers["dpmpp-2m"](), denoiser, shape, grid, rv.Noise(list(seeds)))
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def digits(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what a classifier's guidance does to digits, a row for each scale."""
    model, train = rv.load(options.digits), load_split(options.mnist, "train")
    judge = Judge(train, load_split(options.mnist, "t10k"), options.cache)
    guide = train_noisy(train.images, train.labels, options.train_steps)
    label = torch.arange(options.count) % 10
    schedule, rows = model.denoiser.schedule, []

    def knows(x: Tensor, t: Tensor) -> Tensor:
        return guide(x, schedule.sigma(t) / schedule.alpha(t))

    for scale in options.scales:
        guided = ClassifierGuided(model.denoiser, knows, label, scale)
        images = draw(guided, model.card.shape, options.steps, range(options.count))
        right = judge.classifier.accuracy(images, label)
        error = (right * (1 - right) / options.count) ** 0.5
        distance = judge(images)
        rows.append({"scale": scale, "right": right, "error": error, "frechet": distance.value})
        print(rows[-1], file=sys.stderr, flush=True)
        keep(options, images, f"digits-{scale:g}", 10)
    return rows


def emoji(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what guidance by a similarity does to emoji, a row for each scale."""
    model = rv.load(options.emoji)
    data = open_dataset(options.noto, size=model.card.shape[1], channels=model.card.shape[0])
    index = [i for i in range(len(data)) if data.caption(i)]
    images, captions = data.images(index), [data.caption(i) or "" for i in index]
    guide, judge = (train_image_text(images, captions, seed, options.epochs) for seed in (0, 1))
    guide.requires_grad_(False)
    chosen = generator(0, "steering", "names").permutation(len(captions))[: options.count]
    names = [captions[i] for i in chosen]
    text = guide.of_numbers(guide.vocabulary(names))
    rows = [{"scale": None, **scored(judge, images[torch.from_numpy(chosen)], names, captions)}]
    for scale in options.similarity_scales:
        guided = SimilarityGuided(model.denoiser, lambda x, t: guide.of_pictures(x), text, scale)
        drawn = draw(guided, model.card.shape, options.steps, range(options.count))
        rows.append({"scale": scale, **scored(judge, drawn, names, captions)})
        rows[-1]["guide"] = float(guide.similarity(drawn, names).diagonal().mean())
        print(rows[-1], file=sys.stderr, flush=True)
        keep(options, drawn, f"emoji-{scale:g}", 16)
    return rows


def scored(judge: ImageText, images: Pictures, names: list[str], pool: list[str]) -> dict[str, float]:
    """Return the mean cosine of pictures and their names with its error, and how often a name is picked of 100."""
    cosines = judge.similarity(images, names).diagonal()
    share = retrieval(judge, images, names, pool)
    error = float(cosines.std() / len(cosines) ** 0.5)
    return {"cosine": float(cosines.mean()), "error": error, "picked": share.value, "picked_error": share.error}


def keep(options: argparse.Namespace, images: Pictures, name: str, columns: int) -> None:
    """Write the first pictures of a scale, where a folder was named."""
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        grid_picture(images[: 3 * columns], columns=columns).save(options.out / f"{name}.png")


# The command ----------------------------------------------------------------------------------


def figure(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw what each judge says against the scale."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "reverie"
    from matplotlib import pyplot

    shown, axes = pyplot.subplots(1, len(found), figsize=(4.2 * len(found), 3.2), squeeze=False)
    for axis, (part, rows) in zip(axes[0], found.items(), strict=True):
        guided = [row for row in rows if row["scale"] is not None]
        key, word = ("right", "taken for the label") if part == "digits" else ("cosine", "cosine with the name")
        axis.errorbar(
            [r["scale"] for r in guided], [r[key] for r in guided], [2 * r["error"] for r in guided], fmt="o-"
        )
        for row in rows:
            if row["scale"] is None:
                axis.axhline(row[key], color="grey", linestyle="--", label="real pictures")
                axis.legend(fontsize="small")
        axis.set(xlabel=f"scale, {part}", ylabel=word)
    shown.tight_layout()
    shown.savefig(path, metadata={"Date": None})


def main() -> None:
    """Draw, judge, print tables, write the JSON and the figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--digits", help="an unconditional model of MNIST")
    add("--mnist", type=Path, help="folder of MNIST's four IDX files, gzipped")
    add("--emoji", help="an unconditional model of Noto's emoji")
    add("--noto", help="folder of emoji with captions")
    add("--scales", default="0,0.5,1,2,4", help="of the classifier's guidance, with commas")
    add("--similarity-scales", default="0,10,30,100", help="of the similarity's, with commas")
    add("--count", type=int, default=200, help="samples at each scale")
    add("--steps", type=int, default=20)
    add("--train-steps", type=int, default=1500, help="of the classifier of noisy digits")
    add("--epochs", type=int, default=40, help="of the encoders")
    add("--cache", type=Path, help="file of the judging classifier's weights, to train it once")
    add("--out", type=Path, help="write pictures into this folder")
    add("--figure", type=Path)
    add("--json", type=Path)
    options = parser.parse_args()
    if not options.digits and not options.emoji:
        parser.error("give --digits with --mnist, or --emoji with --noto, or both")
    options.scales, options.similarity_scales = (
        [float(word) for word in text.split(",")] for text in (options.scales, options.similarity_scales)
    )
    found = {}
    if options.digits:
        found["digits"] = digits(options)
        print(table(["scale", "right, %", "+-", "Frechet distance"], [
            [f"{r['scale']:g}", f"{100 * r['right']:.1f}", f"{100 * r['error']:.1f}", f"{r['frechet']:.1f}"]
            for r in found["digits"]
        ]))  # fmt: skip
    if options.emoji:
        found["emoji"] = emoji(options)
        print(table(["scale", "cosine", "+-", "picked of 100, %", "+-"], [
            ["real" if r["scale"] is None else f"{r['scale']:g}", f"{r['cosine']:.3f}", f"{r['error']:.3f}",
             f"{100 * r['picked']:.1f}", f"{100 * r['picked_error']:.1f}"] for r in found["emoji"]
        ]))  # fmt: skip
    if options.figure:
        figure(found, options.figure)
    if options.json:
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        about = {"command": command, "machine": machine(), "versions": versions(PACKAGES)}
        options.json.write_text(json.dumps(about | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
