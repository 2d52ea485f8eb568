"""The networks and the loss of a run that distils."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sward import distributed, layers, methods
from sward.config import DistillationConfig
from sward.data import DatasetInfo
from sward.losses import DistillationLoss
from sward.runs.load import load_run
from sward.runs.teachers import load_teacher, restore_statistics
from sward.training import checkpoints
from sward.training.run_folder import RunFolder


@dataclass(frozen=True)
class LoadedDistillation:
    """The networks and the loss of a finished run, in eval mode on the CPU."""

    config: DistillationConfig
    """Configuration of the run."""
    info: DatasetInfo
    """Classes of its data set."""
    student: nn.Module
    """The student with the last weights of the run."""
    teacher: nn.Module
    """The frozen network."""
    loss: DistillationLoss
    """The distillation loss with its learned parameters at the end of the run."""


def load_distillation(path: Path, *, teacher_run: Path | None = None) -> LoadedDistillation | None:
    """Load the student, teacher and trained loss of the run in `path`; None for a run without distillation.

    Args:
        path: run folder.
        teacher_run: folder of the teacher's run where it was moved; None uses that which the run names.

    Raises:
        FileNotFoundError: if the run, its last checkpoint or its teacher does not exist.
        ValueError: if its files are damaged, or its teacher has other weights than when it was trained.
    """
    config, info, student = load_run(path, "last")
    if not isinstance(config, DistillationConfig) or config.distillation == "none":
        return None
    config.teacher.run = teacher_run or config.teacher.run
    teacher = load_teacher(config.teacher, config.preset, info)
    restore_statistics(teacher.network, RunFolder(path))
    network = teacher.network.eval()
    pair = distillation_pair(config, student, teacher.name, network, info)
    loss = methods.build(config.distillation, pair)
    state = checkpoints.load(RunFolder(path).last)
    taught_by = state.get("identity", {}).get("teacher")
    if taught_by not in (None, checkpoints.checksum(network)):
        raise ValueError(f"the teacher of the run in {path} must be the one that taught it, got other weights")
    loss.load_state_dict(state["distillation"])
    return LoadedDistillation(config, info, student, network, loss.eval())


def distillation_pair(
    config: DistillationConfig, student: nn.Module, teacher_name: str, teacher: nn.Module, info: DatasetInfo
) -> methods.DistillationPair:
    """Describe the networks of a run to the builder of its method."""
    settings = config.sward
    classes = info.num_classes
    student_layers = layers.default_layers(config.model, student, config.dataset.image_size, num_classes=classes)
    teacher_layers = layers.default_layers(teacher_name, teacher, config.teacher_image_size, num_classes=classes)
    stages = layers.paired(
        settings.student_layers or student_layers.stages,
        settings.teacher_layers or teacher_layers.stages,
        student_named=config.distillation == "sward" and bool(settings.student_layers),
        teacher_named=config.distillation == "sward" and bool(settings.teacher_layers),
    )
    student_layers = dataclasses.replace(student_layers, stages=stages[0])
    teacher_layers = dataclasses.replace(teacher_layers, stages=stages[1])
    return methods.DistillationPair(
        student=student,
        teacher=teacher,
        student_layers=student_layers,
        teacher_layers=teacher_layers,
        student_image_size=config.dataset.image_size,
        teacher_image_size=config.teacher_image_size,
        num_classes=info.num_classes,
        ignore_index=info.ignore_index,
        settings=settings,
        student_taps=config.student_taps,
        teacher_taps=config.teacher.taps,
        unlabelled=config.has_unlabelled,
        standardize_teacher=config.teacher.normalization != "none",
        masks=config.teacher_masks,
        seed=config.seed,
        # A generator of its own, so that runs with and without distillation see the same images and the same dropout.
        generator=torch.Generator().manual_seed(distributed.rank_seed(config.seed)),
        process_group=distributed.group(),
    )
