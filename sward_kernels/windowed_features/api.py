"""The public function of windowed distillation of features: checks its arguments and dispatches."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sward_kernels.arguments import require_tensor
from sward_kernels.fallback import cannot_load, warn_once
from sward_kernels.registration import constant_in_graphs, without_autocast
from sward_kernels.targets import family_of
from sward_kernels.windowed.api import (
    Terms,
    WindowedDistillation,
    check_implementation,
    check_terms,
    check_window,
    windowed_distillation,
)
from sward_kernels.windowed_features import native
from sward_kernels.windows import Shift

Tensors = tuple[Tensor, Tensor, Tensor, Tensor]
"""The features of student and teacher, then their weights."""

MOST_TOKENS = 64
MOST_CHANNELS = 64
MOST_DIM = 64
"""Tokens of a window, channels of a map and width D that the Triton kernels take, see also `most_channels`."""


def windowed_feature_distillation(
    features_student: Tensor,
    features_teacher: Tensor,
    weight_student: Tensor,
    weight_teacher: Tensor,
    window_size: int,
    shift: Shift = (0, 0),
    *,
    terms: Terms = (1.0, 1.0, 1.0),
    implementation: str = "auto",
) -> WindowedDistillation:
    """Project features to queries, keys and values, and compare these as `windowed_distillation` does (Eq. 4-14).

    Per side, `[Q; K; V] = W X` for each pixel `X`: a 1x1 convolution without bias. Then as documented for
    `windowed_distillation`, of which this is the same function of the projected maps.

    The Triton kernels and the C++ compute the projections inside: memory sees features of C channels instead of
    queries, keys and values of 3 D. On a GPU, forward and backward of both sides then move 8 C elements per token,
    where 1x1 convolutions and `windowed_distillation` move 36 D + 6 C.

    Args:
        features_student: `[B, C_s, H, W]`, any floating dtype and strides (neither NCHW nor channels_last is copied).
        features_teacher: `[B, C_t, H, W]`, on the same grid.
        weight_student: `[3 * D, C_s]`: the rows give queries, keys and values, in that order.
        weight_teacher: `[3 * D, C_t]`.
        window_size: window side in pixels, at least 1. The map may be smaller, and need not be a multiple of it.
        shift: as for `windowed_distillation`.
        terms: weights of the attention, value and context terms. A weight of 0 skips the term, which is returned as 0.
        implementation: `"triton"` projects inside the kernels; on a GPU it takes bf16 and fp16, windows of up to 64
            tokens, D up to 64 and up to 64 channels on each side (32 on AMD). `"native"` projects inside its C++ where
            that is faster: up to 128 channels on each side and windows of up to 16 x 16. Elsewhere it makes queries,
            keys and values first, as any other of `windowed_distillation` does. `"auto"` is triton on GPU tensors that
            it takes, and what it is for `windowed_distillation` elsewhere.

    Returns:
        `WindowedDistillation(loss, attention, value, context)`. The loss has a gradient to features and weights of
        both sides. All four are computed in one dtype: that of autocast where it is on (float64 stays as it is), as a
        convolution would be.

    Raises:
        ValueError: for an argument that does not fit the above.
        NotImplementedError: if the implementation is named explicitly and cannot run this call.

    Examples:
        >>> import torch
        >>> from sward_kernels import windowed_feature_distillation
        >>> features, weight = torch.randn(2, 16, 8, 8), torch.randn(3 * 32, 16) / 4
        >>> out = windowed_feature_distillation(features, features, weight, weight, window_size=4, shift=(1, 3))
        >>> bool(out.loss.abs() < 1e-5)  # the same on both sides
        True

    Source: SWARD, Eq. 4-14. Differentiable once.
    """
    check_implementation(implementation)
    _check_maps(features_student, features_teacher, weight_student, weight_teacher)
    check_window(window_size, shift, features_student.device)
    check_terms(terms)
    tensors = _in_one_dtype((features_student, features_teacher, weight_student, weight_teacher))
    if implementation == "triton" or (implementation == "auto" and _prefers_triton(tensors, window_size)):
        falls_back = implementation == "auto"
        try:
            with without_autocast(features_student.device):
                return WindowedDistillation(*_triton_launcher()(tensors, window_size, shift, terms, falls_back))
        except NotImplementedError as reason:
            if not falls_back:
                raise
            warn_once(f"windowed_feature_distillation makes queries, keys and values in memory: {reason}")
    elif projects_inside(implementation, *sizes_of(tensors), window_size, tensors[0].dtype, tensors[0].device):
        with without_autocast(features_student.device):
            loss, *values = native.windowed_feature_distillation(*tensors, window_size, shift, terms)
        attention, value, context = (each.detach() for each in values)
        return WindowedDistillation(loss, attention, value, context)
    return projected(tensors, window_size, shift, terms, implementation)


def _prefers_triton(tensors: Tensors, window_size: int) -> bool:
    features = tensors[0]
    return features.is_cuda and takes_features(*sizes_of(tensors), window_size, features.dtype, features.device)


def sizes_of(tensors: Tensors) -> tuple[int, int, int]:
    """The channels of student and teacher, and D."""
    features_student, features_teacher, weight_student, _ = tensors
    return features_student.shape[1], features_teacher.shape[1], weight_student.shape[0] // 3


def projects_inside(
    implementation: str,
    student_channels: int,
    teacher_channels: int,
    dim: int,
    window_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> bool:
    """Whether `implementation` projects features of so many channels inside its kernels, where that is faster."""
    if implementation == "triton" or (implementation == "auto" and device.type == "cuda"):
        return takes_features(student_channels, teacher_channels, dim, window_size, dtype, device)
    channels = max(student_channels, teacher_channels)
    return implementation in ("auto", "native") and native.serves(channels, window_size, dtype, device)


def takes_features(
    student_channels: int, teacher_channels: int, dim: int, window_size: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether the Triton kernels take features of so many channels, projected to width `dim`, in such windows."""
    channels = max(student_channels, teacher_channels)
    return channels <= most_channels(dtype, device) and dim <= MOST_DIM and window_size**2 <= MOST_TOKENS


