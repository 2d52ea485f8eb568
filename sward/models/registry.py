"""Registry of students and teachers: builders, layers to distil, and the corresponding rows of the paper."""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from sward.models import sources
from sward.models.deeplab import MobileNetV3DeepLabV3Plus, SMPDeepLabV3Plus
from sward.models.heads import DeepLabV3PlusHead, MultiLevelHead, ResUNetPlusPlusHead
from sward.models.resunetpp import ResUNetPlusPlus
from sward.models.teachers import (
    HIERA_SPECS,
    DINOv2Trunk,
    HieraDemoTrunk,
    HieraSpec,
    Teacher,
    hiera_trunk,
)
from sward.models.unext import UNeXt


@dataclass(frozen=True)
class Stage:
    """A layer whose output is a feature map `[B, channels, H / stride, W / stride]`."""

    layer: str
    """Module path as in `named_modules()`; a forward hook on it receives the map."""
    channels: int
    stride: int


@dataclass(frozen=True)
class ModelDescription:
    """What distillation methods and tables need to know about a network without building it."""

    name: str
    role: str
    """`"student"` or `"teacher"`."""
    stages: tuple[Stage, ...]
    """The four stages that MWAD uses by default, highest resolution first; it pairs stage `i` of both networks."""
    feature_layer: str
    """The layer of the deepest encoder map, which PDR uses."""
    penultimate_layer: str
    """The layer whose output is the input of the classifier, at the head's resolution."""
    paper_name: str | None = None
    """Name of the row in Tables 1 and 2 of the paper; None if the network is not in the paper."""
    paper_params_millions: float | None = None
    paper_gflops: float | None = None
    num_classes: int = 2
    """Classes of the data set on which the paper uses the network: 19 for Cityscapes, 2 for polyps."""


Builder = Callable[..., nn.Module]

_DESCRIPTIONS: dict[str, ModelDescription] = {}
_BUILDERS: dict[str, Builder] = {}


def names(role: str | None = None) -> tuple[str, ...]:
    """Return the names of all networks, or of those with a role (`"student"` or `"teacher"`), in a fixed order.

    Raises:
        ValueError: for another role.
    """
    if role not in (None, "student", "teacher"):
        raise ValueError(f'role must be "student", "teacher" or None, got {role!r}')
    return tuple(name for name, description in _DESCRIPTIONS.items() if role in (None, description.role))


def describe(name: str) -> ModelDescription:
    """Return the description of a network built with default options.

    Raises:
        ValueError: if the name is unknown; the message lists near matches.
    """
    if name not in _DESCRIPTIONS:
        near = difflib.get_close_matches(name, _DESCRIPTIONS, n=3, cutoff=0.4)
        raise ValueError(
            f"unknown model {name!r}; did you mean {' or '.join(near) if near else 'one of ' + ', '.join(names())}?"
            f" Other networks are named like {', '.join(sources.FORMS)}"
        )
    return _DESCRIPTIONS[name]


