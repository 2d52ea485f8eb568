"""`sward demo`: what distillation gains where few images have labels, on generated scenes, in minutes on two cores."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sward import presets
from sward.config import DistillationConfig, TeacherConfig, TeacherTrainingConfig
from sward.data.scenes import render
from sward.deploy.export import require_onnx
from sward.deploy.proof import Exported, export_run
from sward.models.flops import complexity
from sward.paired import Difference, paired_t
from sward.reporting.card import write_card, write_export_card
from sward.reporting.page import write_report
from sward.reproduce.experiments import EvaluationSet
from sward.reproduce.figures import draw_predictions, load_network
from sward.runs import evaluate_run, train_student, train_teacher
from sward.runs.load import build_split
from sward.training.interruption import TrainingInterrupted
from sward.training.run_folder import RunFolder, make_folder

LABELLED = 24
"""Labelled images of the student."""
UNLABELLED = 1024
"""Images without labels that SWARD sees too."""
UNLABELLED_SERIES = 1000
"""Seed of `sward.data.scenes.render` for the images without labels; no split and no teacher uses it."""
SPLIT = "test"
"""The split that is scored. The settings were chosen on scenes of other seeds."""
GRID_ROWS = 6
LOG = "log.txt"
"""File in a run's folder with what the run printed; runs of other commands have none."""

INTRODUCTION = (
    f"A transformer learns from generated scenes without end; a small network from {LABELLED} of them, alone and with\n"
    f"SWARD, which also sees {UNLABELLED} scenes without labels. A few minutes on two cores; nothing is downloaded."
)

TITLES = {"teacher": "teacher", "none": "student alone", "sward": "student + SWARD"}


@dataclass(frozen=True)
class DemoRow:
    """One line of the demo's table."""

    name: str
    params: int
    flops: int
    mean_iou: list[float]
    """One fraction per seed."""
    seconds: float
    """Time in the training loop, mean over seeds."""


@dataclass(frozen=True)
class DemoResult:
    """Scores and files of the demo."""

    rows: list[DemoRow]
    images: int
    """Number of scored images."""
    gain: Difference | None
    """mIoU of the student with SWARD minus alone, paired by seed; None for one seed."""
    grid: Path
    """Picture of images, truth and predictions."""
    report: Path
    """HTML page about all runs."""
    exported: Exported
    """The distilled student of the first seed as ONNX file, and its check."""


@dataclass(frozen=True)
class _Finished:
    mean_iou: float
    seconds: float