@constant_in_graphs
def most_channels(dtype: torch.dtype, device: torch.device) -> int:
    """Most channels of a map that the Triton kernels take on a device; 0 if they do not take its dtype there."""
    return most_channels_of(family_of(device), dtype)


def most_channels_of(family: str, dtype: torch.dtype) -> int:
    """`most_channels` for a family of GPUs.

    In fp32, backward does not fit the shared memory of every target. On AMD more channels spill.
    """
    if family == "interpreter":
        return MOST_CHANNELS
    if dtype.itemsize > 2:
        return 0
    return MOST_CHANNELS // 2 if family == "cdna" else MOST_CHANNELS


def projected(
    tensors: Tensors, window_size: int, shift: Shift, terms: Terms, implementation: str
) -> WindowedDistillation:
    """The specification: 1x1 convolutions, then `windowed_distillation`. The tensors have one dtype."""
    features_student, features_teacher, weight_student, weight_teacher = tensors
    with without_autocast(features_student.device):
        qkv_student = F.conv2d(features_student, weight_student[:, :, None, None])
        qkv_teacher = F.conv2d(features_teacher, weight_teacher[:, :, None, None])
        return windowed_distillation(
            qkv_student, qkv_teacher, window_size, shift, terms=terms, implementation=implementation
        )


def _in_one_dtype(tensors: Tensors) -> Tensors:
    """The tensors in the dtype in which autocast would compute a convolution of them."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or any(tensor.dtype == torch.float64 for tensor in tensors):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    features_student, features_teacher, weight_student, weight_teacher = tensors
    return features_student.to(dtype), features_teacher.to(dtype), weight_student.to(dtype), weight_teacher.to(dtype)


def _check_maps(
    features_student: Tensor, features_teacher: Tensor, weight_student: Tensor, weight_teacher: Tensor
) -> None:
    sides = (("student", features_student, weight_student), ("teacher", features_teacher, weight_teacher))
    for side, features, weight in sides:
        for name, tensor in ((f"features_{side}", features), (f"weight_{side}", weight)):
            require_tensor(name, tensor)
            if not tensor.is_floating_point():
                raise ValueError(f"{name} must have a floating dtype, got {tensor.dtype}")
        if features.dim() != 4 or 0 in features.shape:
            raise ValueError(f"features_{side} must be a non-empty [B, C, H, W], got shape {tuple(features.shape)}")
        channels = features.shape[1]
        if weight.dim() != 2 or 0 in weight.shape or weight.shape[0] % 3 or weight.shape[1] != channels:
            raise ValueError(
                f"weight_{side} must be [3 * D, {channels}], one column per channel of features_{side}, got shape "
                f"{tuple(weight.shape)}"
            )
    batch_and_grid = [(features.shape[0], *features.shape[2:]) for features in (features_student, features_teacher)]
    if batch_and_grid[0] != batch_and_grid[1]:
        raise ValueError(
            f"features_student and features_teacher must have the same batch, height and width, got shapes "
            f"{tuple(features_student.shape)} and {tuple(features_teacher.shape)}; align the two maps first"
        )
    if weight_student.shape[0] != weight_teacher.shape[0]:
        raise ValueError(
            f"weight_student and weight_teacher must have the same number of rows, got {weight_student.shape[0]} and "
            f"{weight_teacher.shape[0]}"
        )
    tensors = (features_student, features_teacher, weight_student, weight_teacher)
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"features and weights must be on the same device, got {_listed(devices)}")
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1 and (torch.float64 in dtypes or not torch.is_autocast_enabled(features_student.device.type)):
        raise ValueError(
            f"features and weights must have the same dtype outside autocast and in float64, got {_listed(dtypes)}"
        )


def _listed(values: set[torch.dtype] | set[torch.device]) -> str:
    return " and ".join(sorted(map(str, values)))


def _triton_launcher() -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    try:
        from sward_kernels.windowed_features import launch  # a statement, which torch.compile can follow
    except ImportError as error:
        raise cannot_load("windowed_feature_distillation", error) from error
    return launch.windowed_feature_distillation
