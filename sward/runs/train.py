"""Training runs: from a configuration to a finished run folder."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sward import data, distributed, layers, methods, models
from sward.config import (
    MASK_METHODS,
    DistillationConfig,
    MaskTrainingConfig,
    TeacherTrainingConfig,
    TrainingConfig,
    check_batch,
    masks_path,
)
from sward.data import DatasetInfo
from sward.data.check import LabelCounts, check_splits
from sward.data.frames import digest
from sward.data.masks import parse_values
from sward.data.unlabelled import UnlabelledImages
from sward.losses import LOGITS, DistillationLoss, SegmentationCrossEntropy, learn_masks, save_masks
from sward.losses.task import TaskLoss, median_frequency_weights
from sward.models.inputs import Renormalising
from sward.models.registry import origin
from sward.models.teachers import Teacher
from sward.runs.distillation import distillation_pair
from sward.runs.images import RunImages, check_data, checksums, unlabelled_images
from sward.runs.load import build_datasets, build_network, build_split, choose_device, student_run
from sward.runs.teachers import (
    TEACHER_STATISTICS,
    check_teacher_logits,
    introduce_teacher,
    load_teacher,
    restore_statistics,
    teacher_run,
)
from sward.runs.trial import try_step
from sward.training import checkpoints
from sward.training.batches import batches, unlabelled_per_step
from sward.training.host_memory import keep_freed_memory
from sward.training.loop import TrainingResult, first_state, fit
from sward.training.progress import Progress
from sward.training.run_folder import KeptData, RunFolder, check_cache_folder, make_folder, require_tensorboard
from sward.training.state import seed_generators
from sward.training.step import TrainingStep
from sward.training.teacher import FrozenTeacher
from sward.training.teacher_cache import TeacherCache, TrunkCache, cached


def train_student(config: DistillationConfig) -> TrainingResult:
    """Train a student, alone or with a teacher and a distillation loss (`sward train`).

    Raises:
        ValueError, FileNotFoundError: if the configuration cannot run, before any work starts.
    """
    config.check()
    _make_root_absolute(config)
    models.check_name(config.model)
    if config.tensorboard:
        require_tensorboard()
    if config.distillation != "none":
        methods.check_name(config.distillation)
    device = choose_device(config.device)
    with distributed.joined(device):
        return _train_student(config, device)


def _train_student(config: DistillationConfig, device: torch.device) -> TrainingResult:
    train_set, validation_set = build_datasets(config)
    config.steps(len(train_set))
    counts = check_data(config, train_set, validation_set)
    task = _task_loss(config, train_set.info, counts)
    images = RunImages(train_set, validation_set, counts, unlabelled_images(config, train_set))
    distributed.share_of(config.batch)
    info = train_set.info
    # Build the student first, so that a seed gives it the same weights with and without distillation.
    torch.manual_seed(config.seed)
    student = _placed(build_network(config, info.num_classes), config, device)
    loss, loaded, frozen = None, None, None
    weights: dict[str, str] = {}
    teacher: FrozenTeacher | TeacherCache | None = None
    if config.distillation != "none":
        loaded = load_teacher(config.teacher, config.preset, info)
        if loaded.run is not None:
            introduce_teacher(loaded.run, config, train_set)
        restore_statistics(loaded.network, RunFolder(config.output or student_run(config)))
        weights["teacher"] = checkpoints.checksum(loaded.network)
        if isinstance(loaded.network, Renormalising) and loaded.network.renormalisation is not None:
            weights[TEACHER_STATISTICS] = str(loaded.network.expected())
        network = _placed(loaded.network, config, device)
        if config.distillation in MASK_METHODS:
            weights["masks"] = hashlib.sha256(config.teacher_masks().read_bytes()).hexdigest()[:16]
        pair = distillation_pair(config, student, loaded.name, network, info)
        loss = methods.build(config.distillation, pair).to(device)
        # The teacher's own classes are labels too, if they are wanted.
        logits = () if config.pseudo_labels is None else (LOGITS,)
        caught = tuple(dict.fromkeys((*loss.teacher_taps, *logits)))
        if LOGITS in loss.teacher_taps:
            check_teacher_logits(config.teacher, info, "distillation", config.distillation)
        if config.pseudo_labels is not None:
            check_teacher_logits(config.teacher, info, "pseudo_labels", config.pseudo_labels)
        config = _with_layers(config, pair, loss)
        teacher = frozen = FrozenTeacher(
            network,
            caught,
            precision=config.teacher.precision,
            # Without autocast, the loss cannot combine the maps of a float32 student with maps of another dtype.
            dtype=torch.float32 if config.precision == "fp32" else None,
            taps=config.teacher.taps,
        )
    extra = unlabelled_per_step(config, train_set, images.unlabelled)
    if extra:
        # Kept in the run's configuration, so that no other number of images or processes changes it on the way.
        config = dataclasses.replace(config, unlabelled_batch=extra)
        if distributed.is_main():
            count = f"{len(images.unlabelled)}, " if isinstance(images.unlabelled, UnlabelledImages) else ""
            print(f"unlabelled images: {count}{extra} per step beside {config.batch} labelled ones")
    if config.teacher.cache is not None:
        check_cache_folder(config.teacher.cache, "teacher.cache")
    try_step(student, task.to(device), loss, frozen, config, info, unlabelled=extra)
    if loaded is not None and frozen is not None:
        if config.compile:
            frozen.network.compile()
        if config.teacher.cache is not None:
            teacher = cached(frozen, config.teacher.cache, origin(loaded.name, loaded.options))
    run = RunFolder(config.output or student_run(config))
    return _fit(student, task, config, images, run, loss=loss, teacher=teacher, weights=weights)


def _with_layers(
    config: DistillationConfig, pair: methods.DistillationPair, loss: DistillationLoss
) -> DistillationConfig:
    """Print the layers that the method compares, and return the configuration with those of MWAD."""
    student, teacher = pair.student_layers.stages, pair.teacher_layers.stages
    of_sward = config.distillation == "sward"
    if distributed.is_main():
        print(f"student layers: {' '.join(student if of_sward else loss.student_taps)}")
        print(f"teacher layers: {' '.join(teacher if of_sward else loss.teacher_taps)}")
    if not of_sward:
        return config
    return dataclasses.replace(
        config, sward=dataclasses.replace(config.sward, student_layers=student, teacher_layers=teacher)
    )


def train_teacher(config: TeacherTrainingConfig) -> TrainingResult:
    """Train a teacher: the head on a frozen trunk, or the whole network (`sward train-teacher`).

    Raises:
        ValueError, FileNotFoundError: if the configuration cannot run, before any work starts.
    """
    config.check()
    _make_root_absolute(config)
    models.check_name(config.model)
    if config.tensorboard:
        require_tensorboard()
    device = choose_device(config.device)
    with distributed.joined(device):
        return _train_teacher(config, device)


def _train_teacher(config: TeacherTrainingConfig, device: torch.device) -> TrainingResult:
    train_set, validation_set = build_datasets(config)
    config.steps(len(train_set))
    counts = check_data(config, train_set, validation_set)
    task = _task_loss(config, train_set.info, counts)
    distributed.share_of(config.batch)
    torch.manual_seed(config.seed)
    network = build_network(config, train_set.info.num_classes)
    if config.trunk_checkpoint is not None:
        matched = models.load_trunk_checkpoint(network, config.trunk_checkpoint)
        if distributed.is_main():
            print(f"trunk weights: {matched}")
    if not config.train_trunk:
        if not isinstance(network, Teacher):
            raise ValueError(
                f"train_trunk (--train-trunk) must be set for model {config.model!r}, which has no trunk to freeze"
            )
        brought = models.own_weights(config.model, train_set.info.num_classes) != "none"
        if config.trunk_checkpoint is None and config.model_weights in (None, "none") and not brought:
            raise ValueError(
                "trunk_checkpoint must name the weights of a frozen trunk, got None; train the trunk too with "
                "--train-trunk, or keep random features with --model-weights random"
            )
        network.freeze_trunk()
    weights: dict[str, str] = {}
    if config.trunk_checkpoint is not None or not config.train_trunk:
        # The configuration names a file, which another one may have replaced or share its name with.
        weights["trunk"] = checkpoints.checksum(network.get_submodule("trunk"))
    if config.cache is not None:
        check_cache_folder(config.cache, "cache")
    network = _placed(network, config, device)
    try_step(network, task.to(device), None, None, config, train_set.info)
    run = RunFolder(config.output or teacher_run(config.preset))
    return _fit(network, task, config, RunImages(train_set, validation_set, counts), run, weights=weights)


def _make_root_absolute(config: TrainingConfig) -> None:
    """Let a run find its data from any working directory."""
    config.dataset.root = data.fixed_root(config.dataset.name, config.dataset.root)


def _task_loss(config: TrainingConfig, info: DatasetInfo, counts: dict[str, LabelCounts]) -> nn.Module:
    group = distributed.group()
    if config.task == "ce" and not config.class_weights and not config.label_smoothing:
        return SegmentationCrossEntropy(info.ignore_index, process_group=group)
    return TaskLoss(
        config.task,
        ignore_index=info.ignore_index,
        class_weights=_class_weights(config.class_weights, counts.get("train"), info.num_classes),
        label_smoothing=config.label_smoothing,
        process_group=group,
    )


def _class_weights(stated: tuple[str, ...], counts: LabelCounts | None, num_classes: int) -> list[float] | None:
    words = parse_values(stated)
    if not words:
        return None
    if words == ("auto",):
        if counts is None:
            raise ValueError("class_weights must be numbers for a data set without mask files, got auto")
        return median_frequency_weights(counts.shares)
    try:
        weights = [float(word) for word in words]
    except ValueError:
        weights = []
    if len(weights) != num_classes:
        raise ValueError(f"class_weights must be auto or {num_classes} numbers, one per class, got {' '.join(words)}")
    return weights


def _placed(network: nn.Module, config: TrainingConfig, device: torch.device) -> nn.Module:
    network = network.to(device)
    return network.to(memory_format=torch.channels_last) if config.channels_last else network


def _fit(
    network: nn.Module,
    task: nn.Module,
    config: TrainingConfig,
    images: RunImages,
    run: RunFolder,
    *,
    loss: DistillationLoss | None = None,
    teacher: FrozenTeacher | TeacherCache | None = None,
    weights: Mapping[str, str],
) -> TrainingResult:
    """Train in the run's folder; `weights` are checksums of networks and masks that a resumed run must find again."""
    if config.sync_batch_norm:
        network = distributed.synchronise_batch_norm(network)
        loss = None if loss is None else distributed.synchronise_batch_norm(loss)
    # The weights above were drawn from the same seed in every process; dropout differs between processes.
    seed_generators(distributed.rank_seed(config.seed))
    frames = checksums(images)
    identity = {f"{split} data": digest(sums) for split, sums in frames.items() if sums}
    identity.update(weights)
    info = images.train.info
    labels = {split: found.summary(info.classes) for split, found in images.counts.items()}
    kept = KeptData(images.train.assignment, labels, frames)
    with run.locked():
        run.check(config, kept)
        step_module = TrainingStep(
            network,
            task.to(next(network.parameters()).device),
            loss,
            factor=config.distillation_factor if isinstance(config, DistillationConfig) else 1.0,
            precision=config.precision,
            taps=config.student_taps if isinstance(config, DistillationConfig) else None,
        )
        if config.compile:
            # In place, which keeps the keys of the state dict; after opening the taps, so that they are traced.
            network.compile()
        state = first_state(step_module, config, len(images.train), identity)
        state.restore(run)
        if isinstance(config, TeacherTrainingConfig) and not config.train_trunk:
            assert isinstance(network, Teacher)
            # Not before: the checkpoint of an earlier version may hold another trunk than the file that is named now.
            state.identity["trunk"] = checkpoints.checksum(network.trunk)
            if config.cache is not None:
                name = origin(config.model, config.model_options)
                network.trunk_cache = TrunkCache(network.trunk, config.cache, name)
        run.start(config, info, kept)
        return fit(
            step_module,
            config,
            images.train,
            images.validation,
            run,
            state,
            teacher=teacher,
            unlabelled=images.unlabelled,
        )


