"""Load what runs need and produce: data sets, devices, teachers and trained networks."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from sward import data, distributed, layers, methods, models, presets
from sward.config import DatasetConfig, DistillationConfig, MaskTrainingConfig, TeacherConfig, TrainingConfig
from sward.data import DatasetInfo, SegmentationDataset
from sward.data.frames import frame_sums, known_images
from sward.losses import LOGITS, DistillationLoss
from sward.models.inputs import IMAGENET, Renormalising
from sward.training import checkpoints
from sward.training.run_folder import RunFolder


def load_run(
    path: Path, checkpoint: Literal["best", "last"] | Path = "best"
) -> tuple[TrainingConfig, DatasetInfo, nn.Module]:
    """Load the configuration, classes and trained network (on the CPU, in eval mode) of the run in `path`.

    Args:
        path: run folder.
        checkpoint: which of its weights, or the path of a checkpoint of this run.

    Raises:
        FileNotFoundError: if there is no run, or it does not have that checkpoint yet.
        ValueError: if its files are damaged.
    """
    run = RunFolder(path)
    config, info = run.read()
    network = models.build(config.model, info.num_classes, **config.model_options)
    named = {"best": run.best, "last": run.last}
    checkpoints.load_model(network, checkpoint if isinstance(checkpoint, Path) else named[checkpoint])
    return config, info, network.eval()


def config_for_images(path: Path, config: TrainingConfig, root: Path | None = None) -> TrainingConfig:
    """Return the configuration that finds the frames of the run in `path`, in `root` where it is given.

    A split that the run has drawn or read from a list holds, even if the folder of the data or the list has changed
    since. `config` stays as it is.
    """
    split = RunFolder(path).split
    split_by = str(split) if split.exists() else config.dataset.split_by
    dataset = dataclasses.replace(config.dataset, root=root or config.dataset.root, split_by=split_by)
    return dataclasses.replace(config, dataset=dataset)


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


def load_distillation(path: Path) -> LoadedDistillation | None:
    """Load the student, teacher and trained loss of the run in `path`; None for a run without distillation.

    Raises:
        FileNotFoundError: if the run, its last checkpoint or its teacher does not exist.
        ValueError: if its files are damaged.
    """
    config, info, student = load_run(path, "last")
    if not isinstance(config, DistillationConfig) or config.distillation == "none":
        return None
    teacher = load_teacher(config.teacher, config.preset, info)
    restore_statistics(teacher.network, RunFolder(path))
    network = teacher.network.eval()
    pair = distillation_pair(config, student, teacher.name, network, info)
    loss = methods.build(config.distillation, pair)
    loss.load_state_dict(checkpoints.load(RunFolder(path).last)["distillation"])
    return LoadedDistillation(config, info, student, network, loss.eval())


def distillation_pair(
    config: DistillationConfig, student: nn.Module, teacher_name: str, teacher: nn.Module, info: DatasetInfo
) -> methods.DistillationPair:
    """Describe the networks of a run to the builder of its method."""
    settings = config.sward
    choices = (
        layers.default_layers(config.model, student, config.dataset.image_size),
        layers.default_layers(teacher_name, teacher, config.teacher_image_size),
    )
    stages = layers.paired(choices[0].stages, choices[1].stages)
    student_layers = dataclasses.replace(choices[0], stages=settings.student_layers or stages[0])
    teacher_layers = dataclasses.replace(choices[1], stages=settings.teacher_layers or stages[1])
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
        unlabelled=config.unlabelled_per_step > 0,
        standardize_teacher=config.teacher.normalization != "none",
        masks=config.teacher_masks,
        seed=config.seed,
        # A generator of its own, so that runs with and without distillation see the same images and the same dropout.
        generator=torch.Generator().manual_seed(distributed.rank_seed(config.seed)),
        process_group=distributed.group(),
    )


def build_network(config: TrainingConfig, num_classes: int) -> nn.Module:
    """Build the network of a run with its initial weights.

    Raises:
        ValueError, FileNotFoundError: if the weights do not exist or do not fit.
    """
    weights = config.model_weights
    if weights == "imagenet":
        network = models.build_with_imagenet(config.model, num_classes, **config.model_options)
    else:
        network = models.build(config.model, num_classes, **config.model_options)
    if weights in (None, "none", "random", "imagenet"):
        _say_statistics("weights", network)
    else:
        _say(f"weights: {models.load_weights(network, Path(weights))}")
    return network


def student_run(config: DistillationConfig) -> Path:
    """Return the default folder of a student's run."""
    return Path("runs") / config.preset / f"{config.distillation}-seed{config.seed}"


