"""GPU targets: what each device can hold. The tiles that fit them stand in each operation's `tile_table.py`."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Target:
    """What the report checks a compiled kernel against.

    Attributes:
        name: as on the report's command line.
        device: the device whose limits and bandwidth these are.
        backend, arch, warp_size: Triton's name for the target.
        family: key of the launch tables.
        shared_limit: bytes of shared memory one program may use.
        shared_per_multiprocessor: bytes of shared memory of a multiprocessor (AMD: compute unit).
        registers: 32-bit registers of a multiprocessor.
        register_granularity: registers are given to a warp in multiples of this many a thread.
        max_warps: resident warps of a multiprocessor.
        max_programs: resident programs of a multiprocessor.
        bandwidth: device memory, bytes a second, from the data sheet.
    """

    name: str
    device: str
    backend: str
    arch: int | str
    warp_size: int
    family: str
    shared_limit: int
    shared_per_multiprocessor: int
    registers: int
    register_granularity: int
    max_warps: int
    max_programs: int
    bandwidth: float


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "A100 SXM 80GB", "cuda", 80, 32, "ampere", 166912, 167936, 65536, 8, 64, 32, 2.039e12),
        Target("sm_89", "L40S", "cuda", 89, 32, "ada", 101376, 102400, 65536, 8, 48, 24, 0.864e12),
        Target("sm_90", "H100 SXM", "cuda", 90, 32, "hopper", 232448, 233472, 65536, 8, 64, 32, 3.35e12),
        # A compute unit: four SIMDs of 512 64-lane registers (vector and accumulation registers share one file).
        Target("gfx942", "MI300X", "hip", "gfx942", 64, "cdna", 65536, 65536, 131072, 8, 32, 32, 5.3e12),
    )
}


@functools.cache
def family_of(device: torch.device) -> str:
    """The launch-table family of a device; on the CPU kernels run interpreted."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "cdna"
    capability = torch.cuda.get_device_capability(device)
    if capability >= (9, 0):
        return "hopper"
    return "ada" if capability == (8, 9) else "ampere"
