"""Data sets by name: `build("cvc_clinicdb", "train", train=True)`.

Every data set returns `Sample(image, labels, name)` and has its `DatasetInfo` as `.info`. The default collate function
can batch training samples. **Evaluation samples keep their labels at the resolution of the label file**, while the
image has the network's input size: resize the logits to the labels before scoring, and batch with `collate_evaluation`
(or use batches of one), since label sizes may vary.

Call `dataset.set_epoch(epoch)` before each pass over a training set; see `SegmentationDataset`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

from sward.data import camvid, cityscapes, folder, polyps, scenes, unlabelled
from sward.data.files import OnCorrupt, PairedFiles
from sward.data.folder import FolderOptions
from sward.data.images import CorruptFileError, check_range, read_image
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
    "FolderOptions",
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
    "evaluation_size",
    "fixed_root",
    "holds",
    "names",
    "normalise",
    "read_image",
    "sample_seed",
]

_INFO = {
    info.name: info for info in (cityscapes.INFO, polyps.CLINICDB.info, polyps.COLONDB.info, camvid.INFO, scenes.INFO)
}
POLYPS = (polyps.CLINICDB.info.name, polyps.COLONDB.info.name)
"""Data sets of polyps, which have a `split_by`."""

_FOLDERS = {
    "cityscapes": cityscapes.FOLDERS,
    "camvid": camvid.FOLDERS,
    **{release.info.name: release.folders for release in (polyps.CLINICDB, polyps.COLONDB)},
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
    """Return the names that `build` accepts."""
    return tuple(_IMAGE_SIZES)


def describe(name: str, *, num_classes: int | None = None, folder_options: FolderOptions | None = None) -> DatasetInfo:
    """Return classes, colours and ignore_index of a data set, without reading from disk.

    Args:
        num_classes: for `folder` (2 to 255) where `folder_options` names no classes; for other data sets None or their
            number of classes.
        folder_options: classes and mask values of `folder`.

    Raises:
        ValueError: unknown name (near matches are listed), or a `num_classes` that does not fit.
    """
    _check_name(name)
    if name == "folder":
        return folder.describe(num_classes, folder_options)
    info = _INFO[name]
    if num_classes not in (None, info.num_classes):
        raise ValueError(f"num_classes must be {info.num_classes} for {name}, got {num_classes}")
    return info


def default_image_size(name: str) -> tuple[int, int]:
    """Return the `(height, width)` that `build` uses by default."""
    _check_name(name)
    return _IMAGE_SIZES[name]


def evaluation_size(name: str, image_size: tuple[int, int]) -> tuple[int, int] | None:
    """Return the `(height, width)` at which a data set is evaluated; None where each image keeps its own.

    Args:
        image_size: the size that `build` is given, which for Cityscapes is that of the training crop alone.
    """
    _check_name(name)
    return None if name == "cityscapes" else image_size


def holds(root: Path, name: str) -> bool:
    """Return whether a folder holds a data set in a sub-folder of the data set's own name."""
    return any((root / folder).is_dir() for folder in _FOLDERS.get(name, ()))


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
    series: int = 0,
    packed: str = "auto",
    on_corrupt: OnCorrupt = "stop",
    views: int | None = None,
    teacher_size: Sequence[int] | None = None,
    image_range: tuple[float, float] | None = None,
    labelled_share: float = 1.0,
    share_seed: int = 0,
    folder_options: FolderOptions | None = None,
) -> SegmentationDataset:
    """Build a data set.

    Args:
        name: one of `names()`.
        split: `train`, `val` or `test`, if the data set has it.
        train: apply the training augmentation. Otherwise samples are prepared for evaluation: no randomness, and labels
            at the resolution of their file.
        root: the data set's own folder, or a folder that holds it; None for the environment variable `SWARD_DATA`,
            then `./data`. `scenes` needs none.
        image_size: one number or `(height, width)` of the network's input; None for `default_image_size(name)`. For
            Cityscapes it is the size of the training crop; evaluation is always at full resolution.
        seed: seed of the augmentation. It does not change which frames or scenes a split contains.
        split_by: `cvc_clinicdb` and `cvc_colondb`: None for `"sequence"`, see `polyps.Polyps`. `folder`: shares such as
            `"80/10/10"` or the path of a list, where the folder has no splits of its own.
        num_classes: `folder` only; its number of classes, if `folder_options` names none.
        count: number of images, `scenes` only.
        series: series of the training images, `scenes` only; see `scenes.Scenes`.
        packed: `"auto"` reads the pack in the data set's folder if there is one (`sward.data.packed`), `"none"` decodes
            the files, a path names a pack in another place. The samples are bit-identical.
        on_corrupt: what to do if an image or mask cannot be read: `"stop"` raises an error that names it, `"skip"`
            warns once per file and returns the next frame instead. For training sets only.
        views: fixed augmented views per image, for a cache of teacher features; None draws new ones each epoch.
        teacher_size: `(height, width)` of a second sampling of every training view, for a teacher that sees more pixels
            than the student, with the aspect ratio of `image_size`; samples are then `TeacherSample`s. None returns
            `Sample`s.
        image_range: the values that become black and white in images with more than 8 bits per channel; None refuses
            such images.
        labelled_share: share of the frames whose masks are used, in (0, 1]; the others are left out. For training sets
            of files only.
        share_seed: another number draws other frames for `labelled_share`.
        folder_options: `folder` only: its classes, mask values, layout and how its split is drawn.

    Raises:
        DatasetNotFoundError: the data set is missing or incomplete.
        ValueError: unknown name or split, an argument that this data set does not support, or a stale pack.

    Examples:
        >>> from sward import data
        >>> scenes = data.build("scenes", "train", train=True, image_size=64, count=24)
        >>> sample = scenes[0]
        >>> len(scenes), tuple(sample.image.shape), tuple(sample.labels.shape)
        (24, (3, 64, 64), (64, 64))
        >>> scenes.info.classes
        ('background', 'stripes', 'checks', 'dots', 'rings')
    """
    info = describe(name, num_classes=num_classes, folder_options=folder_options)
    size = parse_size(default_image_size(name) if image_size is None else image_size)
    if split_by is not None and name not in (*POLYPS, "folder"):
        raise ValueError(f"split_by must be None for {name}, got {split_by!r}; only polyps and folder can be split")
    if count is not None and name != "scenes":
        raise ValueError(f"count must be None for {name}, got {count}; only scenes are generated")
    if series != 0 and name != "scenes":
        raise ValueError(f"series must be 0 for {name}, got {series}; only scenes are generated")
    if views is not None and (views < 1 or not train):
        raise ValueError(f"views must be at least 1 for training sets and None otherwise, got {views}")
    if on_corrupt != "stop" and not train:
        raise ValueError(
            f"on_corrupt must be 'stop' for evaluation, got {on_corrupt!r}; skipping images would change the score"
        )
    if not 0 < labelled_share <= 1:
        raise ValueError(f"labelled_share must be above 0 and at most 1, got {labelled_share:g}")
    if labelled_share != 1 and (not train or name == "scenes"):
        raise ValueError(
            f"labelled_share must be 1 for evaluation and for scenes, which are generated, got {labelled_share:g}"
        )
    dataset: SegmentationDataset
    if name == "scenes":
        if packed not in ("auto", "none"):
            raise ValueError(f"packed must be 'auto' or 'none' for scenes, got {packed!r}; they are generated")
        dataset = scenes.Scenes(split, size, train=train, seed=seed, count=count, series=series)
    else:
        dataset = _from_files(
            info, _root(root), split, size, split_by=split_by, train=train, seed=seed, options=folder_options
        )
        if labelled_share != 1:
            dataset.use_masks_of(labelled_share, share_seed)
        dataset.set_on_corrupt(on_corrupt)
        dataset.image_range = _checked(image_range)
        dataset.use_pack(packed)
        if train:
            dataset.keep_decoded()
    dataset.views = views
    if teacher_size is not None:
        if not isinstance(dataset.transform, TrainingTransform):
            raise ValueError(f"teacher_size must be None where train is False, got {tuple(teacher_size)}")
        height, width = parse_size(teacher_size)
        if height * size[1] != width * size[0]:
            raise ValueError(
                f"teacher_size must have the aspect ratio of image_size, {size[0]}x{size[1]}, got {height}x{width}"
            )
        dataset.teacher_transform = dataset.transform.at((height, width))
    return dataset


