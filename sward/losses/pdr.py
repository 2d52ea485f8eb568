"""Prototype discriminative regularization (PDR), Eq. 16-19 of the paper."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sward.alignment import resize_labels
from sward_kernels import prototype_discrimination
from sward_kernels.prototypes.api import check_settings


class PDROutput(NamedTuple):
    """Result of `PDRLoss`.

    Attributes:
        loss: fp32 scalar with gradient (Eq. 19).
        separation: hinge on the distances between class prototypes (Eq. 16), detached and unweighted.
        compactness: mean trace of the class covariances (Eq. 17-18), detached and unweighted.
    """

    loss: Tensor
    separation: Tensor
    compactness: Tensor


class PDRLoss(nn.Module):
    """Pushes class prototypes at least a margin apart and tightens each class around its prototype.

    Args:
        num_classes: classes `K`; a one-logit binary task has 2.
        margin: least distance `m` between two prototypes (Eq. 16). Default 1.3.
        weights: `lambda_1` of the separation and `lambda_2` of the compactness (Eq. 19). Default 1 and 1.
        ignore_index: label that belongs to no class, even inside `0..K-1`. Default 255.
        normalize: L2-normalise each pixel's features first. Default no, as the paper is written.
        process_group: processes whose class statistics are merged, so that prototypes are those of the global
            batch. Default: this process alone.
        implementation: handed to `sward_kernels.prototype_discrimination`.

    Shapes:
        features: `[B, C, H, W]`, floating; labels: `[B, H_l, W_l]`, any integer dtype, any resolution: they are
        resized to the features' grid, each cell taking the label at its centre.

    Raises:
        ValueError: for settings that `prototype_discrimination` does not take, or (when called) a label outside
            `0..num_classes-1` that is not `ignore_index`, on the CPU; on a GPU such a label is ignored, since looking
            would stall the device.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        margin: float = 1.3,
        weights: tuple[float, float] = (1.0, 1.0),
        ignore_index: int = 255,
        normalize: bool = False,
        process_group: ProcessGroup | None = None,
        implementation: str = "auto",
    ) -> None:
        super().__init__()
        check_settings(num_classes, margin, weights, implementation)
        self.num_classes = num_classes
        self.margin = margin
        self.weights = weights
        self.ignore_index = ignore_index
        self.normalize = normalize
        self.process_group = process_group
        self.implementation = implementation

    def forward(self, features: Tensor, labels: Tensor) -> PDROutput:
        """Regularises the features of one batch; see the class for shapes."""
        result = prototype_discrimination(
            features,
            resize_labels(labels, (features.shape[-2], features.shape[-1])),
            self.num_classes,
            margin=self.margin,
            weights=self.weights,
            ignore_index=self.ignore_index,
            normalize=self.normalize,
            process_group=self.process_group,
            implementation=self.implementation,
        )
        return PDROutput(result.loss, result.separation, result.compactness)

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, margin={self.margin}, weights={self.weights}, "
            f"ignore_index={self.ignore_index}, normalize={self.normalize}"
        )
