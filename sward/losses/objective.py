"""The total objective (Eq. 20): task loss, MWAD and PDR, weighted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sward.losses.global_mean import mean_count
from sward.losses.mwad import MWADLoss
from sward.losses.pairs import full_precision
from sward.losses.pdr import PDRLoss
from sward.losses.protocol import DistillationInputs, DistillationLoss, DistillationOutput
from sward.losses.recipes import RECOMMENDED
from sward_kernels.arguments import are_weights, shown
from sward_kernels.labels import class_indices_op


class SegmentationCrossEntropy(nn.Module):
    """The task loss: mean cross-entropy over labelled pixels, or binary cross-entropy for a single logit.

    Args:
        ignore_index: label that is left out of the mean. Default 255.
        process_group: processes whose labelled pixels the mean is over: with gradients averaged over processes, as
            `DistributedDataParallel` does, they are those of the global batch. Default: this process alone.

    Shapes:
        logits: `[B, K, H, W]`, or `[B, 1, H, W]` for a binary task with labels 0 and 1, computed in float32 at least;
        labels: `[B, H, W]` integers.
        If no pixel is labelled, the loss is 0 with zero gradient; plain cross-entropy would give NaN.

    Raises:
        ValueError: (when called) for logits or labels of other shapes or labels of another dtype; on the CPU, for a
            label that is neither a class nor `ignore_index` (on a GPU it is ignored, since a check would stall the
            device).
    """

    def __init__(self, ignore_index: int = 255, *, process_group: ProcessGroup | None = None) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.process_group = process_group

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        check_logits_and_labels(logits, labels)
        logits, num_classes = full_precision(logits), _num_classes(logits)
        classes = class_indices_op(labels, num_classes, self.ignore_index)
        valid = classes != num_classes
        if logits.shape[1] == 1:
            target = classes.where(valid, 0).to(logits.dtype)
            pixels = F.binary_cross_entropy_with_logits(logits[:, 0], target, reduction="none")
            total = pixels.where(valid, 0.0).sum()
        else:
            total = F.cross_entropy(logits, classes, ignore_index=num_classes, reduction="sum")
        return total / mean_count(valid, self.process_group)


def _num_classes(logits: Tensor) -> int:
    return max(2, logits.shape[1])


def check_logits_and_labels(logits: Tensor, labels: Tensor) -> None:
    """Raise a ValueError unless labels are integers `[B, H, W]` on the grid of logits `[B, K, H, W]`."""
    if logits.dim() != 4:
        raise ValueError(f"logits must be [B, K, H, W], got shape {tuple(logits.shape)}")
    if labels.dim() != 3:
        raise ValueError(f"labels must be [B, H, W], got shape {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must have an integer dtype, got {labels.dtype}")
    batch, _, height, width = logits.shape
    if labels.shape != (batch, height, width):
        raise ValueError(
            f"labels must be [{batch}, {height}, {width}], on the grid of logits {tuple(logits.shape)}, "
            f"got shape {tuple(labels.shape)}; resize the logits to the labels first"
        )


class SWARDOutput(NamedTuple):
    """Result of `SWARDLoss`."""

    loss: Tensor
    """Scalar with gradient, the weighted sum of Eq. 20."""
    task: Tensor
    """Task loss, unweighted and detached."""
    mwad: Tensor
    """MWAD loss, unweighted and detached."""
    pdr: Tensor
    """PDR loss, unweighted and detached."""
    terms: dict[str, Tensor]
    """Name -> detached fp32 scalar, unweighted: the three losses and the terms of MWAD and PDR."""


class SWARDLoss(nn.Module):
    """Eq. 20: `alpha task + beta MWAD + gamma PDR`, for a trainer of your own.

    Args:
        task: `(logits, labels) -> scalar`, such as `SegmentationCrossEntropy()`.
        mwad: windowed distillation between student and teacher.
        pdr: prototype regularization of the student; needed only where gamma is not 0.
        weights: alpha, beta, gamma. Default 1, 1, 0, the recommended recipe; the paper has 1, 2, 1 (section 4.1). A
            part of weight 0 is not computed; its inputs, and the parameters of MWAD and PDR, get gradient 0. The
            attribute `weights` may be changed between steps, for example to ramp a weight up; `torch.compile` compiles
            anew for each value, and stops doing so after a few (`torch._dynamo.config.recompile_limit`).

    Raises:
        ValueError: for `weights` that are not three finite numbers of at least 0, or if gamma is not 0 and `pdr` is
            missing.

    Examples:
        >>> import torch
        >>> from sward.losses import MWADLoss, SegmentationCrossEntropy, SWARDLoss
        >>> loss = SWARDLoss(SegmentationCrossEntropy(), MWADLoss([16], [96], window_size=4, embed_dim=8))
        >>> logits, labels = torch.randn(2, 3, 32, 32, requires_grad=True), torch.randint(0, 3, (2, 32, 32))
        >>> student, teacher = torch.randn(2, 16, 8, 8, requires_grad=True), torch.randn(2, 96, 8, 8)
        >>> out = loss(logits, labels, [student], [teacher])
        >>> out.loss.backward()
        >>> bool(out.loss > out.task)
        True
    """

    def __init__(
        self,
        task: Callable[[Tensor, Tensor], Tensor],
        mwad: MWADLoss,
        pdr: PDRLoss | None = None,
        weights: tuple[float, float, float] = (1.0, *RECOMMENDED.weights),
    ) -> None:
        super().__init__()
        _check_weights(weights, ("alpha", "beta", "gamma"))
        _require_pdr(pdr, weights[-1])
        self.task = task
        self.mwad = mwad
        self.pdr = pdr
        self.weights = weights

    def forward(
        self,
        logits: Tensor,
        labels: Tensor | None,
        student_features: Sequence[Tensor],
        teacher_features: Sequence[Tensor],
        pdr_features: Tensor | None = None,
    ) -> SWARDOutput:
        """Evaluate Eq. 20 for one batch.

        Args:
            logits: the student's `[B, K, H, W]`.
            labels: `[B, H, W]` integers at the logits' resolution. Rows that are all `ignore_index` are unlabelled
                images: MWAD sees them, the task loss and PDR do not. None if the whole batch is unlabelled: the loss is
                beta MWAD, the task loss and PDR are 0 with gradient 0 whatever their weights.
            student_features: the student's maps, as `MWADLoss` takes them.
            teacher_features: the teacher's maps, in the same order.
            pdr_features: the student's map for PDR. Default: the last of `student_features`.

        Raises:
            ValueError: if logits and PDR differ in the number of classes, or for what the three parts reject.
        """
        alpha, beta, gamma = self.weights
        if labels is None:
            alpha, gamma = 0.0, 0.0
        if gamma and self.pdr is not None and _num_classes(logits) != self.pdr.num_classes:
            raise ValueError(
                f"pdr must have as many classes as the logits {tuple(logits.shape)}, {_num_classes(logits)}, "
                f"got PDRLoss(num_classes={self.pdr.num_classes})"
            )
        task = self.task(logits, labels) if alpha and labels is not None else zero_loss([logits])
        relational = _mwad_and_pdr(
            self.mwad,
            self.pdr,
            (beta, gamma),
            student_features,
            teacher_features,
            student_features[-1] if pdr_features is None else pdr_features,
            labels,
        )
        terms = {"task": task.detach().float(), **relational.terms}
        return SWARDOutput(alpha * task + relational.loss, terms["task"], terms["mwad"], terms["pdr"], terms)


class SWARDDistillation(DistillationLoss):
    """MWAD and PDR as a `DistillationLoss`: Eq. 20 without its task loss.

    Args:
        mwad: windowed distillation, one stage per pair of taps.
        pdr: prototype regularization.
        student_taps: the student's layers for MWAD.
        teacher_taps: the teacher's layers, in the same order.
        pdr_tap: the student's layer for PDR. Default: the last of `student_taps`.
        weights: beta and gamma of Eq. 20. Default 1 and 0, the recommended recipe; the paper has 2 and 1. As in
            `SWARDLoss`, 0 is possible and the attribute may be changed.

    Raises:
        ValueError: for `weights` that are not two finite numbers of at least 0.
    """

    def __init__(
        self,
        mwad: MWADLoss,
        pdr: PDRLoss,
        *,
        student_taps: Sequence[str],
        teacher_taps: Sequence[str],
        pdr_tap: str | None = None,
        weights: tuple[float, float] = RECOMMENDED.weights,
    ) -> None:
        _check_weights(weights, ("beta", "gamma"))
        self.pdr_tap = student_taps[-1] if pdr_tap is None else pdr_tap
        super().__init__(list(dict.fromkeys((*student_taps, self.pdr_tap))), teacher_taps)
        self.stage_taps = tuple(student_taps)
        self.mwad = mwad
        self.pdr = pdr
        self.weights = weights

    def forward(self, inputs: DistillationInputs) -> DistillationOutput:
        return _mwad_and_pdr(
            self.mwad, self.pdr, self.weights, *self._stages(inputs), inputs.student[self.pdr_tap], inputs.labels
        )

    def diagnostics(self, inputs: DistillationInputs) -> dict[str, Tensor]:
        """Return the health of MWAD's projections, see `MWADLoss.diagnostics`; nothing if MWAD has weight 0."""
        return self.mwad.diagnostics(*self._stages(inputs)) if self.weights[0] else {}

    def _stages(self, inputs: DistillationInputs) -> tuple[list[Tensor], list[Tensor]]:
        return [inputs.student[tap] for tap in self.stage_taps], [inputs.teacher[tap] for tap in self.teacher_taps]