def build_for_packing(
    name: str,
    *,
    root: str | Path | None = None,
    split_by: str | None = None,
    num_classes: int | None = None,
    image_range: tuple[float, float] | None = None,
    folder_options: FolderOptions | None = None,
) -> list[PairedFiles]:
    """Build every split of a data set for `sward.data.packing.pack`; arguments as in `build`.

    The name may also be `unlabelled`, for all images of the folder `root`.

    Args:
        split_by: polyps only; None packs every frame, a list only the frames in it.

    Raises:
        DatasetNotFoundError: the data set is missing or incomplete, or has no split.
        ValueError: unknown name, `scenes`, which has no files, or options of a folder for another data set.
    """
    where = _root(root)
    if name != "folder" and folder_options is not None:
        folder.refuse_options(vars(folder_options), name)
    if name == unlabelled.INFO.name:
        for option, value in (("split_by", split_by), ("num_classes", num_classes)):
            if value is not None:
                raise ValueError(f"{option} must be None for unlabelled images, got {value!r}")
        images = unlabelled.UnlabelledFolder(where)
        images.image_range = _checked(image_range)
        return [images]
    info = describe(name, num_classes=num_classes, folder_options=folder_options)
    size = default_image_size(name)
    if name == "scenes":
        raise ValueError("name must be a data set of files, got 'scenes'; scenes are generated and need no pack")
    if split_by is not None and name not in POLYPS:
        raise ValueError(
            f"split_by must be None for {name}, got {split_by!r}; only cvc_clinicdb and cvc_colondb can be split"
        )
    if name in POLYPS:
        # Any rule that assigns every frame to a split works here.
        by: str | None = split_by or "ratio"
        splits: Sequence[str] = polyps.SPLITS
    elif name == "folder":
        by, splits = None, folder.splits(where, folder_options)
    else:
        by, splits = None, {"cityscapes": cityscapes, "camvid": camvid}[name].splits(where)
    made = [_from_files(info, where, split, size, split_by=by, train=False, options=folder_options) for split in splits]
    for dataset in made:
        dataset.image_range = _checked(image_range)
    return made


