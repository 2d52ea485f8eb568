"""Loss and validation curves of one or more runs."""

from __future__ import annotations

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
    figure, (losses, scores) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for title, run in runs.items():
        records = run.records()
        steps = [(record["step"], record["task"]) for record in records if "task" in record]
        validated = [(record["step"], record["validation"][metric]) for record in records if "validation" in record]
        losses.plot(*zip(*steps), label=title)
        scores.plot(*zip(*validated), marker="o", label=title)
    losses.set(xlabel="step", ylabel="task loss", yscale="log")
    scores.set(xlabel="step", ylabel={"mean_iou": "validation mIoU", "dice": "validation Dice"}.get(metric, metric))
    losses.legend(frameon=False)
    return save_figure(figure, path)