def run(
    output: Path = Path("runs/demo"),
    *,
    seeds: int = 4,
    iterations: int | None = None,
    processes: int = 2,
    say: Callable[[str], None] = print,
) -> DemoResult:
    """Train a transformer on scenes without end, then a small network on few labels, alone and with SWARD.

    Replaces an earlier demo in `output`.

    Args:
        output: folder of the runs, the pictures and the exported file.
        seeds: number of students of each kind.
        iterations: steps of each run; None uses those of the preset `demo`.
        processes: runs at a time, each in a process of its own; 1 trains in this process. Every run has one thread, so
            that the scores do not depend on it and a second demo on the same machine has the same.
        say: called with one line whenever a run is finished.

    Raises:
        ValueError: if `seeds`, `iterations` or `processes` is below 1, or `output` holds runs of other commands.
        ModuleNotFoundError: if a package for ONNX is not installed.
    """
    for name, value in (("seeds", seeds), ("iterations", iterations), ("processes", processes)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    require_onnx()
    teacher, alone, distilled = _configurations(output, seeds, iterations)
    folders = [config.output for config in (*distilled, *alone, teacher) if config.output is not None]
    for folder in folders:
        _check_own(RunFolder(folder))
    _write_unlabelled(output / "unlabelled", teacher.dataset.image_size)
    with _executor(processes) as executor:
        first = executor.submit(_train, teacher)
        started = [executor.submit(_train, config) for config in alone]
        results = {"teacher": _reported([teacher], [first], say)}
        started += [executor.submit(_train, config) for config in distilled]
        students = _reported([*alone, *distilled], started, say)
        results |= {"none": students[:seeds], "sward": students[seeds:]}

    shown: dict[str, TeacherTrainingConfig | DistillationConfig] = {
        "teacher": teacher,
        "none": alone[0],
        "sward": distilled[0],
    }
    differences = [
        with_sward.mean_iou - without.mean_iou for with_sward, without in zip(results["sward"], results["none"])
    ]
    images = len(build_split(teacher, SPLIT, train=False))
    exported = export_run(
        output / "sward-seed0", output / "student.onnx", checkpoint="last", split=SPLIT, overwrite=True
    )
    write_export_card(exported)
    return DemoResult(
        rows=[_row(kind, config, results[kind]) for kind, config in shown.items()],
        images=images,
        gain=paired_t(differences),
        grid=_grid(shown, images, output / "predictions.png"),
        report=write_report(folders, output / "report.html"),
        exported=exported,
    )


def _configurations(
    output: Path, seeds: int, iterations: int | None
) -> tuple[TeacherTrainingConfig, list[DistillationConfig], list[DistillationConfig]]:
    """Return the configurations of the teacher, of the students alone and of those with SWARD, one per seed."""
    preset = presets.get("demo")
    teacher = dataclasses.replace(preset.teacher, output=output / "teacher")
    few = dataclasses.replace(preset.student.dataset, count=LABELLED)
    student = dataclasses.replace(preset.student, dataset=few, evaluate_every=None)
    if iterations is not None:
        teacher.iterations = student.iterations = iterations
    alone = [
        dataclasses.replace(student, seed=seed, distillation="none", output=output / f"none-seed{seed}")
        for seed in range(seeds)
    ]
    distilled = [
        dataclasses.replace(
            student,
            seed=seed,
            teacher=TeacherConfig(run=output / "teacher"),
            unlabelled=(str(output / "unlabelled"),),
            output=output / f"sward-seed{seed}",
        )
        for seed in range(seeds)
    ]
    return teacher, alone, distilled


def _check_own(folder: RunFolder) -> None:
    """Raise a ValueError if a folder holds a run of another command."""
    if folder.last.exists() and not (folder.path / LOG).exists():
        raise ValueError(f"output must be a folder of its own, got the run in {folder.path}; choose another --output")


def _write_unlabelled(folder: Path, size: tuple[int, int]) -> None:
    make_folder(folder)
    for index in range(UNLABELLED):
        image, _ = render(UNLABELLED_SERIES, index, *size)
        Image.fromarray(image).save(folder / f"{index:04d}.png")


class _AtOnce(Executor):
    """Runs each call in this process when it is submitted."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*arguments, **options))
        return future


@contextlib.contextmanager
def _executor(processes: int) -> Iterator[Executor]:
    if processes == 1:
        yield _AtOnce()
        return
    # Not forked: threads of torch do not survive a fork.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as executor:
        try:
            yield executor
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise


def _train(config: TeacherTrainingConfig | DistillationConfig) -> _Finished:
    """Train with one thread and score the last weights; what the run prints goes to `LOG` in its folder."""
    assert config.output is not None
    folder = RunFolder(config.output)
    folder.forget_checkpoints()
    make_folder(folder.path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with (
            (folder.path / LOG).open("w", encoding="utf-8") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            trained = train_teacher(config) if isinstance(config, TeacherTrainingConfig) else train_student(config)
            scores = evaluate_run(folder.path, split=SPLIT, checkpoint="last")
            write_card(folder.path)
    except TrainingInterrupted as stop:
        # A plain one can travel to another process.
        raise KeyboardInterrupt(str(stop)) from None
    finally:
        torch.set_num_threads(threads)
    return _Finished(scores.mean_iou, trained.seconds)


def _reported(configs: list[Any], started: list[Future[_Finished]], say: Callable[[str], None]) -> list[_Finished]:
    finished = []
    for config, future in zip(configs, started, strict=True):
        result = future.result()
        say(f"{config.output}: {100 * result.mean_iou:.1f} % mIoU, {result.seconds:.0f} s")
        finished.append(result)
    return finished


def _row(kind: str, config: TeacherTrainingConfig | DistillationConfig, results: list[_Finished]) -> DemoRow:
    classes = build_split(config, SPLIT, train=False).info.num_classes
    cost = complexity(config.model, num_classes=classes, image_size=config.dataset.image_size, paper_rule=False)
    return DemoRow(
        name=TITLES[kind],
        params=cost.params,
        flops=cost.gemm_flops,
        mean_iou=[result.mean_iou for result in results],
        seconds=sum(result.seconds for result in results) / len(results),
    )


def _grid(shown: dict[str, TeacherTrainingConfig | DistillationConfig], images: int, path: Path) -> Path:
    networks = {}
    for kind, config in shown.items():
        assert config.output is not None
        networks[TITLES[kind]] = load_network(config.output, "last")
    rows = range(min(GRID_ROWS, images))
    return draw_predictions(networks, EvaluationSet("scenes", SPLIT, ()), rows, path)
