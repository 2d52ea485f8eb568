"""Evaluate a finished run and write the scores into its folder."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any, Literal

from sward import atomic, data
from sward.config import DatasetConfig, TrainingConfig
from sward.data import EvaluationTransform, SegmentationDataset, folder, lists
from sward.data.check import count_labels, judge_evaluation
from sward.data.files import PairedFiles
from sward.data.frames import digest, frame_sums, known_images
from sward.deploy.network import DeployedNetwork
from sward.deploy.tiles import TiledNetwork, check_tile
from sward.evaluation import Evaluation, evaluate
from sward.models.inputs import SIZE_MULTIPLE
from sward.runs.load import (
    build_split,
    choose_device,
    config_for_images,
    load_run,
    same_folder,
    steps_of,
    warn_if_unfinished,
)
from sward.training import checkpoints
from sward.training.progress import Progress
from sward.training.run_folder import RunFolder, make_folder


def evaluate_run(
    path: Path,
    *,
    split: str = "val",
    dataset: str | None = None,
    root: Path | None = None,
    split_by: str | None = None,
    checkpoint: Literal["best", "last"] = "best",
    batch: int = 8,
    device: str | None = None,
    tile: tuple[int, int] | None = None,
    overlap: int | None = None,
) -> Evaluation:
    """Score a run and write the scores to `evaluation_file(path, ...)`.

    Warns if the run is unfinished, if frames of the split were trained on, if its masks lack a class as masks of other
    values do, or if the folder of the run is read-only: then nothing is written.

    Args:
        path: run folder.
        split: split of the data set.
        dataset: another data set with the same classes; None uses that of the run.
        root: folder that holds the data set; None uses that of the run, where another data set must have a folder of
            its own name, else `$SWARD_DATA`, then `./data`.
        split_by: how polyp data is split; None, and that of the run, use the split that the run has kept.
        checkpoint: which weights to score.
        batch: images per forward pass.
        device: device to run on; None uses the GPU if there is one.
        tile: height and width of overlapping tiles at each image's own resolution, one image at a time; None resizes
            images as the run does.
        overlap: pixels that neighbouring tiles share; None takes a quarter of the tile.

    Raises:
        ValueError, FileNotFoundError: if the run or data set does not exist, the classes differ, `batch` is below 1, or
            the tile or overlap is wrong.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    check_tile(tile, overlap)
    config, info, network = load_run(path, checkpoint)
    target = choose_device(device)
    file = evaluation_file(
        path,
        dataset,
        split,
        root=root,
        split_by=split_by,
        checkpoint=checkpoint,
        tile=tile,
        overlap=overlap,
    )
    config, images = _images(path, config, split, dataset, root, split_by)
    settings = config.dataset
    if images.info.classes != info.classes:
        raise ValueError(
            f"dataset must have the classes of the run, {list(info.classes)}, "
            f"got {settings.name!r} with {list(images.info.classes)}"
        )
    if isinstance(images, PairedFiles):
        judge_evaluation(split, images, count_labels(images))
    stores = is_writable(path)
    identity: dict[str, Any] = _identity(RunFolder(path), config, images, split, checkpoint)
    if tile is not None:
        # The wrapped network pads tiles to its multiple, as `sward predict --tile` does.
        tiled = TiledNetwork(DeployedNetwork(network, input="normalised"), tile, overlap)
        network, images.transform, batch = tiled, EvaluationTransform(), 1
        identity |= {"tile": tile, "overlap": tiled.overlap}
    elif any(side % SIZE_MULTIPLE for side in images[0].image.shape[-2:]):
        network = DeployedNetwork(network, input="normalised")  # Pads as `sward predict` and exported files do.
    with Progress(f"evaluate on {settings.name}, {split}", -(-len(images) // batch)) as progress:
        result = evaluate(network.to(target), images, batch=batch, device=target, advance=progress.advance)
    if stores:
        text = json.dumps({**identity, **result.to_dict_with_images()}, indent=2, allow_nan=False)
        atomic.write(file, f"{text}\n".encode())
    return result


def frames_of(
    path: Path, *, split: str = "val", dataset: str | None = None, root: Path | None = None, split_by: str | None = None
) -> str | None:
    """Return the checksum of the images and masks that `evaluate_run` with the same arguments would score now.

    None for images that are not in files. It is `frames` in the scores that `evaluate_run` writes.

    Raises:
        ValueError, FileNotFoundError: if the run or data set does not exist.
    """
    _, images = _images(path, RunFolder(path).read()[0], split, dataset, root, split_by)
    sums = frame_sums(images)
    return digest(sums) if sums else None


def evaluation_file(
    path: Path,
    dataset: str | None = None,
    split: str = "val",
    *,
    root: Path | None = None,
    split_by: str | None = None,
    checkpoint: Literal["best", "last"] = "best",
    tile: tuple[int, int] | None = None,
    overlap: int | None = None,
) -> Path:
    """Return the file for the scores of the run in `path`; every argument that changes scores changes its name.

    The plain name `evaluation-DATASET-SPLIT.json` belongs to the best weights on the data and the split of the run.

    Args:
        path: run folder.
        dataset, split, root, split_by, checkpoint, tile, overlap: as in `evaluate_run`.

    Raises:
        FileNotFoundError, ValueError: if there is no run in `path`, or its files are damaged.
    """
    own = RunFolder(path).read()[0].dataset
    own_root = _own_root(own, dataset or own.name)
    name = f"evaluation-{_short(dataset or own.name)}-{_short(split)}"
    if checkpoint != "best":
        name += f"-{checkpoint}"
    if split_by is not None and (split_by != own.split_by or dataset not in (None, own.name)):
        name += f"-by-{_short(split_by)}"
    if root is not None and not same_folder(root, own_root):
        name += f"-in-{_short(str(root.resolve()))}"
    if tile is not None:
        name += f"-tile-{tile[0]}x{tile[1]}" + ("" if overlap is None else f"-overlap-{overlap}")
    return path / f"{name}.json"


def _images(
    path: Path, config: TrainingConfig, split: str, dataset: str | None, root: Path | None, split_by: str | None
) -> tuple[TrainingConfig, SegmentationDataset]:
    """Return the configuration of a run with the data set that it is scored on, and the images; see `evaluate_run`."""
    own = config.dataset
    if (dataset or own.name, split_by) == (own.name, own.split_by) and same_folder(root or own.root, own.root):
        # The split that the run has kept, which the same words may not give any more.
        split_by = None
    config = config_for_images(path, config, root)
    settings = config.dataset
    if dataset is not None and dataset != settings.name:
        if dataset == "folder":
            raise ValueError(
                "dataset must be one that defines its classes, got 'folder'; only a run that was trained on a folder "
                "says how to read one"
            )
        settings.root = root or _own_root(settings, dataset)
        settings.name, settings.split_by, settings.packed = dataset, None, "auto"
    settings.split_by = split_by or settings.split_by
    try:
        return config, build_split(config, split, train=False)
    except ValueError as error:
        elsewhere = not same_folder(root or own.root, own.root)
        if not (elsewhere and split in lists.SPLITS and settings.split_by == str(RunFolder(path).split)):
            raise
        # The frames of the run's own split are not those of this folder.
        raise ValueError(
            f"{error}; to score every frame of another folder, take --split {folder.EVERY_FRAME}"
        ) from error


def _own_root(own: DatasetConfig, dataset: str) -> Path | None:
    """Return where a data set is looked for without a root: in that of the run, if that is not another one's folder.

    The folder of one data set may have the layout of another, so that must have a folder of its own name.
    """
    return own.root if own.root is None or dataset == own.name or data.holds(own.root, dataset) else None


def _short(value: str) -> str:
    """Return a file name for a word, shares or a path; paths of one name differ by a checksum."""
    if lists.is_ratio(value):
        return value.replace("/", "-")
    path = Path(value)
    if path.name == value and not path.suffix and value != "..":
        return value
    return f"{path.stem}-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:6]}"


def is_writable(path: Path, *, warn: bool = True) -> bool:
    """Return whether `evaluate_run` can store scores in the folder of a run."""
    try:
        make_folder(path)
    except (ValueError, OSError) as error:
        reason = str(error).partition("; ")[0]
        if warn:
            warnings.warn(f"{reason}; the scores are printed and not stored", stacklevel=3)
        return False
    return True


def _identity(
    run: RunFolder, config: TrainingConfig, images: SegmentationDataset, split: str, checkpoint: Literal["best", "last"]
) -> dict[str, str | None]:
    """Return what the scores belong to, and warn of an unfinished run and of frames that it was trained on."""
    settings = config.dataset
    sums = frame_sums(images)
    frames = run.read_frames()
    progress = checkpoints.progress(run.last)
    if progress is not None:
        steps = steps_of(config, len(frames.get("train", {})))
        warn_if_unfinished(f"the run in {run.path}", progress[0], steps, stacklevel=3)
    seen = known_images({**frames.get("train", {}), **frames.get("unlabelled", {})}, sums)
    if seen and split != "train":
        warnings.warn(
            f"{len(seen)} of the {len(sums)} images of the split {split} were trained on, so their scores say nothing "
            f"about new images; the first is {seen[0]}",
            stacklevel=3,
        )
    return {
        "dataset": settings.name,
        "split": split,
        "split_by": settings.split_by,
        "root": None if settings.root is None else str(settings.root.absolute()),
        "frames": digest(sums) if sums else None,
        "checkpoint": checkpoint,
        "weights": run.weights_sum(checkpoint),
    }
