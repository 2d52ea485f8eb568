"""Print results as rich tables, and warnings as lines; rich is imported when the first table is printed."""

from __future__ import annotations

import contextlib
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Print a warning as one line, and the same warning once; no change where Python's development mode is on."""
    before, shown = warnings.formatwarning, set[str]()

    def one_line(message: Warning | str, category: type[Warning], *place: Any, **line: Any) -> str:
        text = str(message)
        if category is not UserWarning:
            return before(message, category, *place, **line)
        if text in shown:
            return ""
        shown.add(text)
        return f"warning: {text}\n"

    if not sys.flags.dev_mode:
        warnings.formatwarning = one_line
    try:
        yield
    finally:
        warnings.formatwarning = before


def print_result(result: Any, metric: str) -> None:
    """Print a `sward.training.TrainingResult`; with several processes only rank 0 prints."""
    from sward import distributed

    if not distributed.is_main():
        return
    print_evaluation(result.evaluation, f"validation, {result.evaluation.images} images, last weights")
    best = f"{100 * result.best_score:.2f} %" if math.isfinite(result.best_score) else "undefined"
    print(f"best {metric} on validation: {best}")
    print(f"seconds in the training loop: {result.seconds:.0f}\nrun: {result.run}")


def print_evaluation(evaluation: Any, title: str) -> None:
    """Print all scores of a `sward.evaluation.Evaluation` in percent."""
    summary = [("mIoU", evaluation.mean_iou), ("mAcc", evaluation.mean_accuracy)]
    if evaluation.dice is not None:
        foreground = list(evaluation.class_iou)[1]
        summary += [
            (f"Dice of {foreground}, mean over images", evaluation.dice),
            (f"IoU of {foreground}, mean over images", evaluation.iou),
            (f"Dice of {foreground}, pooled", evaluation.pooled_dice),
        ]
    summary.append(("Dice, mean over classes", evaluation.mean_dice))
    rows = summary + [(f"IoU {name}", value) for name, value in evaluation.class_iou.items()]
    rows += [(f"Dice {name}", value) for name, value in evaluation.class_dice.items()]
    print_table(title, ("score", "%"), [(name, f"{100 * value:.2f}") for name, value in rows])


def print_export(exported: Any) -> None:
    """Print the contract and the proof of a `sward.deploy.proof.Exported`."""
    metadata, proof = exported.metadata, exported.proof
    form = "torch.export program" if metadata.opset is None else f"ONNX, opset {metadata.opset}"
    size = "any size" if metadata.fixed_size is None else "{} x {} pixels".format(*metadata.fixed_size)
    print(f"{metadata.model}, {form}, {metadata.precision}: {metadata.input} RGB of {size} -> {metadata.output}")
    if proof is None:
        print("not compared with PyTorch")
    else:
        rows = [
            ("mIoU (%)", _percent(proof.mean_iou), _percent(proof.mean_iou_pytorch)),
            ("median latency (ms)", f"{proof.milliseconds:.1f}", f"{proof.milliseconds_pytorch:.1f}"),
        ]
        if proof.dice_pytorch is not None:
            rows.insert(1, ("Dice, mean over images (%)", _percent(proof.dice), _percent(proof.dice_pytorch)))
        height, width = proof.image_size
        threads = "1 thread" if proof.threads == 1 else f"{proof.threads} threads"
        print_table(
            f"{proof.images} images of {proof.split}; latency at {height} x {width}, {threads}",
            ("", "file", "PyTorch"),
            rows,
        )
        print(f"largest difference of {metadata.output}: {proof.largest_difference:.2g}")
        print(f"pixels of another class: {100 * proof.differing_pixels:.4f} %")
        if (proof.mean_iou_evaluated, proof.dice_evaluated) != (proof.mean_iou_pytorch, proof.dice_pytorch):
            dice = "" if proof.dice_evaluated is None else f", Dice {_percent(proof.dice_evaluated)} %"
            print(
                f"from logits at the size of evaluation, as 'sward evaluate' scores: mIoU "
                f"{_percent(proof.mean_iou_evaluated)} %{dice}"
            )
    for layer, loss in exported.refused.items():
        print(f"layer {layer} stays fp32: in int8 it alone loses {100 * loss:.2f} points of mIoU; --force quantises it")
    print(f"written: {exported.path} ({exported.path.stat().st_size / 1e6:.2f} MB)\nwritten: {exported.proof_path}")
    print(f"written: {exported.card_path}")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def print_demo(result: Any) -> None:
    """Print the table, the interval, the check of the exported file and the files of a `sward.cli.demo.DemoResult`."""
    rows = [
        (
            row.name,
            f"{row.params / 1e6:.2f}",
            f"{row.flops / 1e9:.3f}",
            f"{100 * sum(row.mean_iou) / len(row.mean_iou):.1f}",
            "  ".join(f"{100 * each:.1f}" for each in row.mean_iou),
            f"{row.seconds:.0f}",
        )
        for row in result.rows
    ]
    print_table(
        f"generated scenes, {result.images} test images",
        ("network", "params (M)", "GFLOPs", "mIoU (%)", "per seed", "train (s)"),
        rows,
    )
    if result.gain is not None:
        mean, low, high = (100 * value for value in (result.gain.mean, result.gain.low, result.gain.high))
        print(f"SWARD gains {mean:+.1f} points of mIoU, 95 % interval [{low:.1f}, {high:.1f}] (paired by seed)\n")
    print_export(result.exported)
    print(
        f"\nopen these three files:\n  {result.grid}  what the networks see\n"
        f"  {result.report}  scores with intervals, costs, curves and settings of the runs\n"
        f"  {result.exported.path}  the distilled network, for ONNX Runtime or https://netron.app"
    )


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table below its title; the first column is text, the others are numbers."""
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for index, column in enumerate(header):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    output = console()
    output.print(Text(title, style="bold"))
    output.print(table)


def console() -> Any:
    """Return a rich console for standard output."""
    from rich.console import Console

    # Names of classes and files are no markup. A pipe has no width; make it wide enough that a log wraps no table.
    return Console(width=None if sys.stdout.isatty() else 160, markup=False, emoji=False)
