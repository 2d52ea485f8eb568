"""Reading masks: right, or refused with the values found; never background in silence."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sward.data.images import open_image
from sward.data.masks import MaskValues, black_and_white, indices, list_values, parse_values

DISC = (np.hypot(*(np.indices((64, 64)) - 31.5)) < 20).astype(np.uint8)
COLOURED = MaskValues(("#000000", "#ff0000", "#0000ff"))


def palette(values: np.ndarray, colours: list[int]) -> Image.Image:
    image = Image.fromarray(values)
    image.putpalette(colours)
    return image


def polyp(image: Image.Image, path: Path) -> np.ndarray:
    image.save(path)
    return black_and_white(open_image(path), path, ("background", "polyp"), 127)


@pytest.mark.parametrize("mode", ["L", "RGB", "1", "P", "I;16", "JPEG", "soft"])
def test_polyp_masks_of_black_and_white(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(255 * DISC)
    if mode == "I;16":
        image = Image.fromarray(255 * DISC.astype(np.uint16))
    elif mode == "soft":
        image = image.resize((128, 128), Image.Resampling.BILINEAR).resize((64, 64), Image.Resampling.BILINEAR)
    elif mode == "P":
        image = palette(1 - DISC, [255, 255, 255, 0, 0, 0])
    elif mode != "JPEG":
        image = image.convert(mode)
    labels = polyp(image, tmp_path / ("a.jpg" if mode == "JPEG" else "a.png"))
    assert labels.dtype == np.uint8
    assert (labels != DISC).sum() <= (20 if mode == "soft" else 0)


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (Image.fromarray(DISC), "0, 1"),
        (Image.fromarray(2 * DISC), "0, 2"),
        (Image.fromarray(DISC.astype(np.uint16)), "0, 1"),
        (Image.fromarray(65535 * DISC.astype(np.uint16)), "0, 65535"),
        (Image.fromarray(DISC.astype(np.float32)), "0, 1"),
        (palette(DISC, [0, 0, 0, 30, 30, 30]), "0, 30"),
        (palette(DISC, [0, 0, 0, 200, 0, 0]), "#000000, #c80000"),
        (Image.fromarray(DISC[..., None] * np.array([255, 0, 0], np.uint8)), "#000000, #ff0000"),
        (Image.fromarray(DISC[..., None] * np.array([0, 0, 255], np.uint8)), "#000000, #0000ff"),
        (Image.fromarray(np.full((4, 4, 4), 255, np.uint8) * np.eye(4, dtype=np.uint8)[..., None]), "transparent"),
        (Image.merge("LA", [Image.new("L", (4, 4), 255), Image.fromarray(255 * np.eye(4, dtype=np.uint8))]), "12 tra"),
    ],
)
def test_other_polyp_masks_are_refused_with_the_values_found(tmp_path: Path, image: Image.Image, found: str) -> None:
    with pytest.raises(ValueError, match=f"mask .*a.tif must .* got .*{found}"):
        polyp(image, tmp_path / "a.tif")


def test_empty_polyp_masks_are_background(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg"):
        assert not polyp(Image.fromarray(np.zeros((8, 8), np.uint8)), tmp_path / name).any()


def decode(values: MaskValues, image: Image.Image, path: Path, **options: int) -> np.ndarray:
    image.save(path, **options)
    return values.decode(open_image(path), path)


def test_numbers_become_classes_in_the_order_given(tmp_path: Path) -> None:
    values = MaskValues(("255", "0", "7"), ignore=("128",))
    mask = np.array([[0, 7], [128, 255]], np.uint8)
    assert decode(values, Image.fromarray(mask), tmp_path / "a.png").tolist() == [[1, 2], [255, 0]]
    assert decode(values, palette(mask, [1, 2, 3] * 256), tmp_path / "b.png").tolist() == [[1, 2], [255, 0]]
    wide = MaskValues(("0", "1000"))
    assert decode(wide, Image.fromarray(mask.astype(np.uint16) // 255 * 1000), tmp_path / "c.png").sum() == 1
    with pytest.raises(ValueError, match=r"values of mask .*d\.png must be 255, 0, 7, 128, got 3, 9; name every value"):
        decode(values, Image.fromarray(np.array([[3, 3, 9, 0]], np.uint8)), tmp_path / "d.png")


def test_colours_become_classes_also_from_a_palette(tmp_path: Path) -> None:
    mask = np.zeros((2, 2, 3), np.uint8)
    mask[0, 1], mask[1, 0] = [255, 0, 0], [0, 0, 255]
    expected = [[0, 1], [2, 0]]
    assert decode(COLOURED, Image.fromarray(mask), tmp_path / "a.png").tolist() == expected
    opaque = Image.fromarray(mask).convert("RGBA")
    assert decode(COLOURED, opaque, tmp_path / "b.png").tolist() == expected
    indexed = palette(np.array([[2, 0], [1, 2]], np.uint8), [255, 0, 0, 0, 0, 255, 0, 0, 0])
    assert decode(COLOURED, indexed, tmp_path / "c.png").tolist() == expected
    mask[1, 1] = [0, 255, 1]
    with pytest.raises(ValueError, match="got #00ff01; name every value"):
        decode(COLOURED, Image.fromarray(mask), tmp_path / "d.png")


def test_jpeg_masks_take_the_nearest_of_values_far_apart(tmp_path: Path) -> None:
    values = MaskValues(("0", "255"))
    assert (decode(values, Image.fromarray(255 * DISC), tmp_path / "a.jpg", quality=50) == DISC).all()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    with pytest.raises(ValueError, match=r"must be 0, 255, got .* more in [5-9]\d% of its pixels"):
        decode(values, Image.fromarray(noise), tmp_path / "b.jpg")
    with pytest.raises(ValueError, match="must be lossless"):
        decode(MaskValues(("0", "1", "2", "3", "4")), Image.fromarray(DISC * 4), tmp_path / "c.jpg")
    with pytest.raises(ValueError, match="must be lossless"):
        indices(open_image(tmp_path / "c.jpg"), tmp_path / "c.jpg")
    colourful = Image.fromarray(DISC[..., None] * np.array([255, 0, 0], np.uint8))
    assert (decode(COLOURED, colourful, tmp_path / "d.jpg", quality=95) == DISC).mean() > 0.98


def test_values_that_are_not_whole_numbers_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0.0, 0.5, np.nan]], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"must be whole numbers, got 0\.5"):
        indices(open_image(tmp_path / "a.tif"), tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("classes", "ignore", "message"),
    [
        (("0", "x"), (), "must be whole numbers or #rrggbb, got 'x'"),
        (("0", "#ff0000"), (), "must be all numbers or all colours"),
        (("0", "1"), ("1",), "must differ from each other"),
        (("#FF0000", "#ff0000"), (), "must differ from each other"),
    ],
)
def test_values_that_contradict(classes: tuple[str, ...], ignore: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskValues(classes, ignore)


def test_lists_of_values() -> None:
    assert parse_values(["0, 255", "7"]) == ("0", "255", "7")
    assert list_values(np.array([3, 1, 1, 2]), most=2) == "1, 2 and 1 more"
