"""GPU targets and the launch configurations chosen for them, by hand, from `python -m sward_kernels.report`.

Nothing here is tuned at run time: a table row is looked up by window, width, type and family of GPU, so the first call
costs one compilation and a later one none. To add a target, add it to `TARGETS` and give its family rows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

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


@dataclass(frozen=True)
class Configuration:
    """One kernel as it ships: everything that decides what Triton compiles.

    Attributes:
        operation, direction: e.g. `"windowed_distillation"`, `"backward"`; the report's `op` and `pass`.
        kernel: the `@triton.jit` function.
        types: Triton's type of every argument that is not a constexpr, e.g. `{"teacher": "*bf16", "height": "i32"}`.
            Pointers are taken to be aligned to 16 bytes, as PyTorch allocates them.
        constants: the constexpr arguments.
        num_warps: warps of one program.
        maxnreg: Triton's option of that name, the most registers of a thread; None leaves them to the assembler.
        details: columns for the report: `dtype`, `window_size`, `tokens`, `dim`, and what else tells rows apart.
        ideal_bytes, flops: device-memory traffic no implementation can avoid, and arithmetic done, a `unit`.
        unit: what those two are counted for, e.g. `"window"`.
    """

    operation: str
    direction: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    maxnreg: int | None = None
    details: dict[str, Any] = field(default_factory=dict)
    ideal_bytes: int = 0
    flops: int = 0
    unit: str = "window"


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


@dataclass(frozen=True)
class Tiles:
    """Tile shape of a windowed-distillation kernel: tokens a program owns, tokens and channels a step, and its warps.

    `rows == keys >= tokens` selects the kernels in which one program owns whole windows; otherwise a window is tiled,
    and a program owns `rows` queries, or backward as many keys.
    """

    rows: int
    keys: int
    channels: int
    num_warps: int


# (family, direction, bits of the inputs) -> rows of (most tokens, most channels, tiles); the first that fits is taken.
# A key with "nchw" in front serves maps that are not channels_last: each of their elements has an address of its own,
# so tiles are smaller; where it is missing, the key without it serves them too. A missing family takes Ampere's rows.
_WINDOWED_DISTILLATION: dict[tuple[str | int, ...], tuple[tuple[int, int, Tiles], ...]] = {
    ("ampere", "forward", 16): (
        (16, 256, Tiles(32, 32, 32, 2)),
        (64, 64, Tiles(64, 64, 32, 4)),
        (64, 256, Tiles(64, 64, 16, 4)),
        (1024, 32, Tiles(64, 64, 32, 4)),
        (1024, 256, Tiles(32, 32, 32, 4)),
    ),
    ("ampere", "backward", 16): (
        (16, 256, Tiles(32, 32, 32, 2)),
        (64, 64, Tiles(64, 64, 16, 4)),
        (64, 256, Tiles(64, 64, 32, 8)),
        (1024, 32, Tiles(128, 32, 32, 8)),
        (1024, 64, Tiles(128, 16, 16, 8)),
        (1024, 128, Tiles(64, 32, 32, 8)),
        (1024, 256, Tiles(32, 32, 32, 8)),
    ),
    ("nchw", "ampere", "backward", 16): (
        (16, 256, Tiles(32, 32, 16, 2)),
        (64, 16, Tiles(64, 64, 16, 8)),
        (64, 64, Tiles(64, 64, 16, 4)),
        (64, 256, Tiles(64, 64, 32, 8)),
        (1024, 32, Tiles(128, 16, 16, 8)),
        (1024, 64, Tiles(64, 16, 16, 8)),
        (1024, 128, Tiles(32, 16, 64, 8)),
        (1024, 256, Tiles(32, 16, 16, 8)),
    ),
    # At D = 128 Ampere's tiles spill, on Ada only.
    ("ada", "backward", 16): (
        (16, 256, Tiles(32, 32, 32, 2)),
        (64, 64, Tiles(64, 64, 16, 4)),
        (49, 128, Tiles(32, 32, 32, 8)),
        (64, 256, Tiles(64, 64, 32, 8)),
        (1024, 32, Tiles(128, 32, 32, 8)),
        (1024, 64, Tiles(128, 16, 16, 8)),
        (1024, 128, Tiles(64, 16, 32, 8)),
        (1024, 256, Tiles(32, 32, 32, 8)),
    ),
    ("hopper", "forward", 16): (
        (16, 256, Tiles(32, 32, 32, 2)),
        (64, 256, Tiles(64, 64, 32, 4)),
        (1024, 64, Tiles(64, 32, 32, 4)),
        (1024, 256, Tiles(32, 32, 32, 4)),
    ),
    ("hopper", "backward", 16): (
        (16, 256, Tiles(32, 32, 16, 2)),
        (64, 256, Tiles(64, 64, 32, 4)),
        (1024, 32, Tiles(128, 32, 32, 8)),
        (1024, 64, Tiles(128, 16, 16, 8)),
        (1024, 128, Tiles(64, 32, 32, 8)),
        (1024, 256, Tiles(32, 32, 32, 8)),
    ),
    ("nchw", "hopper", "backward", 16): (
        (16, 256, Tiles(32, 32, 16, 2)),
        (64, 256, Tiles(64, 64, 16, 8)),
        (1024, 32, Tiles(128, 16, 16, 8)),
        (1024, 64, Tiles(64, 16, 16, 8)),
        (1024, 128, Tiles(32, 16, 64, 8)),
        (1024, 256, Tiles(32, 16, 16, 8)),
    ),
    # Warps of 64 lanes: with 16 channels, fewer of them keep a lane's share of a load at 128 bits.
    ("cdna", "forward", 16): (
        (16, 16, Tiles(32, 32, 16, 1)),
        (16, 256, Tiles(32, 32, 32, 2)),
        (1024, 16, Tiles(64, 64, 16, 2)),
        (64, 256, Tiles(64, 64, 32, 4)),
        (1024, 64, Tiles(64, 64, 32, 4)),
        (1024, 256, Tiles(32, 32, 32, 4)),
    ),
    ("cdna", "backward", 16): (
        (16, 16, Tiles(32, 32, 16, 1)),
        (16, 256, Tiles(32, 32, 32, 2)),
        (64, 16, Tiles(64, 64, 16, 2)),
        (64, 256, Tiles(64, 64, 32, 4)),
        (1024, 16, Tiles(128, 32, 16, 4)),
        (1024, 64, Tiles(128, 32, 32, 4)),
        (1024, 128, Tiles(64, 32, 32, 4)),
        (1024, 256, Tiles(32, 32, 32, 4)),
    ),
    ("nchw", "cdna", "backward", 16): (
        (16, 16, Tiles(32, 32, 16, 1)),
        (16, 256, Tiles(32, 32, 32, 2)),
        (64, 16, Tiles(64, 64, 16, 2)),
        (64, 256, Tiles(64, 64, 32, 4)),
        (1024, 32, Tiles(128, 32, 16, 4)),
        (1024, 64, Tiles(64, 16, 16, 4)),
        (1024, 256, Tiles(32, 32, 16, 4)),
    ),
    # Three TF32 products in place of one double the operands of every product: only small tiles stay in registers.
    # Both passes take as many channels a step: fp32 scores are then rounded alike (docs/kernels.md, large scores).
    ("ampere", "forward", 32): (
        (16, 256, Tiles(16, 16, 16, 1)),
        (1024, 16, Tiles(16, 16, 16, 2)),
        (1024, 256, Tiles(16, 32, 16, 2)),
    ),
    ("ampere", "backward", 32): (
        (16, 256, Tiles(16, 16, 16, 1)),
        (1024, 32, Tiles(64, 16, 16, 8)),
        (1024, 64, Tiles(32, 32, 16, 8)),
        (1024, 256, Tiles(16, 16, 16, 8)),
    ),
    ("nchw", "ampere", "backward", 32): (
        (16, 256, Tiles(16, 16, 16, 1)),
        (1024, 16, Tiles(32, 16, 16, 8)),
        (1024, 32, Tiles(64, 16, 16, 8)),
        (1024, 64, Tiles(32, 16, 16, 8)),
        (1024, 256, Tiles(16, 16, 16, 8)),
    ),
    # Ada spills at D = 64 but with 32 channels a step.
    ("ada", "forward", 32): (
        (16, 256, Tiles(16, 16, 16, 1)),
        (1024, 16, Tiles(16, 16, 16, 2)),
        (1024, 32, Tiles(16, 32, 16, 2)),
        (1024, 64, Tiles(16, 32, 32, 4)),
        (1024, 256, Tiles(16, 32, 16, 2)),
    ),
    ("ada", "backward", 32): (
        (16, 256, Tiles(16, 16, 16, 1)),
        (1024, 32, Tiles(64, 16, 16, 8)),
        (1024, 64, Tiles(16, 32, 32, 8)),
        (1024, 256, Tiles(16, 16, 16, 8)),
    ),
    ("hopper", "backward", 32): (
        (16, 256, Tiles(16, 16, 16, 1)),
        (1024, 32, Tiles(64, 16, 16, 8)),
        (1024, 64, Tiles(32, 16, 16, 8)),
        (1024, 256, Tiles(16, 16, 16, 8)),
    ),
    ("cdna", "forward", 32): (
        (16, 256, Tiles(16, 16, 16, 1)),
        (1024, 256, Tiles(16, 32, 16, 2)),
    ),
    ("cdna", "backward", 32): (
        (16, 256, Tiles(16, 16, 16, 1)),
        (1024, 32, Tiles(64, 16, 16, 4)),
        (1024, 64, Tiles(32, 16, 16, 4)),
        (1024, 256, Tiles(16, 16, 16, 4)),
    ),
    # float64 serves the tests of the equations; the interpreter is slow by the step, and large tiles are few steps.
    ("ampere", "forward", 64): ((1024, 256, Tiles(16, 16, 16, 4)),),
    ("ampere", "backward", 64): ((1024, 256, Tiles(16, 16, 16, 4)),),
    ("interpreter", "forward", 64): (
        (16, 256, Tiles(32, 32, 32, 1)),
        (64, 256, Tiles(64, 64, 32, 1)),
        (1024, 256, Tiles(128, 64, 32, 1)),
    ),
    ("interpreter", "backward", 64): (
        (16, 256, Tiles(32, 32, 32, 1)),
        (64, 256, Tiles(64, 64, 32, 1)),
        (256, 256, Tiles(128, 64, 32, 1)),
        (1024, 256, Tiles(256, 256, 32, 1)),
    ),
}
# Ada differs from Ampere in channels_last only; without rows of its own its NCHW would take those.
_WINDOWED_DISTILLATION["nchw", "ada", "backward", 16] = _WINDOWED_DISTILLATION["nchw", "ampere", "backward", 16]
_WINDOWED_DISTILLATION["nchw", "ada", "forward", 32] = _WINDOWED_DISTILLATION["ampere", "forward", 32]
_WINDOWED_DISTILLATION["nchw", "ada", "backward", 32] = _WINDOWED_DISTILLATION["nchw", "ampere", "backward", 32]


def windowed_distillation_tiles(
    family: str, direction: str, dtype: torch.dtype, tokens: int, dim: int, channels_last: bool
) -> Tiles:
    """The tiles of `direction` (`"forward"` or `"backward"`) for windows of `tokens` tokens and `dim` channels.

    `channels_last` tells whether both maps are. A family without rows of its own takes Ampere's: the interpreter so
    runs tiles that ship.
    """
    key = (family, direction, dtype.itemsize * 8)
    if key not in _WINDOWED_DISTILLATION:
        key = ("ampere", *key[1:])
    rows = _WINDOWED_DISTILLATION[key]
    if not channels_last:
        rows = _WINDOWED_DISTILLATION.get(("nchw", *key), rows)
    return next(tiles for most_tokens, most_dim, tiles in rows if tokens <= most_tokens and dim <= most_dim)


@dataclass(frozen=True)
class PrototypeTiles:
    """Tile of a prototype kernel: pixels, channels and classes, and how many tiles one program takes.

    Attributes:
        pixels, channels, classes: sizes of a tile.
        steps: tiles of pixels a program walks over.
        blocks: blocks of channels a program takes, one after another.
        num_warps: warps of a program.
    """

    pixels: int
    channels: int
    classes: int
    steps: int
    blocks: int
    num_warps: int


# kernel -> rows of (most classes, tiles); the first that fits is taken. One table serves every family. The more
# classes, the more pixels a program takes, so that the class sums it writes stay small against the features it reads,
# and the fewer channels, so that all classes fit its registers.
_PROTOTYPES: dict[str, tuple[tuple[int, PrototypeTiles], ...]] = {
    "statistics": (
        (16, PrototypeTiles(64, 32, 16, 8, 1, 4)),
        (32, PrototypeTiles(64, 32, 32, 8, 1, 4)),
        (64, PrototypeTiles(64, 32, 64, 16, 1, 8)),
        (128, PrototypeTiles(64, 32, 128, 32, 1, 8)),
        (256, PrototypeTiles(64, 16, 256, 64, 1, 8)),
    ),
    # A program reads all channels of its pixels for their lengths, so it also sums up to 640 of them. It takes fewer
    # pixels: they may then stay in cache between the two readings, and there are programs enough for every GPU.
    "normalized_statistics": (
        (16, PrototypeTiles(64, 32, 16, 1, 20, 4)),
        (32, PrototypeTiles(64, 32, 32, 2, 20, 4)),
        (64, PrototypeTiles(64, 32, 64, 4, 20, 8)),
        (128, PrototypeTiles(64, 32, 128, 4, 20, 8)),
        (256, PrototypeTiles(64, 16, 256, 8, 40, 8)),
    ),
    "gradient": ((256, PrototypeTiles(64, 64, 0, 1, 1, 4)),),
    "normalized_gradient": ((256, PrototypeTiles(32, 64, 0, 1, 1, 4)),),
}


def prototype_tiles(
    kernel: str, num_classes: int, channels: int, dtype: torch.dtype, flat: bool, family: str
) -> PrototypeTiles:
    """The tiles of `kernel` for `num_classes` classes; no wider than `channels` need. `flat` as in the kernels."""
    tiles = next(tiles for most_classes, tiles in _PROTOTYPES[kernel] if num_classes <= most_classes)
    needed = max(16, 1 << (channels - 1).bit_length())  # 16: the least that tensor cores take
    tiles = replace(tiles, channels=min(tiles.channels, needed))
    if not flat and kernel.startswith("normalized"):  # an address for each element of a slice needs registers
        tiles = replace(tiles, pixels=tiles.pixels // 2, steps=tiles.steps * 2)
    if family == "cdna":  # a warp of 64 lanes: more than 4 leave no thread 16 bytes of a 16-bit tile to load
        tiles = replace(tiles, num_warps=min(tiles.num_warps, 4))
    if dtype == torch.float64 and family != "interpreter":  # one-hot tiles of 64 pixels exceed Ada's shared memory
        tiles = replace(tiles, pixels=16)
    return tiles
