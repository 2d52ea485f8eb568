"""What a run starts from and leaves behind: data sets, devices, teachers and trained networks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from sward import data, distributed, models
from sward.config import DistillationConfig, MaskTrainingConfig, TeacherConfig, TeacherTrainingConfig, TrainingConfig
from sward.data import DatasetInfo, SegmentationDataset
from sward.losses import DistillationLoss
from sward.runs import methods
from sward.training import checkpoints
from sward.training.run_folder import RunFolder


def load_run(path: Path, checkpoint: Literal["best", "last"] = "best") -> tuple[TrainingConfig, DatasetInfo, nn.Module]:
    """Configuration, classes and trained network (on the CPU, in eval mode) of the run in `path`.

    Raises:
        FileNotFoundError: if there is no run, or it has no such checkpoint yet.
        ValueError: if its files are damaged.
    """
    run = RunFolder(path)
    config, info = run.read()
    options = config.options if isinstance(config, TeacherTrainingConfig) else {}
    network = models.build(config.model, info.num_classes, **options)
    checkpoints.load_model(network, run.best if checkpoint == "best" else run.last)
    return config, info, network.eval()


@dataclass(frozen=True)
class LoadedDistillation:
    """A finished run with everything it trained on, in eval mode on the CPU.

    Attributes:
        config: of the run.
        info: classes of its data set.
        student: with the run's last weights.
        teacher: the frozen network.
        loss: the distillation loss, with its learned parts as they were at the end.
    """

    config: DistillationConfig
    info: DatasetInfo
    student: nn.Module
    teacher: nn.Module
    loss: DistillationLoss


def load_distillation(path: Path) -> LoadedDistillation | None:
    """Student, teacher and trained loss of the run in `path`; None for a run without distillation.

    Raises:
        FileNotFoundError: if there is no run, no last checkpoint, or its teacher is not where it was.
        ValueError: if its files are damaged.
    """
    config, info, student = load_run(path, "last")
    if not isinstance(config, DistillationConfig) or config.distillation == "none":
        return None
    name, teacher = load_teacher(config.teacher, config.preset, info)
    pair = methods.DistillationPair(config, student, name, teacher.eval(), info)
    loss = methods.build(config.distillation, pair)
    loss.load_state_dict(checkpoints.load(RunFolder(path).last)["distillation"])
    return LoadedDistillation(config, info, student, teacher, loss.eval())


def student_run(config: DistillationConfig) -> Path:
    """Where a student's run goes unless `output` says otherwise."""
    return Path("runs") / config.preset / f"{config.distillation}-seed{config.seed}"


def teacher_run(preset: str) -> Path:
    """Where a teacher's run goes unless `output` says otherwise, and where a student's run looks for it."""
    return Path("runs") / preset / "teacher"


def load_teacher(config: TeacherConfig, preset: str, info: DatasetInfo) -> tuple[str, nn.Module]:
    """Name and network of the teacher: that of a `sward train-teacher` run, or one with random weights.

    Raises:
        FileNotFoundError: if the run is not there.
        ValueError: if it was trained on other classes.
    """
    if config.untrained:
        return config.name, models.build(config.name, info.num_classes)
    path = config.run or teacher_run(preset)
    if not RunFolder(path).best.exists():
        raise FileNotFoundError(
            f"no trained teacher at {path}; train it with 'sward train-teacher {preset}', name its folder with "
            "--teacher.run, or try shapes and speed with --teacher.untrained"
        )
    trained, trained_info, network = load_run(path)
    if trained_info.classes != info.classes:
        raise ValueError(
            f"the teacher at {path} was trained on the classes {list(trained_info.classes)}, "
            f"but the data set {info.name!r} has {list(info.classes)}"
        )
    return trained.model, network


def build_datasets(config: TrainingConfig) -> tuple[SegmentationDataset, SegmentationDataset]:
    """Training and validation split of the configured data set."""
    teacher_size = None
    if isinstance(config, DistillationConfig) and config.distillation != "none":
        teacher_size = config.teacher_image_size if config.teacher_image_size != config.dataset.image_size else None
    train_set = build_split(config, "train", train=True, teacher_size=teacher_size)
    return train_set, build_split(config, "val", train=False)


def build_split(
    config: TrainingConfig | MaskTrainingConfig,
    split: str,
    *,
    train: bool,
    teacher_size: tuple[int, int] | None = None,
) -> SegmentationDataset:
    """One split of the configured data set, with training or evaluation transforms."""
    settings = config.dataset
    return data.build(
        settings.name,
        split,
        root=settings.root,
        image_size=settings.image_size,
        train=train,
        seed=config.seed,
        split_by=settings.split_by,
        num_classes=settings.num_classes,
        packed=settings.packed,
        on_corrupt=config.on_corrupt if train else "stop",
        views=settings.views if train else None,
        teacher_size=teacher_size,
    )


def choose_device(name: str | None) -> torch.device:
    """The named device; without a name the GPU where there is one, else the CPU. Under `torchrun` each process of a
    node takes a GPU of its own.

    Raises:
        ValueError: if the name is no device, or the device is not there.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is not a device; use 'cpu' or 'cuda'") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for, but torch sees no GPU here; use 'cpu'")
    if device.type == "cuda" and distributed.launched_processes() > 1:
        if distributed.local_rank() >= torch.cuda.device_count():
            raise ValueError(
                f"process {distributed.local_rank()} of this node has no GPU of its own, torch sees "
                f"{torch.cuda.device_count()} here; start as many processes as GPUs (--nproc-per-node), or use "
                "--device cpu"
            )
        return torch.device("cuda", distributed.local_rank())
    return device
