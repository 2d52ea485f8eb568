"""Segmentation metrics from exact integer counts.

There are two conventions; scores of one are not comparable with scores of the other:

- `ConfusionMatrix`: counts pooled over all pixels of all images, then one number per class, then the mean over
  classes. This is Cityscapes' mIoU and the mAcc (mean recall) of Table 1.
- `PerImageOverlap`: Dice and IoU of one foreground class in every image, then the mean over images. This is the
  default for polyps (Table 2). The paper does not state its averaging; its pairs of mDice and mIoU rule out pooling
  (pooled, IoU = D / (2 - D): a Dice of 89.53 would force an IoU of 81.0, the table has 85.27), and fit this best.
  `pooled_dice` and `pooled_iou` give the other convention from the same counts.

A ratio that counts no pixels (0 / 0) is nan and is left out of the mean.
"""

from __future__ import annotations

import torch
from torch import Tensor


class ConfusionMatrix:
    """Pixel counts, int64 `[num_classes, num_classes]`: row = label, column = prediction.

    `counts` may be summed over processes directly: `torch.distributed.all_reduce(matrix.counts)`.

    Args:
        num_classes: number of classes K, at least 2.
        ignore_index: label value whose pixels are not counted.
        device: device of the counts; predictions and labels must be on it too.

    Examples:
        >>> import torch
        >>> from sward.metrics import ConfusionMatrix
        >>> matrix = ConfusionMatrix(num_classes=2)
        >>> matrix.update(predictions=torch.tensor([[0, 1, 1, 1]]), labels=torch.tensor([[0, 0, 1, 255]]))
        >>> matrix.counts
        tensor([[1, 1],
                [0, 1]])
        >>> float(matrix.mean_iou())
        0.5
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, device: torch.device | str | None = None) -> None:
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        if 0 <= ignore_index < num_classes:
            raise ValueError(f"ignore_index must not be one of the {num_classes} classes, got {ignore_index}")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Count a batch.

        Args:
            predictions: class indices, any integer dtype, `[B, H, W]` or `[H, W]`.
            labels: class indices or `ignore_index`, any integer dtype, the same shape.

        Raises:
            ValueError: shapes differ, a tensor is not integer, or a counted value is not a class.
        """
        _check_pair(predictions, labels)
        counted = labels != self.ignore_index
        labels, predictions = labels[counted].long(), predictions[counted].long()
        _check_range("labels", labels, self.num_classes, f", or ignore_index {self.ignore_index}")
        _check_range("predictions", predictions, self.num_classes)
        pairs = torch.bincount(labels * self.num_classes + predictions, minlength=self.num_classes**2)
        self.counts += pairs.view_as(self.counts)

    def merge(self, other: ConfusionMatrix) -> None:
        """Add the counts of `other`, which must have the same classes."""
        if (self.num_classes, self.ignore_index) != (other.num_classes, other.ignore_index):
            raise ValueError(
                f"cannot merge counts of {other.num_classes} classes (ignore_index {other.ignore_index}) into "
                f"{self.num_classes} classes (ignore_index {self.ignore_index})"
            )
        self.counts += other.counts.to(self.counts.device)

    def iou(self) -> Tensor:
        """Return the intersection over union, float64 `[K]`; nan for a class in neither labels nor predictions."""
        hits, predicted, labelled = self._margins()
        return hits / (predicted + labelled - hits)

    def dice(self) -> Tensor:
        """Return the Dice coefficient 2 |P and L| / (|P| + |L|), float64 `[K]`; nan for a class in neither."""
        hits, predicted, labelled = self._margins()
        return 2 * hits / (predicted + labelled)

    def accuracy(self) -> Tensor:
        """Return the recall of each class, float64 `[K]`; nan for a class without labelled pixels.

        A class that is predicted but never labelled has no recall and is left out of the mean, as in mmsegmentation;
        the macro `MulticlassAccuracy` of torchmetrics counts it as 0.
        """
        hits, _, labelled = self._margins()
        return hits / labelled

    def mean_iou(self) -> float:
        """Return the mIoU: the mean of `iou` over the classes where it is defined, nan if there are none."""
        return self.iou().nanmean().item()

    def mean_dice(self) -> float:
        """Return the mean of `dice` over the classes where it is defined, nan if there are none."""
        return self.dice().nanmean().item()

    def mean_accuracy(self) -> float:
        """Return the mAcc: the mean of `accuracy` over the classes where it is defined, nan if there are none."""
        return self.accuracy().nanmean().item()

    def _margins(self) -> tuple[Tensor, Tensor, Tensor]:
        counts = self.counts.cpu().double()
        return counts.diagonal(), counts.sum(0), counts.sum(1)


