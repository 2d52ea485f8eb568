"""Data sets by name: `build("cvc_clinicdb", "train", train=True)`.

Every data set hands out `Sample(image, labels, name)` and carries its `DatasetInfo` as `.info`. Training samples can be
batched by the default collate function. **Evaluation samples keep their labels at the resolution of the label file**
while the image has the network's input size: resize the logits to the labels before scoring, and batch with
`collate_evaluation` (or one by one), since labels may differ in size from image to image.

Call `dataset.set_epoch(epoch)` before each pass over a training set; see `SegmentationDataset`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

from sward.data import camvid, cityscapes, folder, polyps, scenes
from sward.data.files import CorruptFileError, OnCorrupt, PairedFiles, read_image
from sward.data.sample import (
    IGNORE_INDEX,
    Batch,
    DatasetInfo,
    DatasetNotFoundError,
    EvaluationBatch,
    Sample,
    SegmentationDataset,
    TeacherSample,
    collate_evaluation,
    collate_training,
    sample_seed,
)
from sward.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    EvaluationTransform,
    TrainingTransform,
    denormalise,
    normalise,
    parse_size,
)

__all__ = [
    "IGNORE_INDEX",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Batch",
    "CorruptFileError",
    "DatasetInfo",
    "DatasetNotFoundError",
    "EvaluationBatch",
    "EvaluationTransform",
    "OnCorrupt",
    "Sample",
    "SegmentationDataset",
    "TeacherSample",
    "build",
    "build_for_packing",
    "collate_evaluation",
    "collate_training",
    "default_image_size",
    "denormalise",
    "describe",
    "names",
    "normalise",
    "read_image",
    "sample_seed",
]

_INFO = {
    info.name: info for info in (cityscapes.INFO, polyps.CLINICDB.info, polyps.COLONDB.info, camvid.INFO, scenes.INFO)
}
_IMAGE_SIZES = {
    "cityscapes": (512, 1024),
    "cvc_clinicdb": (512, 512),
    "cvc_colondb": (512, 512),
    "camvid": (352, 480),
    "scenes": (128, 128),
    "folder": (512, 512),
}


def names() -> tuple[str, ...]:
    """The names `build` knows."""
    return tuple(_IMAGE_SIZES)


def describe(name: str, *, num_classes: int | None = None) -> DatasetInfo:
    """Classes, colours and ignore_index of a data set, without touching the disk.

    Args:
        num_classes: needed by `folder` (2 to 255) and refused if it contradicts another data set.

    Raises:
        ValueError: unknown name (near matches are listed), or a `num_classes` that does not fit.
    """
    _check_name(name)
    if name == "folder":
        return folder.describe(num_classes)
    info = _INFO[name]
    if num_classes not in (None, info.num_classes):
        raise ValueError(f"{name} has {info.num_classes} classes, so num_classes cannot be {num_classes}")
    return info


def default_image_size(name: str) -> tuple[int, int]:
    """`(height, width)` that `build` uses when no `image_size` is given."""
    _check_name(name)
    return _IMAGE_SIZES[name]


def build(
    name: str,
    split: str,
    *,
    train: bool,
    root: str | Path | None = None,
    image_size: int | Sequence[int] | None = None,
    seed: int = 0,
    split_by: str | None = None,
    num_classes: int | None = None,
    count: int | None = None,
    packed: str = "auto",
    on_corrupt: OnCorrupt = "stop",
    views: int | None = None,
    teacher_size: Sequence[int] | None = None,
) -> SegmentationDataset:
    """Build a data set.

    Args:
        name: one of `names()`.
        split: `train`, `val` or `test`, as far as the data set has them.
        train: apply the training augmentation. Without it the sample is prepared for evaluation: no randomness, and
            labels at the resolution of their file.
        root: the data set's own folder, or a folder that holds it; None for the environment variable `SWARD_DATA`,
            then `./data`. `scenes` needs none.
        image_size: one number or `(height, width)` of the image a network gets; None for `default_image_size(name)`.
            Cityscapes: size of the training crop; evaluation is at full resolution whatever the image_size.
        seed: seed of the augmentation. It never changes which frames or which scenes a split holds.
        split_by: `cvc_clinicdb` and `cvc_colondb` only; None for `"sequence"`. See `polyps.Polyps`.
        num_classes: `folder` only, where it is required.
        count: `scenes` only: number of images.
        packed: `"auto"` reads the pack in the data set's folder if there is one (`sward.data.packed`), `"none"` decodes
            the files, a path names a pack that lies elsewhere. The samples are the same, bit for bit.
        on_corrupt: what to do about an image or mask that cannot be read: `"stop"` raises an error that names it,
            `"skip"` warns once a file and hands out the next frame in its place. For training sets only.
        views: fixed augmented views an image, for a cache of teacher features; None draws new ones each epoch.
        teacher_size: `(height, width)` of a second sampling of every training view, for a teacher that sees more pixels
            than the student; samples are then `TeacherSample`s. None hands out `Sample`s.

    Raises:
        DatasetNotFoundError: the data set is missing or incomplete.
        ValueError: unknown name or split, an argument this data set does not take, or a pack that is stale.
    """
    info = describe(name, num_classes=num_classes)
    size = parse_size(default_image_size(name) if image_size is None else image_size)
    if split_by is not None and name not in ("cvc_clinicdb", "cvc_colondb"):
        raise ValueError(f"split_by is for cvc_clinicdb and cvc_colondb; {name} comes with its own split")
    if count is not None and name != "scenes":
        raise ValueError(f"count is for scenes, whose images are generated; {name} has the images it has")
    if views is not None and (views < 1 or not train):
        raise ValueError(f"views must be at least 1 and is for training sets, got {views}")
    if on_corrupt != "stop" and not train:
        raise ValueError("on_corrupt is for training sets: a score without some of the images is another score")
    dataset: SegmentationDataset
    if name == "scenes":
        if packed not in ("auto", "none"):
            raise ValueError(f"packed is {packed!r}, but scenes are generated: there is nothing to pack")
        dataset = scenes.Scenes(split, size, train=train, seed=seed, count=count)
    else:
        dataset = _from_files(info, _root(root), split, size, split_by=split_by, train=train, seed=seed)
        dataset.set_on_corrupt(on_corrupt)
        dataset.use_pack(packed)
    dataset.views = views
    if teacher_size is not None:
        if not isinstance(dataset.transform, TrainingTransform):
            raise ValueError(f"teacher_size must be None where train is False, got {tuple(teacher_size)}")
        dataset.teacher_transform = dataset.transform.at(parse_size(teacher_size))
    return dataset


def build_for_packing(
    name: str, *, root: str | Path | None = None, split_by: str | None = None, num_classes: int | None = None
) -> list[PairedFiles]:
    """Every split of a data set, for `sward.data.packing.pack`; arguments as in `build`.

    Args:
        split_by: polyps only; None packs every frame, a list packs the frames that it names.

    Raises:
        DatasetNotFoundError: the data set is missing or incomplete, or has none of its splits.
        ValueError: unknown name, or `scenes`, which has no files.
    """
    info = describe(name, num_classes=num_classes)
    where = _root(root)
    size = default_image_size(name)
    if name == "scenes":
        raise ValueError("scenes are generated: there is nothing to pack")
    if name in ("cvc_clinicdb", "cvc_colondb"):
        # Any one rule that puts every frame into some split will do.
        by = split_by or "ratio"
        return [_from_files(info, where, split, size, split_by=by, train=False) for split in polyps.SPLITS]
    if split_by is not None:
        raise ValueError(f"split_by is for cvc_clinicdb and cvc_colondb; {name} comes with its own split")
    module = {"cityscapes": cityscapes, "camvid": camvid, "folder": folder}[name]
    return [_from_files(info, where, split, size, train=False) for split in module.splits(where)]


def _from_files(
    info: DatasetInfo,
    where: Path,
    split: str,
    size: tuple[int, int],
    *,
    train: bool,
    split_by: str | None = None,
    seed: int = 0,
) -> PairedFiles:
    if info.name == "cityscapes":
        return cityscapes.Cityscapes(where, split, size, train=train, seed=seed)
    if info.name == "camvid":
        return camvid.CamVid(where, split, size, train=train, seed=seed)
    if info.name == "folder":
        return folder.ImageFolder(where, split, size, info=info, train=train, seed=seed)
    release = polyps.CLINICDB if info.name == "cvc_clinicdb" else polyps.COLONDB
    return polyps.Polyps(release, where, split, size, split_by=split_by or "sequence", train=train, seed=seed)


def _root(root: str | Path | None) -> Path:
    return Path(root or os.environ.get("SWARD_DATA") or "data")


def _check_name(name: str) -> None:
    if name not in _IMAGE_SIZES:
        near = difflib.get_close_matches(name.lower(), _IMAGE_SIZES, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(_IMAGE_SIZES)}."
        raise ValueError(f"unknown data set {name!r}: {hint}")
