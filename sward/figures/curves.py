"""Curves of losses, their terms and validation scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from sward.figures.style import plot_library, save_figure
from sward.training.run_folder import RunFolder


def training_curves(runs: Mapping[str, RunFolder], path: Path, *, metric: str = "mean_iou") -> Path:
    """Draw the task loss and the validation metric over the steps, one line per run.

    Args:
        runs: title -> run folder.
        path: path of the PNG; an SVG is written beside it.
        metric: name of a score in `sward.evaluation.Evaluation`.

    Returns:
        The path of the PNG.
    """
    plt = plot_library()
    figure, (losses, scores) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    for title, run in runs.items():
        records = run.records()
        steps = [(record["step"], record["task"]) for record in records if "task" in record]
        validated = [(record["step"], record["validation"][metric]) for record in records if "validation" in record]
        losses.plot(*zip(*steps), label=title)
        scores.plot(*zip(*validated), marker="o", label=title)
    losses.set(xlabel="step", ylabel="task loss", yscale="log")
    scores.set(xlabel="step", ylabel={"mean_iou": "validation mIoU", "dice": "validation Dice"}.get(metric, metric))
    figure.legend(*scores.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return save_figure(figure, path)


def term_curves(runs: Mapping[str, RunFolder], path: Path) -> Path:
    """Draw every weighted term of the loss over the steps, one panel per run.

    Args:
        runs: title -> run folder.
        path: path of the PNG; an SVG is written beside it.

    Returns:
        The path of the PNG.
    """
    plt = plot_library()
    figure, axes = plt.subplots(1, len(runs), figsize=(5 * len(runs), 3), squeeze=False, layout="constrained")
    for axis, (title, run) in zip(axes[0], runs.items()):
        records = [record for record in run.records() if "weighted" in record]
        names = list(dict.fromkeys(name for record in records for name in record["weighted"]))
        for name in names:
            values = [record["weighted"].get(name, math.nan) for record in records]
            if any(values):  # a term of weight 0 has no logarithm
                axis.plot([record["step"] for record in records], values, label=name)
        axis.set(title=title, xlabel="step", ylabel="weighted term", yscale="log")
        axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return save_figure(figure, path)
