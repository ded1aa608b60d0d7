"""Memory that is used again instead of being given back to the system and asked for anew.

A step makes and drops some hundred large tensors. The C library gives each of those back at once, and the next one's
pages are cleared again by the system as they are first touched: for training the small U-Net a tenth of a step, for
sampling with Stable Diffusion in bfloat16 a fiftieth. Here PyTorch's own memory on the CPU is left with the C library
until the process ends; the peak of a step is what it was.
"""

import ctypes
import platform

# glibc's malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
LARGEST = 2**31 - 1  # what mallopt can be told: such blocks, and larger ones, are still the system's
PAD = 2**26  # bytes that are asked for beyond need


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, up to 2 GiB a block; return whether the C library can.

    Example:
        >>> isinstance(keep_freed_memory(), bool)
        True
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = {M_MMAP_THRESHOLD: LARGEST, M_TRIM_THRESHOLD: LARGEST, M_TOP_PAD: PAD}
    return all(libc.mallopt(name, value) == 1 for name, value in settings.items())
