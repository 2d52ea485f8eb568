"""Reading images: nothing is turned, clipped, dropped or skipped in silence."""

import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sward import data
from sward.data import CorruptFileError, read_image
from sward.data.check import count_labels
from sward.data.files import PairedFiles, list_images, pair_by_name
from sward.data.images import Header, check_depth, may_lie_otherwise, open_image, read_header, read_opened

CORNER = np.zeros((4, 6, 3), np.uint8)
CORNER[0, 0] = 255


def wide_tiff(values: np.ndarray) -> bytes:
    """An uncompressed colour TIFF file of 16 bits per channel, which Pillow does not write."""
    height, width, _ = values.shape
    first, entries = 8, 9
    bits = first + 2 + 12 * entries + 4
    tags = [
        (256, 3, 1, width),
        (257, 3, 1, height),
        (258, 3, 3, bits),
        (259, 3, 1, 1),  # no compression
        (262, 3, 1, 2),  # RGB
        (273, 4, 1, bits + 6),
        (277, 3, 1, 3),
        (278, 3, 1, height),
        (279, 4, 1, values.nbytes),
    ]
    folder = struct.pack("<H", entries) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return (
        b"II*\0" + struct.pack("<I", first) + folder + struct.pack("<HHH", 16, 16, 16) + values.astype("<u2").tobytes()
    )


CORNERS = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
"""EXIF orientation -> row and column of where it puts the upper left corner."""