def teacher_run(preset: str) -> Path:
    """Return the default folder of a teacher's run, used both to write and to load it."""
    return Path("runs") / preset / "teacher"


TeacherSource = Literal["file", "random", "library", "run"]


def teacher_source(config: TeacherConfig) -> TeacherSource:
    """Return where the teacher comes from: `weights`, `untrained`, a `transformers:` folder or a run."""
    if config.weights is not None:
        return "file"
    if config.untrained:
        return "random"
    return "library" if config.run is None and config.name.startswith("transformers:") else "run"


@dataclass(frozen=True)
class LoadedTeacher:
    """A teacher with its weights."""

    name: str
    """Its name, as in `sward.models.build`."""
    options: Mapping[str, int | str]
    """Options of its builder."""
    network: nn.Module
    """The network."""
    run: RunFolder | None = None
    """The run that trained it, where it comes from one."""


def load_teacher(config: TeacherConfig, preset: str, info: DatasetInfo) -> LoadedTeacher:
    """Load the teacher from its `teacher_source`.

    Raises:
        FileNotFoundError: if the run does not exist.
        ValueError: if the configuration names two sources, or asks for another network than its source holds, or the
            run was trained on other classes.
    """
    given = {"run": config.run is not None, "weights": config.weights is not None, "untrained": config.untrained}
    named = [f"teacher.{name}" for name, is_given in given.items() if is_given]
    if len(named) > 1:
        raise ValueError(
            f"only one of teacher.run, teacher.weights and teacher.untrained must be set, got {' and '.join(named)}"
        )
    source = teacher_source(config)
    if source == "run":
        return _load_teacher_run(config, preset, info)
    if source == "library" and models.own_weights(config.name, info.num_classes) == "none":
        raise ValueError(
            f"teacher.name must be a transformers folder with weights, got {config.name!r} without; name a file with "
            "--teacher.weights, or try it with --teacher.untrained"
        )
    network = models.build(config.name, info.num_classes, **config.options)
    if config.weights is not None:
        _say(f"teacher weights: {models.load_weights(network, config.weights)}")
    else:
        _say_statistics("teacher weights", network)
    return LoadedTeacher(config.name, config.options, network)


TEACHER_STATISTICS = "statistics of the teacher's input"
"""Name in the identity of a run whose teacher sees others than ImageNet's."""


def restore_statistics(teacher: nn.Module, run: RunFolder) -> None:
    """Give the teacher of a run the input statistics that it had when the run began, if it has begun.

    In earlier versions all networks saw ImageNet's, and checkpoints said nothing about it.
    """
    if not isinstance(teacher, Renormalising) or teacher.renormalisation is None:
        return
    for path in (run.last, run.previous):
        with contextlib.suppress(FileNotFoundError, ValueError):
            identity = checkpoints.load(path).get("identity")
            if not isinstance(identity, dict) or TEACHER_STATISTICS not in identity:
                teacher.expect(IMAGENET)
            return


def _load_teacher_run(config: TeacherConfig, preset: str, info: DatasetInfo) -> LoadedTeacher:
    path = config.run or teacher_run(preset)
    # A configuration always has a name. One that is there by default asks for no network.
    usual = presets.get(preset).student.teacher if preset in presets.names() else TeacherConfig()
    named = None if config.name in (usual.name, TeacherConfig().name) else config.name
    if not RunFolder(path).best.exists():
        command = f"sward train-teacher {preset}" if named is None else f"sward train-teacher {preset} --model {named}"
        raise FileNotFoundError(
            f"there is no trained teacher at {path}; train it with '{command}', name its folder with --teacher.run, or "
            "try shapes and speed with --teacher.untrained"
        )
    trained, _ = RunFolder(path).read()
    if named not in (None, trained.model):
        raise ValueError(
            f"teacher.name must be {trained.model!r}, the network of the run in {path}, got {named!r}; name another "
            "run with --teacher.run or a file with --teacher.weights"
        )
    if config.options not in ({}, trained.model_options):
        raise ValueError(
            f"teacher.options must be {trained.model_options}, those of the run in {path}, got {config.options}; a "
            "trained teacher needs none"
        )
    _, trained_info, network = load_run(path)
    if trained_info.classes != info.classes:
        raise ValueError(
            f"the teacher at {path} was trained on the classes {list(trained_info.classes)}, "
            f"but the data set {info.name!r} has {list(info.classes)}"
        )
    return LoadedTeacher(trained.model, trained.model_options, network, RunFolder(path))


