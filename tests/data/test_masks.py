"""Reading masks: right, or refused with the values found; never background in silence."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sward.data.images import lossy_compression, open_image, read_image
from sward.data.masks import MaskValues, black_and_white, indices, list_values, parse_values
from tests.support.folder_data import wide_png

DISC = (np.hypot(*(np.indices((64, 64)) - 31.5)) < 20).astype(np.uint8)
THREE = DISC + (np.hypot(*(np.indices((64, 64)) - 31.5)) < 5)
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
        (Image.fromarray(THREE), "0, 1, 2"),
        (Image.fromarray(THREE.astype(np.uint16)), "0, 1, 2"),
        (Image.fromarray(THREE.astype(np.float32)), "0, 1, 2"),
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


def test_ranges_say_where_soft_edges_belong(tmp_path: Path) -> None:
    values = MaskValues(("0-127", "130-255"), ignore=("128-129",))
    mask = np.array([[0, 1, 127, 128], [129, 130, 200, 255]], np.uint8)
    expected = [[0, 0, 0, 255], [255, 1, 1, 1]]
    assert decode(values, Image.fromarray(mask), tmp_path / "a.png").tolist() == expected
    assert decode(values, Image.fromarray(mask).convert("RGB"), tmp_path / "b.png").tolist() == expected
    above = MaskValues(("128-65535", "0-127"))
    assert decode(above, Image.fromarray(mask.astype(np.uint16) * 257), tmp_path / "c.png").tolist() == [
        [1, 0, 0, 0],
        [0, 0, 0, 0],
    ]
    with pytest.raises(ValueError, match=r"must be 1-127, 128-254, got 0, 255; name every value"):
        decode(MaskValues(("1-127", "128-254")), Image.fromarray(mask), tmp_path / "d.png")


@pytest.mark.parametrize("mode", ["1", "P", "quantized", "gif"])
def test_ranges_are_levels_of_grey_whatever_the_mode(tmp_path: Path, mode: str) -> None:
    """By the numbers in the file, 1-bit masks would be all background and palettes could be the wrong way round."""
    mask = Image.fromarray(255 * DISC)
    if mode == "P":
        mask = palette(1 - DISC, [255, 255, 255, 0, 0, 0])
    elif mode == "1":
        mask = mask.convert("1")
    elif mode == "quantized":
        mask = mask.resize((128, 128)).resize((64, 64)).quantize(256)
        assert mask.mode == "P"
    found = decode(MaskValues(("0-127", "128-255")), mask, tmp_path / ("a.gif" if mode == "gif" else "a.png"))
    assert (found != DISC).sum() <= (20 if mode == "quantized" else 0)


def test_lossy_masks_need_wide_ranges(tmp_path: Path) -> None:
    disc = Image.fromarray(110 * DISC)
    # The border that ranges name, and not the value that is nearest.
    assert (decode(MaskValues(("0-70", "71-255")), disc, tmp_path / "a.jpg", quality=95) == DISC).all()
    for values in (("0", "128-255"), ("0-99", "200-255")):
        assert (decode(MaskValues(values), Image.fromarray(255 * DISC), tmp_path / "b.jpg") == DISC).all()
    ignoring = MaskValues(("0", "255"), ignore=("100-150",))
    assert (decode(ignoring, Image.fromarray(255 * DISC), tmp_path / "b.jpg", quality=95) == DISC).mean() > 0.95
    for values in (("0", "1", "2", "3", "4-255"), ("0-3", "4-255"), ("0", "1-255")):
        with pytest.raises(ValueError, match=r"must be lossless .* or ranges at least as wide, as 0-127,128-255 are"):
            decode(MaskValues(values), disc, tmp_path / "c.jpg")


def test_ranges_are_proposed_for_grey_masks_only(tmp_path: Path) -> None:
    grey, black = Image.fromarray(90 * DISC), MaskValues(("0", "255"))
    with pytest.raises(ValueError, match="or ranges such as 128-255 where edges are soft"):
        decode(black, grey, tmp_path / "a.png")
    for mask, name in ((Image.fromarray(DISC).convert("P"), "b.png"), (Image.fromarray(DISC > 0), "c.png")):
        with pytest.raises(ValueError, match=r"got 1; name every value with --mask-values and --ignore-values$"):
            decode(black, mask, tmp_path / name)


FIVE = np.arange(5, dtype=np.uint8).repeat(16)[None].repeat(64, 0)
"""Five classes in stripes of 16 x 64 pixels."""
NO_EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"
"""With metadata WebP files are of the extended kind (`VP8X`), whose pixels may be lossy or lossless."""


@pytest.mark.parametrize(
    ("suffix", "options", "compression"),
    [
        ("jpg", {}, "JPEG"),
        ("webp", {}, "lossy WebP"),
        ("webp", {"exif": NO_EXIF}, "lossy WebP"),
        ("tif", {"compression": "jpeg"}, "TIFF with JPEG compression"),
        ("jp2", {}, "JPEG2000"),
        ("avif", {}, "AVIF"),
    ],
)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_lossy_masks_hold_no_class_indices_but_values_far_apart(
    tmp_path: Path, suffix: str, options: dict[str, Any], compression: str, mode: str
) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(FIVE).convert(mode).save(path, **options)
    assert lossy_compression(open_image(path)) == compression
    with pytest.raises(
        ValueError, match=rf"a\.{suffix} must be lossless \(PNG\) to hold class indices, got {compression},"
    ):
        indices(open_image(path), path)
    with pytest.raises(ValueError, match="got a compression that changes values"):
        MaskValues(("0", "1", "2", "3", "4")).decode(open_image(path), path)
    Image.fromarray(255 * DISC).convert(mode).save(path, **options)
    assert (MaskValues(("0", "255")).decode(open_image(path), path) == DISC).mean() > 0.99
    assert (black_and_white(open_image(path), path, ("background", "polyp"), 127) == DISC).mean() > 0.99
    # Black with the noise of a compression is still black.
    Image.fromarray(9 * DISC).convert(mode).save(path, **options)
    assert not black_and_white(open_image(path), path, ("background", "polyp"), 127).any()


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        ("webp", {"lossless": True}),
        ("webp", {"lossless": True, "exif": NO_EXIF}),
        ("tif", {}),
        ("tif", {"compression": "tiff_lzw"}),
        ("tif", {"compression": "tiff_adobe_deflate"}),
    ],
)
def test_lossless_masks_are_exact(tmp_path: Path, suffix: str, options: dict[str, Any]) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(FIVE).save(path, **options)
    assert lossy_compression(open_image(path)) == ""
    assert (indices(open_image(path), path) == FIVE).all()
    values = MaskValues(("4", "3", "2", "1", "0"))
    assert (values.decode(open_image(path), path) == 4 - FIVE).all()


@pytest.mark.parametrize("lossless", [False, True])
def test_the_pixels_of_an_animated_webp_are_in_its_frames(tmp_path: Path, lossless: bool) -> None:
    """An animation of one frame is a picture, and its chunks lie in that of the frame."""
    path = tmp_path / "a.webp"
    Image.fromarray(FIVE).save(path, lossless=lossless)
    picture = path.read_bytes()[12:]
    size = (79).to_bytes(3, "little") + (63).to_bytes(3, "little")
    frame = bytes(6) + size + bytes(4) + picture
    chunks = (
        (b"VP8X", b"\2\0\0\0" + size),
        (b"ANIM", bytes(6)),
        (b"ODD ", b"x"),
        (b"ANMF", frame),
    )
    content = b"WEBP" + b"".join(
        kind + len(part).to_bytes(4, "little") + part + bytes(len(part) % 2) for kind, part in chunks
    )
    path.write_bytes(b"RIFF" + len(content).to_bytes(4, "little") + content)
    assert lossy_compression(open_image(path)) == ("" if lossless else "lossy WebP")


def test_turned_masks_are_transposed_like_their_images(tmp_path: Path) -> None:
    exif = Image.Exif()
    mask = np.array([[0, 1, 2], [3, 4, 5]], np.uint8)
    upright = {
        1: [[0, 1, 2], [3, 4, 5]],
        2: [[2, 1, 0], [5, 4, 3]],
        3: [[5, 4, 3], [2, 1, 0]],
        4: [[3, 4, 5], [0, 1, 2]],
        5: [[0, 3], [1, 4], [2, 5]],
        6: [[3, 0], [4, 1], [5, 2]],
        7: [[5, 2], [4, 1], [3, 0]],
        8: [[2, 5], [1, 4], [0, 3]],
    }
    for suffix in ("png", "tif"):
        for orientation, expected in upright.items():
            exif[0x0112] = orientation
            path = tmp_path / f"{orientation}.{suffix}"
            Image.fromarray(mask).save(path, exif=exif)
            assert indices(open_image(path), path).tolist() == expected
            assert read_image(path)[0].tolist() == expected


@pytest.mark.parametrize("suffix", ["tif", "gif"])
def test_masks_of_several_pages_are_refused(tmp_path: Path, suffix: str) -> None:
    pages = [Image.fromarray(DISC), Image.fromarray(1 - DISC)]
    pages[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=pages[1:])
    with pytest.raises(ValueError, match=rf"a\.{suffix} must have one page, got 2; save the pages as separate files"):
        open_image(tmp_path / f"a.{suffix}")


# Transparent are the background of 64 * 64 - 1264 pixels, or the disc of 1264.
BACKGROUND, FOREGROUND = int((DISC == 0).sum()), int(DISC.sum())


@pytest.mark.parametrize(
    ("image", "transparency", "count"),
    [
        (palette(DISC, [255, 255, 255, 255, 255, 255]), b"\0\xff", BACKGROUND),
        (palette(DISC, [255, 255, 255, 0, 0, 0]), b"\xff\x80", FOREGROUND),
        (palette(DISC, [0, 0, 0, 255, 255, 255]), 0, BACKGROUND),
        (Image.fromarray(255 * DISC), 0, BACKGROUND),
        (Image.fromarray(255 * DISC).convert("1"), 0, BACKGROUND),
        (Image.fromarray(255 * DISC.astype(np.uint16)), 255, FOREGROUND),
        (Image.fromarray(255 * DISC).convert("RGB"), (0, 0, 0), BACKGROUND),
    ],
    ids=["palette bytes", "half", "palette index", "L", "1", "I;16", "RGB"],
)
def test_masks_with_a_transparent_value_are_refused_as_those_with_an_alpha_channel_are(
    tmp_path: Path, image: Image.Image, transparency: bytes | int | tuple[int, int, int], count: int
) -> None:
    path = tmp_path / "a.png"
    image.save(path, transparency=transparency)
    assert "transparency" in open_image(path).info
    message = rf"mask .*a\.png must not be transparent, got {count} transparent pixels; save it without transparency"
    with pytest.raises(ValueError, match=message):
        black_and_white(open_image(path), path, ("background", "polyp"), 127)
    with pytest.raises(ValueError, match=message):
        MaskValues(("0", "255")).decode(open_image(path), path)
    with pytest.raises(ValueError, match=message):
        indices(open_image(path), path)
    if image.mode != "I;16":
        with pytest.raises(ValueError, match=message):
            MaskValues(("#000000", "#ffffff")).decode(open_image(path), path)


def test_transparent_values_that_no_pixel_has_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    # The third colour, of no pixel, is that of the background.
    palette(DISC, [0, 0, 0, 255, 255, 255, 0, 0, 0]).save(path, transparency=2)
    assert "transparency" in open_image(path).info
    assert (black_and_white(open_image(path), path, ("background", "polyp"), 127) == DISC).all()
    assert (indices(open_image(path), path) == DISC).all()
    assert (MaskValues(("#000000", "#ffffff")).decode(open_image(path), path) == DISC).all()
    Image.fromarray(255 * DISC).convert("RGB").save(path, transparency=(0, 0, 1))
    assert (black_and_white(open_image(path), path, ("background", "polyp"), 127) == DISC).all()


def test_the_transparent_colour_of_16_bit_colour_is_compared_as_its_pixels_are(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    black = wide_png(2, 3)
    content = black[: black.index(b"IDAT") - 4]
    # The pixels are exactly the transparent colour, of which Pillow keeps 0x12 per channel.
    rows = zlib.compress(2 * (b"\0" + 9 * b"\x12\x34"))
    for kind, part in ((b"tRNS", 3 * b"\x12\x34"), (b"IDAT", rows), (b"IEND", b"")):
        content += len(part).to_bytes(4, "big") + kind + part + zlib.crc32(kind + part).to_bytes(4, "big")
    path.write_bytes(content)
    with pytest.raises(ValueError, match="got 6 transparent pixels"):
        black_and_white(open_image(path), path, ("background", "polyp"), 127)


@pytest.mark.parametrize("values", [("0", "255"), ("#000000", "#ffffff")])
def test_masks_whose_values_are_scaled_as_they_are_read_are_refused(tmp_path: Path, values: tuple[str, str]) -> None:
    """A 2 in 16-bit colour would be 0, and a 1 of at most 3 in a PGM file 85."""
    colour = tmp_path / "a.png"
    colour.write_bytes(wide_png(2, 3))
    scaled = tmp_path / "b.pgm"
    scaled.write_bytes(b"P5\n2 2\n3\n\x00\x01\x02\x03")
    for path, found in ((colour, "16-bit colour"), (scaled, "a maximum of 3")):
        with pytest.raises(ValueError, match=rf"mask .*{path.name} must hold its values in 8 bits .* got {found}, for"):
            MaskValues(values).decode(open_image(path), path)
        with pytest.raises(ValueError, match=rf"got {found}, for which they are scaled"):
            indices(open_image(path), path)
    for maximum, stored in ((255, b"\x00\x01\x02\xff"), (65535, b"\0\0\0\x01\0\x02\0\xff")):
        scaled.write_bytes(f"P5\n2 2\n{maximum}\n".encode() + stored)
        assert indices(open_image(scaled), scaled).tolist() == [[0, 1], [2, 255]]


def test_values_that_are_not_whole_numbers_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0.0, 0.5, np.nan]], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"must be whole numbers, got 0\.5"):
        indices(open_image(tmp_path / "a.tif"), tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("classes", "ignore", "message"),
    [
        (("0", "x"), (), "must be whole numbers, ranges such as 128-255 or #rrggbb, got 'x'"),
        (("0", "1-x"), (), "got '1-x'"),
        (("0-100", "100-255"), (), "must not overlap, got 0-100 and 100-255"),
        (("0-127", "128-255"), ("130",), "must not overlap, got 128-255 and 130"),
        (("0", "255-128"), (), "must go from the lower to the higher one, got '255-128'"),
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