def build(name: str, num_classes: int, /, **options: Any) -> nn.Module:
    """Build a network; torch's global generator (`torch.manual_seed`) initialises its weights.

    Args:
        name: one of `names`, or a form of `sward.models.sources.FORMS`.
        num_classes: K, at least 1.
        options: `backend="sam2" | "timm"` for the Hiera teachers (default `"sam2"`); `token_stride`,
            pixels per token, for `vit_small_dinov2` (default 8). The other networks have none.

    Returns:
        A module that maps images `[B, 3, H, W]` (ImageNet-normalised, H and W multiples of 32) to logits
        `[B, K, H, W]`.

    Raises:
        ValueError: for an unknown name, an option that the network does not have, or `num_classes` below 1.
        ModuleNotFoundError: if the package behind the network is not installed.

    Examples:
        >>> import torch
        >>> from sward import models
        >>> student = models.build("unext", 2).eval()
        >>> tuple(student(torch.randn(1, 3, 64, 64)).shape)
        (1, 2, 64, 64)
        >>> models.build("unxt", 2)
        Traceback (most recent call last):
        ValueError: unknown model 'unxt'; did you mean unext or resunetpp?...
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    check_name(name)
    if "num_classes" in options:
        given = options["num_classes"]
        raise ValueError(f"option 'num_classes' of model {name!r} must be left to sward, got {given!r}")
    if name not in _DESCRIPTIONS:
        return sources.build(name, num_classes, options)
    builder = _BUILDERS[name]
    known = [option for option in inspect.signature(builder).parameters if option != "num_classes"]
    for option in options:
        if option not in known:
            has = f"its options are {', '.join(known)}" if known else "it has no options"
            raise ValueError(f"model {name!r} has no option {option!r}; {has}")
    return builder(num_classes, **sources.typed_options(name, builder, options))


def build_with_imagenet(name: str, num_classes: int, /, **options: Any) -> nn.Module:
    """Build a network whose encoder has ImageNet weights, from the cache or hub of its library.

    Raises:
        ValueError: if there are none for it, or they cannot be loaded; the message says where they are looked for.
    """
    if ":" not in name:
        raise ValueError(f"ImageNet weights must be for smp:, torchvision: or timm: models, got {name!r}")
    return sources.build(name, num_classes, options, imagenet=True)


def check_name(name: str) -> None:
    """Raise a ValueError that lists near matches if `name` is neither registered nor has a form of `sources.FORMS`."""
    if ":" not in name:
        describe(name)


def origin(name: str, options: Mapping[str, Any]) -> str:
    """Return the builder and options of a network as text; empty for sward's own ones, whose modules tell them apart.

    A function of a user may keep an option where no module shows it.
    """
    return "" if name in _OWN else json.dumps([name, options], sort_keys=True, default=str)


def register(description: ModelDescription, builder: Builder) -> None:
    """Make a network known by name to `build`, `describe` and the command line.

    Args:
        description: its name and layers.
        builder: `builder(num_classes, **options)` returns a module that maps images to logits of the same size.

    Raises:
        ValueError: if the name is taken or holds a colon.
    """
    if description.name in _DESCRIPTIONS or ":" in description.name:
        raise ValueError(f"name must be new and without a colon, got {description.name!r}")
    _register(description, builder)


def _register(description: ModelDescription, builder: Builder) -> None:
    _DESCRIPTIONS[description.name] = description
    _BUILDERS[description.name] = builder


_register(
    ModelDescription(
        name="unext",
        role="student",
        # The shallowest stage, 16 channels at stride 2, has no counterpart in the teachers' trunks.
        stages=(
            Stage("encoder.1", 32, 4),
            Stage("encoder.2", 128, 8),
            Stage("encoder.3", 160, 16),
            Stage("encoder.4", 256, 32),
        ),
        feature_layer="encoder.4",
        penultimate_layer="up.4",
        paper_name="UNeXt",
        paper_params_millions=1.47,
        paper_gflops=4.63,
    ),
    UNeXt,
)
_register(
    ModelDescription(
        name="resunetpp",
        role="student",
        # Paired by level, not by stride: the deepest map of the network, the bridge, is at stride 8.
        stages=(
            Stage("encoder.1", 32, 2),
            Stage("encoder.2", 64, 4),
            Stage("encoder.3", 128, 8),
            Stage("bridge", 256, 8),
        ),
        feature_layer="bridge",
        penultimate_layer="output_aspp",
        paper_name="ResUNet++",
        paper_params_millions=4.06,
        paper_gflops=126.84,
    ),
    ResUNetPlusPlus,
)
_register(
    ModelDescription(
        name="mbv3s_deeplabv3plus",
        role="student",
        stages=(
            Stage("encoder.1", 16, 4),
            Stage("encoder.3", 24, 8),
            Stage("encoder.8", 48, 16),
            Stage("encoder.12", 576, 16),
        ),
        feature_layer="encoder.12",
        penultimate_layer="head.fuse",
        paper_name="DeepLabV3+ MobileNetV3-S",
        paper_params_millions=3.30,
        paper_gflops=22.60,
        num_classes=19,
    ),
    MobileNetV3DeepLabV3Plus,
)
_register(
    ModelDescription(
        name="smp_mbv3s_deeplabv3plus",
        role="student",
        stages=(
            Stage("network.encoder.model.blocks.0", 16, 4),
            Stage("network.encoder.model.blocks.1", 24, 8),
            Stage("network.encoder.model.blocks.3", 48, 16),
            Stage("network.encoder.model.blocks.5", 576, 16),
        ),
        feature_layer="network.encoder.model.blocks.5",
        penultimate_layer="network.decoder.block2",
        num_classes=19,
    ),
    SMPDeepLabV3Plus,
)


def _teacher_stages(channels: tuple[int, ...], strides: tuple[int, ...]) -> tuple[Stage, ...]:
    return tuple(
        Stage(f"levels.{level}", width, stride)
        for level, (width, stride) in enumerate(zip(channels, strides, strict=True))
    )


def _register_teacher(
    name: str,
    builder: Builder,
    channels: tuple[int, ...],
    penultimate_layer: str,
    strides: tuple[int, ...] = (4, 8, 16, 32),
    **paper: Any,
) -> None:
    description = ModelDescription(
        name=name,
        role="teacher",
        stages=_teacher_stages(channels, strides),
        feature_layer="levels.3",
        penultimate_layer=penultimate_layer,
        **paper,
    )
    _register(description, builder)


def _hiera_builder(spec: HieraSpec, head: Callable[[tuple[int, ...], int], nn.Module]) -> Builder:
    def build_hiera(num_classes: int, backend: str = "sam2") -> Teacher:
        return Teacher(hiera_trunk(spec, backend), head(spec.channels, num_classes))

    return build_hiera


def _build_hiera_demo(num_classes: int, backend: str = "sam2") -> Teacher:
    channels = (HieraDemoTrunk.STEM_CHANNELS, *HieraDemoTrunk.SPEC.channels)
    return Teacher(HieraDemoTrunk(backend), MultiLevelHead(channels, num_classes, width=HieraDemoTrunk.SPEC.embed_dim))


def _build_vit_small_dinov2(num_classes: int, token_stride: int = 8) -> Teacher:
    return Teacher(DINOv2Trunk(token_stride), MultiLevelHead((384,) * 4, num_classes, width=128, upsample=True))


_HEADS: dict[str, tuple[Callable[[tuple[int, ...], int], nn.Module], str]] = {
    "deeplabv3plus": (DeepLabV3PlusHead, "head.fuse"),
    "resunetpp": (ResUNetPlusPlusHead, "head.output_aspp"),
}
_PAPER_TEACHERS: dict[str, dict[str, Any]] = {
    "sam2_hiera_large_deeplabv3plus": {
        "paper_name": "SAM2.1 Hiera-L + DeepLabV3+",
        "paper_params_millions": 224.45,
        "paper_gflops": 406.01,
        "num_classes": 19,
    },
    "medsam2_hiera_tiny_resunetpp": {
        "paper_name": "MedSAM2 Hiera-T + ResUNet++",
        "paper_params_millions": 38.96,
        "paper_gflops": 55.38,
    },
}

_register_teacher("hiera_demo", _build_hiera_demo, HieraDemoTrunk.SPEC.channels, "head.fuse")
for _family, _sizes in (("sam2", tuple(HIERA_SPECS)), ("medsam2", ("tiny",))):
    for _size in _sizes:
        for _head_name, (_head, _penultimate) in _HEADS.items():
            _name = f"{_family}_hiera_{_size}_{_head_name}"
            _spec = HIERA_SPECS[_size]
            _register_teacher(
                _name, _hiera_builder(_spec, _head), _spec.channels, _penultimate, **_PAPER_TEACHERS.get(_name, {})
            )
_register_teacher("vit_small_dinov2", _build_vit_small_dinov2, (384,) * 4, "head.fuse", strides=(8,) * 4)

_OWN = names()
"""The networks of sward, without those that `register` adds later."""
