"""Random image and mask files: right pixels, or one sentence that names the file."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image, ImageOps

from sward import data
from sward.data.files import PairedFiles
from sward.data.folder import FolderOptions
from sward.data.images import SUFFIXES, read_image
from sward.data.sample import Pair
from tests.support.folder_data import build, write_pairs
from tests.support.fuzzing import assert_sentence, examples, for_each

MODES = ("L", "RGB", "RGBA", "LA", "P", "1", "I", "I;16", "F", "CMYK", "YCbCr")
WIDE: dict[str, type] = {"I": np.int32, "I;16": np.uint16, "F": np.float32}
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".tif": "TIFF", ".bmp": "BMP", ".gif": "GIF", ".webp": "WEBP", ".ppm": "PPM"}


class Picture(NamedTuple):
    """How to write one file."""

    mode: str
    size: tuple[int, int]
    format: str
    suffix: str
    orientation: int
    kept: float
    """Share of the bytes that the file keeps."""
    flipped: int
    """Bit to flip, counted from the start; -1 for none."""
    pages: int
    seed: int


def pictures(largest: int) -> st.SearchStrategy[Picture]:
    """Half of them whole files without loss, the others of any kind."""
    sizes = st.tuples(st.integers(1, largest), st.integers(1, largest))
    orientations, seeds = st.integers(0, 9), st.integers(0, 99)
    whole = st.builds(
        Picture,
        mode=st.sampled_from(["L", "RGB"]),
        size=sizes,
        format=st.sampled_from([".png", ".bmp"]),
        suffix=st.sampled_from(["", ".PNG", ".jpg"]),
        orientation=orientations,
        kept=st.just(1.0),
        flipped=st.just(-1),
        pages=st.just(1),
        seed=seeds,
    )
    anything = st.builds(
        Picture,
        mode=st.sampled_from(MODES),
        size=sizes,
        format=st.sampled_from(sorted(FORMATS)),
        suffix=st.sampled_from(["", "", *SUFFIXES]),
        orientation=orientations,
        kept=st.sampled_from([1.0, 1.0, 0.99, 0.5, 0.1, 0.0]),
        flipped=st.sampled_from([-1, -1, 3, 50, 100, 1000, 5000]),
        pages=st.sampled_from([1, 1, 2]),
        seed=seeds,
    )
    return st.one_of(whole, anything)


def write(picture: Picture, path: Path) -> Image.Image | None:
    """Write the picture as told and return it; None if Pillow has no such file."""
    width, height = picture.size
    values = np.random.default_rng(picture.seed).integers(0, 256, (height, width, 4), np.uint8)
    if picture.mode in WIDE:
        image = Image.fromarray(values[..., 0].astype(WIDE[picture.mode]) * 200)
    elif picture.mode == "L":
        image = Image.fromarray(values[..., 0])
    else:
        image = Image.fromarray(values).convert(picture.mode)
    exif = Image.Exif()
    if picture.orientation:
        exif[0x0112] = picture.orientation
    options: dict[str, Any] = {"exif": exif} if picture.format in (".png", ".jpg", ".tif", ".webp") else {}
    if picture.pages > 1 and picture.format in (".tif", ".gif", ".webp", ".png"):
        options |= {"save_all": True, "append_images": [ImageOps.mirror(image.convert("RGB"))]}
    try:
        image.save(path, format=FORMATS[picture.format], **options)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return None
    content = bytearray(path.read_bytes())
    content = content[: round(picture.kept * len(content))]
    if 0 <= picture.flipped < 8 * len(content):
        content[picture.flipped // 8] ^= 1 << picture.flipped % 8
    path.write_bytes(content)
    return image


def fresh_paths(folder: Path) -> Callable[[str], Path]:
    numbers = itertools.count()
    return lambda suffix: folder / f"{next(numbers)}{suffix}"


@examples(120, 3000)
def test_images_are_read_right_or_refused(count: int, tmp_path: Path) -> None:
    next_path = fresh_paths(tmp_path)
    outcomes = {"right": 0, "refused": 0}

    def check(picture: Picture) -> None:
        path = next_path(picture.suffix or picture.format)
        image = write(picture, path)
        if image is None:
            return
        ranges = (0, 60_000) if picture.mode in WIDE else None
        try:
            pixels = read_image(path, ranges)
        except ValueError as error:
            assert_sentence(str(error), str(path))
            outcomes["refused"] += 1
            return
        assert pixels.dtype == torch.uint8
        assert pixels.shape[0] == 3
        is_whole = picture.kept == 1.0 and picture.flipped < 0
        if is_whole and picture.format in (".png", ".bmp") and picture.mode in ("L", "RGB"):
            upright = image
            if picture.format == ".png" and picture.orientation in range(2, 9):
                exif = Image.Exif()
                exif[0x0112] = picture.orientation
                image.getexif()[0x0112] = picture.orientation
                upright = ImageOps.exif_transpose(image)
            expected = np.asarray(upright.convert("RGB")).transpose(2, 0, 1)
            assert np.array_equal(pixels.numpy(), expected)
            outcomes["right"] += 1

    for_each(pictures(64 if count < 1000 else 4000), count, check)
    assert min(outcomes.values()) > count // 10


@examples(60, 3000)
def test_masks_become_classes_or_are_refused(count: int, tmp_path: Path) -> None:
    next_path = fresh_paths(tmp_path)
    root = write_pairs(tmp_path / "set", classes=3)
    declared = st.one_of(
        st.none(), st.lists(st.one_of(st.integers(0, 255), st.integers(-3, 70_000)), min_size=1, max_size=5)
    )
    held = st.sets(st.integers(0, 255), min_size=1, max_size=4)
    outcomes = {"right": 0, "refused": 0}

    def check(case: tuple[Picture, set[int], list[int] | None]) -> None:
        picture, values, declared = case
        path = next_path(picture.suffix or picture.format)
        plain = picture.mode == "L" and picture.format == ".png" and picture.kept == 1.0 and picture.flipped < 0
        if plain:
            choices = np.array(sorted(values), np.uint8)
            pixels = np.random.default_rng(picture.seed).choice(choices, picture.size[::-1])
            Image.fromarray(pixels).save(path, format="PNG")
        elif write(picture, path) is None:
            return
        try:
            dataset = open_folder(root, declared)
        except ValueError as error:
            assert_sentence(str(error))
            return
        try:
            labels = dataset.read_mask(Pair("a", path, path))
        except ValueError as error:
            assert_sentence(str(error), str(path))
            outcomes["refused"] += 1
            return
        assert labels.dtype == np.uint8
        assert labels.ndim == 2
        assert set(np.unique(labels).tolist()) <= {*range(dataset.info.num_classes), 255}
        if plain:
            expected = np.full_like(pixels, 255)
            for index, value in enumerate(declared or range(3)):
                expected[pixels == value] = index
            assert np.array_equal(labels, expected)
            outcomes["right"] += 1

    for_each(st.tuples(pictures(24), held, declared), count, check)
    assert min(outcomes.values()) > 0


def open_folder(root: Path, declared: list[int] | None) -> PairedFiles:
    if declared is None:
        return build(root)
    names = tuple(f"class {index}" for index in range(len(declared)))
    options = FolderOptions(names, tuple(map(str, declared)))
    dataset = data.build("folder", "train", root=root, image_size=32, train=True, folder_options=options)
    assert isinstance(dataset, PairedFiles)
    return dataset
