"""`sward demo`: train a teacher, a baseline and a distilled student on generated images, in minutes on two cores."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from sward import presets
from sward.config import DistillationConfig, TeacherConfig, TeacherTrainingConfig
from sward.data import denormalise
from sward.evaluation import predict_sample
from sward.figures.curves import training_curves
from sward.figures.predictions import prediction_grid
from sward.models.flops import complexity
from sward.runs import load_run, train_student, train_teacher
from sward.runs.load import build_split
from sward.training import TrainingResult
from sward.training.run_folder import RunFolder

GRID_ROWS = 6


@dataclass
class DemoRow:
    """One line of the demo's table; scores as fractions, seconds in the training loop."""

    name: str
    params: int
    flops: int
    mean_iou: float
    mean_accuracy: float
    seconds: float


@dataclass
class DemoResult:
    """Results of the demo: the table, and the paths of the prediction grid and of the training curves."""

    rows: list[DemoRow]
    grid: Path
    curves: Path


def run(output: Path = Path("runs/demo"), *, seed: int = 0, iterations: int | None = None) -> DemoResult:
    """Train a transformer teacher on `scenes`, then the student alone and with SWARD from the same seed.

    The results are reproducible on the same machine. Replaces an earlier demo in `output`.

    Args:
        output: folder of the three runs and the figures.
        seed: seed of all three runs.
        iterations: steps of each run; None uses those of the preset `demo`.
    """
    preset = presets.get("demo")
    teacher_config = dataclasses.replace(preset.teacher, seed=seed, output=output / "teacher")
    baseline_config = dataclasses.replace(preset.student, seed=seed, distillation="none", output=output / "baseline")
    sward_config = dataclasses.replace(
        preset.student,
        seed=seed,
        output=output / "sward",
        teacher=TeacherConfig(run=output / "teacher"),
    )
    configs: dict[str, TeacherTrainingConfig | DistillationConfig] = {
        "teacher": teacher_config,
        "baseline": baseline_config,
        "SWARD": sward_config,
    }
    results = {}
    for title, config in configs.items():
        if iterations is not None:
            config.iterations = iterations
        RunFolder(config.output or output).forget_checkpoints()
        results[title] = train_teacher(config) if isinstance(config, TeacherTrainingConfig) else train_student(config)

    networks = {title: load_run(result.run, "last")[2] for title, result in results.items()}
    size = sward_config.dataset.image_size
    return DemoResult(
        rows=[_row(title, configs[title].model, result, size) for title, result in results.items()],
        grid=_grid(networks, sward_config, output / "predictions.png"),
        curves=training_curves({title: RunFolder(each.run) for title, each in results.items()}, output / "curves.png"),
    )


def _row(title: str, model: str, result: TrainingResult, size: tuple[int, int]) -> DemoRow:
    cost = complexity(model, num_classes=len(result.evaluation.class_iou), image_size=size, paper_rule=False)
    return DemoRow(
        name=title,
        params=cost.params,
        flops=cost.gemm_flops,
        mean_iou=result.evaluation.mean_iou,
        mean_accuracy=result.evaluation.mean_accuracy,
        seconds=result.seconds,
    )


def _grid(networks: dict[str, nn.Module], config: DistillationConfig, path: Path) -> Path:
    dataset = build_split(config, "val", train=False)
    samples = [dataset[index] for index in range(min(GRID_ROWS, len(dataset)))]
    columns = {"truth": [sample.labels for sample in samples]}
    for title, network in networks.items():
        columns[title] = [predict_sample(network, sample) for sample in samples]
    return prediction_grid([denormalise(sample.image) for sample in samples], columns, dataset.info, path)