def _mwad_and_pdr(
    mwad: MWADLoss,
    pdr: PDRLoss | None,
    weights: tuple[float, float],
    student_features: Sequence[Tensor],
    teacher_features: Sequence[Tensor],
    pdr_features: Tensor,
    labels: Tensor | None,
) -> DistillationOutput:
    beta, gamma = weights
    zero = torch.zeros((), device=pdr_features.device)
    loss = zero
    lambdas = (0.0, 0.0) if pdr is None else pdr.terms
    terms = dict.fromkeys(("mwad", "attention", "value", "context", "pdr", "separation", "compactness"), zero)
    factors = {
        **{name: beta * weight for name, weight in zip(("attention", "value", "context"), mwad.terms)},
        **{name: gamma * weight for name, weight in zip(("separation", "compactness"), lambdas)},
    }
    if beta:
        relations = mwad(student_features, teacher_features)
        loss = loss + beta * relations.loss
        terms |= {
            "mwad": relations.loss.detach(),
            "attention": relations.attention,
            "value": relations.value,
            "context": relations.context,
        }
    else:
        loss = loss + zero_loss([*mwad.parameters(), *student_features])
    _require_pdr(pdr, gamma)
    if gamma and pdr is not None and labels is not None:
        prototypes = pdr(pdr_features, labels)
        loss = loss + gamma * prototypes.loss
        terms |= {
            "pdr": prototypes.loss.detach(),
            "separation": prototypes.separation,
            "compactness": prototypes.compactness,
        }
    else:
        loss = loss + zero_loss([pdr_features])
    return DistillationOutput(loss, terms, {name: factor * terms[name] for name, factor in factors.items()})


def _check_weights(weights: tuple[float, ...], names: tuple[str, ...]) -> None:
    if not are_weights(weights, len(names)):
        raise ValueError(
            f"weights must be {len(names)} finite numbers of at least 0, for {', '.join(names)}, got {shown(weights)}"
        )


def _require_pdr(pdr: PDRLoss | None, gamma: float) -> None:
    if gamma and pdr is None:
        raise ValueError(f"pdr must be a PDRLoss where its weight gamma is not 0, got None with gamma={gamma}")


def zero_loss(tensors: Iterable[Tensor]) -> Tensor:
    """The number 0 with gradient 0 to each of the tensors.

    It stands for a part of weight 0: `DistributedDataParallel` raises an error for parameters outside the graph.
    """
    return torch.stack([tensor[:0].sum().float() for tensor in tensors]).sum()
