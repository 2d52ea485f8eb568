"""What the C library does with memory that tensors free on a CPU."""

from __future__ import annotations

import ctypes
import os
import platform

# mallopt(3): how many blocks may be mapped on their own, and from which size on free memory goes back to the system.
_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1


def keep_freed_memory() -> bool:
    """Let this process keep the memory that tensors free, so that the next ones find it.

    glibc returns blocks of 32 MiB and more to the system at once, which clears every page of the next such block when
    it is first touched: 15 % of a training step at 256 x 256 pixels (docs/cpu_kernels.md). Results stay the same, bit
    for bit. The process keeps its largest size until it ends. `sward.training.fit` calls this for a network on a CPU;
    call it once in a training loop of your own.

    Returns:
        Whether it was done: False without glibc, and where the user's environment sets up `malloc`
        (`MALLOC_*` or `GLIBC_TUNABLES`).
    """
    if platform.libc_ver()[0] != "glibc" or _user_sets_malloc():
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(_M_MMAP_MAX, 0)) and bool(library.mallopt(_M_TRIM_THRESHOLD, -1))


def _user_sets_malloc() -> bool:
    return any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
