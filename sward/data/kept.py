"""Decoded training frames in memory, so that only the first epoch decodes files."""

from __future__ import annotations

import mmap

import numpy as np
import torch
from torch import Tensor

from sward.data.packed import frame_bytes, split_frame

LIMIT = 2**29
"""Most bytes of memory for the frames of a data set; none are kept of a larger one."""


class KeptFrames:
    """Keeps what was decoded, in memory that forked loader processes share.

    Every frame has a place of `LIMIT / count` bytes, or four times the `expected` size. Larger frames are not kept.

    Args:
        count: number of frames.
        expected: `(height, width)` of a frame.
    """

    def __init__(self, count: int, expected: tuple[int, int]) -> None:
        place = min(LIMIT // count, 4 * frame_bytes(*expected))
        # Anonymous memory counts when it is written to first, and no limit of /dev/shm applies to it.
        self._places = np.frombuffer(mmap.mmap(-1, count * place), np.uint8).reshape(count, place)
        # Height and width of each kept frame.
        self._sizes = torch.zeros(count, 2, dtype=torch.int64).share_memory_()

    @staticmethod
    def fit(count: int, expected: tuple[int, int]) -> bool:
        """Return whether `count` frames of the `expected` size may be kept."""
        return 0 < count * frame_bytes(*expected) <= LIMIT

    def read(self, index: int) -> tuple[Tensor, Tensor] | None:
        """Return a copy of frame `index`, `image [3, H, W]` and `labels [H, W]`, uint8; None if it is not kept."""
        height, width = self._sizes[index].tolist()
        if not height:
            return None
        image, labels = split_frame(self._places[index], height, width)
        return image.clone(), labels.clone()

    def write(self, index: int, image: Tensor, labels: Tensor) -> None:
        """Keep a frame if its place is large enough."""
        height, width = labels.shape
        place = self._places[index]
        if frame_bytes(height, width) <= len(place):
            kept_image, kept_labels = split_frame(place, height, width)
            kept_image.copy_(image)
            kept_labels.copy_(labels)
            # Last, so that no other process finds half of a frame.
            self._sizes[index] = torch.tensor([height, width])
