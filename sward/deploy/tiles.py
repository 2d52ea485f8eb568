"""Overlapping tiles over an image of any size, blended into rows of finished pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


def check_tile(tile: tuple[int, int] | None, overlap: int | None) -> None:
    """Raise ValueError unless tiles of this height and width with this overlap cover an image; None: no tiles."""
    if tile is None:
        if overlap is not None:
            raise ValueError(f"overlap must be given with a tile, got {overlap} without one")
        return
    overlap = default_overlap(tile) if overlap is None else overlap
    if min(tile) < 1:
        raise ValueError(f"tile must be two positive numbers, got {tile[0]} {tile[1]}")
    if not 0 <= overlap < min(tile):
        raise ValueError(f"overlap must be at least 0 and below the sides of the tile, {min(tile)}, got {overlap}")


def default_overlap(tile: tuple[int, int]) -> int:
    """Return a quarter of the shorter side."""
    return min(tile) // 4


class TiledNetwork(nn.Module):
    """Run a network on overlapping tiles of one image and blend the results.

    Args:
        network: maps images `[1, 3, h, w]` to `[1, K, h, w]`.
        tile: height and width of a tile.
        overlap: pixels that neighbours share; None takes a quarter of the tile.

    Raises:
        ValueError: if tiles of this height and width with this overlap do not cover an image.
    """

    def __init__(self, network: nn.Module, tile: tuple[int, int], overlap: int | None) -> None:
        super().__init__()
        check_tile(tile, overlap)
        self.network, self.tile = network, tile
        self.overlap = default_overlap(tile) if overlap is None else overlap

    def forward(self, images: Tensor) -> Tensor:
        """Map one image `[1, 3, H, W]` to `[1, K, H, W]`."""
        bands = [band for _, band in blended_bands(self.network, images[0], self.tile, self.overlap)]
        return torch.cat(bands, dim=1)[None]


def blended_bands(
    forward: Callable[[Tensor], Tensor], image: Tensor, tile: tuple[int, int], overlap: int
) -> Iterator[tuple[int, Tensor]]:
    """Run `forward` on overlapping tiles and yield the blended result from top to bottom.

    Where tiles overlap, their weights fall linearly towards their edges and sum to 1; elsewhere the result is that of
    the one tile. An image that fits into a tile is one tile. Only one row of tiles is in memory.

    Args:
        forward: maps images `[1, 3, h, w]` to `[1, K, h, w]`.
        image: `[3, H, W]`.
        tile: height and width.
        overlap: pixels that neighbours share, at least.

    Yields:
        The first row of a band, and its values `[K, rows, W]`.
    """
    height, width = image.shape[-2:]
    rows, columns = _spans(height, tile[0], overlap), _spans(width, tile[1], overlap)
    row_weights, column_weights = _weights(rows), _weights(columns)
    unfinished: Tensor | None = None
    for index, (top, bottom) in enumerate(rows):
        band: Tensor | None = None
        for (left, right), weights in zip(columns, column_weights):
            values = forward(image[None, :, top:bottom, left:right])[0]
            values = values * weights.to(values.device)
            if band is None:
                band = values.new_zeros(len(values), bottom - top, width)
            band[:, :, left:right] += values * row_weights[index][:, None].to(values.device)
        assert band is not None
        if unfinished is not None:
            band[:, : unfinished.shape[1]] += unfinished
        end = rows[index + 1][0] if index + 1 < len(rows) else height
        yield top, band[:, : end - top]
        unfinished = band[:, end - top :].clone()


def _spans(length: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """Return the starts and ends of tiles along one side; the last one is moved back to end with the image."""
    if length <= tile:
        return [(0, length)]
    starts = [*range(0, length - tile, tile - overlap), length - tile]
    return [(start, start + tile) for start in starts]


def _weights(spans: list[tuple[int, int]]) -> list[Tensor]:
    """Return one weight per pixel of each span; over all spans the weights of a pixel sum to 1."""
    ramps = []
    for start, end in spans:
        places = torch.arange(end - start)
        ramps.append(torch.minimum(places + 1, end - start - places).float())
    total = torch.zeros(spans[-1][1])
    for (start, end), ramp in zip(spans, ramps):
        total[start:end] += ramp
    return [ramp / total[start:end] for (start, end), ramp in zip(spans, ramps)]
