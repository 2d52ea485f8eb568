"""Task losses against torch, torchvision and sums by hand; ignored pixels never matter."""

import math
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss

from sward.losses import SegmentationCrossEntropy, TaskLoss
from sward.losses.task import TaskName, median_frequency_weights

NAMES = get_args(TaskName)
WEIGHTS = (0.5, 2.0, 1.0)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.randn(4, 3, 6, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 3, (4, 6, 5))
    labels[0, :3] = 255
    labels[1] = 255
    return logits, labels


def test_cross_entropy_is_that_of_torch(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = batch
    expected = F.cross_entropy(logits, labels, torch.tensor(WEIGHTS).double(), ignore_index=255, label_smoothing=0.1)
    torch.testing.assert_close(TaskLoss("ce", class_weights=WEIGHTS, label_smoothing=0.1)(logits, labels), expected)
    torch.testing.assert_close(TaskLoss("ce")(logits, labels), SegmentationCrossEntropy()(logits, labels))


def test_dice_by_hand(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = batch
    losses = []
    for chances, truth in zip(logits.softmax(1), labels):
        valid = truth != 255
        for label in range(3):
            target = (truth == label)[valid].double()
            if target.any():
                predicted = chances[label][valid]
                losses.append(1 - 2 * (predicted * target).sum() / (predicted.sum() + target.sum()))
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(TaskLoss("dice")(logits, labels), expected)
    torch.testing.assert_close(
        TaskLoss("ce+dice")(logits, labels), expected + SegmentationCrossEntropy()(logits, labels)
    )
    right = 50 * F.one_hot(labels.where(labels != 255, 0), 3).movedim(-1, 1).double()
    assert TaskLoss("dice")(right, labels) == pytest.approx(0, abs=1e-9)


def test_focal_is_that_of_torchvision(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = batch[0][:, :1], batch[1].clamp(max=255)
    labels = labels.where(labels != 2, 1)
    valid = labels != 255
    expected = sigmoid_focal_loss(logits[:, 0][valid], labels[valid].double(), alpha=-1, gamma=2, reduction="mean")
    torch.testing.assert_close(TaskLoss("focal")(logits, labels), expected)


def test_focal_with_class_weights_by_hand() -> None:
    # Probabilities of the labelled classes: 1/2 of class 0, 3/4 of class 1; the third pixel is ignored.
    logits = torch.tensor([[0.0, 0.0, 5.0], [0.0, math.log(3), 1.0]]).view(1, 2, 1, 3)
    labels = torch.tensor([0, 1, 255]).view(1, 1, 3)
    total = 0.5 * (1 / 2) ** 2 * math.log(2) + 2.0 * (1 / 4) ** 2 * math.log(4 / 3)
    loss = TaskLoss("focal", class_weights=(0.5, 2.0))(logits, labels)
    assert loss.item() == pytest.approx(total / (0.5 + 2.0))


@pytest.mark.parametrize("name", NAMES)
def test_ignored_pixels_change_nothing_and_get_no_gradient(
    name: TaskName, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    logits, labels = batch
    loss = TaskLoss(name)(logits, labels)
    loss.backward()
    ignored = (labels == 255)[:, None].expand_as(logits)
    assert (logits.grad[ignored] == 0).all()
    assert (logits.grad[~ignored] != 0).all()
    other = torch.where(ignored, 100 * torch.randn_like(logits), logits)
    torch.testing.assert_close(TaskLoss(name)(other, labels), loss)
    # Images without labels, as --unlabelled adds them, are no part of the mean.
    more = torch.cat([logits, torch.randn_like(logits)]), torch.cat([labels, torch.full_like(labels, 255)])
    torch.testing.assert_close(TaskLoss(name)(*more), loss)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_labelled_is_zero(name: TaskName) -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = TaskLoss(name, class_weights=None if name == "dice" else WEIGHTS)(logits, torch.full((2, 4, 4), 255))
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


def test_weights_from_shares() -> None:
    assert median_frequency_weights([0.9, 0.06, 0.04]) == pytest.approx([0.06 / 0.9, 1, 1.5])
    assert median_frequency_weights([0.9, 0.1, 0.0]) == pytest.approx([0.5 / 0.9, 5, 0])
    with pytest.raises(ValueError, match=r"class_weights must be numbers where no pixel .* has a class, got auto"):
        median_frequency_weights([0.0, 0.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(name="bce"), "task must be one of ce, dice, ce.dice, focal, got 'bce'"),
        (dict(name="focal", label_smoothing=0.1), "label_smoothing must be 0 to 1 with ce and 0 without"),
        (dict(name="ce", label_smoothing=1.0), "label_smoothing must be"),
        (dict(name="dice", class_weights=WEIGHTS), "for ce and focal only"),
        (dict(name="ce", class_weights=(1.0, -1.0)), "class_weights must be 0 or more"),
        (dict(name="ce", class_weights=(1.0, float("nan"))), "class_weights must be 0 or more"),
        (dict(name="focal", class_weights=(1.0, float("inf"))), "class_weights must be 0 or more"),
    ],
)
def test_options_that_do_not_fit(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskLoss(**options)


def test_one_weight_per_class(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="class_weights must be 3 numbers, one per class, got 2"):
        TaskLoss("ce", class_weights=(1.0, 2.0))(*batch)
