"""Windows on a shifted grid (Eq. 4-7): the index arithmetic that all implementations share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Shift = Sequence[int] | Tensor
"""`(dy, dx)` as two ints, or an int32/int64 tensor of two elements on the device of the maps."""


@dataclass(frozen=True)
class WindowGrid:
    """How a map of `height x width` pixels is cut into windows of `window_size x window_size` tokens.

    The map is first rolled by `(-dy, -dx)` and then padded with zeros on the right and at the bottom to a multiple of
    the window side. So token `(r, c)` of the padded grid reads source pixel `((r + dy) mod height, (c + dx) mod width)`
    if `r < height and c < width`, and is padding otherwise: which tokens are padding does not depend on the shift.
    Windows are numbered row by row, and so are the tokens inside a window.
    """

    height: int
    """Height of the map in pixels, at least 1. A map may be smaller than a window."""
    width: int
    """Width of the map in pixels, at least 1."""
    window_size: int
    """Window side `M`, at least 1."""

    @property
    def tokens(self) -> int:
        """Tokens per window, `T = M * M`."""
        return self.window_size * self.window_size

    @property
    def window_rows(self) -> int:
        """Rows of windows, `ceil(height / M)`."""
        return (self.height + self.window_size - 1) // self.window_size

    @property
    def window_columns(self) -> int:
        """Columns of windows, `ceil(width / M)`."""
        return (self.width + self.window_size - 1) // self.window_size

    @property
    def windows(self) -> int:
        """Windows per image."""
        return self.window_rows * self.window_columns

    @property
    def padded_height(self) -> int:
        return self.window_rows * self.window_size

    @property
    def padded_width(self) -> int:
        return self.window_columns * self.window_size

    def source_rows(self, shift: Shift, device: torch.device | None = None) -> Tensor:
        """The source row of each row of the rolled grid, `(r + dy) mod height`: int64 `[height]`."""
        return (torch.arange(self.height, device=device) + shift[0]) % self.height

    def source_columns(self, shift: Shift, device: torch.device | None = None) -> Tensor:
        """The source column of each column of the rolled grid, `(c + dx) mod width`: int64 `[width]`."""
        return (torch.arange(self.width, device=device) + shift[1]) % self.width

    def row_runs(self, start: int, stop: int, shift: Sequence[int]) -> list[Run]:
        """Rows `start..stop` of the rolled, padded grid as contiguous runs of source rows, without padding."""
        return _runs(start, min(stop, self.height), shift[0], self.height)

    def column_runs(self, start: int, stop: int, shift: Sequence[int]) -> list[Run]:
        """Columns `start..stop` of the rolled, padded grid as contiguous runs of source columns, without padding."""
        return _runs(start, min(stop, self.width), shift[1], self.width)

    def real_tokens(self, device: torch.device | None = None) -> Tensor:
        """Mask of the tokens that are pixels and not padding: bool `[windows, T]`."""
        real = torch.ones(1, self.height, self.width, dtype=torch.bool, device=device)
        return split_windows(self.pad(real), self.window_size)[:, 0]

    def roll(self, maps: Tensor, shift: Shift) -> Tensor:
        """Roll `[B, C, height, width]` by `(-dy, -dx)` (Eq. 5)."""
        if isinstance(shift, Tensor):  # torch.roll would need its values on the host
            rows, columns = self.source_rows(shift, maps.device), self.source_columns(shift, maps.device)
            return maps.index_select(2, rows).index_select(3, columns)
        return torch.roll(maps, (-shift[0], -shift[1]), (2, 3))

    def pad(self, maps: Tensor) -> Tensor:
        """Pad `[..., height, width]` with zeros to `[..., padded_height, padded_width]` (Eq. 6)."""
        return F.pad(maps, (0, self.padded_width - self.width, 0, self.padded_height - self.height))

    def partition(self, maps: Tensor, shift: Shift) -> Tensor:
        """Roll, pad and cut `[B, C, height, width]` into tokens, `[B, windows, T, C]` (Eq. 5-7)."""
        return split_windows(self.pad(self.roll(maps, shift)), self.window_size).mT


class Run(NamedTuple):
    """Neighbours on the rolled grid that are neighbours on the map, too."""

    target: slice
    """Positions on the rolled grid, counted from `start`."""
    source: slice
    """Positions on the map."""


def _runs(start: int, stop: int, offset: int, size: int) -> list[Run]:
    runs = []
    position = start
    while position < stop:
        source = (position + offset) % size
        length = min(stop - position, size - source)
        runs.append(Run(slice(position - start, position - start + length), slice(source, source + length)))
        position += length
    return runs


def split_windows(maps: Tensor, window_size: int) -> Tensor:
    """Cut `[..., C, rows * M, columns * M]` into windows: `[..., rows * columns, C, T]`, row by row (Eq. 4)."""
    cells = maps.unflatten(-1, (-1, window_size)).unflatten(-3, (-1, window_size))  # [..., C, rows, M, columns, M]
    return cells.movedim((-4, -2), (-5, -4)).flatten(-2).flatten(-4, -3)
