"""Find images and their masks in a folder of one's own, whichever of the usual layouts it has.

A layout is two patterns: `images` names a folder of images and `masks` a mask file without its suffix. `{split}` stands
for train, val or test and `{name}` for the name of the image, with sub-folders.

| images | masks |
|---|---|
| `images/{split}` | `masks/{split}/{name}` |
| `{split}/images` | `{split}/masks/{name}` |
| `{split}` | `{split}/{name}_mask` |
| `images` | `masks/{name}` |
| `.` | `{name}_mask` |

`masks` may be called `labels` or `annotations` too, `images` `imgs`, and the name of a mask may end in `_mask`,
`_label` or another of `SUFFIXES_OF_MASKS`.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sward.data.files import (
    may_hold_a_picture,
    natural_order,
    shortened,
    similar,
    sort_folder,
    stored,
    warn_of_skipped,
    warn_of_unused_masks,
)
from sward.data.images import SUFFIXES
from sward.data.lists import SPLIT_OF, SPLITS, composed, meant_split, read_table
from sward.data.sample import DatasetNotFoundError, Pair

IMAGE_FOLDERS = ("images", "image", "imgs", "img")
MASK_FOLDERS = ("masks", "mask", "labels", "label", "annotations", "gt")
SUFFIXES_OF_MASKS = ("", "_mask", "-mask", "_label", "_labels", "_gt", "_seg", "_segmentation")
SOURCE = (
    "a folder data set has the folders images and masks, or images/train, masks/train, images/val and masks/val, with "
    "a mask of the same name for every image"
)


@dataclass(frozen=True)
class Layout:
    """Where the images and masks of a folder are."""

    folder: Path
    """The folder of the data set."""
    images: str
    """Pattern of the folder of the images."""
    masks: str
    """Pattern of a mask."""

    @property
    def has_splits(self) -> bool:
        """Whether the folder itself says which frame belongs to which split."""
        return "{split}" in self.images

    def splits(self) -> list[str]:
        """Return the splits that have a folder of images; empty where the folder has none."""
        if not self.has_splits:
            return []
        parts = self.images.split("/")
        first = next(place for place, part in enumerate(parts) if "{split}" in part)
        (parent,) = stored([self.folder / "/".join(parts[:first])])
        names = [path.name for path in parent.iterdir() if not path.name.startswith(".")]
        possible = [value for name in names if (value := _value_of(name, parts[first], "{split}"))]
        # The placeholder may stand in further parts too, as in `{split}/{split}_images`.
        folders = stored(self.folder / self.images.replace("{split}", value) for value in possible)
        found = [
            value
            for value, folder in zip(possible, folders)
            # A folder of another name that holds no image, such as that of a pack, is no split.
            if folder.is_dir() and (value in SPLIT_OF or _holds_an_image(folder))
        ]
        return sorted({SPLIT_OF.get(value, value) for value in found})

    def labelled_splits(self) -> list[str]:
        """Return the splits as `splits` does, but other ones than train and val only with masks; warn of the rest."""
        found = self.splits()
        bare = [split for split in found if split not in ("train", "val") and not self._has_masks(split)]
        if bare:
            warnings.warn(f"{self.folder} has no masks for {', '.join(bare)}, left out", stacklevel=2)
        return [split for split in found if split not in bare]

    def _has_masks(self, split: str) -> bool:
        _, mask_folder, pattern = self._places(split)
        masks = list_tree(mask_folder, warn=False) if mask_folder.is_dir() else {}
        return any(pattern.replace("{name}", name) in masks for name in self.images_of(split))

    def pairs(self, split: str | None = None) -> list[Pair]:
        """Return the frames of a split, or of the whole folder where it has no splits.

        Warns of masks without an image and of files that are not read; for train also of images that are in no split.

        Raises:
            DatasetNotFoundError: there is no folder of images or masks, or no image in it.
            ValueError: an image has no mask.
        """
        image_folder, mask_folder, pattern = self._places(split)
        for place in (image_folder, mask_folder):
            if not place.is_dir():
                raise DatasetNotFoundError(
                    f"the folder data set in {self.folder} is incomplete: there is no folder {place}; {SOURCE}"
                )
        masks = list_tree(mask_folder)
        images = self.images_of(split, warn=image_folder != mask_folder)
        if not images:
            place = image_folder.relative_to(self.folder)
            raise DatasetNotFoundError(
                f"the folder data set in {self.folder} is empty: {place} holds no image; {SOURCE}"
            )
        found = []
        for name, image in images.items():
            mask = masks.get(pattern.replace("{name}", name))
            if mask is None:
                raise ValueError(self._no_mask(image, name, mask_folder, masks))
            found.append(Pair(name, image, mask))
        used = {path for pair in found for path in (pair.image, pair.mask)}
        unused = [name for name, path in masks.items() if path not in used and _is_mask(name, pattern)]
        warn_of_unused_masks(mask_folder, unused)
        if split == "train":
            self._warn_of_no_split()
        return found

    def _warn_of_no_split(self) -> None:
        """Warn once of images and masks that lie beside the folders of the splits."""
        folders = {folder for split in self.splits() for folder in self._places(split)[:2]}
        above = {folder.parent for folder in folders if folders.isdisjoint(folder.parents)}
        files = [
            path
            for folder in above
            if folder.is_dir()
            for path in folder.iterdir()
            if may_hold_a_picture(path) and path.is_file()
        ]
        loose = sorted((str(path.relative_to(self.folder)) for path in files), key=natural_order)
        if loose:
            warnings.warn(
                f"{len(loose)} files beside the folders of the splits in {self.folder} are in no split: "
                f"{shortened(loose)}",
                stacklevel=2,
            )

    def images_of(self, split: str | None = None, *, warn: bool = False) -> dict[str, Path]:
        """Map the names of the frames of a split, or of the whole folder, to their images, with or without masks.

        Args:
            split: the split.
            warn: as in `list_tree`.

        Raises:
            DatasetNotFoundError: there is no folder of images.
        """
        image_folder, mask_folder, pattern = self._places(split)
        images = list_tree(image_folder, warn=warn)
        if image_folder == mask_folder:
            images = {name: path for name, path in images.items() if not _is_mask(name, pattern)}
        elif image_folder in mask_folder.parents:
            images = {name: path for name, path in images.items() if mask_folder not in path.parents}
        return images

    def _no_mask(self, image: Path, name: str, folder: Path, masks: dict[str, Path]) -> str:
        """Say that an image has no mask, and which pattern would find the file that may be meant."""
        stem = Path(name).name
        near = [path.name for path in similar(stem, masks)]
        hint = ""
        if near:
            # The shortest is the least changed one: 1_mask before 10_mask.
            closest = min(near, key=len)
            hint = f"; did you mean {closest}?"
            if stem in closest:
                above, _ = self._mask_parts()
                pattern = "/".join([*above, closest.replace(stem, "{name}")])
                hint = f"; --images '{self.images}' --masks '{pattern}' would take {closest}"
        return f"image {image} has no mask; {folder} holds no image file named {stem}{hint}"

    def _mask_parts(self) -> tuple[list[str], list[str]]:
        """Return the parts of the pattern of masks up to the first with a name, and from it on."""
        parts = self.masks.split("/")
        first = next(place for place, part in enumerate(parts) if "{name}" in part)
        return parts[:first], parts[first:]

    def _places(self, split: str | None) -> tuple[Path, Path, str]:
        """Return the folders of images and masks, and the name of a mask in its folder."""
        above, named = self._mask_parts()
        folders = self.images, "/".join(above) or "."
        pattern = composed("/".join(named))
        suffix = Path(pattern).suffix.lower()
        pattern = pattern[: -len(suffix)] if suffix in SUFFIXES else pattern
        if split is None:
            return *self._at(folders), pattern
        for name in SPLITS.get(split, (split,)):
            image_folder, mask_folder = self._at([folder.replace("{split}", name) for folder in folders])
            if image_folder.is_dir():
                return image_folder, mask_folder, pattern
        images, masks = (folder.replace("{split}", split) for folder in folders)
        raise DatasetNotFoundError(
            f"the folder data set not found: looked for the folders {images!r} and {masks!r} in {self.folder}; {SOURCE}"
        )

    def _at(self, folders: Sequence[str]) -> tuple[Path, Path]:
        images, masks = stored(self.folder / folder for folder in folders)
        return images, masks


def find_layout(root: Path, images: str | None = None, masks: str | None = None) -> Layout:
    """Find the layout of a folder, or take the patterns given.

    Args:
        root: the folder.
        images: pattern of the folder of images, such as `"frames/{split}"`; None looks for the usual layouts.
        masks: pattern of a mask, such as `"masks/{split}/{name}_mask.png"`.

    Raises:
        DatasetNotFoundError: the folder does not exist or has none of the usual layouts.
        ValueError: only one of the patterns is given, `masks` lacks `{name}`, or `{split}` is in one of them only.
    """
    if not root.is_dir():
        raise DatasetNotFoundError(f"the folder data set not found: there is no folder {root}; {SOURCE}")
    if images is not None or masks is not None:
        if images is None or masks is None or "{name}" not in masks or ("{split}" in images) != ("{split}" in masks):
            raise ValueError(
                "images and masks must be given together, as images='images/{split}' and "
                f"masks='masks/{{split}}/{{name}}.png', got images={images!r} and masks={masks!r}"
            )
        return Layout(root, images, masks)
    for layout in _usual(root):
        train = "train" if layout.has_splits else None
        for suffix in SUFFIXES_OF_MASKS:
            candidate = Layout(root, layout.images, layout.masks + suffix)
            try:
                image_folder, mask_folder, pattern = candidate._places(train)
            except DatasetNotFoundError:
                continue
            # Only what the chosen layout leaves out is worth a warning.
            images_there = list_tree(image_folder, warn=False)
            masks_there = images_there if mask_folder == image_folder else list_tree(mask_folder, warn=False)
            if any(pattern.replace("{name}", name) in masks_there for name in images_there):
                if train is None:
                    _warn_of_folders_like_splits(root, images_there)
                return candidate
    # No mask fits: the first layout says which one is missing.
    first = next(_usual(root), None)
    if first is None or first.images == ".":
        raise DatasetNotFoundError(f"the folder data set not found: looked for images and masks in {root}; {SOURCE}")
    return first


def _usual(root: Path) -> Iterator[Layout]:
    """Yield the usual layouts whose folders exist, those with splits first."""
    named = list(itertools.product(IMAGE_FOLDERS, MASK_FOLDERS))
    for images, masks in named:
        for split in SPLITS["train"]:
            if (root / images / split).is_dir() and (root / masks / split).is_dir():
                yield Layout(root, f"{images}/{{split}}", f"{masks}/{{split}}/{{name}}")
            if (root / split / images).is_dir() and (root / split / masks).is_dir():
                yield Layout(root, f"{{split}}/{images}", f"{{split}}/{masks}/{{name}}")
    for split in SPLITS["train"]:
        if (root / split).is_dir() and any((root / val).is_dir() for val in SPLITS["val"]):
            for suffix in SUFFIXES_OF_MASKS[1:]:
                yield Layout(root, "{split}", f"{{split}}/{{name}}{suffix}")
    for images, masks in named:
        if (root / images).is_dir() and (root / masks).is_dir():
            yield Layout(root, images, f"{masks}/{{name}}")
    for suffix in SUFFIXES_OF_MASKS[1:]:
        yield Layout(root, ".", f"{{name}}{suffix}")


def _warn_of_folders_like_splits(root: Path, names: Iterable[str]) -> None:
    """Warn of frames in folders called as splits are, where the layout does not tell them apart."""
    folders = {folder for name in names for folder in name.split("/")[:-1] if folder.lower() in SPLIT_OF}
    if folders:
        warnings.warn(
            f"all images in {root} are taken as one set, though some lie in folders called "
            f"{shortened(sorted(folders))}; to keep splits apart, call them train, val and test as in images/train, "
            "masks/train, or name the folders with --images and --masks",
            stacklevel=3,
        )


def _holds_an_image(folder: Path) -> bool:
    return any(path.suffix.lower() in SUFFIXES for path in folder.rglob("*"))


def list_tree(folder: Path, *, warn: bool = True) -> dict[str, Path]:
    """Map names without suffix, with sub-folders (`a/b/1`), to the image files in a folder and below.

    Args:
        folder: the folder.
        warn: warn once of all files that are not read as images; see `sward.data.files.UNREADABLE`.

    Raises:
        ValueError: two images have one name, also in Unicode of another composition.
    """
    found, unread = _tree(folder)
    if warn:
        warn_of_skipped(folder, [str(path.relative_to(folder)) for path in unread])
    return found


def _tree(folder: Path) -> tuple[dict[str, Path], list[Path]]:
    """Return the images as in `list_tree`, and the files that are not read."""
    found, unread, folders = sort_folder(folder)
    for path in folders:
        images, unread_below = _tree(path)
        below = {f"{composed(path.name)}/{name}": image for name, image in images.items()}
        doubled = next((name for name in below if name in found), None)
        if doubled is not None:
            raise ValueError(
                f"names in {folder} must be unique, got {doubled!r} in two folders whose names differ in their Unicode "
                "composition only; rename one of them"
            )
        found |= below
        unread += unread_below
    return found, unread


def table_pairs(table: Path, images: str | None = None, masks: str | None = None) -> tuple[list[Pair], dict[str, str]]:
    """Read frames from a CSV file with the columns `image` and `mask`, and `split` if it has one.

    Paths are relative to the folder of the table. Returns the frames, and frame -> split where there is that column.

    Args:
        table: the file.
        images, masks: patterns, which belong to a folder.

    Raises:
        ValueError: a column is missing, a frame is listed twice, a word is no split, or there is a pattern.
        FileNotFoundError: a file does not exist.
    """
    for option, pattern in (("images", images), ("masks", masks)):
        if pattern is not None:
            raise ValueError(
                f"{option} (--{option}) must be left out where the data is a table, which names the files, "
                f"got {pattern!r} with {table}"
            )
    pairs, assigned = [], {}
    rows = read_table(table, ("image", "mask"), title="the table of frames")
    for number, row in enumerate(rows, start=1):
        if not (row["image"] and row["mask"]):
            raise ValueError(f"{table} must name an image and a mask in every row, got none in {number}")
    image_files, mask_files = (stored(table.parent / row[column] for row in rows) for column in ("image", "mask"))
    for row, image, mask in zip(rows, image_files, mask_files):
        pair = Pair(composed(Path(row["image"]).with_suffix("").as_posix()), image, mask)
        for path in (pair.image, pair.mask):
            if not path.is_file():
                raise FileNotFoundError(f"there is no file {path}, which {table} names")
        pairs.append(pair)
        split = meant_split(row.get("split", ""), pair.name, table)
        if split:
            assigned[pair.name] = split
    names = [pair.name for pair in pairs]
    doubled = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if doubled is not None:
        raise ValueError(f"frames of {table} must be listed once, got {doubled!r} twice")
    return pairs, assigned


def _is_mask(name: str, pattern: str) -> bool:
    return _value_of(name, pattern, "{name}") is not None


def _value_of(text: str, pattern: str, placeholder: str) -> str | None:
    """Return what the placeholder, which may stand several times in the pattern, is in the text; None if no match."""
    before, *after = map(re.escape, pattern.split(placeholder))
    match = re.fullmatch(before + "(?P<value>.*)" + "(?P=value)".join(after), text)
    return match and match["value"]
