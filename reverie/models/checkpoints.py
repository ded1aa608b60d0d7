"""Checkpoints that are whole, or not there.

A checkpoint is a folder: one safetensors file for each group of tensors (model, ema-0.9999, optimizer, rng),
state.json for every number beside them, and manifest.json, written last, with the length and checksums of each.
There is no pickle in it. It is made under another name and becomes visible by one rename:

    step-00000500.tmp-<pid>/ -> each file fsynced -> manifest.json -> fsync -> read back -> rename -> fsync(parent)

and only then may an older one go. Nothing points at the latest: it is the highest step whose manifest and
checksums hold. Neither a clock nor a file's time decides anything.

References:
    safetensors, the format
    https://huggingface.co/docs/safetensors
    RFC 1952, section 8: crc32, which finds every flipped bit and every burst of up to 32
    https://www.rfc-editor.org/rfc/rfc1952
"""

import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import reverie
from reverie.base import storage
from reverie.base.errors import ModelFileError, NonFiniteError, StorageError, UsageError
from reverie.base.storage import Digest, Writer, alive, file_digest, guarded, sync_folder, write_synced

FORMAT = 1
MANIFEST, RECORD = "manifest.json", "state.json"
FINISHED = re.compile(r"step-(\d{8,})(?:-(\d+))?", re.ASCII)
UNFINISHED = re.compile(r"step-\d{8,}(?:-\d+)?\.tmp-(\d+)", re.ASCII)
TRASH = ".trash-"
GROUP = re.compile(r"[a-z0-9][\w.-]*", re.ASCII | re.IGNORECASE)

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
DTYPE_NAMED = {name: dtype for dtype, name in DTYPES.items()}


# Tensors in a file ----------------------------------------------------------------------------


class Spec(NamedTuple):
    """A tensor without its numbers."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: "Tensor | Spec") -> "Spec":
        """Return a tensor's spec; a spec is its own."""
        return tensor if isinstance(tensor, Spec) else cls(tuple(tensor.shape), tensor.dtype)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {self.shape}"


