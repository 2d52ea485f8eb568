"""Distillation methods by name: from a configuration and two networks to a `DistillationLoss`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sward import distributed, models
from sward.config import DistillationConfig, MaskMethod
from sward.data import DatasetInfo
from sward.features import FeatureTaps
from sward.losses import (
    LOGITS,
    AttentionTransferLoss,
    CIRKDLoss,
    CWDLoss,
    DistillationLoss,
    FitNetLoss,
    FreeKDLoss,
    FrequencyPrompts,
    KDLoss,
    MasKDLoss,
    MWADLoss,
    PairwiseLoss,
    PDRLoss,
    ReceptiveTokens,
    StandardizedTeacher,
    SWARDDistillation,
    load_masks,
)
from sward.losses.masks import TeacherMasks
from sward.losses.standardized import feature_taps


@dataclass(frozen=True)
class DistillationPair:
    """What the builder of a method may need."""

    config: DistillationConfig
    """The run's configuration."""
    student: nn.Module
    """The network that learns."""
    teacher_name: str
    """Name of the teacher in `sward.models`."""
    teacher: nn.Module
    """The frozen network."""
    info: DatasetInfo
    """Classes of the data set."""


def build(name: str, pair: DistillationPair) -> DistillationLoss:
    """Build the distillation loss `name` for a pair of networks; torch's global generator initialises its weights.

    Raises:
        ValueError: if there is no such method, with a list of near matches, or its teacher maps cannot be standardised.
    """
    check_name(name)
    loss = METHODS[name](pair)
    if name == "sward" or pair.config.teacher.normalization == "none":
        return loss
    taps = feature_taps(loss)
    if not taps or name == "freekd":
        reason = "its prompts are learned on the maps as they are" if taps else "it reads the teacher's logits only"
        raise ValueError(f"teacher.normalization must be 'none' for the method {name!r}, got 'standardize'; {reason}")
    channels = tap_channels(pair.teacher, taps, pair.config.teacher_image_size)
    return StandardizedTeacher(loss, channels, process_group=distributed.group())


def check_name(name: str) -> None:
    """Raise a ValueError that lists near matches if there is no method `name`."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=3, cutoff=0.4) or sorted(METHODS)
        raise ValueError(
            f"unknown distillation method {name!r}; did you mean {' or '.join(map(repr, near))} (or 'none')?"
        )


def tap_channels(network: nn.Module, layers: Sequence[str], image_size: tuple[int, int]) -> list[int]:
    """Return the number of channels of each layer's map, found by running one blank image.

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
    mwad = MWADLoss(
        tap_channels(pair.student, student_layers, pair.config.dataset.image_size),
        tap_channels(pair.teacher, teacher_layers, pair.config.teacher_image_size),
        window_size=settings.window_size[0] if len(settings.window_size) == 1 else settings.window_size,
        embed_dim=settings.embed_dim,
        shift=settings.shift,
        terms=settings.terms,
        teacher_normalization=settings.teacher_normalization,
        teacher_projections=settings.teacher_projections,
        context_reduction=settings.context_reduction,
        process_group=distributed.group(),
        # A generator of its own, so that runs with and without distillation see the same images and the same dropout.
        generator=torch.Generator().manual_seed(distributed.rank_seed(pair.config.seed)),
    )
    pdr = PDRLoss(
        pair.info.num_classes,
        margin=settings.margin,
        terms=settings.pdr_weights,
        ignore_index=pair.info.ignore_index,
        normalize=settings.normalize,
        process_group=distributed.group(),
    )
    return SWARDDistillation(
        mwad,
        pdr,
        student_taps=student_layers,
        teacher_taps=teacher_layers,
        pdr_tap=settings.pdr_layer or student.feature_layer,
        weights=settings.weights,
    )


