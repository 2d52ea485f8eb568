"""Distillation methods by name: from two networks and their layers to a `DistillationLoss`."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sward.config import MaskMethod, SWARDConfig, TapConfig
from sward.features import FeatureTaps, evaluating, map_channels
from sward.layers import LayerChoice
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
from sward.tensor_layouts import describe


@dataclass(frozen=True)
class DistillationPair:
    """Two networks and what the builder of a method may need about them."""

    student: nn.Module
    """The network that learns."""
    teacher: nn.Module
    """The frozen network."""
    student_layers: LayerChoice
    """Layers of the student that methods tap."""
    teacher_layers: LayerChoice
    """Layers of the teacher, one stage per stage of the student."""
    student_image_size: tuple[int, int]
    """Height and width of images that the student accepts, to find the channels of its layers."""
    teacher_image_size: tuple[int, int]
    """The same for the teacher."""
    num_classes: int
    """Classes of the data set."""
    ignore_index: int
    """Label that is left out."""
    settings: SWARDConfig
    """Settings of `"sward"`."""
    masks: Callable[[], Path]
    """Returns the file of the masks for `"maskd"` and `"freekd"`, or raises."""
    student_taps: TapConfig = field(default_factory=TapConfig)
    """How the student's layers arrange their output."""
    teacher_taps: TapConfig = field(default_factory=TapConfig)
    """How the teacher's layers arrange their output."""
    unlabelled: bool = False
    """Whether images without labels are distilled too; then methods that can use every pixel do."""
    standardize_teacher: bool = False
    """Whether the other methods than `"sward"` see standardised teacher maps; `settings` say so for `"sward"`."""
    seed: int = 0
    """Seed of CIRKD's memory."""
    generator: torch.Generator | None = None
    """Source of the window shifts; None draws from torch's global generator."""
    process_group: ProcessGroup | None = None
    """Processes over which losses take their means and statistics."""

    def student_channels(self, taps: Sequence[str]) -> list[int]:
        """Return the channels of the student's maps at `taps`."""
        return map_channels(self.student, taps, self.student_image_size, **self.student_taps.arguments())

    def teacher_channels(self, taps: Sequence[str]) -> list[int]:
        """Return the channels of the teacher's maps at `taps`."""
        return map_channels(self.teacher, taps, self.teacher_image_size, **self.teacher_taps.arguments())


def build(name: str, pair: DistillationPair) -> DistillationLoss:
    """Build the distillation loss `name` for a pair of networks; torch's global generator initialises its weights.

    Warns where the teacher is smaller than the student: the two may be exchanged.

    Raises:
        ValueError: if there is no such method, with a list of near matches, or its teacher maps cannot be standardised.
    """
    check_name(name)
    sizes = [sum(each.numel() for each in network.parameters()) for network in (pair.student, pair.teacher)]
    if sizes[1] < sizes[0]:
        warnings.warn(
            f"the teacher has fewer parameters than the student, {sizes[1]:,} and {sizes[0]:,}; are they exchanged?",
            stacklevel=3,
        )
    loss = METHODS[name](pair)
    if name == "sward" or not pair.standardize_teacher:
        return loss
    taps = feature_taps(loss)
    if not taps or name == "freekd":
        reason = "its prompts are learned on the maps as they are" if taps else "it reads the teacher's logits only"
        raise ValueError(f"teacher.normalization must be 'none' for the method {name!r}, got 'standardize'; {reason}")
    return StandardizedTeacher(loss, pair.teacher_channels(taps), process_group=pair.process_group)


