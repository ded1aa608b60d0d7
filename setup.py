"""Builds the kernels in reverie/kernels/csrc, once for each instruction set, where there is a compiler.

They are optional: whatever goes wrong here is said, and the package installs without them.
"""

import platform
import sys
import zlib
from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("reverie/kernels/csrc")
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
LEVELS = {
    "avx512bf16": [*AVX512, "-mavx512bf16"],
    "avx512": AVX512,
    "avx2": ["-mavx2", "-mfma"],
}


def checksum() -> int:
    """Return the checksum that reverie/kernels/dispatch.py compares a library with."""
    files = sorted(path for path in SOURCES.iterdir() if path.suffix in (".h", ".cpp"))
    return zlib.crc32(b"".join(path.read_bytes() for path in files))


def kernels() -> list[Extension]:
    """Return what to build: nothing on a processor or with a compiler that these flags are not for."""
    if platform.machine().lower() not in ("x86_64", "amd64") or sys.platform == "win32":
        return []
    threads = [] if sys.platform == "darwin" else ["-fopenmp"]
    said = ["-Wno-psabi", "-Wno-uninitialized"]  # the latter of GCC 12's own headers
    common = ["-std=gnu++17", "-O3", "-g0", "-fvisibility=hidden", f"-DREVERIE_SOURCES={checksum()}u", *said, *threads]
    return [
        Extension(
            f"reverie.kernels._{level}",
            [str(SOURCES / "kernels.cpp")],
            depends=[str(path) for path in SOURCES.iterdir()],
            extra_compile_args=[*common, *flags],
            # Not linked to an OpenMP of its own: PyTorch's serves, which is loaded before. Two pools would wait for
            # each other, and a step with two threads take ten times as long.
            extra_link_args=[],
            language="c++",
            optional=True,
        )
        for level, flags in LEVELS.items()
    ]


setup(ext_modules=kernels())
