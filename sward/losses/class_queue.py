"""CIRKD's memory: one ring buffer of unit vectors per class, filled from the teacher."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PIXELS_PER_CLASS = 16
"""Most pixels per class and image that enter the pixel queue in one step (CIRKD's code)."""


class ClassRows(NamedTuple):
    """Vectors picked from a batch, by image and class."""

    pixels: Tensor
    """`[B, K, 16, C]`, of which the first `pixel_counts` are valid."""
    pixel_counts: Tensor
    """`[B, K]` int64, at most 16."""
    regions: Tensor
    """`[B, K, 1, C]`, the mean of the class's pixels, scaled to length one."""
    region_counts: Tensor
    """`[B, K]` int64, 1 where the class is in the image."""


def pick_rows(units: Tensor, classes: Tensor, num_classes: int, scores: Tensor, *, official: bool) -> ClassRows:
    """Pick up to 16 random pixels, and the mean, of every class in every image, without a loop or a host sync.

    Args:
        units: `[B, C, P]` vectors of length one.
        classes: `[B, P]` int64; `num_classes` stands for no class.
        num_classes: `K`.
        scores: `[B, P]`, random; the pixels with the lowest scores are picked.
        official: pick from the first `n_k` pixels of the image instead of the `n_k` pixels of class k, a mistake of
            CIRKD's code.
    """
    members = F.one_hot(classes, num_classes + 1)[..., :num_classes].mT
    counts = members.sum(dim=-1)
    pixels = units.shape[-1]
    if official:
        members = torch.arange(pixels, device=units.device) < counts.unsqueeze(-1)
    wanted = min(PIXELS_PER_CLASS, pixels)
    # Non-members are sorted behind all members; it does not matter which of them fill the unused places.
    picked = scores.unsqueeze(1).masked_fill(members == 0, 2.0).topk(wanted, dim=-1, largest=False).indices
    rows = units.mT.gather(1, picked.flatten(1)[..., None].expand(-1, -1, units.shape[1]))
    rows = rows.unflatten(1, picked.shape[1:])
    means = torch.einsum("bkp,bcp->bkc", F.one_hot(classes, num_classes + 1)[..., :num_classes].mT.to(units), units)
    return ClassRows(
        F.pad(rows, (0, 0, 0, PIXELS_PER_CLASS - wanted)),
        counts.clamp(max=wanted),
        F.normalize(means, dim=-1).unsqueeze(2),
        counts.clamp(max=1),
    )


class ClassQueue:
    """A ring buffer of `size` unit vectors per class; deliberately neither a module nor a buffer.

    DDP broadcasts every buffer of a module from rank 0 in every forward pass: hundreds of megabytes here. Instead, the
    banks are updated identically on all ranks, and saved as extra state of the loss.

    Args:
        num_classes: `K`.
        size: slots per class.
        channels: length of a vector.
        generator: draws the random unit vectors that initialise the slots.
        official: wrap around as CIRKD's code does (rows that do not fit overwrite the last slots, then the pointer is
            0) and also draw from slots that were never filled. Otherwise the oldest rows are replaced and only filled
            slots are drawn.
    """

    def __init__(
        self, num_classes: int, size: int, channels: int, generator: torch.Generator, *, official: bool
    ) -> None:
        self.size = size
        self.official = official
        rows = F.normalize(torch.randn(num_classes, size, channels, generator=generator), dim=-1)
        # Rows without a place are written to a spare row at the end, so that no shape depends on the data.
        self._storage = torch.cat((rows.flatten(0, 1), rows.new_zeros(1, channels)))
        self.pointer = torch.zeros(num_classes, dtype=torch.int64)
        self.filled = torch.zeros(num_classes, dtype=torch.int64)

    @property
    def rows(self) -> Tensor:
        """The bank, `[K, size, C]`."""
        return self._storage[:-1].unflatten(0, (len(self.pointer), self.size))

    def to(self, device: torch.device) -> None:
        """Move the bank to `device` if it is not there."""
        if self._storage.device != device:
            self._storage = self._storage.to(device)
            self.pointer = self.pointer.to(device)
            self.filled = self.filled.to(device)

    def enqueue(self, rows: Tensor, counts: Tensor) -> None:
        """Add the first `counts[n, k]` of `rows[n, k]`, image by image.

        Shapes: rows `[N, K, M, C]`, counts `[N, K]`.

        Raises:
            ValueError: if the queue is too small for all of them at once.
        """
        if rows.shape[0] * rows.shape[2] > self.size:
            raise ValueError(
                f"a queue of {self.size} slots a class cannot take {rows.shape[2]} rows of each of "
                f"{rows.shape[0]} images at once; make it at least {rows.shape[0] * rows.shape[2]}"
            )
        if not self.official:
            first = self.pointer + counts.cumsum(dim=0) - counts
            self._write(rows, counts, first)
            total = counts.sum(dim=0)
            self.pointer = (self.pointer + total) % self.size
            self.filled = (self.filled + total).clamp(max=self.size)
            return
        for image_rows, taken in zip(rows, counts):
            wraps = self.pointer + taken >= self.size
            first = torch.where(wraps, self.size - taken, self.pointer)
            self._write(image_rows[None], taken[None], first[None])
            self.pointer = torch.where(wraps, 0, self.pointer + taken)
        self.filled = torch.full_like(self.filled, self.size)

    def draw(self, order: Tensor) -> tuple[Tensor, Tensor]:
        """Draw the same number of keys from every class, one class after another.

        Args:
            order: `[n]` int64, distinct slots in `0..size-1`; if a class is only partly filled, they are mapped to the
                filled part.

        Returns:
            Keys `[K n, C]`, and whether each is usable, `[K n]` bool (not for a class that was never seen).
        """
        slots = (order * self.filled.unsqueeze(1)) // self.size if not self.official else order
        slots = slots.expand(len(self.pointer), -1)
        keys = self._storage[(slots + self._offsets()).flatten()]
        usable = torch.ones_like(slots, dtype=torch.bool) if self.official else self.filled.unsqueeze(1) > 0
        return keys, usable.expand_as(slots).flatten()

    def state(self) -> dict[str, Tensor]:
        """Return the state for a checkpoint."""
        return {"rows": self.rows.clone(), "pointer": self.pointer, "filled": self.filled}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned.

        Raises:
            ValueError: if the shape of the bank differs.
        """
        if state["rows"].shape != self.rows.shape:
            raise ValueError(
                f"the saved memory bank has shape {tuple(state['rows'].shape)}, this one {tuple(self.rows.shape)}"
            )
        device = self._storage.device
        self.rows.copy_(state["rows"])
        self.pointer = state["pointer"].to(device, copy=True)
        self.filled = state["filled"].to(device, copy=True)

    def _write(self, rows: Tensor, counts: Tensor, first: Tensor) -> None:
        place = torch.arange(rows.shape[2], device=rows.device)
        slots = (first.unsqueeze(2) + place) % self.size + self._offsets()
        spare = self._storage.shape[0] - 1
        target = slots.where(place < counts.unsqueeze(2), spare)
        self._storage[target.flatten()] = rows.flatten(0, 2).to(self._storage.dtype)

    def _offsets(self) -> Tensor:
        return torch.arange(len(self.pointer), device=self.pointer.device).unsqueeze(1) * self.size