def write_turned(path: Path, orientation: int) -> None:
    """Write a picture of 16 x 32 pixels as stored, with a white block of 8 x 12 in its upper left corner."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = np.zeros((16, 32, 3), np.uint8)
    picture[:8, :12] = 255
    Image.fromarray(picture).save(path, exif=exif, quality=100)


@pytest.mark.parametrize("orientation", CORNERS)
@pytest.mark.parametrize(
    ("suffix", "format"), [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("tif", "TIFF"), ("avif", "AVIF")]
)
def test_exif_orientation_is_applied(tmp_path: Path, suffix: str, format: str, orientation: int) -> None:
    path = tmp_path / f"a.{suffix}"
    write_turned(path, orientation)
    image = read_image(path)
    height, width = (16, 32) if orientation < 5 else (32, 16)
    assert image.shape == (3, height, width)
    expected = Header((height, width), "RGB", turned=orientation != 1, format=format, keeps_size=orientation < 5)
    assert read_header(path) == expected
    opened = Header.of(open_image(path))
    assert (opened.size, opened.turned) == ((height, width), False)
    block = image[0] > 127
    assert block.sum() == 8 * 12
    assert block[CORNERS[orientation]]
    # The longer side of the block lies along the longer side of the picture.
    assert (block.any(1).sum(), block.any(0).sum()) == ((8, 12) if orientation < 5 else (12, 8))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_uncompressed_tiff_of_any_mode_is_turned(tmp_path: Path, mode: str, orientation: int) -> None:
    """Pillow scrambles such files when it opens them by name, since it maps their rows with the width of the result."""
    values: np.ndarray = np.array([[0, 10, 20], [30, 40, 50]], np.uint8)
    upright = {
        5: [[0, 30], [10, 40], [20, 50]],
        6: [[30, 0], [40, 10], [50, 20]],
        7: [[50, 20], [40, 10], [30, 0]],
        8: [[20, 50], [10, 40], [0, 30]],
    }
    stored = Image.fromarray(values.astype(np.uint16)) if mode == "I;16" else Image.fromarray(values).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.tif"
    stored.save(path, exif=exif)
    value_range = (0, 255) if mode == "I;16" else None
    for opened in (path, Image.open(path)):
        read = read_image(opened, value_range) if isinstance(opened, Path) else read_opened(opened, value_range)
        assert read[0].tolist() == upright[orientation]


def test_an_orientation_in_xmp_counts_and_one_that_is_none_does_not(tmp_path: Path) -> None:
    picture = Image.fromarray(CORNER)
    picture.save(tmp_path / "a.tif", tiffinfo={700: b'<x:xmpmeta tiff:Orientation="6"/>'})
    assert read_header(tmp_path / "a.tif") == Header((6, 4), "RGB", turned=True, format="TIFF", keeps_size=False)
    assert read_image(tmp_path / "a.tif").shape == (3, 6, 4)
    exif = Image.Exif()
    exif[0x0112] = 0
    picture.save(tmp_path / "b.png", exif=exif)
    assert read_header(tmp_path / "b.png") == Header((4, 6), "RGB", turned=False, format="PNG")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_upright_masks_pass_the_check_beside_turned_images(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "images/train").mkdir(parents=True)
    (tmp_path / "masks/train").mkdir(parents=True)
    for orientation in CORNERS:
        write_turned(tmp_path / f"images/train/{orientation}.{suffix}", orientation)
        mask = np.zeros((16, 32) if orientation < 5 else (32, 16), np.uint8)
        mask[:4] = 1
        Image.fromarray(mask).save(tmp_path / f"masks/train/{orientation}.png")
    dataset = data.build("folder", "train", train=True, root=tmp_path, num_classes=2, image_size=16, packed="none")
    assert isinstance(dataset, PairedFiles)
    counted = count_labels(dataset)
    assert counted.pixels[:, 1].tolist() == [4 * 32] * 4 + [4 * 16] * 4
    # Of the others, the sizes say that image and mask are the same way up.
    assert counted.turned_alone == ("2", "3", "4")


@pytest.mark.parametrize("orientation", [3, 6])
def test_of_a_square_image_no_size_says_which_way_up_its_mask_is(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    square = Image.fromarray(np.zeros((16, 16), np.uint8))
    square.save(tmp_path / "a.png", exif=exif)
    square.save(tmp_path / "upright.png")
    header = read_header(tmp_path / "a.png")
    assert header is not None
    assert may_lie_otherwise(header, tmp_path / "upright.png")
    assert not may_lie_otherwise(header, tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_wide_images_need_a_range_and_keep_their_levels(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    values = np.linspace(0, 4095, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(values).save(path)
    with pytest.raises(
        ValueError, match=r"must have 8 bits per channel, got uint16 values from 0 to 4095; state .*range"
    ):
        read_image(path)
    image = read_image(path, (0, 4095))
    assert image.shape == (3, 8, 8)
    assert torch.equal(image[1], torch.from_numpy((values / 4095 * 255).round().astype(np.uint8)))
    with pytest.raises(ValueError, match=r"must be in the stated range, 0 to 1023, got uint16 values from 0 to 4095"):
        read_image(path, (0, 1023))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bit_and_float_images_are_scaled(tmp_path: Path, dtype: type) -> None:
    values = np.array([[0, 1], [2, 4]], dtype)
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="must have 8 bits per channel"):
        read_image(tmp_path / "a.tif")
    assert read_image(tmp_path / "a.tif", (0, 4))[0].tolist() == [[0, 64], [128, 255]]


@pytest.mark.parametrize(
    ("value_range", "shown"),
    [
        ((0, math.inf), "0 inf"),
        ((-math.inf, 0), "-inf 0"),
        ((math.nan, 1), "nan 1"),
        ((0, math.nan), "0 nan"),
        ((4095, 0), "4095 0"),
        ((7, 7), "7 7"),
        ((-1e308, 1e308), r"-1e\+308 1e\+308"),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_ranges_must_be_finite_and_increasing(
    tmp_path: Path, dtype: type, value_range: tuple[float, float], shown: str
) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.full((2, 2), 7, dtype)).save(path)
    message = f"^image_range must be two finite numbers, the lower first, such as 0 4095, got {shown}$"
    with pytest.raises(ValueError, match=message):
        read_image(path, value_range)
    header = read_header(path)
    assert header is not None
    with pytest.raises(ValueError, match=message):
        check_depth(path, header, value_range)
    with Image.open(path) as image, pytest.raises(ValueError, match=message):
        read_opened(image, value_range)


def test_16_bit_colour_tiff_is_refused_without_the_full_range(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(wide_tiff(np.array([[[0, 4095, 65535]] * 3] * 2, np.uint16)))
    for value_range in (None, (0, 4095)):
        with pytest.raises(ValueError, match=r"a\.tif must have 8 bits per channel, got 16-bit colour; state"):
            read_image(path, value_range)
    assert read_image(path, (0, 65535))[:, 1, 2].tolist() == [0, 15, 255]


def test_16_bit_pgm_is_refused_without_a_range(tmp_path: Path) -> None:
    path = tmp_path / "a.pgm"
    path.write_bytes(b"P5 2 1 65535\n" + np.array([0, 65535], ">u2").tobytes())
    with pytest.raises(ValueError, match=r"a\.pgm must have 8 bits per channel, got int32 values from 0 to 65535"):
        read_image(path)
    assert read_image(path, (0, 65535))[0].tolist() == [[0, 255]]


def test_nan_is_out_of_range(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0.5, np.nan]], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="must be in the stated range"):
        read_image(tmp_path / "a.tif", (0, 1))


def test_transparency_is_composited_over_black(tmp_path: Path) -> None:
    pixels = np.full((2, 2, 4), 200, np.uint8)
    pixels[..., 3] = [[255, 0], [0, 255]]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png")[0].tolist() == [[200, 0], [0, 200]]


def test_cmyk_and_grey_become_rgb(tmp_path: Path) -> None:
    Image.fromarray(CORNER).convert("CMYK").save(tmp_path / "a.tif")
    assert torch.equal(read_image(tmp_path / "a.tif").permute(1, 2, 0), torch.from_numpy(CORNER))
    Image.fromarray(CORNER[..., 0]).save(tmp_path / "b.png")
    assert torch.equal(read_image(tmp_path / "b.png"), read_image(tmp_path / "a.tif"))


def test_several_pages_are_refused(tmp_path: Path) -> None:
    pages = [Image.fromarray(CORNER), Image.fromarray(CORNER + 9)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(ValueError, match=r"a\.tif must have one page, got 2; save the pages as separate files"):
        read_image(tmp_path / "a.tif")


def test_animated_gif_is_refused(tmp_path: Path) -> None:
    pages = [Image.fromarray(CORNER), Image.fromarray(255 - CORNER)]
    pages[0].save(tmp_path / "a.gif", save_all=True, append_images=pages[1:])
    with pytest.raises(ValueError, match=r"a\.gif must have one page, got 2; save the pages as separate files"):
        read_image(tmp_path / "a.gif")


@pytest.mark.parametrize("suffix", ["gif", "ppm", "tga", "jp2", "avif"])
def test_less_usual_formats_are_listed_and_read(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(np.full((16, 16, 3), 120, np.uint8)).save(tmp_path / f"a.{suffix}")
    (path,) = list_images(tmp_path).values()
    assert (read_image(path).float() - 120).abs().max() < 5


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    Image.fromarray(CORNER).save(tmp_path / "a.png")
    for name in (".DS_Store", "Thumbs.db", "notes.txt", "._a.png"):
        (tmp_path / name).write_bytes(b"x")
    assert list(list_images(tmp_path)) == ["a"]
    (tmp_path / "b.npy").write_bytes(b"x")
    (tmp_path / "nested").mkdir()
    with pytest.warns(UserWarning, match=r"skipped in .*: b\.npy, nested$"):
        assert list(list_images(tmp_path)) == ["a"]


def test_what_only_looks_like_an_image_is_named_as_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match=r"folder\.png must be a file, got a folder"):
        list_images(tmp_path)
    (tmp_path / "folder.png").rmdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match=r"link\.png must be a file, got a broken link"):
        list_images(tmp_path)
    (tmp_path / "link.png").unlink()
    (tmp_path / "text.png").write_text("x")
    with pytest.raises(CorruptFileError, match=r"text\.png: the file is damaged or not an image"):
        read_image(tmp_path / "text.png")


def test_far_too_many_pixels_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(CORNER).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    with pytest.raises(ValueError, match=r"a\.png must have at most 10 pixels"):
        read_image(tmp_path / "a.png")


def test_names_are_compared_in_composed_unicode_and_near_ones_are_named(tmp_path: Path) -> None:
    for folder, name in (("images", "cafe\u0301"), ("masks", "caf\u00e9"), ("images", "X1"), ("masks", "x1_mask")):
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.fromarray(CORNER[..., 0]).save(tmp_path / folder / f"{name}.png")
    with pytest.raises(ValueError, match=r"no image file named X1; did you mean x1_mask\.png\?"):
        pair_by_name(tmp_path / "images", tmp_path / "masks")
    (tmp_path / "images/X1.png").unlink()
    with pytest.warns(UserWarning, match=r"masks without an image in .*: x1_mask$"):
        pairs = pair_by_name(tmp_path / "images", tmp_path / "masks")
    assert [pair.name for pair in pairs] == ["caf\u00e9"]


def test_an_8_bit_bmp_of_two_colours_is_refused(tmp_path: Path) -> None:
    """Pillow reads its bytes as eight pixels each."""
    pixels = bytes([1, 0, 1, 1] * 4)
    header = struct.pack("<2sIHHI", b"BM", 62 + 16, 0, 0, 62)
    header += struct.pack("<IiiHHIIiiII", 40, 4, 4, 1, 8, 0, 16, 0, 0, 2, 2) + bytes([0, 0, 0, 0, 255, 255, 255, 0])
    (tmp_path / "mask.bmp").write_bytes(header + pixels)
    with pytest.raises(ValueError, match="must not be a BMP of two colours in 8 bits, which is misread; save"):
        open_image(tmp_path / "mask.bmp")
    Image.fromarray(np.eye(4, dtype=bool)).save(tmp_path / "fine.bmp")
    assert np.array_equal(np.asarray(open_image(tmp_path / "fine.bmp")), np.eye(4, dtype=bool))
    # One bit per pixel in the older header of 12 bytes, rows padded to 4 bytes, the lowest first.
    header = struct.pack("<2sIHHI", b"BM", 32 + 16, 0, 0, 32) + struct.pack("<IHHHH", 12, 4, 4, 1, 1)
    rows = b"".join(bytes([16 << row, 0, 0, 0]) for row in range(4))
    (tmp_path / "old.bmp").write_bytes(header + bytes([0, 0, 0, 255, 255, 255]) + rows)
    assert np.array_equal(np.asarray(open_image(tmp_path / "old.bmp")), np.eye(4, dtype=bool))
