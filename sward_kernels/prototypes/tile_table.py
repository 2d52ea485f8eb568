"""Tile shapes of the prototype kernels, chosen by hand from `python -m sward_kernels.report`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


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
_TABLE: dict[str, tuple[tuple[int, PrototypeTiles], ...]] = {
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


def tiles_of(
    kernel: str, num_classes: int, channels: int, dtype: torch.dtype, flat: bool, family: str
) -> PrototypeTiles:
    """The tiles of `kernel` for `num_classes` classes; no wider than `channels` need. `flat` as in the kernels."""
    tiles = next(tiles for most_classes, tiles in _TABLE[kernel] if num_classes <= most_classes)
    needed = max(16, 1 << (channels - 1).bit_length())  # 16: the least that tensor cores take
    tiles = replace(tiles, channels=min(tiles.channels, needed))
    if not flat and kernel.startswith("normalized"):  # an address for each element of a slice needs registers
        tiles = replace(tiles, pixels=tiles.pixels // 2, steps=tiles.steps * 2)
    if family == "cdna":  # a warp of 64 lanes: more than 4 leave no thread 16 bytes of a 16-bit tile to load
        tiles = replace(tiles, num_warps=min(tiles.num_warps, 4))
    if dtype == torch.float64 and family != "interpreter":  # one-hot tiles of 64 pixels exceed Ada's shared memory
        tiles = replace(tiles, pixels=16)
    return tiles
