"""Estimate the steps, FLOPs and memory of a run before it starts, on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from sward import data, models
from sward.config import DistillationConfig, TeacherTrainingConfig, TrainingConfig
from sward.data import DatasetNotFoundError
from sward.losses import SegmentationCrossEntropy
from sward.models.flops import gemm_flops
from sward.models.teachers import Teacher
from sward.presets import CLINICDB_FRAMES
from sward.runs.load import build_split

BYTES = 4
"""Bytes of one fp32 number."""

TRAINING_IMAGES = {
    ("cityscapes", None): 2975,
    ("camvid", None): 367,
    ("cvc_clinicdb", "sequence"): CLINICDB_FRAMES,
    ("cvc_clinicdb", "ratio"): 490,
    ("cvc_colondb", "sequence"): 302,
    ("cvc_colondb", "ratio"): 304,
}
"""Number of training images of the published data sets, ColonDB's release of 380 frames among them, used if the images
are not available."""


@dataclass(frozen=True)
class Estimate:
    """Estimated cost of a run."""

    steps: int
    """Optimiser steps."""
    flops: int
    """FLOPs of all steps: matrix products of the networks, three forward passes for trained parts and one for frozen
    parts, without those of the losses."""
    memory: int
    """Bytes on the device in fp32: weights, gradients, both AdamW moments, the student's activations saved for
    backward, the frozen teacher's weights and its largest intermediate maps; without buffers of the losses and the
    allocator."""


def estimate(config: TrainingConfig, teacher: TeacherTrainingConfig) -> Estimate:
    """Estimate the cost of one run, with as many unlabelled as labelled images where it names some: the most it takes.

    Args:
        config: configuration of the run.
        teacher: training configuration of the teacher that it distils.
    """
    settings = config.dataset
    classes = data.describe(settings.name, num_classes=settings.num_classes).num_classes
    images = _training_images(config)
    steps = config.steps(images)
    options = tuple(sorted(config.model_options.items())) if isinstance(config, TeacherTrainingConfig) else ()
    frozen = isinstance(config, TeacherTrainingConfig) and not config.train_trunk
    batch = config.batch + config.unlabelled_per_step(images, _unlabelled_images(config, images))
    own = _trained(config.model, classes, options, settings.image_size, batch, frozen)
    flops, memory = own.flops, own.memory
    if isinstance(config, DistillationConfig) and config.distillation != "none":
        other = _frozen(
            teacher.model,
            classes,
            tuple(sorted(teacher.model_options.items())),
            config.teacher_image_size,
            batch,
        )
        flops, memory = flops + other.flops, memory + other.memory
    return Estimate(steps, steps * flops, memory)


@dataclass(frozen=True)
class _Network:
    """FLOPs of one step and bytes of one network."""

    flops: int
    memory: int


@lru_cache
def _trained(
    name: str, classes: int, options: tuple[tuple[str, Any], ...], size: tuple[int, int], batch: int, frozen: bool
) -> _Network:
    forward = gemm_flops(models.build(name, classes, **dict(options)).eval(), size)
    network = models.build(name, classes, **dict(options)).to("meta").train()
    flops = 3 * forward
    if frozen and isinstance(network, Teacher):
        network.freeze_trunk()
        # The trunk runs forward only; the head also runs backward.
        trunk = gemm_flops(models.build(name, classes, **dict(options)).trunk.eval(), size)  # type: ignore[union-attr]
        flops = trunk + 3 * (forward - trunk)
    learnable = sum(each.numel() for each in network.parameters() if each.requires_grad)
    fixed = sum(each.numel() for each in network.parameters()) - learnable
    return _Network(batch * flops, BYTES * (4 * learnable + fixed) + _kept_for_backward(network, size, batch))


@lru_cache
def _frozen(
    name: str, classes: int, options: tuple[tuple[str, Any], ...], size: tuple[int, int], batch: int
) -> _Network:
    flops = gemm_flops(models.build(name, classes, **dict(options)).eval(), size)
    network = models.build(name, classes, **dict(options)).to("meta").eval()
    weights = sum(each.numel() for each in network.parameters())
    largest = 0

    def weigh(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        nonlocal largest
        held = sum(each.numel() for each in (*inputs, output) if isinstance(each, Tensor))
        largest = max(largest, held)

    handles = [module.register_forward_hook(weigh) for module in network.modules() if not list(module.children())]
    with torch.no_grad():
        network(torch.zeros(batch, 3, *size, device="meta"))
    for handle in handles:
        handle.remove()
    return _Network(batch * flops, BYTES * (weights + largest))


def _kept_for_backward(network: nn.Module, size: tuple[int, int], batch: int) -> int:
    """Count the bytes that one training forward pass saves for backward, without the parameters."""
    kept: dict[int, int] = {}
    alive: list[Tensor] = []
    parameters = {id(each.untyped_storage()) for each in network.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in parameters:
            kept[storage._cdata] = tensor.numel() * tensor.element_size()
            alive.append(tensor)
        return tensor

    labels = torch.zeros(batch, *size, dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        SegmentationCrossEntropy()(network(torch.zeros(batch, 3, *size, device="meta")), labels)
    return sum(kept.values())


def _unlabelled_images(config: TrainingConfig, labelled: int) -> int | None:
    """Return the number of training images whose masks are not used; None if there are others too, not counted here."""
    if isinstance(config, DistillationConfig) and config.unlabelled:
        return None
    return round(labelled / config.dataset.labelled_share) - labelled


def _training_images(config: TrainingConfig) -> int:
    try:
        return len(build_split(config, "train", train=True))
    except DatasetNotFoundError:
        settings = config.dataset
        return round(settings.labelled_share * TRAINING_IMAGES[settings.name, settings.split_by])