def raw(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes in row-major order, whatever its strides and device."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def safetensors_writer(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Callable[[Writer], None]:
    """Return the function that writes tensors, and texts by name, as a safetensors file.

    The library writes such files too, but past `storage.put`; here each byte is counted and summed up as it
    leaves, so that what is read back is compared with the memory and not with itself. No copy of the whole is made.
    """
    # Wide types first, so that each tensor starts at a multiple of its item's size.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].numel() * tensors[name].dtype.itemsize
        kind, shape = DTYPES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(writer: Writer) -> None:
        writer.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            writer.write(raw(tensors[name]))

    return write


def nonfinite(tensor: Tensor) -> int:
    """Return how many numbers of a tensor are NaN or infinite.

    Example:
        >>> nonfinite(torch.tensor([1.0, float("nan"), float("inf")])), nonfinite(torch.full((9,), 3e38))
        (2, 0)
    """
    if not tensor.is_floating_point():
        return 0
    values = tensor.detach()
    values = values.float() if values.dtype.itemsize == 1 else values
    if bool(values.sum().isfinite()):  # one pass and no copy; a sum may overflow, so its failure decides nothing
        return 0
    return int((~values.isfinite()).sum())


def check_saveable(tensors: Mapping[str, Mapping[str, Tensor]], where: str) -> None:
    """Refuse what could not be read back, and what ought not to be.

    Raises:
        NonFiniteError: A tensor holds NaN or infinity.
        UsageError: A group or tensor of a kind that the format has no place for.
    """
    for group, named in tensors.items():
        if not GROUP.fullmatch(group):
            raise UsageError(f"{where}: {group!r} cannot name a group; use letters, digits, '.', '-' and '_'")
        for name, tensor in named.items():
            if tensor.dtype not in DTYPES or tensor.layout != torch.strided or tensor.is_meta or name == "__metadata__":
                kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
                raise UsageError(f"{where}: {group}/{name} ({kind}) cannot be saved; make it dense and real")
            if bad := nonfinite(tensor):
                message = f"{where}: {group}/{name} has {bad} NaN or infinite numbers of {tensor.numel()}; not saved"
                raise NonFiniteError(f"{message}: go on from an older checkpoint, with a lower learning rate")


def check_tensors(
    expected: Mapping[str, Tensor | Spec], found: Mapping[str, Tensor | Spec], source: str = "the file"
) -> None:
    """Compare names, shapes and dtypes before anything is taken.

    Arguments:
        expected: What the model has.
        found: What the file has.
        source: The file, for the message.

    Raises:
        ModelFileError: They differ; the message shows the first three differences and their number.

    Example:
        >>> check_tensors({"w": torch.zeros(3, 2)}, {"w": torch.zeros(4, 2)}, "runs/a")
        Traceback (most recent call last):
        reverie.base.errors.ModelFileError: runs/a: 1 of 1 tensors do not fit: w is float32 (4, 2), not ...
    """
    faults = []
    for name in expected:
        if name not in found:
            faults.append(f"{name} is missing")
        elif (there := Spec.of(found[name])) != (here := Spec.of(expected[name])):
            faults.append(f"{name} is {there}, not {here}")
    faults += [f"{name} has no place" for name in found if name not in expected]
    if faults:
        count = f"{len(faults)} of {len({*expected, *found})} tensors do not fit"
        raise ModelFileError(f"{source}: {count}: {first(faults)}; build the model as it was, or use another file")


def first(faults: list[str], shown: int = 3) -> str:
    """Return the first few of a list, and how many more there are.

    Example:
        >>> first(["a", "b", "c", "d", "e"])
        'a; b; c; and 2 more'
    """
    more = [f"and {len(faults) - shown} more"] if len(faults) > shown else []
    return "; ".join(faults[:shown] + more)


# The manifest ---------------------------------------------------------------------------------


def seal(manifest: Mapping[str, Any]) -> bytes:
    """Return a manifest as text that carries its own checksum."""
    inner = json.dumps(manifest, indent=1, sort_keys=True).encode()
    return json.dumps({**manifest, "crc32": f"{zlib.crc32(inner):08x}"}, indent=1, sort_keys=True).encode()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest, which is as it was written.

    Raises:
        ModelFileError: It is missing, damaged, or of a newer format; the message is the cause alone.
    """
    try:
        text = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise ModelFileError(f"{MANIFEST} is missing: the save did not finish, or the file was deleted") from None
    except OSError as error:
        raise ModelFileError(f"{MANIFEST} cannot be read: {error.strerror}") from error
    try:
        manifest = json.loads(text)
        newer = manifest["format"] > FORMAT
        whole = newer or (manifest.pop("crc32") and seal(manifest) == text and well_formed(manifest))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ModelFileError(f"{MANIFEST} is damaged") from None
    if newer:
        raise ModelFileError(f"its format {manifest['format']} is newer than this version's ({FORMAT}): update reverie")
    if not whole:
        raise ModelFileError(f"{MANIFEST} is damaged")
    return manifest


def well_formed(manifest: Mapping[str, Any]) -> bool:
    """Return whether a manifest says what its readers look for, in the types that they expect."""
    lengths = [Digest(**digest).bytes for digest in manifest["files"].values()]
    numbers = [manifest["format"], manifest["step"], *lengths]
    whole = all(type(number) is int and number >= 0 for number in numbers)
    return whole and manifest["format"] == FORMAT and manifest.keys() >= {"code", "torch", "threads"}


def problems(folder: Path, thorough: bool) -> Iterator[str]:
    """Yield what is wrong with a checkpoint, the cheap checks first."""
    if not folder.is_dir():
        yield "it is not a folder"
        return
    try:
        manifest = read_manifest(folder)
        # Files whose name begins with a dot are the system's (.DS_Store, .nfs0001), and nothing here reads them.
        present = {path.name: path for path in folder.iterdir() if not path.name.startswith(".")}
    except ModelFileError as error:
        yield str(error)
        return
    except OSError as error:
        yield f"it cannot be read: {error.strerror}"
        return

    named = FINISHED.fullmatch(folder.name)
    if named and int(named[1]) != manifest["step"]:
        yield f"it holds step {manifest['step']}: the folder was renamed"
    listed = manifest["files"]
    yield from (f"{name} is missing" for name in listed if name not in present)
    yield from (f"{name} is not part of it" for name in sorted(present.keys() - listed.keys() - {MANIFEST}))
    for name in sorted(listed.keys() & present.keys()):
        if fault := file_problem(present[name], Digest(**listed[name]), thorough):
            yield f"{name} {fault}"


def file_problem(path: Path, written: Digest, thorough: bool) -> str | None:
    """Return how a file differs from what was written, if it does."""
    try:
        if path.is_symlink() or not path.is_file():
            return "is not a plain file"
        length = path.stat().st_size
        if length != written.bytes:
            return f"{'is truncated' if length < written.bytes else 'has grown'}: {length} bytes of {written.bytes}"
        if file_digest(path, thorough) != (written if thorough else replace(written, sha256=None)):
            return "is damaged: its checksum differs (a flipped bit, or a change by hand)"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


def verify(folder: Path | str, thorough: bool = True) -> list[str]:
    """Return what is wrong with a checkpoint: nothing, if it is as it was written.

    Arguments:
        folder: A folder such as runs/digits/checkpoints/step-00000500.
        thorough: Whether to compare sha256 as well as crc32, which alone finds what accidents do.
    """
    return list(problems(Path(folder), thorough))


# Reading --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was verified; its tensors are read when asked for.

    Arguments:
        path: Its folder.
        step: How many steps came before it.
        record: What was saved beside the tensors.
        manifest: Step, versions, threads, files with their checksums.
        warnings: Newer checkpoints that could not be used, each with its cause, in a sentence.
    """

    path: Path
    step: int
    record: dict[str, Any]
    manifest: dict[str, Any]
    warnings: tuple[str, ...] = ()

    @property
    def groups(self) -> list[str]:
        """The names of the groups of tensors."""
        return sorted(name.removesuffix(".safetensors") for name in self.manifest["files"] if name != RECORD)

    def tensors(self, group: str) -> dict[str, Tensor]:
        """Return the tensors of a group, mapped from the file: copy what is to outlive it.

        Raises:
            ModelFileError: There is no such group, or the file is no safetensors file.
        """
        return dict(self._read(group, lambda file, name: file.get_tensor(name)))

    def specs(self, group: str) -> dict[str, Spec]:
        """Return shapes and dtypes of a group from the file's header alone.

        Raises:
            ModelFileError: As `tensors`.
        """

        def spec(file: Any, name: str) -> Spec:
            part = file.get_slice(name)
            return Spec(tuple(part.get_shape()), DTYPE_NAMED[part.get_dtype()])

        return dict(self._read(group, spec))

    def changes(self) -> list[str]:
        """Return what this process does otherwise than the one that saved, each a reason why the bits of a
        resumed run may differ from those of an uninterrupted one."""
        now = {"threads": torch.get_num_threads(), "torch": str(torch.__version__), "code": reverie.__version__}
        saved = self.manifest
        return [f"{key}: {saved[key]} then, {value} now" for key, value in now.items() if saved[key] != value]

    def _read(self, group: str, take: Callable[[Any, str], Any]) -> Iterator[tuple[str, Any]]:
        if group not in self.groups:
            raise ModelFileError(f"{self.path} has no {group!r} (it has {', '.join(self.groups)})")
        path = self.path / f"{group}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (it is no dictionary)
                    yield name, take(file, name)
        except (SafetensorError, OSError, KeyError) as error:
            raise ModelFileError(f"{path} cannot be read: {error}; use an older checkpoint") from error


def open_checkpoint(folder: Path | str) -> Checkpoint:
    """Return the checkpoint of a folder, once verified.

    Raises:
        ModelFileError: It is damaged, incomplete, or of a newer format.
    """
    folder = Path(folder)
    if faults := verify(folder):
        raise ModelFileError(f"checkpoint {folder} cannot be used: {first(faults)}")
    try:
        manifest = read_manifest(folder)
        record = json.loads((folder / RECORD).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(f"checkpoint {folder} cannot be used: {RECORD}: {error}") from error
    return Checkpoint(folder, manifest["step"], record, manifest)


# The store ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is on the disk, verified; its length, and warnings of deletions that failed."""

    path: Path
    step: int
    bytes: int
    warnings: tuple[str, ...] = ()


class CheckpointStore:
    """The checkpoints of one run.

    Arguments:
        folder: Where they lie, a folder of their own.
        keep: How many of the newest to keep, two at least: the last one may be lost while the next is written.

    Raises:
        UsageError: keep is less than two.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     store = CheckpointStore(folder)
        ...     saved = store.save(500, {"model": {"w": torch.ones(2)}}, {"epoch": 3})
        ...     found = store.latest()
        ...     found.step, found.record, found.tensors("model")
        (500, {'epoch': 3}, {'w': tensor([1., 1.])})
    """

    def __init__(self, folder: Path | str, keep: int = 3) -> None:
        if keep < 2:
            raise UsageError(
                f"keep is {keep}; keep at least 2 checkpoints: the last may be lost while the next is saved"
            )
        self.folder = Path(folder)
        self.keep = keep

    def prepare(self) -> None:
        """Make the folder, and do there once what a save does.

        Raises:
            StorageError: Nothing can be saved there.
        """
        storage.probe(self.folder)

    def candidates(self) -> list[Path]:
        """Return what is there under a finished checkpoint's name, the newest step first.

        Raises:
            ModelFileError: The folder cannot be read.
        """
        try:
            paths = [path for path in self.folder.iterdir() if FINISHED.fullmatch(path.name)]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ModelFileError(f"{self.folder} cannot be read: {error.strerror}; check the path") from error
        return sorted(paths, key=age, reverse=True)

    def latest(self) -> Checkpoint | None:
        """Return the newest checkpoint that verifies, or None where there never was one.

        Raises:
            ModelFileError: There are checkpoints, and none can be used. Nothing was changed.
        """
        faults: list[str] = []
        for path in self.candidates():
            try:
                found = open_checkpoint(path)
            except ModelFileError as error:
                faults.append(str(error))
            else:
                return replace(found, warnings=tuple(f"{fault}; step {found.step} was taken" for fault in faults))
        if faults:
            advice = "restore one from a copy, or start anew in another folder"
            raise ModelFileError(f"no checkpoint in {self.folder} can be used ({first(faults)}); {advice}")
        return None

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], record: Mapping[str, Any]) -> Saved:
        """Save a checkpoint, verify it, and only then delete what is older than the `keep` newest good ones.

        Arguments:
            step: How many steps were made.
            tensors: Groups of tensors by name: {"model": {...}, "ema-0.9999": {...}, "optimizer": {...}}.
            record: Everything else, in what JSON can hold; tuples come back as lists. "code_version", "config_hash"
                and "data_fingerprint" are copied into the manifest.

        Returns:
            Where it is, and which deletions failed.

        Raises:
            NonFiniteError: A tensor or a number is NaN or infinite.
            StorageError: The disk is full, read-only, gone or faulty, or read back something else.
            TypeError: The record holds what JSON does not.
            UsageError: The step is negative, or a tensor is of a kind that the format has no place for.

            After any of them the older checkpoints are as they were, and nothing half-made is left.
        """
        if step < 0:
            raise UsageError(f"a checkpoint of step {step} cannot be; steps count from 0")
        check_saveable(tensors, f"step {step}")
        check_record(record)
        contents: dict[str, bytes | Callable[[Writer], None]] = {
            f"{group}.safetensors": safetensors_writer(named) for group, named in tensors.items()
        }
        contents[RECORD] = json.dumps(record, indent=1).encode()
        needed = sum(tensor.nbytes for named in tensors.values() for tensor in named.values())

        final = self._free_name(step)
        unfinished = final.with_name(f"{final.name}.tmp-{os.getpid()}")
        with guarded(final, needed):
            warnings = self._sweep()
            try:
                unfinished.mkdir()
                length = self._fill(unfinished, contents, step, record)
                if faults := verify(unfinished, thorough=False):
                    advice = "the disk or the memory is faulty: check them, and choose another folder"
                    raise StorageError(f"{final} was written but not read back as it was: {first(faults)}; {advice}")
                storage.rename(unfinished, final)
            except BaseException:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise
            sync_folder(self.folder)
        return Saved(final, step, length, (*warnings, *self._retire(final)))

    def _fill(
        self,
        folder: Path,
        contents: Mapping[str, bytes | Callable[[Writer], None]],
        step: int,
        record: Mapping[str, Any],
    ) -> int:
        """Write all files of a checkpoint, the manifest last, and return their length."""
        files = {name: asdict(write_synced(folder / name, content)) for name, content in contents.items()}
        manifest = {
            "format": FORMAT,
            "step": step,
            "code": record.get("code_version", reverie.__version__),
            "torch": str(torch.__version__),
            "threads": torch.get_num_threads(),
            "config_hash": record.get("config_hash"),
            "data_fingerprint": record.get("data_fingerprint"),
            "files": files,
        }
        last = write_synced(folder / MANIFEST, seal(manifest))
        sync_folder(folder)
        return last.bytes + sum(digest["bytes"] for digest in files.values())

    def _free_name(self, step: int) -> Path:
        """Return the folder for a step. One that is there already, good or bad, is not replaced but followed, by
        step-00000500-2, and then deleted as an older one is: at every moment one of the two is whole."""
        times = [time for there, time in map(age, self.candidates()) if there == step]
        return self.folder / (f"step-{step:08d}-{max(times) + 1}" if times else f"step-{step:08d}")

    def _sweep(self) -> list[str]:
        """Delete what saves that died left behind."""
        warnings = []
        for path in self.folder.iterdir():
            left = UNFINISHED.fullmatch(path.name)
            dead = left and (int(left[1]) == os.getpid() or not alive(int(left[1])))
            if dead or path.name.startswith(f"{TRASH}step-"):
                warnings += deletion(path, storage.remove_folder)
        return warnings

    def _retire(self, newest: Path) -> list[str]:
        """Delete checkpoints older than the `keep` newest good ones; which are good is read from the disk anew."""
        candidates = self.candidates()
        if len({age(path)[0] for path in candidates}) == len(candidates) <= self.keep:
            return []
        warnings, good = [], set()
        for path in candidates:
            step, _ = age(path)
            if path == newest:
                good.add(step)
            elif step in good or len(good) >= self.keep:
                warnings += deletion(path, throw_away)
            elif not verify(path, thorough=False):
                good.add(step)
        return warnings


