"""Tile shapes of the prototype kernels, chosen by hand from `python -m sward_kernels.report`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class PrototypeTiles:
    """Tile shape of a prototype kernel, and how many tiles one program processes."""

    pixels: int
    channels: int
    classes: int
    steps: int
    """Tiles of pixels per program."""
    blocks: int
    """Blocks of channels per program, one after another."""
    num_warps: int
    """Warps per program."""


# Kernel -> rows of (most classes, tiles); the first that fits is used, for every family of GPU. With more classes, a
# program takes more pixels, so that it writes few class sums compared with the features it reads, and fewer channels,
# so that all classes fit in its registers.
_TABLE: dict[str, tuple[tuple[int, PrototypeTiles], ...]] = {
    "statistics": (
        (16, PrototypeTiles(64, 32, 16, 8, 1, 4)),
        (32, PrototypeTiles(64, 32, 32, 8, 1, 4)),
        (64, PrototypeTiles(64, 32, 64, 16, 1, 8)),
        (128, PrototypeTiles(64, 32, 128, 32, 1, 8)),
        (256, PrototypeTiles(64, 16, 256, 64, 1, 8)),
    ),
    # A program reads all channels of its pixels for their lengths, so it also sums up to 640 of them. It takes fewer
    # pixels, which may then stay in cache between the two reads, and which leave enough programs for every GPU.
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
    """Return the tiles of `kernel`; `flat` as in the kernels. A tile is not wider than `channels` needs."""
    tiles = next(tiles for most_classes, tiles in _TABLE[kernel] if num_classes <= most_classes)
    needed = max(16, 1 << (channels - 1).bit_length())  # tl.dot takes at least 16 channels
    tiles = replace(tiles, channels=min(tiles.channels, needed))
    if not flat and kernel.startswith("normalized"):  # every element of a slice has an address, which takes registers
        tiles = replace(tiles, pixels=tiles.pixels // 2, steps=tiles.steps * 2)
    if family == "cdna":  # with more than 4 warps of 64 lanes, a thread loads less than 16 bytes of a 16-bit tile
        tiles = replace(tiles, num_warps=min(tiles.num_warps, 4))
    if dtype == torch.float64 and family != "interpreter":  # one-hot tiles of 64 pixels exceed shared memory on Ada
        tiles = replace(tiles, pixels=16)
    return tiles


def class_tiles(kernel: str, num_classes: int, channels: int, family: str) -> dict[str, int]:
    """Return the constants of one of the kernels between the passes over the features, which work on small tables.

    A tile has one row per class in `"count"` and `"loss"`, and about as many elements whatever their number.
    """
    classes = 1 << (num_classes - 1).bit_length()
    columns = min(128, max(16, 4096 // classes))
    widest, block = columns, 64
    if family == "interpreter":  # there a step takes as long whatever its width
        widest = block = 256
    needed = 1 << (channels - 1).bit_length()
    return {
        "count": {"BLOCK_CLASSES": classes, "BLOCK_PIXELS": columns, "TILES": 16},
        "first pixels": {"BLOCK_PROGRAMS": 256, "BLOCK_CHANNELS": min(256, needed)},
        "means": {"BLOCK_CHUNKS": 16, "BLOCK_CHANNELS": min(block, needed), "BLOCK_ROWS": 256},
        "loss": {"BLOCK_CLASSES": classes, "BLOCK_CHANNELS": min(widest, needed)},
        "total": {"BLOCK_CLASSES": classes},
    }[kernel]
