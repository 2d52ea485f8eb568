"""Metrics against hand-counted images, against torchmetrics where the definitions coincide, and their invariants."""

import math

import pytest
import torch
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
from torchmetrics.segmentation import DiceScore, MeanIoU

from sward.metrics import ConfusionMatrix, PerImageOverlap


def random_batch(num_classes: int, batch: int = 6, size: int = 23) -> tuple[Tensor, Tensor]:
    """Predictions right about half the time, and labels with a tenth of the pixels ignored."""
    labels = torch.randint(0, num_classes, (batch, size, size))
    guesses = torch.randint(0, num_classes, labels.shape)
    predictions = torch.where(torch.rand(labels.shape) < 0.5, labels, guesses)
    return predictions, labels.masked_fill(torch.rand(labels.shape) < 0.1, 255)


def test_confusion_matrix_counted_by_hand() -> None:
    labels = torch.tensor([[0, 0, 1, 1], [1, 2, 255, 255]])
    predictions = torch.tensor([[0, 1, 1, 1], [0, 2, 2, 0]])
    matrix = ConfusionMatrix(4)
    matrix.update(predictions, labels)
    assert matrix.counts.dtype == torch.int64
    assert matrix.counts.tolist() == [[1, 1, 0, 0], [1, 2, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert matrix.iou().tolist() == pytest.approx([1 / 3, 2 / 4, 1, math.nan], nan_ok=True)
    assert matrix.dice().tolist() == pytest.approx([2 / 4, 4 / 6, 1, math.nan], nan_ok=True)
    assert matrix.accuracy().tolist() == pytest.approx([1 / 2, 2 / 3, 1, math.nan], nan_ok=True)
    assert matrix.mean_iou() == pytest.approx((1 / 3 + 1 / 2 + 1) / 3)
    assert matrix.mean_dice() == pytest.approx((1 / 2 + 2 / 3 + 1) / 3)
    assert matrix.mean_accuracy() == pytest.approx((1 / 2 + 2 / 3 + 1) / 3)


def test_class_predicted_but_never_labelled_has_iou_zero_and_no_recall() -> None:
    matrix = ConfusionMatrix(3)
    matrix.update(torch.tensor([[0, 2]]), torch.tensor([[0, 0]]))
    assert matrix.iou().tolist() == pytest.approx([0.5, math.nan, 0], nan_ok=True)
    assert matrix.mean_iou() == 0.25
    assert matrix.mean_accuracy() == 0.5


def test_nothing_labelled_means_nan() -> None:
    matrix, overlap = ConfusionMatrix(2), PerImageOverlap()
    assert math.isnan(matrix.mean_iou())
    assert math.isnan(overlap.mean_dice())
    ignored = torch.full((2, 3, 3), 255)
    matrix.update(torch.ones_like(ignored), ignored)
    overlap.update(torch.ones_like(ignored), ignored)
    assert math.isnan(matrix.mean_accuracy())
    assert overlap.dice().isnan().all()
    assert math.isnan(overlap.pooled_iou())


@pytest.mark.parametrize("num_classes", [2, 5, 19])
def test_agrees_with_torchmetrics_on_pooled_iou_and_recall(num_classes: int) -> None:
    matrix = ConfusionMatrix(num_classes)
    jaccard = MulticlassJaccardIndex(num_classes, average=None, ignore_index=255)
    mean_jaccard = MulticlassJaccardIndex(num_classes, average="macro", ignore_index=255)
    recall = MulticlassAccuracy(num_classes, average="macro", ignore_index=255)
    for _ in range(3):
        predictions, labels = random_batch(num_classes)
        matrix.update(predictions, labels)
        for metric in (jaccard, mean_jaccard, recall):
            metric.update(predictions, labels)
    assert matrix.iou().tolist() == pytest.approx(jaccard.compute().tolist(), abs=1e-6)
    assert matrix.mean_iou() == pytest.approx(mean_jaccard.compute().item(), abs=1e-6)
    assert matrix.mean_accuracy() == pytest.approx(recall.compute().item(), abs=1e-6)


def test_agrees_with_torchmetrics_on_per_image_dice_and_iou() -> None:
    # torchmetrics knows no ignore_index here, so nothing is ignored; its IoU is averaged image by image.
    predictions, labels = torch.randint(0, 2, (2, 7, 20, 20))
    overlap = PerImageOverlap()
    overlap.update(predictions, labels)
    settings = {"num_classes": 2, "include_background": False, "input_format": "index"}
    dice = DiceScore(aggregation_level="samplewise", average="macro", **settings)
    pooled = DiceScore(aggregation_level="global", average="macro", **settings)
    iou = MeanIoU(**settings)
    for metric in (dice, pooled, iou):
        metric.update(predictions, labels)
    assert overlap.mean_dice() == pytest.approx(dice.compute().item(), abs=1e-6)
    assert overlap.pooled_dice() == pytest.approx(pooled.compute().item(), abs=1e-6)
    assert overlap.mean_iou() == pytest.approx(iou.compute().item(), abs=1e-6)


def test_images_without_foreground_reward_predicting_none() -> None:
    empty = torch.zeros(4, 2, 2, dtype=torch.long)
    overlap = PerImageOverlap()
    overlap.update(torch.stack([*empty[:3], empty[0] + 1]), empty)
    assert overlap.mean_dice() == 0.75
    assert PerImageOverlap().pooled_dice() != 1
    overlap.update(empty[0], torch.full((2, 2), 255))
    assert overlap.mean_dice() == 0.75


def test_per_image_overlap_counted_by_hand() -> None:
    labels = torch.tensor([[[1, 1, 0, 255]], [[0, 0, 0, 0]], [[0, 0, 0, 0]], [[1, 1, 1, 1]]])
    predictions = torch.tensor([[[1, 0, 1, 1]], [[0, 0, 0, 0]], [[1, 0, 0, 0]], [[1, 1, 1, 1]]])
    overlap = PerImageOverlap()
    overlap.update(predictions, labels)
    assert overlap.counts.tolist() == [[1, 2, 2, 3], [0, 0, 0, 4], [0, 1, 0, 4], [4, 4, 4, 4]]
    assert overlap.dice().tolist() == pytest.approx([0.5, 1, 0, 1])
    assert overlap.iou().tolist() == pytest.approx([1 / 3, 1, 0, 1])
    assert overlap.mean_dice() == pytest.approx(2.5 / 4)
    assert overlap.mean_iou() == pytest.approx((1 / 3 + 1 + 0 + 1) / 4)
    assert overlap.pooled_dice() == pytest.approx(10 / 13)
    assert overlap.pooled_iou() == pytest.approx(5 / 8)


def test_pooled_overlap_is_the_confusion_matrix() -> None:
    predictions, labels = random_batch(2)
    matrix, overlap = ConfusionMatrix(2), PerImageOverlap()
    matrix.update(predictions, labels)
    overlap.update(predictions, labels)
    assert overlap.pooled_dice() == matrix.dice()[1].item()
    assert overlap.pooled_iou() == matrix.iou()[1].item()
    assert overlap.pooled_iou() == pytest.approx(overlap.pooled_dice() / (2 - overlap.pooled_dice()))
    # Jensen: image by image, IoU is a convex function of Dice, so its mean is at least that of the mean.
    assert overlap.mean_iou() >= overlap.mean_dice() / (2 - overlap.mean_dice())


def test_parts_merge_to_the_whole() -> None:
    predictions, labels = random_batch(5)
    whole, images = ConfusionMatrix(5), PerImageOverlap(foreground=3)
    whole.update(predictions, labels)
    images.update(predictions, labels)
    parts, rows = ConfusionMatrix(5), PerImageOverlap(foreground=3)
    for half in (slice(0, 4), slice(4, None)):
        part, row = ConfusionMatrix(5), PerImageOverlap(foreground=3)
        part.update(predictions[half], labels[half])
        row.update(predictions[half], labels[half])
        parts.merge(part)
        rows.merge(row)
    assert torch.equal(parts.counts, whole.counts)
    assert torch.equal(rows.counts, images.counts)


def test_integer_dtypes_and_single_images_count_alike() -> None:
    predictions, labels = random_batch(5)
    expected, expected_rows = ConfusionMatrix(5), PerImageOverlap()
    expected.update(predictions, labels)
    expected_rows.update(predictions, labels)
    matrix, rows = ConfusionMatrix(5), PerImageOverlap()
    for prediction, label in zip(predictions, labels, strict=True):
        matrix.update(prediction.int(), label.to(torch.uint8))
        rows.update(prediction.to(torch.uint8), label.int())
    assert torch.equal(matrix.counts, expected.counts)
    assert torch.equal(rows.counts, expected_rows.counts)


def test_counts_are_exact_past_float32() -> None:
    matrix = ConfusionMatrix(2)
    matrix.counts[0, 0] = 2**40
    matrix.update(torch.tensor([[0]]), torch.tensor([[0]]))
    assert matrix.counts[0, 0] == 2**40 + 1


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        (torch.zeros(1, 2, 2).long(), torch.zeros(1, 2, 3).long(), r"same shape .* got \[1, 2, 2\] and \[1, 2, 3\]"),
        (torch.zeros(1, 2, 2), torch.zeros(1, 2, 2).long(), "predictions must hold class indices .* torch.float32"),
        (
            torch.zeros(1, 2, 2).long(),
            torch.full((1, 2, 2), 7),
            "labels must be classes 0 to 2, or ignore_index 255, got 7",
        ),
        (
            torch.zeros(1, 2, 2).long(),
            torch.full((1, 2, 2), -1),
            "labels must be classes 0 to 2, or ignore_index 255, got -1",
        ),
        (torch.full((1, 2, 2), 3), torch.zeros(1, 2, 2).long(), "predictions must be classes 0 to 2, got 3"),
    ],
)
def test_refuses_what_cannot_be_counted(predictions: Tensor, labels: Tensor, message: str) -> None:
    matrix = ConfusionMatrix(3)
    with pytest.raises(ValueError, match=message):
        matrix.update(predictions, labels)
    assert matrix.counts.sum() == 0


def test_refuses_settings_and_merges_that_contradict() -> None:
    with pytest.raises(ValueError, match="ignore_index must not be one of the 2 classes, got 1"):
        ConfusionMatrix(2, ignore_index=1)
    with pytest.raises(ValueError, match="num_classes must be at least 2"):
        ConfusionMatrix(1)
    with pytest.raises(ValueError, match=r"3 classes .* into 2 classes"):
        ConfusionMatrix(2).merge(ConfusionMatrix(3))
    with pytest.raises(ValueError, match="foreground must differ from ignore_index, got 255 for both"):
        PerImageOverlap(foreground=255)
    with pytest.raises(ValueError, match="cannot merge class 2"):
        PerImageOverlap(1).merge(PerImageOverlap(2))
