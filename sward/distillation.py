"""Distillation methods by name: from a configuration and two networks to a `DistillationLoss`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sward import models
from sward.config import DistillationConfig
from sward.data import DatasetInfo
from sward.features import FeatureTaps
from sward.losses import DistillationLoss, MWADLoss, PDRLoss, SWARDDistillation


@dataclass(frozen=True)
class DistillationPair:
    """What a method may need to know to build itself.

    Attributes:
        config: the run's configuration.
        student: the network that learns.
        teacher_name: what `sward.models` calls the teacher.
        teacher: the frozen network.
        info: classes of the data set.
    """

    config: DistillationConfig
    student: nn.Module
    teacher_name: str
    teacher: nn.Module
    info: DatasetInfo


def build(name: str, pair: DistillationPair) -> DistillationLoss:
    """The distillation loss `name` for a pair of networks, its weights drawn from torch's global generator.

    Raises:
        ValueError: if there is no such method; the message lists near matches.
    """
    check_name(name)
    return METHODS[name](pair)


def check_name(name: str) -> None:
    """Raises a ValueError that lists near matches if there is no method `name`."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=3, cutoff=0.4) or sorted(METHODS)
        raise ValueError(
            f"unknown distillation method {name!r}; did you mean {' or '.join(map(repr, near))} (or 'none')?"
        )


def tap_channels(network: nn.Module, layers: Sequence[str], image_size: tuple[int, int]) -> list[int]:
    """Channels of the maps that `layers` of `network` return, found by running one blank image.

    Raises:
        ValueError: if a layer does not exist or returns no `[B, C, H, W]` map.
    """
    training = network.training
    parameter = next(network.parameters())
    with FeatureTaps(network, layers) as taps, torch.no_grad():
        network.eval()(parameter.new_zeros(1, 3, *image_size))
        maps = taps.collect()
    network.train(training)
    return [maps[layer].shape[1] for layer in layers]


def _sward(pair: DistillationPair) -> SWARDDistillation:
    settings = pair.config.sward
    student, teacher = models.describe(pair.config.model), models.describe(pair.teacher_name)
    student_layers = settings.student_layers or tuple(stage.layer for stage in student.stages)
    teacher_layers = settings.teacher_layers or tuple(stage.layer for stage in teacher.stages)
    image_size = pair.config.dataset.image_size
    mwad = MWADLoss(
        tap_channels(pair.student, student_layers, image_size),
        tap_channels(pair.teacher, teacher_layers, image_size),
        window_size=settings.window_size[0] if len(settings.window_size) == 1 else settings.window_size,
        embed_dim=settings.embed_dim,
        shift=settings.shift,
        weights=settings.terms,
        teacher_projections=settings.teacher_projections,
        context_reduction=settings.context_reduction,
        # A stream of its own: a run with and one without distillation see the same images and the same dropout.
        generator=torch.Generator().manual_seed(pair.config.seed),
    )
    pdr = PDRLoss(
        pair.info.num_classes,
        margin=settings.margin,
        weights=settings.pdr_weights,
        ignore_index=pair.info.ignore_index,
        normalize=settings.normalize,
    )
    return SWARDDistillation(
        mwad,
        pdr,
        student_taps=student_layers,
        teacher_taps=teacher_layers,
        pdr_tap=settings.pdr_layer or student.feature_layer,
        weights=settings.weights,
    )


METHODS: dict[str, Callable[[DistillationPair], DistillationLoss]] = {"sward": _sward}
"""Every method that `--distillation` accepts besides `"none"`."""
