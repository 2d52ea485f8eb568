"""Tile shapes of the windowed-distillation kernels, chosen by hand from `python -m sward_kernels.report`.

Windows of up to 64 tokens have, of the tiles tried, those with the fewest simulated cycles on sm_80 and sm_90; larger
ones those with the least arithmetic that spill nothing.

Nothing is tuned at run time: a row is looked up by family of GPU, direction, type, window and width, so the first call
of a kind compiles once and later ones compile nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tiles:
    """Tile shape of a windowed-distillation kernel.

    `rows == keys >= tokens` selects the kernels in which one program owns whole windows. Otherwise a window is tiled,
    and a program owns `rows` queries, or in the backward pass as many keys.
    """

    rows: int
    """Tokens that one program owns."""
    keys: int
    """Tokens per step."""
    channels: int
    """Channels per step of a product over channels."""
    num_warps: int
    """Warps per program."""
    max_registers: int = 255
    """Most registers per thread on NVIDIA; with 168, three programs of 4 warps are resident instead of two."""


# (family, direction, bits of the inputs) -> rows of (most tokens, most channels, tiles); the first that fits is used.
# Keys that begin with "nchw" are for maps that are not channels_last: each of their elements has an address of its own,
# so tiles are smaller. Without such a key, the key without "nchw" is used. A missing family uses Ampere's rows.
_TABLE: dict[tuple[str | int, ...], tuple[tuple[int, int, Tiles], ...]] = {
    ("ampere", "forward", 16): (
        (16, 256, Tiles(32, 32, 32, 2)),
        (64, 64, Tiles(64, 64, 32, 4, max_registers=168)),
        (64, 256, Tiles(64, 64, 16, 4, max_registers=168)),
        (1024, 32, Tiles(64, 64, 32, 4)),
        (1024, 256, Tiles(32, 32, 32, 4)),
    ),
    ("ampere", "backward", 16): (
        (16, 256, Tiles(32, 32, 32, 2)),
        (64, 64, Tiles(64, 64, 32, 4)),
        (64, 256, Tiles(64, 64, 32, 8)),
        (1024, 32, Tiles(128, 32, 32, 8)),
        (1024, 64, Tiles(128, 16, 16, 8)),
        (1024, 128, Tiles(64, 32, 32, 8)),
        (1024, 256, Tiles(32, 32, 32, 8)),
    ),
    ("nchw", "ampere", "backward", 16): (
        (16, 256, Tiles(32, 32, 16, 2)),
        (64, 16, Tiles(64, 64, 16, 8)),
        (64, 64, Tiles(64, 64, 32, 4)),
        (64, 256, Tiles(64, 64, 32, 8)),
        (1024, 32, Tiles(128, 16, 16, 8)),
        (1024, 64, Tiles(64, 16, 16, 8)),
        (1024, 128, Tiles(32, 16, 64, 8)),
        (1024, 256, Tiles(32, 16, 16, 8)),
    ),
    # At D = 128, Ampere's tiles spill on Ada. The backward pass reads what the forward pass saves: both own whole
    # windows, or neither does.
    ("ada", "forward", 16): (
        (16, 256, Tiles(32, 32, 32, 2)),
        (64, 64, Tiles(64, 64, 32, 4, max_registers=168)),
        (49, 128, Tiles(32, 32, 32, 4)),
        (64, 256, Tiles(64, 64, 16, 4, max_registers=168)),
        (1024, 32, Tiles(64, 64, 32, 4)),
        (1024, 256, Tiles(32, 32, 32, 4)),
    ),
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
        (64, 256, Tiles(64, 64, 32, 4, max_registers=168)),
        (1024, 64, Tiles(64, 32, 32, 4)),
        (1024, 256, Tiles(32, 32, 32, 4)),
    ),
    ("hopper", "backward", 16): (
        (16, 256, Tiles(32, 32, 16, 2)),
        (64, 64, Tiles(64, 64, 64, 4)),
        (64, 256, Tiles(64, 64, 32, 4)),
        (1024, 32, Tiles(128, 32, 32, 8)),
        (1024, 64, Tiles(128, 16, 16, 8)),
        (1024, 128, Tiles(64, 32, 32, 8)),
        (1024, 256, Tiles(32, 32, 32, 8)),
    ),
    ("nchw", "hopper", "backward", 16): (
        (16, 256, Tiles(32, 32, 16, 2)),
        (64, 32, Tiles(64, 64, 16, 4)),
        (64, 64, Tiles(64, 64, 32, 4)),
        (64, 256, Tiles(64, 64, 16, 4)),
        (1024, 32, Tiles(128, 16, 16, 8)),
        (1024, 64, Tiles(64, 16, 16, 8)),
        (1024, 128, Tiles(32, 16, 64, 8)),
        (1024, 256, Tiles(32, 16, 16, 8)),
    ),
    # A warp has 64 lanes: with 16 channels, fewer warps keep a lane's share of a load at 128 bits.
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
    # Whole windows, though three TF32 products per product spill some registers at 255: tiled, backward would do nine
    # times the arithmetic. Larger windows take small tiles. Both passes take the same number of channels per step, so
    # that they round fp32 scores alike (docs/kernels.md, large scores).
    ("ampere", "forward", 32): (
        (16, 256, Tiles(16, 16, 16, 1)),
        (64, 256, Tiles(64, 64, 16, 4)),
        (1024, 16, Tiles(16, 16, 16, 2)),
        (1024, 256, Tiles(16, 32, 16, 2)),
    ),
    ("ampere", "backward", 32): (
        (16, 256, Tiles(16, 16, 16, 1)),
        (64, 256, Tiles(64, 64, 16, 4)),
        (1024, 32, Tiles(64, 16, 16, 8)),
        (1024, 64, Tiles(32, 32, 16, 8)),
        (1024, 256, Tiles(16, 16, 16, 8)),
    ),
    ("nchw", "ampere", "backward", 32): (
        (16, 256, Tiles(16, 16, 16, 1)),
        (64, 256, Tiles(64, 64, 16, 4)),
        (1024, 16, Tiles(32, 16, 16, 8)),
        (1024, 32, Tiles(64, 16, 16, 8)),
        (1024, 64, Tiles(32, 16, 16, 8)),
        (1024, 256, Tiles(16, 16, 16, 8)),
    ),
    # On Ada, D = 64 spills unless a step takes 32 channels.
    ("ada", "forward", 32): (
        (16, 256, Tiles(16, 16, 16, 1)),
        (64, 256, Tiles(64, 64, 16, 4)),
        (1024, 16, Tiles(16, 16, 16, 2)),
        (1024, 32, Tiles(16, 32, 16, 2)),
        (1024, 64, Tiles(16, 32, 32, 4)),
        (1024, 256, Tiles(16, 32, 16, 2)),
    ),
    ("ada", "backward", 32): (
        (16, 256, Tiles(16, 16, 16, 1)),
        (64, 256, Tiles(64, 64, 16, 4)),
        (1024, 32, Tiles(64, 16, 16, 8)),
        (1024, 64, Tiles(16, 32, 32, 8)),
        (1024, 256, Tiles(16, 16, 16, 8)),
    ),
    ("hopper", "backward", 32): (
        (16, 256, Tiles(16, 16, 16, 1)),
        (64, 256, Tiles(64, 64, 16, 4)),
        (1024, 32, Tiles(64, 16, 16, 8)),
        (1024, 64, Tiles(32, 16, 16, 8)),
        (1024, 256, Tiles(16, 16, 16, 8)),
    ),
    ("cdna", "forward", 32): (
        (16, 256, Tiles(16, 16, 16, 1)),
        (64, 256, Tiles(64, 64, 16, 4)),
        (1024, 256, Tiles(16, 32, 16, 2)),
    ),
    ("cdna", "backward", 32): (
        (16, 256, Tiles(16, 16, 16, 1)),
        (64, 256, Tiles(64, 64, 16, 4)),
        (1024, 32, Tiles(64, 16, 16, 4)),
        (1024, 64, Tiles(32, 16, 16, 4)),
        (1024, 256, Tiles(16, 16, 16, 4)),
    ),
    # float64 is for tests of the equations. The interpreter's time grows with the number of steps, so its tiles are
    # large.
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
# Ada differs from Ampere in channels_last only. These keys keep its NCHW from using Ada's channels_last rows.
_TABLE["nchw", "ada", "forward", 16] = _TABLE["ampere", "forward", 16]
_TABLE["nchw", "ada", "backward", 16] = _TABLE["nchw", "ampere", "backward", 16]
_TABLE["nchw", "ada", "forward", 32] = _TABLE["ampere", "forward", 32]
_TABLE["nchw", "ada", "backward", 32] = _TABLE["nchw", "ampere", "backward", 32]


def tiles_of(family: str, direction: str, dtype: torch.dtype, tokens: int, dim: int, channels_last: bool) -> Tiles:
    """Return the tiles of `direction` (`"forward"` or `"backward"`) for windows of `tokens` tokens and `dim` channels.

    `channels_last` is whether both maps are. A family without rows of its own uses Ampere's, so in most cases the
    interpreter runs shipped tiles.
    """
    key = (family, direction, dtype.itemsize * 8)
    if key not in _TABLE:
        key = ("ampere", *key[1:])
    rows = _TABLE[key]
    if not channels_last:
        rows = _TABLE.get(("nchw", *key), rows)
    return next(tiles for most_tokens, most_dim, tiles in rows if tokens <= most_tokens and dim <= most_dim)
