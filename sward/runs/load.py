"""Load what runs need and produce: data sets, devices and trained networks."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from sward import data, distributed, models
from sward.config import DistillationConfig, MaskTrainingConfig, TrainingConfig
from sward.data import DatasetInfo, SegmentationDataset, folder
from sward.data.packed import holds_pack
from sward.models.inputs import Renormalising
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


def steps_of(config: TrainingConfig, images: int) -> int | None:
    """Return the steps that a run was to take on its listed images; None where its epochs pass over unlisted ones."""
    return config.iterations or (config.steps(images) if images >= config.batch else None)


def warn_if_unfinished(title: str, step: int, steps: int | None, *, stacklevel: int) -> None:
    """Warn if a run has taken fewer steps than it was to take; `title` names it, such as `the run in runs/a`."""
    if steps is not None and step < steps:
        warnings.warn(
            f"{title} is unfinished, at step {step} of {steps}; finish it with the command that began it and --resume",
            stacklevel=stacklevel + 1,
        )


def config_for_images(path: Path, config: TrainingConfig, root: Path | None = None) -> TrainingConfig:
    """Return the configuration that finds the frames of the run in `path`, in `root` where it is given.

    A split that the run has drawn or read from a list holds, even if the folder of the data or the list has changed
    since, but not in another folder that has splits of its own. `config` stays as it is.
    """
    split = RunFolder(path).split
    split_by = str(split) if split.exists() else config.dataset.split_by
    where = root or config.dataset.root
    elsewhere = not same_folder(where, config.dataset.root)
    if where is not None and elsewhere and config.dataset.name == "folder":
        split_by = None if folder.has_splits(where, config.dataset.folder_options) else split_by
    packed = config.dataset.packed
    if packed not in ("auto", "none") and (elsewhere or not holds_pack(Path(packed))):
        packed = "auto"  # The pack was of another folder or is gone, and frames are the same with and without one.
    dataset = dataclasses.replace(config.dataset, root=where, split_by=split_by, packed=packed)
    return dataclasses.replace(config, dataset=dataset)


def same_folder(one: Path | None, other: Path | None) -> bool:
    """Return whether two paths lead to one folder; None stands for no path."""
    return one == other or (one is not None and other is not None and one.resolve() == other.resolve())


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
        say_statistics("weights", network)
    else:
        say(f"weights: {models.load_weights(network, Path(weights))}")
    return network


def student_run(config: DistillationConfig) -> Path:
    """Return the default folder of a student's run."""
    return Path("runs") / config.preset / f"{config.distillation}-seed{config.seed}"


def say_statistics(title: str, network: nn.Module) -> None:
    """Print which input statistics a network expects, if they are not ImageNet's."""
    if isinstance(network, Renormalising) and network.renormalisation is not None:
        say(f"{title}: images have {network.expected()}, which their source states")


def say(text: str) -> None:
    """Print a line from one process of a group."""
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
