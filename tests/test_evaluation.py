"""Scoring at label resolution, against counts made by hand."""

import json
import math

import pytest
import torch
from torch import Tensor, nn

from sward.data import DatasetInfo, EvaluationTransform, SegmentationDataset
from sward.evaluation import Evaluation, evaluate, predicted_labels


class TwoImages(SegmentationDataset):
    """Labels of two sizes, images of one."""

    def __init__(self, classes: int = 2) -> None:
        info = DatasetInfo("two", tuple("abc"[:classes]), ((0, 0, 0),) * classes)
        super().__init__(info, EvaluationTransform((4, 4)))
        half = torch.zeros(8, 8, dtype=torch.uint8)
        half[:, 4:] = 1
        quarter = torch.zeros(4, 4, dtype=torch.uint8)
        quarter[:2, :2] = 1
        quarter[3] = 255
        self.labels = [half, quarter]

    def __len__(self) -> int:
        return 2

    def read(self, index: int) -> tuple[Tensor, Tensor, str]:
        return torch.zeros(3, 8, 8, dtype=torch.uint8), self.labels[index], str(index)


class RightHalf(nn.Module):
    """Says class 1 in the right half of every image, at half the resolution."""

    def forward(self, images: Tensor) -> Tensor:
        logits = torch.zeros(images.shape[0], 2, 2, 2)
        logits[:, 0], logits[:, 1, :, 0], logits[:, 1, :, 1] = 0.0, -4.0, 4.0
        return logits


def test_scores_by_hand() -> None:
    result = evaluate(RightHalf(), TwoImages(), batch=2)
    # Image 0: all 32 foreground pixels of 64 hit. Image 1: 6 predicted, 4 labelled, none common, 12 counted.
    assert result.images == 2
    assert result.dice == pytest.approx((1.0 + 0.0) / 2)
    assert result.iou == pytest.approx((1.0 + 0.0) / 2)
    assert result.pooled_dice == pytest.approx(2 * 32 / (38 + 36))
    background, foreground = (32 + 2) / (32 + 2 + 4 + 6), 32 / (32 + 6 + 4)
    assert result.class_iou == {"a": pytest.approx(background), "b": pytest.approx(foreground)}
    assert result.mean_iou == pytest.approx((background + foreground) / 2)
    assert result.mean_accuracy == pytest.approx((34 / 40 + 32 / 36) / 2)


def test_training_mode_comes_back() -> None:
    model = nn.Sequential(RightHalf(), nn.Sequential(nn.BatchNorm2d(2))).train()
    model[1][0].eval()  # frozen, as in a network that is fine-tuned
    evaluate(model, TwoImages())
    assert (model.training, model[0].training, model[1].training, model[1][0].training) == (True, True, True, False)
    with pytest.raises(ValueError, match="predictions must be classes 0 to 1"):
        evaluate(nn.Sequential(RightHalf(), nn.ZeroPad3d((0, 0, 0, 0, 2, 0))).train(), TwoImages())
    assert model.training


def test_scoring_draws_nothing() -> None:
    before = torch.get_rng_state()
    evaluate(RightHalf(), TwoImages())
    assert torch.equal(torch.get_rng_state(), before)


def test_one_logit_is_foreground_where_positive() -> None:
    logits = torch.tensor([[-1.0, 2.0]]).view(1, 1, 1, 2)
    assert predicted_labels(logits, (1, 2)).tolist() == [[[0, 1]]]


def test_logits_are_upsampled_before_they_are_compared() -> None:
    # Upsampling labels would put the edge at column 2; upsampling logits moves it to where the two classes cross.
    logits = torch.tensor([[[[0.0, 0.0]], [[-1.0, 3.0]]]])
    assert predicted_labels(logits, (1, 4)).tolist() == [[[0, 0, 1, 1]]]
    logits = torch.tensor([[[[0.0, 0.0]], [[-3.0, 1.0]]]])
    assert predicted_labels(logits, (1, 4)).tolist() == [[[0, 0, 0, 1]]]


def test_dice_needs_two_classes() -> None:
    class Zeros(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.zeros(images.shape[0], 3, 4, 4)

    result = evaluate(Zeros(), TwoImages(classes=3))
    assert result.dice is None
    assert math.isnan(result.class_iou["c"])
    with pytest.raises(
        ValueError, match="metric must be 'mean_iou' or 'mean_dice' unless the data set has two classes, got 'dice'"
    ):
        result.score("dice")


@pytest.mark.parametrize(("classes", "iou"), [(2, math.nan), (3, None)])
def test_undefined_scores_come_back_from_json(classes: int, iou: float | None) -> None:
    names = "abc"[:classes]
    scores = Evaluation(1, 0.5, math.nan, {**dict.fromkeys(names, 0.25), "b": math.nan}, iou, iou, iou)
    text = json.dumps(scores.to_dict(), allow_nan=False)
    assert json.loads(text)["class_iou"]["b"] is None
    # repr: nan is not equal to itself.
    assert repr(Evaluation.from_dict(json.loads(text))) == repr(scores)


def test_dice_of_each_class_follows_from_its_iou() -> None:
    class Ramp(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.arange(48.0).view(1, 3, 4, 4).sin().expand(len(images), -1, -1, -1)

    result = evaluate(Ramp(), TwoImages(classes=3))
    for name, iou in result.class_iou.items():
        assert result.class_dice[name] == pytest.approx(2 * iou / (1 + iou), nan_ok=True)
    defined = [dice for dice in result.class_dice.values() if not math.isnan(dice)]
    assert result.mean_dice == result.score("mean_dice") == pytest.approx(sum(defined) / len(defined))
    old = {name: value for name, value in result.to_dict().items() if "dice" not in name} | {
        "dice": None,
        "pooled_dice": None,
    }
    assert math.isnan(Evaluation.from_dict(old).mean_dice)
