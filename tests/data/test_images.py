"""Reading images: nothing is turned, clipped, dropped or skipped in silence."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sward.data import CorruptFileError, read_image
from sward.data.files import list_images, pair_by_name
from sward.data.images import Header, read_header

CORNER = np.zeros((4, 6, 3), np.uint8)
CORNER[0, 0] = 255


def shifted_jpeg(path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = np.zeros((16, 32, 3), np.uint8)
    picture[:8, :8] = 255
    Image.fromarray(picture).save(path, exif=exif, quality=100, subsampling=0)


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (1, 1)), (6, (0, 1)), (8, (1, 0))])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, corner: tuple[int, int]) -> None:
    shifted_jpeg(tmp_path / "a.jpg", orientation)
    image = read_image(tmp_path / "a.jpg")
    height, width = (16, 32) if orientation < 5 else (32, 16)
    assert image.shape == (3, height, width)
    assert read_header(tmp_path / "a.jpg") == Header((height, width), "RGB", turned=orientation != 1, format="JPEG")
    row, column = (-1 if last else 0 for last in corner)
    assert image[:, row, column].min() > 200
    assert (image[0] > 127).sum() == 64


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
