"""Which implementation of an operator serves a call.

The library of `csrc/` is compiled when the package is installed, once for each instruction set, and is optional. It is
loaded by ctypes and knows nothing of PyTorch: it is given addresses, sizes and a number of threads. It shares PyTorch's
OpenMP, as that is loaded first.

What is chosen depends on the machine and on what a call is made of (its device, dtype and layout), never on the batch:
one sample's bits must not depend on how many others there are.
"""

import ctypes
import os
import zlib
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from reverie.base.errors import UsageError

VARIABLE = "REVERIE_KERNELS"
MODES = ("auto", "fast", "plain")
LEVELS = {"AVX512": ("avx512", "avx2"), "AVX2": ("avx2",)}  # by PyTorch's word for what the CPU has, the best first
NAMES = {"avx512bf16": "AVX-512 with bfloat16", "avx512": "AVX-512", "avx2": "AVX2"}
SUFFIX = {torch.float32: "", torch.bfloat16: "_bfloat16"}  # what the library's functions for a dtype end in
FOLDER = Path(__file__).parent


def mode() -> str:
    """Return what the environment asks for: "auto", "fast" or "plain".

    Raises:
        UsageError: It asks for something else.
    """
    chosen = os.environ.get(VARIABLE, "") or "auto"
    if chosen not in MODES:
        raise UsageError(f"{VARIABLE} is {chosen!r}; it is one of {', '.join(MODES)}")
    return chosen


@cache
def sources() -> int | None:
    """Return the checksum of the library's sources, or None where they were not installed."""
    files = sorted(path for path in (FOLDER / "csrc").glob("*") if path.suffix in (".h", ".cpp"))
    return zlib.crc32(b"".join(path.read_bytes() for path in files)) if files else None


def levels() -> tuple[str, ...]:
    """Return the instruction sets that this CPU has and a library may be built for, the best first."""
    found = LEVELS.get(torch.backends.cpu.get_cpu_capability(), ())
    return ("avx512bf16", *found) if "avx512" in found and multiplies_bfloat16() else found


def multiplies_bfloat16() -> bool:
    """Whether this CPU has AVX-512's dot product of bfloat16 (Zen 4, Cooper Lake, Sapphire Rapids and later)."""
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


@cache
def candidates() -> dict[str, str]:
    """Return each instruction set that this CPU has, and what speaks against its library: "" for nothing."""
    return {level: refused(level) for level in levels()}


def refused(level: str) -> str:
    """Return why the library for an instruction set can't be used, or nothing."""
    try:
        found = opened(level)
    except OSError as error:
        return f"it does not load ({error})"
    if found is None:
        return "not built: no C++ compiler when reverie was installed"
    if sources() not in (None, found.reverie_sources()):
        return "built from other sources; install reverie again"
    return ""


@cache
def opened(level: str) -> ctypes.CDLL | None:
    """Return the library for an instruction set, or None where there is none."""
    path = next(iter(sorted(FOLDER.glob(f"_{level}.*so"))), None)
    if path is None:
        return None
    library = ctypes.CDLL(str(path))
    library.reverie_sources.restype = ctypes.c_uint32
    return library


@cache
def library() -> ctypes.CDLL | None:
    """Return the best library that there is, or None."""
    return next((opened(level) for level, why in candidates().items() if not why), None)


def status() -> dict[str, str]:
    """Return what serves each operator here, in words.

    Example:
        >>> sorted(status())
        ['attention', 'gated units', 'group norm', 'linear']
    """
    from reverie.kernels.linear import by_convolution

    if mode() == "plain":
        said = f"PyTorch ({VARIABLE}=plain)"
    elif library() is not None:
        said = "ours, " + next(NAMES[level] for level, why in candidates().items() if not why)
    else:
        said = "PyTorch (" + (next(iter(candidates().values()), "") or "no AVX2 or AVX-512 here") + ")"
    convolution = mode() != "plain" and by_convolution()
    return {
        "attention": said,
        "gated units": said,
        "group norm": said,
        "linear": "oneDNN" if convolution else "PyTorch",
    }


def fast(*tensors: Tensor | None, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)) -> bool:
    """Whether the library may serve a call with these tensors.

    It may not where they are elsewhere than in the CPU's memory, of other dtypes, or nothing but names for something
    that PyTorch traces: torch.compile, torch.func, forward-mode differentiation.

    Raises:
        UsageError: REVERIE_KERNELS=fast, and there is no library.
    """
    chosen = mode()
    if chosen == "plain" or torch.compiler.is_compiling():
        return False
    if library() is None:
        if chosen == "fast":
            why = next(iter(candidates().values()), "this CPU has neither AVX2 nor AVX-512")
            raise UsageError(f"{VARIABLE} is 'fast', but there are no fast kernels here: {why}")
        return False
    given = [tensor for tensor in tensors if tensor is not None]
    return readable(*given) and all(tensor.dtype in dtypes for tensor in given)


def has(name: str) -> bool:
    """Whether the library has a function: those for bfloat16 need a processor that multiplies it.

    Example:
        >>> has("reverie_of_nothing")
        False
    """
    return library() is not None and hasattr(library(), name)


def widths() -> tuple[int, int]:
    """Return how many numbers the library's vectors, and how many outputs its panels of weights hold."""
    found = library()
    assert found is not None
    return found.reverie_vector(), found.reverie_panel()


def readable(*tensors: Tensor) -> bool:
    """Whether what to do may depend on the numbers of tensors: they are in the CPU's memory, and nothing is traced."""
    return not torch.compiler.is_compiling() and all(map(plain_memory, tensors)) and not traced()


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a gradient by any of some tensors is asked for."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def plain_memory(tensor: Tensor) -> bool:
    """Whether a tensor is numbers in the CPU's memory, and nothing else."""
    return (
        tensor.device.type == "cpu"
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


def traced() -> bool:
    """Whether PyTorch does more with the operators that are called now than to compute."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
    )


def call(name: str, *arguments: object) -> None:
    """Call a function of the library, with PyTorch's number of threads.

    Raises:
        MemoryError: It had no memory to work in.
    """
    if getattr(library(), name)(*arguments, torch.get_num_threads()):
        raise MemoryError("no memory for the kernels' scratch")


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """Return where a tensor's numbers begin, as C is told it."""
    return ctypes.c_void_p(address(tensor))


def address(tensor: Tensor | None) -> int | None:
    """Return where a tensor's numbers begin."""
    return None if tensor is None else tensor.data_ptr()


def integers(*values: int) -> ctypes.Array[ctypes.c_int64]:
    """Return whole numbers as C has them."""
    return (ctypes.c_int64 * len(values))(*values)
