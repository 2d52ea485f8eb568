"""Tiles against the whole image, and their blending against values worked out by hand."""

import pytest
import torch
from torch import Tensor

from sward.deploy.tiles import blended_bands


def whole(bands: list[tuple[int, Tensor]]) -> Tensor:
    """Join bands; each must start where the one before ended."""
    start = 0
    for top, band in bands:
        assert top == start
        start += band.shape[1]
    return torch.cat([band for _, band in bands], dim=1)


@pytest.mark.parametrize("size", [(40, 50), (16, 16), (7, 100), (41, 16), (17, 33)])
@pytest.mark.parametrize(("tile", "overlap"), [((16, 16), 4), ((16, 16), 0), ((16, 24), 15), ((10, 12), 7)])
def test_tiles_of_a_network_without_context_equal_the_whole_image(
    size: tuple[int, int], tile: tuple[int, int], overlap: int
) -> None:
    image = torch.randint(0, 256, (3, *size)).float()

    def forward(images: Tensor) -> Tensor:
        assert images.shape[-2] <= tile[0]
        assert images.shape[-1] <= tile[1]
        return torch.cat([images, images.square()], dim=1)

    found = whole(list(blended_bands(forward, image, tile, overlap)))
    torch.testing.assert_close(found, forward_whole(image), rtol=1e-6, atol=0)


def forward_whole(image: Tensor) -> Tensor:
    return torch.cat([image, image.square()])


def test_an_image_that_fits_is_one_tile_bit_for_bit() -> None:
    image, values = torch.rand(3, 20, 30), torch.randn(1, 5, 20, 30)
    ((top, found),) = blended_bands(lambda images: values, image, (32, 32), 8)
    assert top == 0
    assert torch.equal(found, values[0])


def test_weights_fall_linearly_in_the_overlap() -> None:
    # Two tiles of 6 pixels on 10: they share pixels 4 and 5. The first tile says 0 everywhere, the second 3.
    answers = iter([torch.zeros(1, 1, 1, 6), torch.full((1, 1, 1, 6), 3.0)])
    ((_, found),) = blended_bands(lambda images: next(answers), torch.rand(3, 1, 10), (1, 6), 0)
    assert found[0, 0].tolist() == [0, 0, 0, 0, 1, 2, 3, 3, 3, 3]


def test_bands_come_as_soon_as_their_tiles_are_done() -> None:
    calls = []

    def forward(images: Tensor) -> Tensor:
        calls.append(tuple(images.shape))
        return images[:, :1]

    bands = blended_bands(forward, torch.rand(3, 100, 60), (20, 30), 5)
    for rows, done in ((15, 3), (15, 6), (15, 9)):
        _, band = next(bands)
        assert (band.shape[1], len(calls)) == (rows, done)
    assert set(calls) == {(1, 3, 20, 30)}
