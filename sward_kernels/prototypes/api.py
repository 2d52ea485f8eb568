"""The public function of the prototype regularization: checks its arguments and dispatches to an implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sward_kernels.arguments import are_weights, require_count, require_tensor, require_weight, shown
from sward_kernels.fallback import cannot_load, require_known, warn_once
from sward_kernels.labels import class_indices_op
from sward_kernels.prototypes import closed_form, eager, native, reference
from sward_kernels.prototypes.passes import Passes
from sward_kernels.registration import without_autocast

IMPLEMENTATIONS = ("auto", "reference", "eager", "compiled", "native", "triton")


class PrototypeDiscrimination(NamedTuple):
    """Result of `prototype_discrimination`; floating tensors are fp32, or float64 for float64 features."""

    loss: Tensor
    """Scalar, the weighted sum of the two terms (Eq. 19), with gradient to the features."""
    separation: Tensor
    """Scalar, Eq. 16, unweighted and detached."""
    compactness: Tensor
    """Scalar, Eq. 17-18, unweighted and detached."""
    prototypes: Tensor
    """`[K, C]` class means, detached; rows of absent classes are 0."""
    counts: Tensor
    """`[K]` int64, the number of pixels per class."""


def prototype_discrimination(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    margin: float = 1.3,
    terms: tuple[float, float] = (1.0, 1.0),
    ignore_index: int = 255,
    normalize: bool = False,
    process_group: ProcessGroup | None = None,
    implementation: str = "auto",
) -> PrototypeDiscrimination:
    """Push class prototypes a margin apart and pull each pixel's features to its prototype (Eq. 16-19).

    With `n_k` pixels f of class k in the batch, their mean `mu_k`, and `K'` classes that have at least one pixel::

        separation  = 2 / (K' (K' - 1)) * sum over pairs i < j of max(0, margin - |mu_i - mu_j|)    (0 if K' < 2)
        compactness = 1 / K' * sum over k with n_k >= 2 of sum_f |f - mu_k|^2 / (n_k - 1)           (0 if K' = 0)
        loss        = terms[0] * separation + terms[1] * compactness

    Gradients also flow through the prototypes. Two equal prototypes get gradient 0 from each other.

    Args:
        features: `[B, C, H, W]`, any floating dtype and strides (neither NCHW nor channels_last is copied), finite;
            16-bit features are computed in fp32, also under autocast.
        labels: `[B, H, W]`, any integer dtype, on the grid and the device of the features.
        num_classes: classes `K`, at least 1.
        margin: distance up to which two prototypes repel each other, at least 0.
        terms: weights of separation and compactness, each at least 0.
        ignore_index: label that belongs to no class, even inside `0..K-1`.
        normalize: scale each pixel's features to length 1 first, without a normalised copy in memory. A zero vector
            stays zero and gets gradient 0. Prototypes are then means of unit vectors.
        process_group: processes whose statistics (never their features) are merged, so that every process returns the
            loss of the whole batch. A process may have no labelled pixel at all. The gradient is that of the sum of
            all processes' losses, the world size times the gradient of one. Averaged over processes, as
            `DistributedDataParallel` does, the parameters' gradients equal those of one process with the whole batch.
            Divide by the world size if you sum gradients yourself.
        implementation: `"reference"` (plain autograd PyTorch, the specification), `"eager"` (closed-form gradient in
            cache-sized chunks, any device), `"native"` (the same two passes in C++: fp32 on a CPU, compiled for it on
            first use), `"compiled"` (native where it supports the call, eager
            elsewhere: eager through `torch.compile` is slower), `"triton"`, or `"auto"`: triton on GPU tensors,
            compiled elsewhere. Where there is no C++ compiler for compiled or auto, or triton cannot run a call of
            auto, eager runs with a warning.

    Returns:
        `PrototypeDiscrimination(loss, separation, compactness, prototypes, counts)`.

    Raises:
        ValueError: for an argument that does not fit the above; on the CPU, for a label that is neither a class nor
            `ignore_index` (on a GPU such a label is ignored, since a check would stall the device).
        NotImplementedError: if `"native"` or `"triton"` is named explicitly and cannot run this call.

    Source: SWARD, Eq. 16-19. Differentiable once (twice with `"reference"`).
    """
    check_settings(num_classes, margin, terms, implementation)
    _check(features, labels, ignore_index, normalize)
    arguments = (features, labels, num_classes, margin, terms, ignore_index, normalize, process_group)
    # Every implementation chooses its own precision; autocast would lower it in the middle of the formulas.
    with without_autocast(features.device):
        if implementation == "reference":
            classes = class_indices_op(labels, num_classes, ignore_index)
            loss, *values, prototypes, counts = reference.prototype_discrimination(
                features, classes, num_classes, margin, terms, normalize, process_group
            )
            separation, compactness = (value.detach() for value in values)
            return PrototypeDiscrimination(loss, separation, compactness, prototypes.detach(), counts)
        passes = _choose_passes(implementation, features, num_classes)
        return PrototypeDiscrimination(*closed_form.prototype_discrimination(*arguments, passes))


def _choose_passes(implementation: str, features: Tensor, num_classes: int) -> Passes:
    wanted = implementation
    if wanted == "auto":
        wanted = "triton" if features.is_cuda else "compiled"  # is_cuda is true for ROCm tensors too
    if wanted == "compiled":
        wanted = "native" if native.serves(features) else "eager"
    try:
        if wanted == "triton":
            passes = _triton_passes(features, num_classes)
            return _or_eager(passes) if implementation == "auto" else passes
        if wanted == "native":
            native.require_support(features)
            return native.passes
    except NotImplementedError as reason:
        if implementation == wanted:
            raise
        warn_once(f"prototype_discrimination runs eager instead of {wanted}: {reason}", stacklevel=4)
    return eager.passes


def _or_eager(triton: Passes) -> Passes:
    """The passes of triton, and those of eager, with a warning, where Triton turns out to be unable to compile one."""

    def choose(first: Callable[..., Any], second: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            try:
                return first(*arguments)
            except NotImplementedError as reason:
                warn_once(f"prototype_discrimination runs eager instead of triton: {reason}", stacklevel=2)
                return second(*arguments)

        return run

    return Passes(
        choose(triton.statistics, eager.passes.statistics),
        choose(triton.gradient, eager.passes.gradient),
        triton.closed_form and choose(triton.closed_form, closed_form.in_precision_of),
    )


def _triton_passes(features: Tensor, num_classes: int) -> Passes:
    try:
        from sward_kernels.prototypes import launch
    except ImportError as error:
        raise cannot_load("prototype_discrimination", error) from error
    launch.require_support(features, num_classes)
    return launch.passes


def check_settings(num_classes: int, margin: float, terms: tuple[float, float], implementation: str) -> None:
    """Raise ValueError for settings that `prototype_discrimination` does not take."""
    require_known(implementation, IMPLEMENTATIONS)
    require_count("num_classes", num_classes)
    require_weight("margin", margin)
    if not are_weights(terms, 2):
        raise ValueError(
            f"terms must be two finite numbers of at least 0, for separation and compactness, got {shown(terms)}"
        )


def _check(features: Tensor, labels: Tensor, ignore_index: int, normalize: bool) -> None:
    require_tensor("features", features)
    require_tensor("labels", labels)
    if not isinstance(ignore_index, int):
        raise ValueError(f"ignore_index must be an int, got {ignore_index!r}")
    if not isinstance(normalize, bool):
        raise ValueError(f"normalize must be True or False, got {normalize!r}")
    if features.dim() != 4 or 0 in features.shape:
        raise ValueError(f"features must be a non-empty [B, C, H, W], got shape {tuple(features.shape)}")
    if not features.is_floating_point():
        raise ValueError(f"features must have a floating dtype, got {features.dtype}")
    batch, _, height, width = features.shape
    if labels.shape != (batch, height, width):
        raise ValueError(
            f"labels must be [B, H, W] = [{batch}, {height}, {width}], on the grid of features, got shape "
            f"{tuple(labels.shape)}; resize labels by nearest neighbour first"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must have an integer dtype, got {labels.dtype}")
    if labels.device != features.device:
        raise ValueError(f"features and labels must be on the same device, got {features.device} and {labels.device}")
