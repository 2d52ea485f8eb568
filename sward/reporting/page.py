"""`sward report`: one self-contained HTML page about one or more runs, for people who decide."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sward import atomic
from sward.config_json import to_json
from sward.data import DatasetNotFoundError
from sward.reporting import pictures
from sward.reporting.costs import Cost, cost_of, this_cpu
from sward.reporting.data_card import SplitCounts, counts_of_run, counts_on_disk, splits_on_disk
from sward.reporting.headline import Headline, baseline, headline
from sward.reporting.pictures import Picture
from sward.reporting.runs import Group, ReportedRun, by_images, group, read_runs, with_companions
from sward.reporting.scores import (
    METRICS,
    Score,
    against,
    class_score,
    decisive,
    evaluations,
    first_scores,
    interval_text,
    metric_of,
    score,
)
from sward.reporting.templates import render
from sward.training.run_folder import make_folder

NOTHING = "-"


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str
    """What it says."""
    detail: str = ""
    """Second line, in small letters: an interval."""
    is_gain: bool = False
    """Whether it stands out: the interval of a difference is above 0."""


@dataclass(frozen=True)
class Table:
    """A table of the page."""

    header: tuple[str, ...]
    """The first entry heads the titles of the rows."""
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    """Title and cells of each row."""
    title: str = ""
    """Heading above the table."""
    note: str = ""
    """Sentence above the table."""


@dataclass
class Section:
    """All about the runs of one data set."""

    name: str
    """Name of the data set."""
    headline: Headline
    """The first sentences."""
    scores: list[Table] = field(default_factory=list)
    """One per evaluation."""
    costs: Table | None = None
    """Parameters, FLOPs, size and latency."""
    classes: list[Table] = field(default_factory=list)
    """IoU per class, one per evaluation."""
    predictions: Picture | None = None
    """Outlines from worst to best."""
    card: Table | None = None
    """Images and class shares per split."""
    examples: Picture | None = None
    """Images with the outlines of their labels."""
    absent: str = ""
    """Why there are no images; empty if there are."""
    terms: Table | None = None
    """Weighted terms at the last logged step."""
    term_curves: Picture | None = None
    """Weighted terms over the steps."""
    training: Table | None = None
    """Steps and time per run."""
    curves: Picture | None = None
    """Loss and validation score over the steps."""


def write_report(paths: Sequence[Path], output: Path | None = None, *, root: Path | None = None) -> Path:
    """Write the page and return its path.

    The teacher and the student alone are added where they lie beside the runs.

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
    given = read_runs(paths)
    runs = read_runs(with_companions(paths))
    output = output or paths[0] / "report.html"
    if output.is_dir():
        raise ValueError(f"output must be a file, got the folder {output}; use {output / 'report.html'}")
    make_folder(output.parent)
    with TemporaryDirectory() as folder:
        sections = []
        for index, (name, alike) in enumerate(by_images(runs).items()):
            place = Path(folder) / str(index)
            place.mkdir()
            sections.append(_section(name, group(alike), place, root))
        page = render(
            "report.html.j2",
            heading=given[0].title if len(given) == 1 else f"{len(given)} runs",
            added=[run.title for run in runs[len(given) :]],
            sections=sections,
            differing=_differing(runs),
            configurations=[(f"{run.title}/config.json", to_json(run.config)) for run in runs],
            environments=[(f"{run.title}/environment.json", _environment(run)) for run in runs],
        )
    atomic.write(output, page.encode())
    return output


def _section(name: str, groups: Sequence[Group], folder: Path, root: Path | None) -> Section:
    costs = {each.title: cost_of(each) for each in groups}
    section = Section(name, headline(groups, costs))
    section.scores = [_scores(groups, evaluation) for evaluation in evaluations(groups)]
    section.classes = [_per_class(groups, evaluation) for evaluation in evaluations(groups)]
    section.costs = _costs(groups, costs)
    section.terms = _terms(groups)
    section.training = _training(groups)
    section.curves = pictures.curves(groups, folder)
    section.term_curves = pictures.terms(groups, folder)
    counts = counts_of_run(groups[0].runs[0])
    try:
        splits = splits_on_disk(groups[0].runs[0], root)
        section.examples = pictures.examples("train", splits["train"], folder)
        drawable = [each for each in groups if costs[each.title] is not None]
        if drawable:
            evaluation = decisive(groups)
            is_test = evaluation is not None and first_scores(groups, evaluation).get("split") == "test"
            split = "test" if is_test and "test" in splits else "val"
            judged = _judged(drawable, evaluation)
            section.predictions = pictures.predictions(drawable, judged, split, root, folder)
        # A run says itself which masks it had; with a share of them, those on the disk are more.
        known = {each.name for each in counts}
        counts += counts_on_disk({split: each for split, each in splits.items() if split not in known})
    except (DatasetNotFoundError, ValueError) as error:
        # Also one damaged file, with which a run may well have gone on.
        section.absent = f"Not all images of {name} can be shown: {error}"
    section.card = _card(counts)
    return section


