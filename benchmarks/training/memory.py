"""Memory that tensors gave up stays with the process.

glibc gives large blocks back to the kernel and takes them again, empty, some hundred times a training step. On a CPU that costs ResNet-20 up to a
tenth of its step, now more and now less, by what happened to be allocated before. Every run is treated alike.
"""

from __future__ import annotations

import ctypes

__all__ = ["keep_memory"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
NEVER, LARGEST = 2**31 - 1, 2**25  # the most that mallopt takes of each


def keep_memory() -> bool:
    """Have the C library keep what is freed; whether it is one that can, which is glibc."""
    try:
        library = ctypes.CDLL("libc.so.6")
        return bool(library.mallopt(M_TRIM_THRESHOLD, NEVER) and library.mallopt(M_MMAP_THRESHOLD, LARGEST))
    except (OSError, AttributeError):
        return False
