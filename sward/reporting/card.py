"""The model card of a run or of an exported file: what it is, what it was made from, and what it is not for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sward import __version__, atomic
from sward.config import DistillationConfig, TeacherTrainingConfig, TrainingConfig
from sward.data import evaluation_size
from sward.deploy.proof import Exported
from sward.methods import METHOD_TITLES
from sward.reporting.data_card import counts_of_run
from sward.reporting.runs import ReportedRun, group, read_runs, same_but_seed, teacher_of
from sward.reporting.scores import METRICS, interval_text, score
from sward.reporting.templates import render
from sward.runs.teachers import has_teacher_run, teacher_run

NAME = "MODEL_CARD.md"
"""Name of the card in a run folder."""

LICENCES = (
    (
        "medsam2",
        "The weights of MedSAM2 are licensed under CC-BY-SA 4.0: name the authors, share alike.",
    ),
    ("sam2", "The weights of SAM 2.1 are licensed under Apache-2.0."),
    ("dinov2", "The weights of DINOv2 are licensed under Apache-2.0."),
)
"""Part of the name of a network or of the file of its weights -> what to know; the first that fits counts."""


@dataclass(frozen=True)
class ScoreLine:
    """One score of a card."""

    name: str
    """Header of the score."""
    value: str
    """Mean in percent, and its interval where several seeds are known."""


@dataclass(frozen=True)
class Scored:
    """The scores of one evaluation."""

    evaluation: str
    """Name of the evaluation."""
    images: int
    """Number of images."""
    seeds: int
    """Number of runs."""
    lines: tuple[ScoreLine, ...]
    """The scores."""


def write_card(run: Path) -> Path:
    """Write the card of a run into its folder and return its path."""
    return _write(run, run / NAME, None)


def write_export_card(exported: Exported) -> Path:
    """Write the card of a run beside a file exported from it, with what is said of the file, and return its path."""
    return _write(exported.run, exported.card_path, exported)


def _write(run: Path, path: Path, exported: Exported | None) -> Path:
    (own,) = read_runs([run])
    teacher = teacher_of(own)
    page = render(
        "model_card.md.j2",
        title=group([own])[0].title,
        run=own.folder.path.resolve().name,
        version=__version__,
        config=own.config,
        size=evaluation_size(own.config.dataset.name, own.config.dataset.image_size),
        classes=own.info.classes,
        data=own.info.name,
        counts=counts_of_run(own),
        unlabelled=_unlabelled(own),
        method=_method(own.config),
        teacher=_teacher_name(own.config, teacher),
        teacher_found=teacher is not None,
        teacher_scores=[] if teacher is None else _scored([teacher]),
        scores=_scored(same_but_seed(run)),
        licences=_licences(own.config, teacher),
        exported=exported,
    )
    atomic.write(path, page.encode())
    return path


def _unlabelled(run: ReportedRun) -> str | None:
    """Return how many images without masks a run had; None for a run without."""
    if not isinstance(run.config, DistillationConfig) or not run.config.has_unlabelled:
        return None
    count = len(run.folder.read_frames().get("unlabelled", {}))
    return f"{count} images" if count else "images from tar files"


def _method(config: TrainingConfig) -> str | None:
    if not isinstance(config, DistillationConfig) or config.distillation == "none":
        return None
    return METHOD_TITLES.get(config.distillation, config.distillation).removeprefix("+ ")


def _teacher_name(config: TrainingConfig, teacher: ReportedRun | None) -> str | None:
    if _method(config) is None or not isinstance(config, DistillationConfig):
        return None
    if teacher is not None:
        return teacher.config.model
    # `teacher.name` does not say which network a run holds.
    run = config.teacher.run or teacher_run(config.preset)
    return f"the teacher in {run}" if has_teacher_run(config.teacher) else config.teacher.name


def _scored(runs: Sequence[ReportedRun]) -> list[Scored]:
    found = []
    for evaluation in dict.fromkeys(name for run in runs for name in run.evaluations):
        stored = [run.evaluations[evaluation] for run in runs if evaluation in run.evaluations]
        lines = []
        for header, metric in METRICS:
            value = score(runs, evaluation, metric)
            if value is not None:
                interval = "" if value.interval is None else f" {interval_text(value.interval)}"
                lines.append(ScoreLine(header, f"{value.mean:.2f}{interval}"))
        found.append(Scored(evaluation, stored[0]["images"], len(stored), tuple(lines)))
    return found


def _licences(config: TrainingConfig, teacher: ReportedRun | None) -> list[str]:
    """Return what to know about the weights that the network was made from."""
    sources = [config.model, config.model_weights or ""]
    for each in (config, None if teacher is None else teacher.config):
        if isinstance(each, TeacherTrainingConfig):
            sources += [each.model, each.trunk_checkpoint.name if each.trunk_checkpoint is not None else ""]
    if isinstance(config, DistillationConfig) and config.distillation != "none":
        sources += [config.teacher.name] if teacher is None and not config.teacher.untrained else []
        sources.append("" if config.teacher.weights is None else config.teacher.weights.name)
    known = [next((text for part, text in LICENCES if part in source.lower()), None) for source in sources]
    notes = list(dict.fromkeys(text for text in known if text is not None))
    if config.model_weights == "imagenet":
        notes.append("The initial weights were trained on ImageNet; the library that ships them states their terms.")
    return notes
