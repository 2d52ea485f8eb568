"""Score a network on a data set, at the resolution of the labels."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.data import DataLoader

from sward.data import Sample, SegmentationDataset, TeacherSample, collate_evaluation
from sward.features import evaluating
from sward.metrics import ConfusionMatrix, PerImageOverlap


@dataclass
class Evaluation:
    """Scores as fractions of 1; `sward.metrics` defines them."""

    images: int
    """Number of images scored."""
    mean_iou: float
    """IoU per class over all pixels, mean over classes."""
    mean_accuracy: float
    """Recall per class over all pixels, mean over classes."""
    class_iou: dict[str, float]
    """IoU of each class by name; nan for a class that occurs in neither labels nor predictions."""
    dice: float | None = None
    """Dice of the foreground, mean over images (the convention of Table 2); None unless there are two classes."""
    iou: float | None = None
    """IoU of the foreground, mean over images; None unless there are two classes."""
    pooled_dice: float | None = None
    """Dice of the foreground over all pixels of all images; None unless there are two classes."""
    per_image: dict[str, list[float]] | None = field(default=None, repr=False)
    """`"dice"` and `"iou"` of the foreground per image, in the order of the data set; None unless there are two
    classes."""
    mean_dice: float = math.nan
    """Dice per class over all pixels, mean over classes."""
    class_dice: dict[str, float] = field(default_factory=dict)
    """Dice of each class by name, over all pixels; nan for a class that occurs in neither labels nor predictions."""

    def to_dict(self) -> dict[str, Any]:
        """Return all scores but `per_image` as JSON values; nan becomes None, since JSON has no nan."""
        scores = self.to_dict_with_images()
        del scores["per_image"]
        return scores

    def to_dict_with_images(self) -> dict[str, Any]:
        """As `to_dict`, with `per_image`."""
        scores: dict[str, Any] = json.loads(json.dumps(asdict(self)), parse_constant=lambda constant: None)
        return scores

    @classmethod
    def from_dict(cls, scores: Mapping[str, Any]) -> Evaluation:
        """Inverse of `to_dict`: None becomes nan. Ignores other entries, such as those that `evaluate_run` adds."""
        newer = ("per_image", "mean_dice", "class_dice")
        found = {each.name: scores[each.name] for each in fields(cls) if each.name not in newer}
        found["mean_dice"] = _number(scores.get("mean_dice"))
        found["class_dice"] = {name: _number(dice) for name, dice in scores.get("class_dice", {}).items()}
        found["class_iou"] = {name: _number(iou) for name, iou in scores["class_iou"].items()}
        if scores.get("per_image") is not None:
            found["per_image"] = {name: list(map(_number, values)) for name, values in scores["per_image"].items()}
        overlaps = ("dice", "iou", "pooled_dice") if len(scores["class_iou"]) == 2 else ()
        for name in ("mean_iou", "mean_accuracy", *overlaps):
            found[name] = _number(found[name])
        return cls(**found)

    def score(self, metric: str) -> float:
        """Return the score named `metric`, for picking the best checkpoint; -inf if it is nan.

        Raises:
            ValueError: if `metric` is `"dice"` and the data set does not have two classes.
        """
        value = getattr(self, metric)
        if value is None:
            raise ValueError(
                f"metric must be 'mean_iou' or 'mean_dice' unless the data set has two classes, got {metric!r}"
            )
        return -math.inf if math.isnan(value) else value


def _number(stored: float | None) -> float:
    return math.nan if stored is None else stored


def predicted_labels(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Predict the class of every pixel: upsample logits `[B, K, H, W]` to `size` bilinearly, then take the argmax.

    With one logit (K = 1) the class is 1 where the logit is positive. Returns int64 `[B, *size]`.
    """
    if tuple(logits.shape[-2:]) != tuple(size):
        logits = F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
    return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)


@torch.no_grad()
def predict_sample(network: nn.Module, sample: Sample | TeacherSample) -> Tensor:
    """Predict the class of every pixel of one sample at the resolution of its labels, int64 `[H, W]`.

    Args:
        network: in eval mode, on the CPU.
        sample: a sample of an evaluation split.
    """
    size = (sample.labels.shape[-2], sample.labels.shape[-1])
    return predicted_labels(network(sample.image[None]), size)[0]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: SegmentationDataset,
    *,
    batch: int = 8,
    device: torch.device | str = "cpu",
    advance: Callable[[], None] | None = None,
    process_group: ProcessGroup | None = None,
) -> Evaluation:
    """Score `model` on `dataset`.

    Args:
        model: `[B, 3, H, W]` -> logits `[B, K, h, w]`. Runs in eval mode; every module gets its own mode back.
        dataset: an evaluation split (`sward.data.build(..., train=False)`).
        batch: images per forward pass.
        device: where the model is.
        advance: called after each batch, for a progress bar.
        process_group: processes that share the batches. All of them must call this; all return the same scores,
            exactly those of a single process. Default: this process alone.
    """
    rank, processes = (0, 1) if process_group is None else (dist.get_rank(process_group), process_group.size())
    # Split whole batches: each batch holds the same images as in a single process, so the logits are bit-identical.
    everyone = [list(range(start, min(start + batch, len(dataset)))) for start in range(0, len(dataset), batch)]
    info = dataset.info
    matrix = ConfusionMatrix(info.num_classes, info.ignore_index)
    overlap = PerImageOverlap(ignore_index=info.ignore_index) if info.num_classes == 2 else None
    # Its own generator: a loader draws from one, and dropout must not depend on how often a run is validated.
    loader = DataLoader(
        dataset,
        batch_sampler=everyone[rank::processes],
        collate_fn=collate_evaluation,
        generator=torch.Generator(),
    )
    with evaluating(model):
        for images, labels, _ in loader:
            logits = model(images.to(device))
            for index, label in enumerate(labels):
                size = (label.shape[-2], label.shape[-1])
                prediction = predicted_labels(logits[index : index + 1], size)[0].cpu()
                matrix.update(prediction, label)
                if overlap is not None:
                    overlap.update(prediction, label)
            if advance is not None:
                advance()
    if process_group is not None:
        dist.all_reduce(matrix.counts, group=process_group)
        if overlap is not None:
            overlap.counts = _in_order(overlap.counts, everyone, process_group)
    return Evaluation(
        images=len(dataset),
        mean_iou=matrix.mean_iou(),
        mean_accuracy=matrix.mean_accuracy(),
        class_iou=dict(zip(info.classes, matrix.iou().tolist())),
        mean_dice=matrix.mean_dice(),
        class_dice=dict(zip(info.classes, matrix.dice().tolist())),
        dice=None if overlap is None else overlap.mean_dice(),
        iou=None if overlap is None else overlap.mean_iou(),
        pooled_dice=None if overlap is None else overlap.pooled_dice(),
        per_image=None if overlap is None else {"dice": overlap.dice().tolist(), "iou": overlap.iou().tolist()},
    )


def _in_order(counts: Tensor, everyone: list[list[int]], process_group: ProcessGroup) -> Tensor:
    mine = everyone[dist.get_rank(process_group) :: process_group.size()]
    rows = counts.new_zeros(sum(map(len, everyone)), counts.shape[1])
    rows[[index for indices in mine for index in indices]] = counts
    dist.all_reduce(rows, group=process_group)
    return rows
