"""`sward report`: one self-contained HTML page about one or more runs."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sward.config import TrainingConfig, to_json
from sward.data import DatasetInfo, DatasetNotFoundError
from sward.evaluation import predict_sample
from sward.figures.curves import training_curves
from sward.figures.predictions import prediction_grid
from sward.runs import load_run
from sward.runs.load import build_split, stored_split
from sward.training.run_folder import RunFolder, make_folder, read_json

IMAGES = 4
VALIDATION = "last validation during training"
SCORES = (
    ("mIoU %", "mean_iou"),
    ("mAcc %", "mean_accuracy"),
    ("Dice per image %", "dice"),
    ("IoU per image %", "iou"),
    ("Dice pooled %", "pooled_dice"),
)
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --accent: #2a6fb0; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.2rem; margin-top: 2.2rem; } h3 { font-size: 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid var(--line); }
tbody tr:hover { background: var(--soft); }
td.best { font-weight: 600; color: var(--accent); }
td.text, th.text { text-align: left; } .scroll + .scroll { margin-top: 1.2rem; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; background: white; border-radius: 4px; }
figcaption, .note { color: #888; font-size: .9rem; }
pre { overflow-x: auto; padding: .8rem; background: var(--soft); border-radius: 4px; font-size: 13px; }
summary { cursor: pointer; }
"""


@dataclass(frozen=True)
class ReportedRun:
    """The contents of a run folder."""

    title: str
    folder: RunFolder
    config: TrainingConfig
    info: DatasetInfo
    evaluations: dict[str, dict[str, Any]]
    """`VALIDATION` and the names of `evaluation-*.json` -> scores."""


def write_report(paths: Sequence[Path], output: Path | None = None, *, root: Path | None = None) -> Path:
    """Write the page and return its path.

    Args:
        paths: run folders, at least one.
        output: path of the page. Default: `report.html` in the first run folder.
        root: folder that holds the data sets; None uses that of each run. If images are missing, the page says so.

    Raises:
        ValueError: if `paths` is empty, or the page cannot be written.
        FileNotFoundError: if a folder is not a run folder.
    """
    if not paths:
        raise ValueError("paths must name at least one run folder, got none")
    runs = [_read(path, title) for path, title in zip(paths, _titles(paths), strict=True)]
    output = output or paths[0] / "report.html"
    if output.is_dir():
        raise ValueError(f"output must be a file, got the folder {output}; use {output / 'report.html'}")
    make_folder(output.parent)
    heading = runs[0].title if len(runs) == 1 else f"{len(runs)} runs"
    with TemporaryDirectory() as folder:
        sections = [
            _section("Scores", _scores(runs)),
            _section("Training", _training(runs)),
            _section("Curves", _curves(runs, Path(folder))),
            _section("Results per class", _per_class(runs)),
            _section("Predictions", _predictions(runs, Path(folder), root)),
            _section("Configuration", _configuration(runs)),
            _section("Environment", _environment(runs)),
        ]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>sward: {html.escape(heading)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f"<body><h1>{html.escape(heading)}</h1>\n{''.join(sections)}</body></html>\n"
    )
    output.write_text(page, encoding="utf-8")
    return output


def _read(path: Path, title: str) -> ReportedRun:
    folder = RunFolder(path)
    config, info = folder.read()
    config.dataset.split_by = stored_split(path) or config.dataset.split_by
    evaluations = {
        file.stem.removeprefix("evaluation-"): read_json(dict, file) for file in sorted(path.glob("evaluation-*.json"))
    }
    validated = [record for record in folder.records() if "validation" in record]
    if validated:
        evaluations = {VALIDATION: validated[-1]["validation"], **evaluations}
    return ReportedRun(title, folder, config, info, evaluations)


