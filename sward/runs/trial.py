"""One step on random images before a run exists: what cannot work is said before anything is written."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from sward import distributed
from sward.config import DistillationConfig, TapConfig, TrainingConfig
from sward.data import DatasetInfo
from sward.losses import LOGITS, DistillationLoss
from sward.tensor_layouts import refuse_probabilities
from sward.training.step import TrainingStep
from sward.training.teacher import FrozenTeacher


def try_step(
    network: nn.Module,
    task: nn.Module,
    loss: DistillationLoss | None,
    teacher: FrozenTeacher | None,
    config: TrainingConfig,
    info: DatasetInfo,
    *,
    unlabelled: int = 0,
) -> None:
    """Run forward and backward passes of copies of the networks on images of the run's size.

    `unlabelled` images without labels come on top of `config.batch`. Neither the networks nor the random states change.
    With several processes nothing is tried, since their losses exchange tensors.

    Raises:
        ValueError: if the step fails, for example because a layer has no grid of a window's size, or the logits have
            another number of channels than there are classes.
    """
    if distributed.world_size() > 1:
        return
    device = next(network.parameters()).device
    height, width = config.dataset.image_size
    tall, wide = height, width
    taps: TapConfig | None = None
    if isinstance(config, DistillationConfig) and teacher is not None:
        tall, wide = config.teacher_image_size
        taps = config.student_taps
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(config.batch + unlabelled, 3, height, width, generator=generator)
    labels = torch.randint(0, info.num_classes, (len(images), height, width), generator=generator)
    labels[config.batch :] = info.ignore_index
    seen = images if (tall, wide) == (height, width) else torch.rand(len(images), 3, tall, wide, generator=generator)
    devices = [device] if device.type == "cuda" else []
    student_logits: list[Tensor] = []
    try:
        with torch.random.fork_rng(devices):
            step = TrainingStep(*copy.deepcopy((network, task, loss)), precision=config.precision, taps=taps).train()
            features = {} if teacher is None else teacher(seen.to(device))
            step.model.register_forward_hook(lambda *call: student_logits.append(call[-1].detach()))
            step(images.to(device), labels.to(device), features).loss.backward()
    except ValueError as error:
        if not str(error).startswith("Expected more than 1 value per channel"):
            raise
        raise ValueError(
            f"batch must be at least 2 for batch norm on maps of one pixel, got {config.batch} images of "
            f"{height}x{width}; raise --batch or --dataset.image-size"
        ) from error
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"a step of {config.model!r} on {len(images)} images of {height}x{width} must be possible, got "
            f"{type(error).__name__}: {reason}"
        ) from error
    _check_channels(f"model {config.model!r}", student_logits[0], info)
    if LOGITS in features:
        _check_channels("the teacher", features[LOGITS], info)


def _check_channels(whose: str, logits: Tensor, info: DatasetInfo) -> None:
    """Raise a ValueError unless there is one channel per class, of logits; one logit serves two classes."""
    count, classes = logits.shape[1], info.num_classes
    if count != classes and (count, classes) != (1, 2):
        one = " or 1" if classes == 2 else ""
        raise ValueError(f"logits of {whose} must have {classes}{one} channels, one per class, got {count}")
    refuse_probabilities(logits, whose)