def train_masks(config: MaskTrainingConfig) -> Path:
    """Learn MasKD's tokens or FreeKD's prompts on a trained teacher and return their file (`sward train-masks`).

    Raises:
        ValueError, FileNotFoundError: if the configuration cannot run, before any work starts.
    """
    if distributed.launched_processes() > 1:
        raise ValueError(
            f"train-masks must run in one process, got {distributed.launched_processes()}; start it without torchrun"
        )
    config.check()
    path = config.output or masks_path(config.preset, config.method)
    if path.is_dir():
        raise ValueError(f"output must be a file, got the folder {path}; choose {path / f'{config.method}.pt'}, say")
    if path.exists():
        raise ValueError(f"output must be a new file, got {path}, which exists; choose another --output or delete it")
    device = choose_device(config.device)
    steps = config.steps or (10_000 if config.method == "maskd" else 2_000)
    if config.teacher.image_size is not None:
        # No student looks on: the teacher's views alone.
        config = dataclasses.replace(
            config, dataset=dataclasses.replace(config.dataset, image_size=config.teacher.image_size)
        )
    dataset = build_split(config, "train", train=True)
    check_batch(config.batch, len(dataset))
    check_splits({"train": dataset}, skip_corrupt=config.on_corrupt == "skip")
    loaded = load_teacher(config.teacher, config.preset, dataset.info)
    teacher = loaded.network.to(device)
    if device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(config.seed)
    choice = layers.default_layers(
        loaded.name, teacher, config.dataset.image_size, num_classes=dataset.info.num_classes
    )
    masks = methods.new_masks(config.method, teacher, choice, config.dataset.image_size, config.teacher.taps)
    masks = masks.to(device)
    tap = methods.mask_tap(config.method, choice)
    if tap == LOGITS:
        check_teacher_logits(config.teacher, dataset.info, "method", config.method)
    stream = batches(dataset, config.batch, seed=config.seed, workers=config.dataset.workers)
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