def _titles(paths: Sequence[Path]) -> list[str]:
    """Return the shortest suffixes of the paths that are unique."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        titles = ["/".join(each[-length:]) for each in parts]
        if len(set(titles)) == len(titles):
            return titles
    raise ValueError(f"paths must be distinct run folders, got {', '.join(map(str, paths))}")


def _scores(runs: Sequence[ReportedRun]) -> str:
    tables = []
    for name in dict.fromkeys(name for run in runs for name in run.evaluations):
        columns = [
            (header, key)
            for header, key in SCORES
            if any(run.evaluations.get(name, {}).get(key) is not None for run in runs)
        ]
        numbers = [[run.evaluations.get(name, {}).get(key) for _, key in columns] for run in runs]
        scored = next(run.evaluations[name] for run in runs if name in run.evaluations)
        weights = scored.get("checkpoint", "last")
        tables.append(
            f"<h3>{html.escape(name)}</h3>"
            f'<p class="note">{scored["images"]} images, {html.escape(weights)} weights</p>'
            + _table(["run", *(header for header, _ in columns)], [run.title for run in runs], numbers)
        )
    return "".join(tables) or '<p class="note">No run has been validated yet.</p>'


def _per_class(runs: Sequence[ReportedRun]) -> str:
    tables = []
    for name in dict.fromkeys(name for run in runs for name in run.evaluations):
        scored = [run for run in runs if name in run.evaluations]
        classes = list(dict.fromkeys(each for run in scored for each in run.evaluations[name]["class_iou"]))
        numbers = [[run.evaluations[name]["class_iou"].get(each) for run in scored] for each in classes]
        header = [f"IoU %, {name}", *(run.title for run in scored)]
        tables.append(_table(header, classes, numbers, best="row"))
    return "".join(tables) or '<p class="note">No run has been validated yet.</p>'


def _training(runs: Sequence[ReportedRun]) -> str:
    rows = []
    for run in runs:
        logged = [record for record in run.folder.records() if "loss" in record]
        if not logged:
            rows.append(["0", "-", "-", "-"])
            continue
        last = logged[-1]
        seconds, step = last["seconds"], last["step"]
        rows.append([f"{step:,}", f"{seconds:,.0f}", f"{seconds / step:.3f}", f"{last['loss']:.4f}"])
    header = ["run", "steps", "seconds in the loop", "seconds per step", "last loss"]
    return _table(header, [run.title for run in runs], rows)


def _curves(runs: Sequence[ReportedRun], folder: Path) -> str:
    drawn = {run.title: run.folder for run in runs if run.folder.records()}
    if not drawn:
        return '<p class="note">No run has logged a step yet.</p>'
    metric = runs[0].config.metric
    path = training_curves(drawn, folder / "curves.png", metric=metric)
    return _figure(path.with_suffix(".svg"), "Task loss at the logged steps and validation score")


def _predictions(runs: Sequence[ReportedRun], folder: Path, root: Path | None) -> str:
    """Draw one grid per data set, with its runs side by side on the same images."""
    pages = []
    for name in dict.fromkeys(run.info.name for run in runs):
        group = [run for run in runs if run.info.name == name and run.folder.best.exists()]
        if not group:
            pages.append(f'<p class="note">{html.escape(name)}: no run has saved weights yet.</p>')
            continue
        config = group[0].config
        config.dataset.root = root or config.dataset.root
        try:
            dataset = build_split(config, "val", train=False)
        except DatasetNotFoundError as error:
            pages.append(f'<p class="note">No predictions on {html.escape(name)}: {html.escape(str(error))}</p>')
            continue
        chosen = [index * len(dataset) // IMAGES for index in range(min(IMAGES, len(dataset)))]
        samples = [dataset[index] for index in chosen]
        columns = {"ground truth": [sample.labels for sample in samples]}
        for run in group:
            _, _, network = load_run(run.folder.path)
            columns[run.title] = [predict_sample(network, sample) for sample in samples]
        images = [dataset.read(index)[0] for index in chosen]
        path = prediction_grid(images, columns, dataset.info, folder / f"{name}.png")
        pages.append(_figure(path, f"{name}, validation split, best weights"))
    return "".join(pages)


def _configuration(runs: Sequence[ReportedRun]) -> str:
    flat = [_flatten(json.loads(to_json(run.config))) for run in runs]
    names = list(dict.fromkeys(name for each in flat for name in each))
    differing = [name for name in names if len({str(each.get(name, "")) for each in flat}) > 1]
    parts = []
    if len(runs) > 1:
        rows = [[str(each.get(name, "")) for each in flat] for name in differing]
        parts.append("<h3>What differs</h3>" + _table(["field", *(run.title for run in runs)], differing, rows))
    for run in runs:
        text = html.escape(to_json(run.config))
        is_open = " open" if len(runs) == 1 else ""
        parts.append(
            f"<details{is_open}><summary>{html.escape(run.title)}/config.json</summary><pre>{text}</pre></details>"
        )
    return "".join(parts)


def _environment(runs: Sequence[ReportedRun]) -> str:
    parts = []
    for run in runs:
        path = run.folder.path / "environment.json"
        text = path.read_text(encoding="utf-8") if path.exists() else "none was recorded"
        parts.append(
            f"<details><summary>{html.escape(run.title)}/environment.json</summary><pre>{html.escape(text)}</pre></details>"
        )
    return "".join(parts)


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _section(title: str, body: str) -> str:
    return f"<h2>{title}</h2>\n{body}\n" if body else ""


def _table(
    header: Sequence[str], names: Sequence[str], rows: Sequence[Sequence[float | str | None]], *, best: str = "column"
) -> str:
    """Format fractions in percent; highlight the single best number of each column (or row)."""
    columns = list(zip(*rows)) if rows else []
    lines = []
    for index, (name, row) in enumerate(zip(names, rows, strict=True)):
        cells = []
        for position, value in enumerate(row):
            group: Iterable[Any] = columns[position] if best == "column" else rows[index]
            cells.append(_cell(value, [each for each in group if isinstance(each, float) and not math.isnan(each)]))
        lines.append(f"<tr><td>{html.escape(name)}</td>{''.join(cells)}</tr>")
    kind = ' class="text"' if any(isinstance(value, str) for row in rows for value in row) else ""
    head = "".join(f"<th{kind}>{html.escape(each)}</th>" for each in header)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _cell(value: float | str | None, group: Sequence[float]) -> str:
    if isinstance(value, str):
        return f'<td class="text">{html.escape(value)}</td>'
    if value is None or math.isnan(value):
        return "<td>-</td>"
    is_best = len(group) > 1 and value == max(group) and group.count(value) == 1
    mark = ' class="best"' if is_best else ""
    return f"<td{mark}>{100 * value:.2f}</td>"


def _figure(path: Path, caption: str) -> str:
    kind = {".png": "png", ".svg": "svg+xml"}[path.suffix]
    content = base64.b64encode(path.read_bytes()).decode()
    text = html.escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/{kind};base64,{content}"><figcaption>{text}</figcaption></figure>'
    )
