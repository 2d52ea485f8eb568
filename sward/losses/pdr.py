"""Prototype discriminative regularization (PDR), Eq. 16-19 of the paper."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sward.alignment import resize_labels
from sward_kernels import prototype_discrimination
from sward_kernels.prototypes.api import check_settings


class PDROutput(NamedTuple):
    """Result of `PDRLoss`."""

    loss: Tensor
    """fp32 scalar with gradient (Eq. 19)."""
    separation: Tensor
    """Hinge on the distances between class prototypes (Eq. 16), detached and unweighted."""
    compactness: Tensor
    """Mean trace of the class covariances (Eq. 17-18), detached and unweighted."""


class PDRLoss(nn.Module):
    """Push class prototypes at least a margin apart and tighten each class around its prototype.

    Args:
        num_classes: classes `K`; a one-logit binary task has 2.
        margin: distance `m` up to which two prototypes repel each other (Eq. 16). Default 1.3.
        terms: weights of the separation (`lambda_1`) and the compactness (`lambda_2`), Eq. 19. Default 1 and 1.
        ignore_index: label that belongs to no class, even inside `0..K-1`. Default 255.
        normalize: L2-normalise each pixel's features first. Default False, as in the paper.
        process_group: processes whose class statistics are merged, so that prototypes are those of the global
            batch. Default: this process alone.
        implementation: passed to `sward_kernels.prototype_discrimination`.

    Examples:
        >>> import torch
        >>> from sward.losses import PDRLoss
        >>> features = torch.tensor([[[[3.0, 0.0]]]])  # two pixels, one channel
        >>> labels = torch.tensor([[[0, 1]]])
        >>> out = PDRLoss(num_classes=2, margin=4.0)(features, labels)
        >>> out.separation, out.compactness  # prototypes 3 apart, margin 4; one pixel per class
        (tensor(1.), tensor(0.))

    Shapes:
        features: `[B, C, H, W]`, floating; labels: `[B, H_l, W_l]`, any integer dtype and resolution: they are resized
        to the features' grid by the label at each cell's centre.

    Raises:
        ValueError: for settings that `prototype_discrimination` does not take, or (when called) a label outside
            `0..num_classes-1` that is not `ignore_index`, on the CPU; on a GPU such a label is ignored, since a check
            would stall the device.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        margin: float = 1.3,
        terms: tuple[float, float] = (1.0, 1.0),
        ignore_index: int = 255,
        normalize: bool = False,
        process_group: ProcessGroup | None = None,
        implementation: str = "auto",
    ) -> None:
        super().__init__()
        check_settings(num_classes, margin, terms, implementation)
        self.num_classes = num_classes
        self.margin = margin
        self.terms = terms
        self.ignore_index = ignore_index
        self.normalize = normalize
        self.process_group = process_group
        self.implementation = implementation

    def forward(self, features: Tensor, labels: Tensor) -> PDROutput:
        """Regularise the features of one batch; see the class for shapes."""
        result = prototype_discrimination(
            features,
            resize_labels(labels, (features.shape[-2], features.shape[-1])),
            self.num_classes,
            margin=self.margin,
            terms=self.terms,
            ignore_index=self.ignore_index,
            normalize=self.normalize,
            process_group=self.process_group,
            implementation=self.implementation,
        )
        return PDROutput(result.loss, result.separation, result.compactness)

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, margin={self.margin}, terms={self.terms}, "
            f"ignore_index={self.ignore_index}, normalize={self.normalize}"
        )
