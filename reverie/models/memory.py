"""How much memory there is, asked before it is taken."""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from reverie.base.errors import OutOfMemoryError

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that can still be taken on a device; None where the system does not say.

    On a CPU that is the least of what the machine has, what its container may use, and what this process
    may address.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    known = [count for count in (machine_free(), container_free(), address_space_free()) if count is not None]
    return min(known, default=None)


def machine_free() -> int | None:
    """Return the memory that Linux can give without swapping."""
    return numbers(MEMINFO).get("MemAvailable")


def container_free() -> int | None:
    """Return what a container's limit leaves: what can be reclaimed (the cache of files) counts as free."""
    with contextlib.suppress(OSError, ValueError):
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        cache = numbers(CGROUP / "memory.stat", scale=1).get("inactive_file", 0)
        return max(0, limit - used + cache)
    return None


def address_space_free() -> int | None:
    """Return what the process's own limit (ulimit -v) leaves."""
    try:
        import resource
    except ImportError:  # no such limit on this system
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = numbers(Path("/proc/self/status")).get("VmSize")
    return None if limit == resource.RLIM_INFINITY or used is None else max(0, limit - used)


def numbers(path: Path, scale: int = 1024) -> dict[str, int]:
    """Return the numbers of a file of the kernel's with a name and a number on each line, in bytes."""
    found = {}
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            words = line.replace(":", " ").split()
            if len(words) > 1 and words[1].isdigit():
                found[words[0]] = int(words[1]) * scale
    return found


def check_memory(needed: int, device: torch.device, what: str, lower: str) -> None:
    """Refuse what can't be held.

    Arguments:
        needed: The bytes that it takes, at the least.
        device: Where.
        what: What would take them, for the message.
        lower: What to lower.

    Raises:
        OutOfMemoryError: It exceeds what is free.

    Example:
        >>> check_memory(10**18, torch.device("cpu"), "a million images", "n")
        Traceback (most recent call last):
        reverie.base.errors.OutOfMemoryError: a million images would take 1000000000.0 GB...
    """
    free = free_memory(device)
    if free is not None and needed > free:
        raise OutOfMemoryError(
            f"{what} would take {gigabytes(needed)} at the least, and {gigabytes(free)} are free; lower {lower}"
        )


def gigabytes(count: int) -> str:
    """Return a number of bytes as people read it."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


@contextmanager
def memory_errors(what: str, lower: str) -> Iterator[None]:
    """Turn an allocation that fails inside the block into an OutOfMemoryError that says what to lower."""
    try:
        yield
    except OutOfMemoryError:
        raise
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in text:
            raise
        first = text.splitlines()[0] if text else "an allocation failed"
        raise OutOfMemoryError(f"not enough memory for {what} ({first}); lower {lower}") from error