class PerImageOverlap:
    """Dice and IoU of one foreground class, image by image.

    An image where the foreground is in neither labels nor prediction scores 1: the network is right that nothing is
    there. An image with a prediction but no labelled foreground, or the reverse, scores 0. An image whose pixels are
    all ignored scores nan and is left out of the mean.

    `counts` is int64 `[N, 4]`, one row per image in the order of the updates: intersection, predicted foreground,
    labelled foreground, all pixels that are not ignored. Rows gathered from several processes may be concatenated.

    Args:
        foreground: the class to score.
        ignore_index: label value whose pixels are not counted.
    """

    def __init__(self, foreground: int = 1, ignore_index: int = 255) -> None:
        if foreground == ignore_index:
            raise ValueError(f"foreground must differ from ignore_index, got {foreground} for both")
        self.foreground = foreground
        self.ignore_index = ignore_index
        self.counts = torch.zeros(0, 4, dtype=torch.int64)

    @torch.no_grad()
    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Count a batch: class indices `[B, H, W]` or one image `[H, W]`, any integer dtype, equal shapes.

        Raises:
            ValueError: shapes differ or a tensor is not integer.
        """
        _check_pair(predictions, labels)
        if labels.ndim == 2:
            predictions, labels = predictions[None], labels[None]
        counted = labels != self.ignore_index
        predicted = (predictions == self.foreground) & counted
        labelled = labels == self.foreground
        rows = [region.flatten(1).sum(1) for region in (predicted & labelled, predicted, labelled, counted)]
        self.counts = torch.cat([self.counts, torch.stack(rows, dim=1).cpu()])

    def merge(self, other: PerImageOverlap) -> None:
        """Append the images of `other`."""
        if (self.foreground, self.ignore_index) != (other.foreground, other.ignore_index):
            raise ValueError(
                f"cannot merge class {other.foreground} (ignore_index {other.ignore_index}) into class "
                f"{self.foreground} (ignore_index {self.ignore_index})"
            )
        self.counts = torch.cat([self.counts, other.counts])

    def dice(self) -> Tensor:
        """Return the Dice of every image, float64 `[N]`."""
        return _dice(self.counts.double())

    def iou(self) -> Tensor:
        """Return the IoU of every image, float64 `[N]`."""
        return _iou(self.counts.double())

    def mean_dice(self) -> float:
        """Return the mDice: the mean over images, nan if every pixel is ignored."""
        return self.dice().nanmean().item()

    def mean_iou(self) -> float:
        """Return the mIoU of the foreground: the mean over images, nan if every pixel is ignored."""
        return self.iou().nanmean().item()

    def pooled_dice(self) -> float:
        """Return the Dice over the pixels of all images."""
        return _dice(self.counts.double().sum(0)).item()

    def pooled_iou(self) -> float:
        """Return the IoU over the pixels of all images."""
        return _iou(self.counts.double().sum(0)).item()


def _dice(counts: Tensor) -> Tensor:
    hits, predicted, labelled, counted = counts.unbind(-1)
    return _share(2 * hits, predicted + labelled, counted)


def _iou(counts: Tensor) -> Tensor:
    hits, predicted, labelled, counted = counts.unbind(-1)
    return _share(hits, predicted + labelled - hits, counted)


def _share(part: Tensor, whole: Tensor, counted: Tensor) -> Tensor:
    """Return `part / whole`: 1 where nothing is predicted or labelled, nan where no pixel counts."""
    return (part / whole).where(whole > 0, 1.0).where(counted > 0, torch.nan)


def _check_pair(predictions: Tensor, labels: Tensor) -> None:
    if predictions.shape != labels.shape or labels.ndim not in (2, 3):
        raise ValueError(
            "predictions and labels must have the same shape [B, H, W] or [H, W], "
            f"got {list(predictions.shape)} and {list(labels.shape)}"
        )
    for name, tensor in (("predictions", predictions), ("labels", labels)):
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise ValueError(f"{name} must hold class indices of an integer dtype, got {tensor.dtype}")


def _check_range(name: str, values: Tensor, num_classes: int, otherwise: str = "") -> None:
    if values.numel() == 0:
        return
    lowest, highest = (int(bound) for bound in values.aminmax())
    if lowest < 0 or highest >= num_classes:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"{name} must be classes 0 to {num_classes - 1}{otherwise}, got {wrong}")