def _judged(groups: Sequence[Group], evaluation: str | None) -> Group:
    """Return the group whose scores order the predictions: the best distilled student, or what is there."""
    last = [each for each in groups if each.role == groups[-1].role]
    _, metric = metric_of(last[0].runs[0].info.num_classes)
    means = {each.title: None if evaluation is None else score(each, evaluation, metric) for each in last}
    return max(last, key=lambda each: -1.0 if (found := means[each.title]) is None else found.mean)


def _scores(groups: Sequence[Group], evaluation: str) -> Table:
    metrics = [(header, key) for header, key in METRICS if any(score(each, evaluation, key) for each in groups)]
    name, judged = metric_of(groups[0].runs[0].info.num_classes)
    rows = []
    for each in groups:
        found = [score(each, evaluation, key) for _, key in metrics]
        count = sum(evaluation in run.evaluations for run in each.runs)
        gain = against(each, baseline(each, groups), evaluation, judged)
        difference = Cell(NOTHING) if gain is None else Cell(f"{gain.mean:+.2f}", interval_text(gain), gain.is_gain)
        cells = [Cell(NOTHING) if value is None else _score_cell(value) for value in found]
        rows.append((each.title, (Cell(str(count)), *cells, difference)))
    header = ("network", "seeds", *(header for header, _ in metrics), f"{name} - alone")
    stored = first_scores(groups, evaluation)
    return Table(
        header, tuple(rows), evaluation, f"{stored['images']} images, {stored.get('checkpoint', 'last')} weights"
    )


def _score_cell(value: Score) -> Cell:
    return Cell(f"{value.mean:.2f}", "" if value.interval is None else interval_text(value.interval))


def _per_class(groups: Sequence[Group], evaluation: str) -> Table:
    scored = [each for each in groups if any(evaluation in run.evaluations for run in each.runs)]
    names = list(first_scores(groups, evaluation).get("class_iou", {}))
    rows = tuple((name, tuple(_percent(class_score(each, evaluation, name)) for each in scored)) for name in names)
    return Table((f"IoU %, {evaluation}", *(each.title for each in scored)), rows)


def _percent(value: float | None) -> Cell:
    return Cell(NOTHING if value is None else f"{value:.2f}")


def _costs(groups: Sequence[Group], costs: dict[str, Cost | None]) -> Table:
    rows = []
    for each in groups:
        cost = costs[each.title]
        texts = ("no weights saved yet", *(NOTHING,) * 4)
        if cost is not None:
            size = "{} x {}".format(*cost.size)
            numbers = (f"{cost.params / 1e6:.2f}", f"{cost.flops / 1e9:.2f}", f"{cost.bytes / 1e6:.1f}")
            texts = (size, *numbers, f"{cost.milliseconds:.1f}")
        rows.append((each.title, tuple(map(Cell, texts))))
    header = ("network", "image", "parameters (M)", "GFLOPs per image", "weights (MB)", "ms per image")
    return Table(header, tuple(rows), note=f"PyTorch, batches of one image, {this_cpu()}")


def _card(counts: Sequence[SplitCounts]) -> Table | None:
    if not counts:
        return None
    header = ("split", "images", *(f"{name}, % of pixels" for name in counts[0].shares))
    return Table(
        header,
        tuple(
            (each.name, (Cell(f"{each.images:,}"), *(_percent(100 * share) for share in each.shares.values())))
            for each in counts
        ),
    )


def _terms(groups: Sequence[Group]) -> Table | None:
    rows = []
    for each in groups:
        for run in each.runs:
            logged = [record["weighted"] for record in run.folder.records() if "weighted" in record]
            if logged:
                rows.append((run.title, logged[-1]))
    names = list(dict.fromkeys(name for _, weighted in rows for name in weighted))
    if not names:
        return None
    filled = tuple(
        (title, tuple(Cell(f"{weighted[name]:.4f}" if name in weighted else NOTHING) for name in names))
        for title, weighted in rows
    )
    return Table(("run", *names), filled)


def _training(groups: Sequence[Group]) -> Table:
    rows = []
    for run in (run for each in groups for run in each.runs):
        logged = [record for record in run.folder.records() if "loss" in record]
        texts = ["0", NOTHING, NOTHING, NOTHING]
        if logged:
            seconds, step = logged[-1]["seconds"], logged[-1]["step"]
            texts = [f"{step:,}", f"{seconds:,.0f}", f"{seconds / step:.3f}", f"{logged[-1]['loss']:.4f}"]
        rows.append((run.title, tuple(map(Cell, texts))))
    return Table(("run", "steps", "seconds in the loop", "seconds per step", "last loss"), tuple(rows))


def _differing(runs: Sequence[ReportedRun]) -> Table | None:
    """Compare the configurations field by field; None for a single run."""
    if len(runs) < 2:
        return None
    flat = [_flatten(json.loads(to_json(run.config))) for run in runs]
    names = list(dict.fromkeys(name for each in flat for name in each))
    differing = [name for name in names if len({str(each.get(name, "")) for each in flat}) > 1]
    rows = tuple((name, tuple(Cell(str(each.get(name, ""))) for each in flat)) for name in differing)
    return Table(("field", *(run.title for run in runs)), rows)


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _environment(run: ReportedRun) -> str:
    path = run.folder.path / "environment.json"
    return path.read_text(encoding="utf-8") if path.exists() else "none was recorded"