def check_name(name: str) -> None:
    """Raise a ValueError that lists near matches if there is no method `name`."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=3, cutoff=0.4) or sorted(METHODS)
        raise ValueError(
            f"unknown distillation method {name!r}; did you mean {' or '.join(map(repr, near))} (or 'none')?"
        )


def _sward(pair: DistillationPair) -> SWARDDistillation:
    settings, student_layers, teacher_layers = pair.settings, pair.student_layers.stages, pair.teacher_layers.stages
    if len(student_layers) != len(teacher_layers):
        raise ValueError(
            f"teacher_layers must be as many as student_layers, {len(student_layers)}, got {len(teacher_layers)}"
        )
    mwad = MWADLoss(
        pair.student_channels(student_layers),
        pair.teacher_channels(teacher_layers),
        window_size=settings.window_size[0] if len(settings.window_size) == 1 else settings.window_size,
        embed_dim=settings.embed_dim,
        shift=settings.shift,
        terms=settings.terms,
        teacher_normalization=settings.teacher_normalization,
        teacher_projections=settings.teacher_projections,
        context_reduction=settings.context_reduction,
        process_group=pair.process_group,
        generator=pair.generator,
    )
    pdr = PDRLoss(
        pair.num_classes,
        margin=settings.margin,
        terms=settings.pdr_terms,
        ignore_index=pair.ignore_index,
        normalize=settings.normalize,
        process_group=pair.process_group,
    )
    return SWARDDistillation(
        mwad,
        pdr,
        student_taps=student_layers,
        teacher_taps=teacher_layers,
        pdr_tap=settings.pdr_layer or pair.student_layers.deepest,
        weights=settings.weights,
    )


def _kd(pair: DistillationPair) -> KDLoss:
    # Every pixel of an unlabelled image is ignored by the label terms, but not by the teacher.
    return KDLoss(ignore_index=None if pair.unlabelled else pair.ignore_index, process_group=pair.process_group)


def _cwd(pair: DistillationPair) -> CWDLoss:
    return CWDLoss()


def _attention_transfer(pair: DistillationPair) -> AttentionTransferLoss:
    student, teacher = _deepest(pair)
    _channels(pair, student, teacher)  # It needs none, but a layer without a map is refused here.
    return AttentionTransferLoss(student_tap=student, teacher_tap=teacher)


def _fitnet(pair: DistillationPair) -> FitNetLoss:
    student, teacher = _deepest(pair)
    return FitNetLoss(*_channels(pair, student, teacher), student_tap=student, teacher_tap=teacher)


def _pairwise(pair: DistillationPair) -> PairwiseLoss:
    student, teacher = _deepest(pair)
    _channels(pair, student, teacher)  # As above.
    return PairwiseLoss(student_tap=student, teacher_tap=teacher)


def _cirkd(pair: DistillationPair) -> CIRKDLoss:
    student, teacher = _penultimate(pair)
    return CIRKDLoss(
        *_channels(pair, student, teacher),
        pair.num_classes,
        student_tap=student,
        teacher_tap=teacher,
        ignore_index=pair.ignore_index,
        seed=pair.seed,
        process_group=pair.process_group,
    )


def _maskd(pair: DistillationPair) -> MasKDLoss:
    return MasKDLoss(_masks(pair, ReceptiveTokens, LOGITS))


def _freekd(pair: DistillationPair) -> FreeKDLoss:
    student, teacher = _penultimate(pair)
    prompts = _masks(pair, FrequencyPrompts, teacher)
    channels, _ = _channels(pair, student, teacher)
    return FreeKDLoss.preset("released", prompts, channels, student_tap=student, teacher_tap=teacher)


Masks = TypeVar("Masks", ReceptiveTokens, FrequencyPrompts)


def _masks(pair: DistillationPair, kind: type[Masks], tap: str) -> Masks:
    path = pair.masks()
    masks = load_masks(path, pair.teacher, tap)
    if not isinstance(masks, kind):
        raise ValueError(f"masks must be a file with {kind.__name__} at {tap!r}, got {type(masks).__name__} in {path}")
    return masks


def new_masks(
    method: MaskMethod,
    teacher: nn.Module,
    layers: LayerChoice,
    image_size: tuple[int, int],
    taps: TapConfig | None = None,
) -> TeacherMasks:
    """Create untrained MasKD tokens or FreeKD prompts for a teacher, at the layer that `mask_tap` names.

    Raises:
        ValueError: if that layer returns no maps `[B, C, h, w]`, which learning replaces by masked ones.
    """
    images = next(teacher.parameters()).new_zeros(1, 3, *image_size)
    # Its batch norm must not learn from the blank image.
    with torch.no_grad(), evaluating(teacher):
        if method == "maskd":
            return ReceptiveTokens(max(teacher(images).shape[1], 2))
        return FrequencyPrompts.preset(
            "released", _replaceable_channels(teacher, mask_tap(method, layers), images, taps)
        )


def _replaceable_channels(teacher: nn.Module, layer: str, images: Tensor, taps: TapConfig | None) -> int:
    outputs: list[Any] = []

    def remember(module: nn.Module, arguments: object, output: Any) -> None:
        outputs.append(output)

    handle = teacher.get_submodule(layer).register_forward_hook(remember)
    try:
        with FeatureTaps(teacher, [layer], **(taps or TapConfig()).arguments()) as opened:
            teacher(images)
            output = outputs[-1]
            maps = opened.collect()[layer]
    finally:
        handle.remove()
    if maps is not output:
        found = f"{describe(output)} in another order" if isinstance(output, Tensor) else describe(output)
        raise ValueError(
            f"the teacher's layer {layer!r} must return maps [B, C, h, w] for freekd, got {found}; maskd needs the "
            "logits only"
        )
    return maps.shape[1]


def mask_tap(method: MaskMethod, layers: LayerChoice) -> str:
    """Return the teacher's layer on which MasKD's tokens or FreeKD's prompts are learned."""
    return LOGITS if method == "maskd" else layers.penultimate


def _deepest(pair: DistillationPair) -> tuple[str, str]:
    return pair.student_layers.deepest, pair.teacher_layers.deepest


def _penultimate(pair: DistillationPair) -> tuple[str, str]:
    return pair.student_layers.penultimate, pair.teacher_layers.penultimate


def _channels(pair: DistillationPair, student_layer: str, teacher_layer: str) -> tuple[int, int]:
    (student,) = pair.student_channels([student_layer])
    (teacher,) = pair.teacher_channels([teacher_layer])
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

METHOD_TITLES = {
    "none": "student alone",
    "kd": "+ KD",
    "cwd": "+ CWD",
    "at": "+ AT",
    "fitnet": "+ FitNets",
    "pairwise": "+ pairwise (SKD)",
    "cirkd": "+ CIRKD",
    "maskd": "+ MasKD",
    "freekd": "+ FreeKD",
    "sward": "+ SWARD",
}
"""Names in tables and reports, of `"none"` too."""
