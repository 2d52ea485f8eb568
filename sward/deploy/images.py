"""Image files that a user names, and the names of what is written for them."""

from __future__ import annotations

import glob
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sward.data.files import natural_order


def find_images(paths: Sequence[Path], *, leave_out: Path) -> tuple[list[Path], int]:
    """Return the images among files, folders and glob patterns, each once, in the order given.

    Args:
        paths: files; folders, which are searched with all their subfolders; patterns such as `a/**/*.jpg`.
        leave_out: folder of results; ignored where it lies in a folder of images.

    Returns:
        The files, and the number of files in folders that are not images.

    Raises:
        FileNotFoundError: if a path does not exist, or a folder or pattern holds no image.
    """
    found: dict[Path, Path] = {}
    others = 0
    for path in paths:
        if path.is_file():
            found.setdefault(_absolute(path), path)
            continue
        if path.is_dir():
            inside = sorted(_tree(path), key=lambda each: natural_order(str(each)))
        elif any(character in str(path) for character in "*?["):
            inside = [Path(each) for each in sorted(glob.glob(str(path), recursive=True), key=natural_order)]
        else:
            raise FileNotFoundError(f"there is no image at {path}")
        files = [each for each in inside if each.is_file() and not _is_within(each, leave_out, path)]
        images = [each for each in files if each.suffix.lower() in _readable() and not each.name.startswith(".")]
        if not images:
            raise FileNotFoundError(f"there is no image in {path}")
        others += len(files) - len(images)
        for each in images:
            found.setdefault(_absolute(each), each)
    return list(found.values()), others


def output_names(images: Sequence[Path]) -> list[Path]:
    """Return a distinct relative path without suffix per image: its path below the folder that all images share.

    Images of one folder that differ only by suffix keep it: `x.png`, `x.jpg`.
    """
    absolute = [_absolute(path) for path in images]
    base = os.path.commonpath([path.parent for path in absolute])
    relative = [path.relative_to(base) for path in absolute]
    stems = Counter(path.with_suffix("") for path in relative)
    return [path if stems[path.with_suffix("")] > 1 else path.with_suffix("") for path in relative]


@contextmanager
def pixel_limit(images: Sequence[Path], *, allow_large: bool) -> Iterator[None]:
    """Lift Pillow's limit on the number of pixels in the block, or check all images against it first.

    Raises:
        ValueError: if an image has more pixels and `allow_large` is not set.
    """
    from PIL import Image

    before = Image.MAX_IMAGE_PIXELS
    if allow_large:
        Image.MAX_IMAGE_PIXELS = None
    try:
        with warnings.catch_warnings():
            # Pillow warns at half of the size that it refuses.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            for path in images:
                try:
                    Image.open(path).close()
                except Image.DecompressionBombError as error:
                    raise ValueError(
                        f"image {path} must have at most {2 * (before or 0)} pixels, got more; if it is no "
                        "decompression bomb, use --allow-large, and --tile to bound the memory"
                    ) from error
                except (OSError, SyntaxError, ValueError):
                    continue  # reported when it is read
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _is_within(path: Path, folder: Path, root: Path) -> bool:
    """Whether `path` lies in `folder`, and `folder` strictly inside `root`."""
    inner = folder.resolve()
    return root.resolve() in inner.parents and inner in path.resolve().parents


def _absolute(path: Path) -> Path:
    """Return a path under its own name, also where it is a link, as every image of git-annex and DVC is."""
    return Path(os.path.abspath(path))


def _tree(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder and below, linked folders too, each once."""
    seen: set[str] = set()
    for place, below, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        yield from (Path(place) / name for name in files)


_ONLY_NAMED = ("MPEG", "HDF5", "BUFR", "GRIB")
"""Formats that Pillow knows by name and does not read: a folder of photos may hold a film."""


def _readable() -> set[str]:
    from PIL import Image

    readable = set(Image.OPEN) - set(_ONLY_NAMED)
    return {suffix for suffix, form in Image.registered_extensions().items() if form in readable}
