"""Scores of a finished run, written into its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from sward.evaluation import Evaluation, evaluate
from sward.runs.load import build_split, choose_device, load_run
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
) -> Evaluation:
    """`sward evaluate`: scores a run and writes the scores to `evaluation_file(path, ...)`.

    Args:
        path: run folder.
        split: split of the data set.
        dataset: another data set with the same classes; None takes the run's own.
        root: folder that holds the data set; None takes the run's own.
        split_by: how polyp data is split; None takes the run's own.
        checkpoint: which weights.
        batch: images a forward pass.
        device: where to run; None takes the GPU where there is one.

    Raises:
        ValueError, FileNotFoundError: if there is no such run or data set, it has other classes, or a batch is empty.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    config, info, network = load_run(path, checkpoint)
    target = choose_device(device)
    settings = config.dataset
    if dataset is not None and dataset != settings.name:
        settings.name, settings.split_by, settings.packed = dataset, None, "auto"
    settings.root = root or settings.root
    settings.split_by = split_by or settings.split_by
    images = build_split(config, split, train=False)
    if images.info.classes != info.classes:
        raise ValueError(
            f"dataset {settings.name!r} has the classes {list(images.info.classes)}, "
            f"but the run was trained on {list(info.classes)}"
        )
    with Progress(f"evaluate on {settings.name}, {split}", -(-len(images) // batch)) as progress:
        result = evaluate(network.to(target), images, batch=batch, device=target, advance=progress.advance)
    scores = {"dataset": settings.name, "split": split, "split_by": settings.split_by, "checkpoint": checkpoint}
    text = json.dumps({**scores, **result.to_dict()}, indent=2, allow_nan=False)
    evaluation_file(path, settings.name, split).write_text(text + "\n", encoding="utf-8")
    return result


def evaluation_file(path: Path, dataset: str, split: str) -> Path:
    """Where the scores of the run in `path` on a split of a data set are kept."""
    return path / f"evaluation-{dataset}-{split}.json"
