"""Tile shapes of the kernels of CIRKD's mini-batch relation, chosen by hand from `python -m sward_kernels.report`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RelationTiles:
    """Tile shape of a kernel: rows and keys of a score tile, channels a step, channels of the gradient one program
    writes (backward), and warps a program."""

    rows: int
    keys: int
    chunk: int
    out: int
    num_warps: int


TILES = {
    ("ampere", "forward"): RelationTiles(64, 64, 16, 0, 4),
    ("ampere", "backward"): RelationTiles(64, 32, 16, 64, 8),
    ("hopper", "forward"): RelationTiles(64, 64, 16, 0, 4),
    ("hopper", "backward"): RelationTiles(64, 32, 16, 128, 8),
    ("cdna", "forward"): RelationTiles(64, 64, 16, 0, 4),
    ("cdna", "backward"): RelationTiles(64, 32, 16, 128, 8),
}
"""(family, direction) -> the largest tiles tried that spill no register, at TF32 and at fp32's own precision."""


def tiles_of(family: str, direction: str) -> RelationTiles:
    """The tiles of `direction` (`"forward"` or `"backward"`); the interpreter runs Ampere's."""
    return TILES.get((family, direction)) or TILES["ampere", direction]
