"""What glibc's malloc does with memory that was freed; nothing with another C library."""

from __future__ import annotations

import contextlib
import ctypes
import os

# M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20


def return_freed_memory() -> None:
    """Give the system what glibc keeps of freed tensors below 32 MiB: nearly a whole network."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory() -> None:
    """Let this process keep from now on what a training step on the CPU frees, for the next step.

    glibc would return the activations to the system after each backward pass, and the next forward
    pass would take them again page by page. Nothing is changed where the environment says how
    malloc is to behave (MALLOC_..., GLIBC_TUNABLES).
    """
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        # The value that glibc goes up to by itself, which it stops to do once either is set.
        mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