def _kd(pair: DistillationPair) -> KDLoss:
    # Every pixel of an unlabelled image is ignored by the label terms, but not by the teacher.
    ignore_index = None if pair.config.unlabelled else pair.info.ignore_index
    return KDLoss(ignore_index=ignore_index, process_group=distributed.group())


def _cwd(pair: DistillationPair) -> CWDLoss:
    return CWDLoss()


def _attention_transfer(pair: DistillationPair) -> AttentionTransferLoss:
    student, teacher = _deepest(pair)
    return AttentionTransferLoss(student_tap=student, teacher_tap=teacher)


def _fitnet(pair: DistillationPair) -> FitNetLoss:
    student, teacher = _deepest(pair)
    return FitNetLoss(*_channels(pair, student, teacher), student_tap=student, teacher_tap=teacher)


def _pairwise(pair: DistillationPair) -> PairwiseLoss:
    student, teacher = _deepest(pair)
    return PairwiseLoss(student_tap=student, teacher_tap=teacher)


def _cirkd(pair: DistillationPair) -> CIRKDLoss:
    student, teacher = _penultimate(pair)
    return CIRKDLoss(
        *_channels(pair, student, teacher),
        pair.info.num_classes,
        student_tap=student,
        teacher_tap=teacher,
        ignore_index=pair.info.ignore_index,
        seed=pair.config.seed,
    )


def _maskd(pair: DistillationPair) -> MasKDLoss:
    masks = load_masks(pair.config.teacher_masks(), pair.teacher, LOGITS)
    assert isinstance(masks, ReceptiveTokens)
    return MasKDLoss(masks)


def _freekd(pair: DistillationPair) -> FreeKDLoss:
    student, teacher = _penultimate(pair)
    prompts = load_masks(pair.config.teacher_masks(), pair.teacher, teacher)
    assert isinstance(prompts, FrequencyPrompts)
    channels, _ = _channels(pair, student, teacher)
    return FreeKDLoss.preset("released", prompts, channels, student_tap=student, teacher_tap=teacher)


def new_masks(method: MaskMethod, teacher_name: str, teacher: nn.Module, image_size: tuple[int, int]) -> TeacherMasks:
    """Create untrained MasKD tokens or FreeKD prompts for a teacher, at the layer that `mask_tap` names."""
    tap = mask_tap(method, teacher_name)
    if method == "maskd":
        with torch.no_grad():
            logits = teacher(next(teacher.parameters()).new_zeros(1, 3, *image_size))
        return ReceptiveTokens(max(logits.shape[1], 2))
    return FrequencyPrompts.preset("released", tap_channels(teacher, [tap], image_size)[0])


def mask_tap(method: MaskMethod, teacher_name: str) -> str:
    """Return the teacher's layer on which MasKD's tokens or FreeKD's prompts are learned."""
    return LOGITS if method == "maskd" else models.describe(teacher_name).penultimate_layer


def _deepest(pair: DistillationPair) -> tuple[str, str]:
    return models.describe(pair.config.model).feature_layer, models.describe(pair.teacher_name).feature_layer


def _penultimate(pair: DistillationPair) -> tuple[str, str]:
    return models.describe(pair.config.model).penultimate_layer, models.describe(pair.teacher_name).penultimate_layer


def _channels(pair: DistillationPair, student_layer: str, teacher_layer: str) -> tuple[int, int]:
    (student,) = tap_channels(pair.student, [student_layer], pair.config.dataset.image_size)
    (teacher,) = tap_channels(pair.teacher, [teacher_layer], pair.config.teacher_image_size)
    return student, teacher


METHODS: dict[str, Callable[[DistillationPair], DistillationLoss]] = {
    "sward": _sward,
    "cirkd": _cirkd,
    "maskd": _maskd,
    "freekd": _freekd,
    "cwd": _cwd,
    "at": _attention_transfer,
    "kd": _kd,
    "fitnet": _fitnet,
    "pairwise": _pairwise,
}
"""Every method that `--distillation` accepts besides `"none"`."""
