"""Tile shapes of the kernels of CIRKD's mini-batch relation, chosen by hand from `python -m sward_kernels.report`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RelationTiles:
    """Tile shape of a kernel."""

    rows: int
    keys: int
    """Rows and keys of one tile of scores."""
    chunk: int
    """Channels per step of a product over channels."""
    out: int
    """Channels of the gradient that one program writes; 0 in the forward pass."""
    num_warps: int
    """Warps per program."""


TILES = {
    ("ampere", "forward"): RelationTiles(64, 64, 16, 0, 4),
    ("ampere", "backward"): RelationTiles(64, 32, 16, 64, 8),
    ("hopper", "forward"): RelationTiles(64, 64, 16, 0, 4),
    ("hopper", "backward"): RelationTiles(64, 32, 16, 128, 8),
    ("cdna", "forward"): RelationTiles(64, 64, 16, 0, 4),
    ("cdna", "backward"): RelationTiles(64, 32, 16, 128, 8),
}
"""(family, direction) -> the largest of the tiles tried that spill no registers, in TF32 and in full fp32 precision."""


def tiles_of(family: str, direction: str) -> RelationTiles:
    """The tiles of `direction` (`"forward"` or `"backward"`); the interpreter runs Ampere's."""
    return TILES.get((family, direction)) or TILES["ampere", direction]
