"""PyTorch's pickled weights, turned into a safetensors file by a process of its own.

A pickle is a program. PyTorch's reader for weights alone runs none of it but a short list of calls, and
has had its own holes: so it runs here in a child process, with limits on memory and time, after a look
at the archive, and is never tried again in another way. What comes back is a safetensors file, which is
then looked at like any other.
"""

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path

from reverie.base.errors import ModelFileError
from reverie.models.formats.files import what_is

MAX_PICKLE = 64 << 20  # the archive's one pickle: names and shapes
MAX_MEMBERS = 200_000
ROOM = 16 << 30  # address space of a child beside the weights: PyTorch's libraries
SECONDS = 600


def as_safetensors(path: Path, target: Path) -> Path:
    """Turn a file of torch.save into a safetensors file, and return it.

    Raises:
        ModelFileError: It contains anything but weights, or is damaged.
    """
    try:
        check_archive(path)
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise ModelFileError(f"{path} is no sound archive of PyTorch's: {error}; download it again") from None
    command = [sys.executable, "-m", __name__, str(path), str(target), str(ROOM + 4 * path.stat().st_size)]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise ModelFileError(f"{path} took longer than {SECONDS} s to read; convert it where it was made") from None
    if child.returncode != 0:
        said = child.stderr.strip().splitlines()
        why = said[-1] if said else f"its reader ended with signal {-child.returncode}"
        raise ModelFileError(f"{path} contains code, not only weights, or is damaged: {why[:300]}")
    return target


def check_archive(path: Path) -> None:
    """Refuse an archive that is none of torch.save's, or that would grow as it is read.

    Raises:
        ModelFileError: It is one.
    """
    if not zipfile.is_zipfile(path) or path.open("rb").read(4) != b"PK\x03\x04":
        raise ModelFileError(f"{path} is {what_is(path) or 'no archive of PyTorch'}; it was not opened")
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    names = [member.filename for member in members]
    pickles = [member for member in members if member.filename.endswith(".pkl")]
    total = sum(member.file_size for member in members)
    if (
        len(members) > MAX_MEMBERS
        or len(set(names)) < len(names)
        or any(member.compress_type != zipfile.ZIP_STORED for member in members)
        or [member.filename.rpartition("/")[2] for member in pickles] != ["data.pkl"]
        or any(member.file_size > MAX_PICKLE for member in pickles)
        or total > path.stat().st_size
    ):
        raise ModelFileError(f"{path} is no archive as torch.save writes it, and may contain code; it was not opened")


def limit_memory(most: int) -> None:
    """Bound what this process may address, where the system can."""
    try:
        import resource
    except ImportError:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def convert(path: Path, target: Path) -> None:
    """Read the weights alone, and write those that are dense tensors as a safetensors file."""
    import torch
    from safetensors.torch import save_file

    state = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):  # as a trainer's checkpoint has it
        state = state["state_dict"]
    if isinstance(state, dict) and isinstance(state.get("string_to_param"), dict):  # as A1111 has an embedding
        state = {f"string_to_param.{name}": tensor for name, tensor in state["string_to_param"].items()}
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError("it holds no tensors by name")
    for name, tensor in state.items():
        if (
            type(tensor) not in (torch.Tensor, torch.nn.Parameter)
            or tensor.layout != torch.strided
            or tensor.is_quantized
        ):
            raise ValueError(f"{name} is no dense tensor")
    # `contiguous` and `clone` part tensors that share their numbers, which the format has no word for.
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in state.items()}, target)


def main() -> None:
    """Convert, and say on one line what was wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("most", type=int)
    given = parser.parse_args()
    limit_memory(given.most)
    try:
        convert(given.path, given.target)
    except Exception as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        sys.exit(f"{type(error).__name__}: {first}")


if __name__ == "__main__":
    main()