def _from_files(
    info: DatasetInfo,
    where: Path,
    split: str,
    size: tuple[int, int],
    *,
    train: bool,
    split_by: str | None = None,
    seed: int = 0,
    options: FolderOptions | None = None,
) -> PairedFiles:
    if info.name == "cityscapes":
        return cityscapes.Cityscapes(where, split, size, train=train, seed=seed)
    if info.name == "camvid":
        return camvid.CamVid(where, split, size, train=train, seed=seed)
    if info.name == "folder":
        return folder.ImageFolder(
            where, split, size, info=info, train=train, split_by=split_by, seed=seed, options=options
        )
    release = polyps.CLINICDB if info.name == "cvc_clinicdb" else polyps.COLONDB
    return polyps.Polyps(release, where, split, size, split_by=split_by or "sequence", train=train, seed=seed)


def _checked(image_range: tuple[float, float] | None) -> tuple[float, float] | None:
    check_range(image_range)
    return image_range


def _root(root: str | Path | None) -> Path:
    return Path(root or os.environ.get("SWARD_DATA") or "data")


def fixed_root(name: str, root: Path | None) -> Path | None:
    """Return the root of a data set for a configuration that is read again from another working directory.

    None where `$SWARD_DATA` says it each time, and for generated images.
    """
    if root is None and (name == "scenes" or os.environ.get("SWARD_DATA")):
        return None
    return _root(root).absolute()


def _check_name(name: str) -> None:
    if name not in _IMAGE_SIZES:
        near = difflib.get_close_matches(name.lower(), _IMAGE_SIZES, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(_IMAGE_SIZES)}"
        raise ValueError(f"unknown data set {name!r}; {hint}")
