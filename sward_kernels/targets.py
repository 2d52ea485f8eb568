"""GPU targets: what each device can hold. The tiles that fit them stand in each operation's `tile_table.py`."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Target:
    """A device and its limits, against which the report checks a compiled kernel."""

    name: str
    """Name on the report's command line."""
    device: str
    """The device that the limits and the bandwidth belong to."""
    backend: str
    """Triton's backend, `"cuda"` or `"hip"`."""
    arch: int | str
    """Triton's name of the architecture."""
    warp_size: int
    """Threads per warp."""
    family: str
    """Key of the tile tables."""
    shared_limit: int
    """Bytes of shared memory that one program may use."""
    shared_per_multiprocessor: int
    """Bytes of shared memory per multiprocessor (AMD: compute unit)."""
    registers: int
    """32-bit registers per multiprocessor."""
    register_granularity: int
    """Registers per thread are allocated in multiples of this."""
    max_warps: int
    """Resident warps per multiprocessor."""
    max_programs: int
    """Resident programs per multiprocessor."""
    bandwidth: float
    """Device-memory bandwidth in bytes per second, from the data sheet."""
    l2_bytes: int
    """Bytes of L2 cache. Where every die has a cache of its own, of all dies together."""
    multiprocessors: int
    """Multiprocessors (AMD: compute units) of the device."""
    clock: float
    """Cycles per second of a multiprocessor, from the data sheet.

    The report turns the least time of device memory into cycles with it, and nothing else. The H100's is the boost
    clock of the PCIe card; that of SXM is 1.98e9.
    """


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "A100 SXM 80GB", "cuda", 80, 32, "ampere", 166912, 167936, 65536, 8, 64, 32, 2.039e12,
               40 * 2**20, 108, 1.41e9),
        Target("sm_89", "L40S", "cuda", 89, 32, "ada", 101376, 102400, 65536, 8, 48, 24, 0.864e12,
               96 * 2**20, 142, 2.52e9),
        Target("sm_90", "H100 SXM", "cuda", 90, 32, "hopper", 232448, 233472, 65536, 8, 64, 32, 3.35e12,
               50 * 2**20, 132, 1.755e9),
        Target("sm_100", "B200", "cuda", 100, 32, "hopper", 232448, 233472, 65536, 8, 64, 32, 8e12,
               126 * 2**20, 148, 1.965e9),
        Target("sm_120", "RTX 5090", "cuda", 120, 32, "ada", 101376, 102400, 65536, 8, 48, 24, 1.792e12,
               96 * 2**20, 170, 2.407e9),
        # A compute unit has four SIMDs of 512 64-lane registers; vector and accumulation registers share one file.
        Target("gfx942", "MI300X", "hip", "gfx942", 64, "cdna", 65536, 65536, 131072, 8, 32, 32, 5.3e12,
               32 * 2**20, 304, 2.1e9),  # eight dies of 38 compute units and 4 MiB each
    )
}  # fmt: skip


@functools.cache
def family_of(device: torch.device) -> str:
    """Return the tile-table family of a device; `"interpreter"` for a CPU."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "cdna"
    capability = torch.cuda.get_device_capability(device)
    if capability >= (12, 0) or capability == (8, 9):  # gaming Blackwell has Ada's shared memory and instructions
        return "ada"
    return "hopper" if capability >= (9, 0) else "ampere"
