"""Snapshots of power-function averages in a run's folder, and a model of any other length made of them.

    runs/NAME/snapshots/power-0.05-00000500.safetensors    the weights of length 0.05 after 500 updates

A file holds what is averaged and nothing else. They are written as the run goes on, also by a resumed run, and
never deleted; the formulas are in power.py.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from reverie.base.errors import ModelFileError, UsageError
from reverie.base.storage import write_file
from reverie.models.checkpoints import check_saveable, check_tensors, safetensors_writer
from reverie.models.formats.weights import read_header, read_tensors
from reverie.models.load import load
from reverie.models.model import Model
from reverie.training.ema import PowerEMA, averageable, distinct, overwrite
from reverie.training.power import Combination, Profile, combine

FOLDER = "snapshots"
FILE = re.compile(r"power-(\d+(?:\.\d+)?)-(\d{8,})\.safetensors", re.ASCII)


@dataclass(frozen=True)
class Snapshot:
    """An average of one length as it was after so many updates.

    Arguments:
        path: Its file.
        sigma_rel: Its relative length.
        updates: The updates that it was taken after, at least 1.
    """

    path: Path
    sigma_rel: float
    updates: int

    @property
    def profile(self) -> Profile:
        """The profile of its average."""
        return Profile.of_length(self.sigma_rel, self.updates)


def write_snapshot(run: Path, ema: PowerEMA, updates: int) -> Path:
    """Write an average as it is now, whole or not at all, and return its file.

    Raises:
        StorageError: The disk is full, read-only, gone or faulty.
        NonFiniteError: A weight is NaN or infinite.
    """
    path = run / FOLDER / f"power-{ema.sigma_rel:.12g}-{updates:08d}.safetensors"
    path.parent.mkdir(exist_ok=True)
    weights = ema.weights()
    check_saveable({"snapshot": weights}, str(path))
    write_file(path, safetensors_writer(weights), sum(w.numel() * w.element_size() for w in weights.values()))
    return path


def find_snapshots(run: Path | str) -> list[Snapshot]:
    """Return a run's snapshots, in the order of their updates.

    Raises:
        UsageError: It has none.
    """
    folder = Path(run) / FOLDER
    found = [(path, FILE.fullmatch(path.name)) for path in sorted(folder.iterdir())] if folder.is_dir() else []
    snapshots = [Snapshot(path, float(match[1]), int(match[2])) for path, match in found if match and int(match[2])]
    if not snapshots:
        raise UsageError(
            f"{run} has no snapshots of its averages; train with --ema-lengths 0.1,0.05 (edm2 does so by itself)"
        )
    return sorted(snapshots, key=lambda snapshot: (snapshot.updates, snapshot.sigma_rel))


def settle(snapshots: Sequence[Snapshot], sigma_rel: float, updates: int | None = None) -> Combination:
    """Return the shares of snapshots that make an average of another length, and the error of its profile.

    Arguments:
        snapshots: Those there are.
        sigma_rel: The relative length that is wanted.
        updates: At which update; the last snapshot's, if not said.

    Raises:
        UsageError: There is no such length, or no snapshot, or the update lies beyond the last.
    """
    last = max((snapshot.updates for snapshot in snapshots), default=0)
    if updates is not None and not 1 <= updates <= last:
        raise UsageError(f"update {updates} is not one of 1 .. {last}, which the snapshots reach")
    return combine([s.profile for s in snapshots], Profile.of_length(sigma_rel, updates or last))


def reconstruct(snapshots: Sequence[Snapshot], sigma_rel: float, updates: int | None = None) -> dict[str, Tensor]:
    """Return the weights that an average of a length would have, by name, in float32.

    One snapshot is in memory at a time.

    Arguments:
        snapshots: Those of a run.
        sigma_rel: The relative length that is wanted, whether it was tracked or not.
        updates: At which update; the last snapshot's, if not said.

    Raises:
        UsageError: There is no such length, or the update lies beyond the last snapshot.
        ModelFileError: A snapshot is damaged, or of another network.
    """
    shares = settle(snapshots, sigma_rel, updates).shares
    total: dict[str, Tensor] = {}
    first = read_header(snapshots[0].path).specs
    for snapshot, share in zip(snapshots, shares, strict=True):
        check_tensors(first, read_header(snapshot.path).specs, str(snapshot.path))
        for name, tensor in read_tensors(snapshot.path, first).items():
            part = tensor.double() * share
            total[name] = total[name].add_(part) if name in total else part
    weights = {name: tensor.float() for name, tensor in total.items()}
    if bad := [name for name, tensor in weights.items() if not bool(tensor.isfinite().all())]:
        raise ModelFileError(f"{snapshots[0].path.parent}: {bad[0]} comes out as NaN or infinity; a file is damaged")
    return weights


def rebuild(run: Path | str, sigma_rel: float, updates: int | None = None, device: str = "cpu") -> Model:
    """Return a run's model with averaged weights of any length.

    Raises:
        UsageError: The path is no run with snapshots, or there is no such length.
        ModelFileError: Something there is damaged.
    """
    snapshots = find_snapshots(run)
    model = load(run, device=device)
    put_weights(model, reconstruct(snapshots, sigma_rel, updates), str(run))
    model.origin["weights"] = f"ema-power-{sigma_rel:.12g}, of {len(snapshots)} snapshots"
    return model


def put_weights(model: Model, weights: dict[str, Tensor], where: str) -> None:
    """Give a model's network averaged weights; its buffers stay.

    Raises:
        ModelFileError: They are of another network.
    """
    tensors, _ = distinct(model.denoiser.network)
    averaged = {name: tensor for name, tensor in tensors.items() if averageable(tensor)}
    check_tensors({name: tensor.float() for name, tensor in averaged.items()}, weights, where)
    with torch.no_grad():
        overwrite(averaged, weights)
