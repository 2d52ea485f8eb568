"""From a configuration to a finished run: builds data, networks and losses, and hands them to the training loop."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from sward import checkpointing, data, distillation, distributed, models
from sward.config import (
    DistillationConfig,
    MaskTrainingConfig,
    TeacherConfig,
    TeacherTrainingConfig,
    TrainingConfig,
    masks_path,
)
from sward.data import DatasetInfo, SegmentationDataset
from sward.evaluation import Evaluation, evaluate
from sward.losses import DistillationLoss, SegmentationCrossEntropy, learn_masks, save_masks
from sward.models.teachers import Teacher
from sward.teacher_cache import TeacherCache
from sward.tracking import Progress, RunFolder, make_folder
from sward.training import FrozenTeacher, TrainingResult, TrainingStep, batches, fit
from sward.training_state import seed_generators


def train_student(config: DistillationConfig) -> TrainingResult:
    """`sward train`: a student alone, or with a teacher and a distillation loss.

    Raises:
        ValueError, FileNotFoundError: for a configuration that cannot run, before any work.
    """
    config.check()
    models.describe(config.model)
    if config.distillation != "none":
        distillation.check_name(config.distillation)
    device = choose_device(config.device)
    with distributed.joined(device):
        return _train_student(config, device)


def _train_student(config: DistillationConfig, device: torch.device) -> TrainingResult:
    train_set, validation_set = build_datasets(config)
    config.steps(len(train_set))
    distributed.share_of(config.batch)
    info = train_set.info
    # The student first: with or without distillation the same seed gives it the same weights.
    torch.manual_seed(config.seed)
    student = _placed(models.build(config.model, info.num_classes), config, device)
    loss = None
    teacher: FrozenTeacher | TeacherCache | None = None
    if config.distillation != "none":
        name, network = load_teacher(config.teacher, config.preset, info)
        network = _placed(network, config, device)
        pair = distillation.DistillationPair(config, student, name, network, info)
        loss = distillation.build(config.distillation, pair).to(device)
        teacher = FrozenTeacher(
            network,
            loss.teacher_taps,
            precision=config.teacher.precision,
            # Outside of autocast a float32 student cannot meet maps of another dtype.
            dtype=torch.float32 if config.precision == "fp32" else None,
        )
        if config.compile:
            network.compile()
        if config.teacher.cache is not None:
            teacher = TeacherCache(teacher, config.teacher.cache)
    run = RunFolder(config.output or student_run(config))
    return _fit(student, loss, config, train_set, validation_set, run, teacher)


def train_teacher(config: TeacherTrainingConfig) -> TrainingResult:
    """`sward train-teacher`: the head on a frozen trunk, or the whole network.

    Raises:
        ValueError, FileNotFoundError: for a configuration that cannot run, before any work.
    """
    config.check()
    models.describe(config.model)
    device = choose_device(config.device)
    with distributed.joined(device):
        return _train_teacher(config, device)


def _train_teacher(config: TeacherTrainingConfig, device: torch.device) -> TrainingResult:
    train_set, validation_set = build_datasets(config)
    config.steps(len(train_set))
    distributed.share_of(config.batch)
    torch.manual_seed(config.seed)
    network = models.build(config.model, train_set.info.num_classes, **config.options)
    if config.trunk_checkpoint is not None:
        models.load_trunk_checkpoint(network, config.trunk_checkpoint)
    if not config.train_trunk:
        if not isinstance(network, Teacher):
            raise ValueError(f"model {config.model!r} has no trunk to freeze; train all of it with --train-trunk")
        network.freeze_trunk()
    run = RunFolder(config.output or teacher_run(config.preset))
    return _fit(_placed(network, config, device), None, config, train_set, validation_set, run, None)


def _placed(network: nn.Module, config: TrainingConfig, device: torch.device) -> nn.Module:
    network = network.to(device)
    return network.to(memory_format=torch.channels_last) if config.channels_last else network


def _fit(
    network: nn.Module,
    loss: DistillationLoss | None,
    config: TrainingConfig,
    train_set: SegmentationDataset,
    validation_set: SegmentationDataset,
    run: RunFolder,
    teacher: FrozenTeacher | TeacherCache | None,
) -> TrainingResult:
    if config.sync_batch_norm:
        network = distributed.synchronise_batch_norm(network)
        loss = None if loss is None else distributed.synchronise_batch_norm(loss)
    # Dropout differs between processes; the weights drawn before do not.
    seed_generators(distributed.rank_seed(config.seed))
    run.start(config, train_set.info)
    task = SegmentationCrossEntropy(train_set.info.ignore_index, process_group=distributed.group())
    step_module = TrainingStep(network, task, loss, precision=config.precision)
    if config.compile:
        # In place, so that the keys of the state dict stay; and after the taps, which are traced with it.
        network.compile()
    return fit(step_module, config, train_set, validation_set, run, teacher=teacher)


def train_masks(config: MaskTrainingConfig) -> Path:
    """`sward train-masks`: MasKD's tokens or FreeKD's prompts, learned on a trained teacher; returns their file.

    Raises:
        ValueError, FileNotFoundError: for a configuration that cannot run, before any work.
    """
    if distributed.launched_processes() > 1:
        raise ValueError("train-masks runs in one process; start it without torchrun")
    device = choose_device(config.device)
    steps = config.steps or (10_000 if config.method == "maskd" else 2_000)
    if config.teacher.image_size is not None:
        # No student looks on: the teacher's views alone.
        config = dataclasses.replace(
            config, dataset=dataclasses.replace(config.dataset, image_size=config.teacher.image_size)
        )
    dataset = build_split(config, "train", train=True)
    name, teacher = load_teacher(config.teacher, config.preset, dataset.info)
    teacher.to(device)
    torch.manual_seed(config.seed)
    masks = distillation.new_masks(config.method, name, teacher, config.dataset.image_size).to(device)
    tap = distillation.mask_tap(config.method, name)
    stream = batches(dataset, config.batch, seed=config.seed, workers=config.dataset.workers)
    path = config.output or masks_path(config.preset, config.method)
    make_folder(path.parent)
    with Progress(f"{config.method} masks", steps) as progress:

        def show(step: int, terms: dict[str, Tensor]) -> None:
            progress.advance()
            if step % 20 == 0 or step == steps:
                progress.note("  ".join(f"{key} {value.item():.3f}" for key, value in terms.items()))

        task = SegmentationCrossEntropy(dataset.info.ignore_index)
        learn_masks(masks, teacher, tap, stream, task, steps=steps, on_step=show)
    save_masks(path, masks, teacher, tap)
    return path


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
    checkpointing.load_model(network, run.best if checkpoint == "best" else run.last)
    return config, info, network.eval()


@dataclass(frozen=True)
class DistilledPair:
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


def load_distillation(path: Path) -> DistilledPair | None:
    """Student, teacher and trained loss of the run in `path`; None for a run without distillation.

    Raises:
        FileNotFoundError: if there is no run, no last checkpoint, or its teacher is not where it was.
        ValueError: if its files are damaged.
    """
    config, info, student = load_run(path, "last")
    if not isinstance(config, DistillationConfig) or config.distillation == "none":
        return None
    name, teacher = load_teacher(config.teacher, config.preset, info)
    pair = distillation.DistillationPair(config, student, name, teacher.eval(), info)
    loss = distillation.build(config.distillation, pair)
    loss.load_state_dict(checkpointing.load(RunFolder(path).last)["distillation"])
    return DistilledPair(config, info, student, teacher, loss.eval())


def evaluate_run(
    path: Path,
    *,
    split: str = "val",
    dataset: str | None = None,
    root: Path | None = None,
    split_by: str | None = None,
    checkpoint: Literal["best", "last"] = "best",
    batch: int = 8,
    device: str | None = None,
) -> Evaluation:
    """`sward evaluate`: scores a run and writes the scores to `evaluation_file(path, ...)`.

    Args:
        path: run folder.
        split: split of the data set.
        dataset: another data set with the same classes; None takes the run's own.
        root: folder that holds the data set; None takes the run's own.
        split_by: how polyp data is split; None takes the run's own.
        checkpoint: which weights.
        batch: images a forward pass.
        device: where to run; None takes the GPU where there is one.

    Raises:
        ValueError, FileNotFoundError: if there is no such run or data set, it has other classes, or a batch is empty.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    config, info, network = load_run(path, checkpoint)
    target = choose_device(device)
    settings = config.dataset
    if dataset is not None and dataset != settings.name:
        settings.name, settings.split_by, settings.packed = dataset, None, "auto"
    settings.root = root or settings.root
    settings.split_by = split_by or settings.split_by
    images = build_split(config, split, train=False)
    if images.info.classes != info.classes:
        raise ValueError(
            f"dataset {settings.name!r} has the classes {list(images.info.classes)}, "
            f"but the run was trained on {list(info.classes)}"
        )
    with Progress(f"evaluate on {settings.name}, {split}", -(-len(images) // batch)) as progress:
        result = evaluate(network.to(target), images, batch=batch, device=target, advance=progress.advance)
    scores = {"dataset": settings.name, "split": split, "split_by": settings.split_by, "checkpoint": checkpoint}
    text = json.dumps({**scores, **result.to_dict()}, indent=2, allow_nan=False)
    evaluation_file(path, settings.name, split).write_text(text + "\n", encoding="utf-8")
    return result


def evaluation_file(path: Path, dataset: str, split: str) -> Path:
    """Where the scores of the run in `path` on a split of a data set are kept."""
    return path / f"evaluation-{dataset}-{split}.json"


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
