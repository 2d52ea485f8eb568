"""The most memory that a piece of work held at once."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from types import TracebackType

import torch


class PeakMemory:
    """Measures the peak of what runs inside its `with` block.

        with PeakMemory(device) as memory:
            train()
        memory.bytes

    On a GPU `bytes` is the most that torch's allocator held. On a CPU it is the largest resident size of the whole
    process, Python and torch included (Linux only; None elsewhere). Memory that earlier work left with the C allocator
    is handed back first, so that it does not count.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None
        self._is_reset = False

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._is_reset = _reset_peak()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        elif self._is_reset:
            self.bytes = _resident_peak()


def _reset_peak() -> bool:
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        # proc(5): writing 5 sets the peak resident size to the current one.
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def _resident_peak() -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
