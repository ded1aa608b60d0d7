"""What this machine is and has: read, not measured, and without torch where that is possible."""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

INSTRUCTIONS = {
    "AVX2": "avx2",
    "AVX-512": "avx512f",
    "AVX-512 VNNI": "avx512_vnni",
    "AVX-512 BF16": "avx512_bf16",
    "AMX BF16": "amx_bf16",
    "NEON": "asimd",
    "SVE": "sve",
    "ARM BF16": "bf16",
}
EXTRAS = {"hub": "data sets of the Hugging Face hub", "tracking": "TensorBoard, W&B", "demo": "the digits' classifier"}


def hardware(folder: Path | str = ".") -> dict[str, Any]:
    """Return the CPU, its cores and instruction sets, memory, and the free space where `folder` is."""
    info = cpu_info()
    total, free = memory()
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "cores": cores(),
        "instructions": instructions(info),
        "memory": total,
        "memory_free": free,
        "disk_free": shutil.disk_usage(folder).free,
    }


def cpu_info(path: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """Return what Linux says of the first core, or the same from sysctl on a Mac; {} elsewhere."""
    if path.is_file():
        lines = path.read_text(errors="replace").split("\n\n")[0].splitlines()
        return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if platform.system() != "Darwin":
        return {}
    flags = said(["sysctl", "-n", "machdep.cpu.leaf7_features"]).lower()
    return {"model name": said(["sysctl", "-n", "machdep.cpu.brand_string"]), "flags": flags}


def instructions(info: dict[str, str]) -> list[str]:
    """Return the instruction sets that matter here, of those a CPU's flags name.

    Example:
        >>> instructions({"flags": "fpu avx2 avx512f avx512_bf16"})
        ['AVX2', 'AVX-512', 'AVX-512 BF16']
    """
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return [name for name, word in INSTRUCTIONS.items() if word in flags]


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory(meminfo: Path = Path("/proc/meminfo"), limit: Path = Path("/sys/fs/cgroup/memory.max")) -> tuple[int, int]:
    """Return the bytes of memory, in all and free, within the container's limit; (0, 0) where none is told."""
    try:
        kib = dict(re.findall(r"^(\w+):\s+(\d+) kB", meminfo.read_text(), re.M))
        total, free = int(kib["MemTotal"]) * 1024, int(kib["MemAvailable"]) * 1024
    except (OSError, KeyError):
        return 0, 0
    try:
        most = int(limit.read_text())
    except (OSError, ValueError):
        return total, free
    return min(total, most), min(free, most)


def available() -> int:
    """Return the bytes that this process may still take, within its own limit (ulimit -v); 0 where none is told."""
    free = memory()[1]
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        return free
    return free if limit == resource.RLIM_INFINITY else max(0, min(free, limit - used))


def compiler() -> str | None:
    """Return the C++ compiler that torch.compile would use, if there is one."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and shutil.which(name):
            return (said([name, "--version"]).splitlines() or [name])[0]
    return None


def said(command: list[str]) -> str:
    """Return what a program prints, or nothing."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def extras(package: str = "reverie") -> dict[str, Any]:
    """Return each optional extra: what it is for, what of it is missing, and how to install it."""
    try:
        required = metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        required = []
    found = {}
    for name, purpose in EXTRAS.items():
        missing = absent(distributions(required, name))
        found[name] = {"for": purpose, "missing": missing, "install": f"pip install '{package}[{name}]'"}
    return found


def distributions(required: Iterable[str], extra: str) -> list[str]:
    """Return the distributions that an extra asks for.

    Example:
        >>> distributions(['torch>=2', 'datasets>=3; extra == "hub"'], "hub")
        ['datasets']
    """
    wanted = [line for line in required if f"extra == '{extra}'" in line.replace('"', "'")]
    return [re.match(r"[\w.-]+", line)[0] for line in wanted]  # type: ignore[index]


def absent(names: Iterable[str]) -> list[str]:
    """Return those distributions that are not installed."""
    missing = []
    for name in names:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
    return missing