def age(path: Path) -> tuple[int, int]:
    """Return the step of a finished checkpoint, and the how-manieth of that step it is.

    Example:
        >>> age(Path("runs/step-00000500")), age(Path("runs/step-00000500-2"))
        ((500, 1), (500, 2))
    """
    match = FINISHED.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path} has not the name of a checkpoint")
    return int(match[1]), int(match[2] or 1)


def throw_away(path: Path) -> None:
    """Delete a checkpoint; a crash in the middle leaves it under a name that no reader looks at."""
    trash = path.with_name(f"{TRASH}{path.name}-{os.getpid()}")
    storage.rename(path, trash)
    storage.remove_folder(trash)


def deletion(path: Path, delete: Callable[[Path], None]) -> list[str]:
    """Delete; a failure is a warning and no more, as nothing is lost by it but space."""
    try:
        delete(path)
    except OSError as error:
        return [f"{path} could not be deleted: {error.strerror or error}; delete it by hand"]
    return []


def check_record(value: Any, place: str = "record") -> None:
    """Refuse what JSON cannot hold, or would hold as something else.

    Raises:
        NonFiniteError: A NaN or an infinity; None says that there is no number.
        TypeError: A value or key of another type.
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{place} has the key {key!r}; keys in JSON are text")
            check_record(inner, f"{place}.{key}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            check_record(inner, f"{place}[{index}]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise NonFiniteError(f"{place} is {value}, which a checkpoint does not hold; save None for no number")
    elif not (value is None or isinstance(value, str | int)):
        raise TypeError(f"{place} is a {type(value).__name__}; a checkpoint's record holds what JSON does")
