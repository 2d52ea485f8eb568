"""Look at every frame once before a training starts: what is wrong is found before step 1.

Masks are read; of images the header, and whether the file ends early; and images of different splits are compared.

What was found is kept in `$XDG_CACHE_HOME/sward` (default `~/.cache/sward`) with the size and the modification time of
the files, so that the next run looks only at files that have changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sward import atomic, distributed
from sward.data.files import PairedFiles
from sward.data.folder import ImageFolder
from sward.data.images import (
    CorruptFileError,
    Header,
    check_depth,
    check_end,
    may_lie_otherwise,
    open_image,
    read_header,
    read_image,
)
from sward.data.sample import Pair, SegmentationDataset


@dataclass(frozen=True)
class LabelCounts:
    """Labels of the masks of one split."""

    pixels: NDArray[np.int64]
    """Pixels per mask and class, `[N, K + 1]`; the last column counts ignored pixels."""
    turned_alone: tuple[str, ...] = ()
    """Names of images that an EXIF orientation turns, of the same size, while their masks have none."""

    @property
    def shares(self) -> list[float]:
        """Share of each class in the pixels that are not ignored."""
        per_class = self.pixels[:, :-1].sum(0)
        return (per_class / max(per_class.sum(), 1)).tolist()

    def summary(self, classes: Sequence[str]) -> dict[str, int]:
        """Return the number of masks and the pixels of each class by name."""
        pixels = self.pixels.sum(0).tolist()
        return {
            "masks": len(self.pixels),
            **{f"pixels of {name}": count for name, count in zip(classes, pixels)},
            "ignored pixels": pixels[-1],
        }

    @property
    def only_background(self) -> int:
        """Number of masks that hold class 0 and nothing else but ignored pixels."""
        return int(((self.pixels[:, 0] > 0) & (self.pixels[:, 1:-1].sum(1) == 0)).sum())


def check_splits(
    splits: Mapping[str, SegmentationDataset],
    *,
    compared: Mapping[str, SegmentationDataset] | None = None,
    skip_corrupt: bool = False,
) -> dict[str, LabelCounts]:
    """Check every frame of the splits of a data set that have files; every process of a group must call this.

    Warns of masks that are all background, of masks that may be upside down, and of images with the same bytes in two
    splits.

    Args:
        splits: name of the split -> data set. `"train"` must hold every class.
        compared: further splits, whose images are compared with those of `splits` and whose masks are not read.
        skip_corrupt: leave out training masks that cannot be read.

    Raises:
        ValueError: a mask is invalid or has another size than its image, an image is cut off or out of the stated
            range, a class has no pixel in training, or no pixel of another split has a class.
    """
    found = {}
    for name, dataset in splits.items():
        if isinstance(dataset, PairedFiles):
            found[name] = count_labels(dataset, skip_corrupt=skip_corrupt and name == "train")
            if name == "train":
                _warn_of_turned(name, found[name].turned_alone)
                _judge_training(dataset, found[name])
            else:
                judge_evaluation(name, dataset, found[name])
    if distributed.is_main():
        _warn_of_copies({**splits, **(compared or {})})
    return found


def find_copies(splits: Mapping[str, Sequence[Pair]]) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """Return `(split, name)` twice for each image that has the same bytes as one of an earlier split.

    Only files of equal size are read.
    """
    sized: dict[int, list[tuple[str, Pair]]] = {}
    for split, pairs in splits.items():
        for pair in pairs:
            sized.setdefault(pair.image.stat().st_size, []).append((split, pair))
    alike = [each for group in sized.values() if len({split for split, _ in group}) > 1 for each in group]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as executor:
        digests = list(executor.map(lambda each: hashlib.sha256(each[1].image.read_bytes()).hexdigest(), alike))
    first: dict[str, tuple[str, str]] = {}
    found = []
    for (split, pair), digest in zip(alike, digests):
        other = first.setdefault(digest, (split, pair.name))
        if other[0] != split:
            found.append((other, (split, pair.name)))
    return found


def _warn_of_copies(splits: Mapping[str, SegmentationDataset]) -> None:
    files = {name: dataset.pairs for name, dataset in splits.items() if isinstance(dataset, PairedFiles)}
    copies: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for (split, name), (other_split, other_name) in find_copies(files):
        copies.setdefault((split, other_split), []).append((name, other_name))
    for (split, other_split), found in copies.items():
        name, other_name = found[0]
        warnings.warn(
            f"{len(found)} images of {other_split} have the same bytes as images of {split}, such as {other_name} and "
            f"{name}; their scores say little about new images",
            stacklevel=3,
        )


def check_classes(datasets: Sequence[PairedFiles], *, skip_corrupt: bool = False) -> None:
    """Check that every class has pixels in at least one split, before a pack of all splits is written.

    Raises:
        ValueError: as `check_splits` does.
    """
    counted = [count_labels(dataset, skip_corrupt=skip_corrupt) for dataset in datasets]
    _warn_of_turned("the data set", [name for each in counted for name in each.turned_alone])
    _judge_training(datasets[0], LabelCounts(np.concatenate([each.pixels for each in counted])))


def count_labels(dataset: PairedFiles, *, skip_corrupt: bool = False) -> LabelCounts:
    """Count the labels of every mask, in threads; processes of a group share the work.

    Raises:
        ValueError: a mask is invalid or has another size than its image.
    """
    store = _Store(dataset)
    mine = dataset.pairs[distributed.rank() :: distributed.world_size()]
    own_keys = [store.key(pair) for pair in mine]

    def count(pair: Pair, key: str) -> list[int] | str | None:
        try:
            return store.known.get(key) or _count(dataset, pair)
        except CorruptFileError as error:
            return None if skip_corrupt else str(error)
        except (ValueError, FileNotFoundError) as error:
            return str(error)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as executor:
        results = list(executor.map(count, mine, own_keys))
    shared = distributed.gather((results, own_keys, [pair.name for pair in mine]))
    rows = [row for part, _, _ in shared for row in part]
    keys = [key for _, part, _ in shared for key in part]
    names = [name for _, _, part in shared for name in part]
    wrong = [row for row in rows if isinstance(row, str)]
    if distributed.is_main():
        store.save({key: row for key, row in zip(keys, rows) if isinstance(row, list)})
    if wrong:
        raise ValueError(wrong[0] + (f" (and {len(wrong) - 1} more images or masks)" if len(wrong) > 1 else ""))
    kept = [(name, row) for name, row in zip(names, rows) if isinstance(row, list)]
    table = np.array([row for _, row in kept], np.int64).reshape(-1, dataset.info.num_classes + 2)
    return LabelCounts(table[:, :-1], tuple(name for name, row in kept if row[-1]))


def _count(dataset: PairedFiles, pair: Pair) -> list[int]:
    labels = dataset.read_mask(pair)
    # Opening says why a header cannot be read.
    header = read_header(pair.image) or Header.of(open_image(pair.image))
    check_depth(pair.image, header, dataset.image_range)
    if dataset.packed is None:
        if header.is_wide:
            # Its values, not the header, say whether it is in the stated range.
            read_image(pair.image, dataset.image_range)
        check_end(pair.image, header)
    dataset.check_size(pair, (labels.shape[0], labels.shape[1]), header.size)
    counts = np.bincount(labels.ravel(), minlength=256)
    return [
        *counts[: dataset.info.num_classes].tolist(),
        int(counts[dataset.info.ignore_index]),
        int(may_lie_otherwise(header, pair.mask)),
    ]


def _judge_training(dataset: PairedFiles, found: LabelCounts) -> None:
    absent, masks, empty = _absent(dataset, found), len(found.pixels), found.only_background
    if absent and masks:
        message = f"class {absent[0]!r} must be in at least one training mask, got none in {masks} masks"
        # The classes of a published data set are fixed, and a part of it may lack some.
        if dataset.info.name == "folder" or dataset.info.num_classes == 2:
            raise ValueError(f"{message}; {_cause(dataset, found, absent)}")
        warnings.warn(message, stacklevel=4)
    if empty:
        warnings.warn(f"{empty} of {masks} training masks are all {dataset.info.classes[0]}", stacklevel=4)


def _warn_of_turned(split: str, names: Sequence[str]) -> None:
    if names:
        warnings.warn(
            f"{len(names)} images of {split} have an EXIF orientation and their masks have none, such as {names[0]}; "
            "check in an image viewer that both are the same way up",
            stacklevel=4,
        )


def judge_evaluation(split: str, dataset: PairedFiles, found: LabelCounts) -> None:
    """Warn if masks of a split that is scored may be upside down, or lack a class so that its scores mislead.

    Raises:
        ValueError: no pixel has a class.
    """
    _warn_of_turned(split, found.turned_alone)
    absent, classes = _absent(dataset, found), dataset.info.classes
    if not absent or not len(found.pixels):
        return
    if len(absent) == len(classes):
        raise ValueError(
            f"masks of the split {split} must hold a labelled pixel, got {dataset.info.ignore_index}, which means "
            f"ignore, in every pixel of {len(found.pixels)} masks"
        )
    ignored = found.pixels[:, -1].sum() / found.pixels.sum()
    # Masks of 0 and 255 beside training masks of 0 and 1. Where values are stated any other one is an error, and the
    # masks of published sets are all alike.
    indices = isinstance(dataset, ImageFolder) and dataset.values is None
    mistaken = indices and ignored > 0 and classes[-1] in absent
    cause = (
        f"; {ignored:.0%} of the pixels are {dataset.info.ignore_index}, which means ignore: if they are meant to be "
        f"{classes[-1]}, the masks of this split use other values than the training masks"
        if mistaken
        else ""
    )
    if len(classes) == 2 and absent == [classes[1]]:
        warnings.warn(
            f"no mask of the split {split} holds {classes[1]}; its Dice is the share of images without false positives"
            f"{cause}",
            stacklevel=4,
        )
    elif mistaken:
        warnings.warn(f"no mask of the split {split} holds {', '.join(absent)}{cause}", stacklevel=4)


def _absent(dataset: PairedFiles, found: LabelCounts) -> list[str]:
    return [name for name, share in zip(dataset.info.classes, found.shares) if share == 0]


def _cause(dataset: PairedFiles, found: LabelCounts, absent: Sequence[str]) -> str:
    ignored = int(found.pixels[:, -1].sum())
    if ignored and isinstance(dataset, ImageFolder) and dataset.values is None and len(dataset.info.classes) == 2:
        share = ignored / found.pixels.sum()
        return (
            f"{share:.0%} of the pixels are {dataset.info.ignore_index}, which means ignore; pass --mask-values "
            f"0,{dataset.info.ignore_index} if they are {absent[0]}"
        )
    held = [name for name in dataset.info.classes if name not in absent]
    return f"the masks hold {', '.join(held) or 'only ignored pixels'}; check --classes and --mask-values"


class _Store:
    """What was counted in the masks of one data set, in the user's cache folder."""

    def __init__(self, dataset: PairedFiles) -> None:
        # The number changes with what is checked.
        what = f"7 {dataset.folder.resolve()} {dataset.info.name} {dataset.info.num_classes} {dataset.decoding}"
        what += "" if dataset.image_range is None else f" range {dataset.image_range}"
        what += "" if dataset.packed is None else " packed"  # whose files are not looked at to their end
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self._path = base / "sward" / f"masks-{hashlib.sha256(what.encode()).hexdigest()[:16]}.json"
        try:
            self.known: dict[str, list[int]] = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.known = {}

    def key(self, pair: Pair) -> str:
        """Return paths, sizes and times of both files as text; the name alone where a file is missing."""
        try:
            status = [(str(path), path.stat()) for path in (pair.image, pair.mask)]
        except OSError:
            return pair.name
        return " ".join(f"{path} {each.st_size} {each.st_mtime_ns}" for path, each in status)

    def save(self, counts: Mapping[str, list[int]]) -> None:
        """Add counts; a cache that cannot be written costs time and nothing else."""
        if all(key in self.known for key in counts):
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with atomic.replacing(self._path, shared=True, durable=False) as file:
                file.write(json.dumps({**self.known, **counts}).encode())
        except OSError:
            pass