def introduce_teacher(run: RunFolder, config: DistillationConfig, train_set: SegmentationDataset) -> None:
    """Print what a teacher's run has learned from, and warn if it did not end or had other data than the student.

    Every process of a group must call this.

    Args:
        run: the teacher's run.
        config: configuration of the student.
        train_set: the student's training images.
    """
    trained, _ = run.read()
    frames = run.read_frames().get("train", {})
    unusual = _has_other_data(trained.dataset, frames, config, train_set)
    if not distributed.is_main():
        return
    learned_from = f"{run.path}, trained on {_place(trained.dataset)}"
    progress = checkpoints.progress(run.last)
    if progress is not None:
        step, score = progress
        # Without a list of its frames, passes over the images cannot be counted in steps.
        length = trained.iterations or (trained.steps(len(frames)) if len(frames) >= trained.batch else None)
        learned_from += f", step {step}" if length is None else f", step {step} of {length}"
        if math.isfinite(score):
            learned_from += f", best {trained.metric} on validation {100 * score:.2f} %"
        if length is not None and step < length:
            warnings.warn(
                f"the teacher in {run.path} is unfinished, at step {step} of {length}; finish it with the command that "
                "began it and --resume",
                stacklevel=4,
            )
    print(f"teacher: {learned_from}")
    if unusual:
        warnings.warn(
            f"the teacher in {run.path} was trained on {_place(trained.dataset)} and the student learns from "
            f"{_place(config.dataset)}; unless that is meant, name another run with --teacher.run",
            stacklevel=4,
        )


def _has_other_data(
    teachers: DatasetConfig, frames: Mapping[str, str], config: DistillationConfig, train_set: SegmentationDataset
) -> bool:
    if teachers.name != config.dataset.name:
        # Whoever names a run may want the teacher of another data set.
        return config.teacher.run is None
    roots = {root.resolve() for root in (teachers.root, config.dataset.root) if root is not None}
    if len(roots) < 2:
        return False
    # Data that was copied or moved is the same.
    sums = frame_sums(train_set)
    return bool(sums) and not known_images(frames, sums)


def _place(dataset: DatasetConfig) -> str:
    return dataset.name if dataset.root is None else f"{dataset.name} in {dataset.root}"


def has_teacher_run(config: TeacherConfig) -> bool:
    """Return whether the teacher comes from a run of `sward train-teacher`, not from a file, a library or nowhere."""
    return teacher_source(config) == "run"


def check_teacher_logits(config: TeacherConfig, info: DatasetInfo, method: str, taps: Sequence[str]) -> None:
    """Raise a ValueError if a method compares the logits of a teacher whose classifier has random weights.

    `untrained` asks for random weights, and those of runs and files are complete.
    """
    if LOGITS not in taps or teacher_source(config) != "library":
        return
    if models.own_weights(config.name, info.num_classes) != "all":
        raise ValueError(
            f"distillation must be a method that compares no logits for the teacher {config.name!r}, whose classifier "
            f"is not trained on {info.num_classes} classes, got {method!r}; train it with 'sward train-teacher --model'"
        )


def _say_statistics(title: str, network: nn.Module) -> None:
    if isinstance(network, Renormalising) and network.renormalisation is not None:
        _say(f"{title}: images have {network.expected()}, which their source states")


def _say(text: str) -> None:
    if distributed.is_main():
        print(text)


def build_datasets(config: TrainingConfig) -> tuple[SegmentationDataset, SegmentationDataset]:
    """Build the training and validation splits of the configured data set."""
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
    """Build one split of the configured data set, with training or evaluation transforms."""
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
        image_range=settings.image_range,
        count=settings.count if split == "train" else None,
        series=settings.series,
        labelled_share=settings.labelled_share if train else 1.0,
        share_seed=settings.split_seed,
        folder_options=settings.folder_options,
    )


def choose_device(name: str | None) -> torch.device:
    """Return the named device; without a name the GPU if there is one, else the CPU.

    Under `torchrun` each process of a node uses its own GPU.

    Raises:
        ValueError: if the name is not a device, or torch sees no such device.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be a torch device such as 'cpu' or 'cuda', got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be 'cpu', got {name!r}; torch sees no GPU on this machine")
    if device.type == "cuda" and distributed.launched_processes() > 1:
        if distributed.local_rank() >= torch.cuda.device_count():
            raise ValueError(
                f"the local rank must be below the number of GPUs, {torch.cuda.device_count()}, got "
                f"{distributed.local_rank()}; lower --nproc-per-node or use --device cpu"
            )
        return torch.device("cuda", distributed.local_rank())
    try:
        torch.ones(1, device=device).item()
    except Exception as error:  # each kind of device raises errors of its own
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device must be one that torch can compute on here, such as 'cpu', got {name!r}: {reason}"
        ) from error
    return device
