"""Evaluate a finished run and write the scores into its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from sward.data import EvaluationTransform
from sward.deploy.network import DeployedNetwork
from sward.deploy.tiles import TiledNetwork, check_tile
from sward.evaluation import Evaluation, evaluate
from sward.runs.load import build_split, choose_device, load_run, stored_split
from sward.training.progress import Progress


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
    """Score a run and write the scores to `evaluation_file(path, ...)` and into its model card.

    Args:
        path: run folder.
        split: split of the data set.
        dataset: another data set with the same classes; None uses that of the run.
        root: folder that holds the data set; None uses that of the run.
        split_by: how polyp data is split; None uses that of the run.
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
    settings = config.dataset
    # The frames that this run left for validation and testing, even if the folder has changed since.
    settings.split_by = stored_split(path) or settings.split_by
    if dataset is not None and dataset != settings.name:
        settings.name, settings.split_by, settings.packed = dataset, None, "auto"
    settings.root = root or settings.root
    settings.split_by = split_by or settings.split_by
    images = build_split(config, split, train=False)
    if images.info.classes != info.classes:
        raise ValueError(
            f"dataset must have the classes of the run, {list(info.classes)}, "
            f"got {settings.name!r} with {list(images.info.classes)}"
        )
    scores: dict[str, Any] = {
        "dataset": settings.name,
        "split": split,
        "split_by": settings.split_by,
        "checkpoint": checkpoint,
    }
    if tile is not None:
        # The wrapped network pads tiles to its multiple, as `sward predict --tile` does.
        tiled = TiledNetwork(DeployedNetwork(network, input="normalised"), tile, overlap)
        network, images.transform, batch = tiled, EvaluationTransform(), 1
        scores |= {"tile": tile, "overlap": tiled.overlap}
    with Progress(f"evaluate on {settings.name}, {split}", -(-len(images) // batch)) as progress:
        result = evaluate(network.to(target), images, batch=batch, device=target, advance=progress.advance)
    text = json.dumps({**scores, **result.to_dict_with_images()}, indent=2, allow_nan=False)
    evaluation_file(path, settings.name, split, tile).write_text(text + "\n", encoding="utf-8")
    # Imported here: cards build on runs.
    from sward.reporting.card import write_card

    write_card(path)
    return result


def evaluation_file(path: Path, dataset: str, split: str, tile: tuple[int, int] | None = None) -> Path:
    """Return the file that holds the scores of the run in `path` on a split of a data set, whole or in tiles."""
    tiled = "" if tile is None else f"-tile-{tile[0]}x{tile[1]}"
    return path / f"evaluation-{dataset}-{split}{tiled}.json"
