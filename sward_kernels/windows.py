"""Windows on a shifted grid (Eq. 4-7): the index arithmetic every implementation shares, said once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Shift = Sequence[int] | Tensor
"""`(dy, dx)` as two ints, or an int32/int64 tensor of two elements on the device of the maps."""


@dataclass(frozen=True)
class WindowGrid:
    """How a map of `height x width` pixels is cut into windows of `window_size x window_size` tokens.

    The map is rolled by `(-dy, -dx)` on its own grid and then padded with zeros on the right and at the bottom to
    a multiple of the window side (roll, then pad). So token `(r, c)` of the padded grid reads source pixel
    `((r + dy) mod height, (c + dx) mod width)` where `r < height and c < width`, and is padding elsewhere: which
    tokens are padding does not depend on the shift. Windows are numbered row by row, and so are the tokens of one.

    Args:
        height, width: size of the map in pixels, at least 1. A map may be smaller than a window.
        window_size: window side `M`, at least 1.
    """

    height: int
    width: int
    window_size: int

    @property
    def tokens(self) -> int:
        """Tokens of one window, `T = M * M`."""
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
        """Windows of one image."""
        return self.window_rows * self.window_columns

    @property
    def padded_height(self) -> int:
        return self.window_rows * self.window_size

    @property
    def padded_width(self) -> int:
        return self.window_columns * self.window_size

    @property
    def has_padding(self) -> bool:
        return self.padded_height != self.height or self.padded_width != self.width

    def source_rows(self, shift: Shift, device: torch.device | None = None) -> Tensor:
        """The source row each row of the rolled, not yet padded grid reads: `(r + dy) mod height`, int64 `[height]`."""
        return (torch.arange(self.height, device=device) + shift[0]) % self.height

    def source_columns(self, shift: Shift, device: torch.device | None = None) -> Tensor:
        """The source column each column of the rolled, not yet padded grid reads, int64 `[width]`."""
        return (torch.arange(self.width, device=device) + shift[1]) % self.width

    def real_tokens(self, device: torch.device | None = None) -> Tensor:
        """Which tokens are pixels and not padding: bool `[windows, T]`."""
        real = torch.zeros(1, 1, self.padded_height, self.padded_width, dtype=torch.bool, device=device)
        real[:, :, : self.height, : self.width] = True
        return self.split(real)[0, :, :, 0]

    def roll(self, maps: Tensor, shift: Shift) -> Tensor:
        """Roll `[B, C, height, width]` by `(-dy, -dx)` (Eq. 5)."""
        if isinstance(shift, Tensor):  # read on the device: torch.roll would need its values on the host
            rows, columns = self.source_rows(shift, maps.device), self.source_columns(shift, maps.device)
            return maps.index_select(2, rows).index_select(3, columns)
        return torch.roll(maps, (-shift[0], -shift[1]), (2, 3))

    def pad(self, maps: Tensor) -> Tensor:
        """Pad `[B, C, height, width]` with zeros to `[B, C, padded_height, padded_width]` (Eq. 6)."""
        return F.pad(maps, (0, self.padded_width - self.width, 0, self.padded_height - self.height))

    def split(self, padded: Tensor) -> Tensor:
        """Cut `[B, C, padded_height, padded_width]` into windows of tokens, `[B, windows, T, C]` (Eq. 7)."""
        side = self.window_size
        cells = padded.unflatten(3, (self.window_columns, side)).unflatten(2, (self.window_rows, side))
        return cells.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)

    def partition(self, maps: Tensor, shift: Shift) -> Tensor:
        """Roll, pad and cut `[B, C, height, width]` into `[B, windows, T, C]`."""
        return self.split(self.pad(self.roll(maps, shift)))
