"""Whole training runs: what they write, what they refuse, and that they repeat."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sward.config import DatasetConfig, OptimizerConfig, TapConfig, TeacherConfig
from sward.data import DatasetInfo
from sward.evaluation import Evaluation, evaluate
from sward.losses import LOGITS, DistillationInputs, DistillationLoss, DistillationOutput, SegmentationCrossEntropy
from sward.runs import train_student
from sward.runs.trial import try_step
from sward.training import checkpoints, loop
from sward.training.run_folder import RunFolder
from sward.training.teacher import FrozenTeacher
from tests.support.training_runs import assert_equal_runs, checkpoint, small

pytestmark = pytest.mark.usefixtures("few_images")


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path: Path) -> None:
    runs = [train_student(small(tmp_path / name, seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    a, b, c = (weights(run.run / "checkpoints" / "last.pt") for run in runs)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


def test_student_starts_from_the_same_weights_with_and_without_distillation(tmp_path: Path) -> None:
    tiny = OptimizerConfig(lr=1e-12, weight_decay=0.0)
    for method in ("none", "sward"):
        train_student(small(tmp_path / method, distillation=method, optimizer=tiny, iterations=1))
    none, sward = (weights(tmp_path / method / "checkpoints" / "last.pt") for method in ("none", "sward"))
    for key in none:
        torch.testing.assert_close(none[key], sward[key], rtol=0, atol=1e-9)


def test_metrics_name_every_term_and_the_loss_is_their_weighted_sum(tmp_path: Path) -> None:
    result = train_student(small(tmp_path / "run"))
    records = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
    for record in records[:4]:
        assert record["loss"] == pytest.approx(record["task"] + record["mwad"] + 0.1 * record["pdr"], rel=1e-5)
    assert records[-1]["validation"]["images"] == 4
    assert json.loads((result.run / "config.json").read_text())["sward"]["embed_dim"] == 8
    assert (result.run / "environment.json").exists()
    assert (result.run / "checkpoints" / "best.pt").exists()


def test_distillation_lowers_its_own_loss(tmp_path: Path) -> None:
    result = train_student(small(tmp_path / "run", iterations=80))
    records = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
    mwad = [record["mwad"] for record in records if "mwad" in record]
    assert sum(mwad[-5:]) < 0.5 * sum(mwad[:5])


def test_a_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    train_student(small(tmp_path / "run", distillation="none"))
    with pytest.raises(ValueError, match="already holds a run; resume it with --resume"):
        train_student(small(tmp_path / "run", distillation="none"))


def seven_channels() -> nn.Module:
    return nn.Conv2d(3, 7, 3, stride=4, padding=1)


def test_mistakes_are_found_before_any_work(tmp_path: Path) -> None:
    for changes, message in (
        (dict(epochs=2), "exactly one of iterations and epochs"),
        (dict(batch=100), "batch must be at most 18, the number of training images, got 100"),
        (dict(distillation="swrad"), "unknown distillation method 'swrad'; did you mean 'sward'"),
        (dict(model="unet"), "did you mean unext"),
        (
            dict(metric="dice"),
            "metric must be 'mean_iou' or 'mean_dice' unless the data set has two classes, got 'dice' with 5 classes",
        ),
        (dict(device="meta"), "device must be one that torch can compute on here, such as 'cpu', got 'meta'"),
        (dict(model=":"), "model ':' must be written as 'package.module:function'"),
        (dict(model="a b:c"), "model 'a b:c' must be written as 'package.module:function'"),
        (
            dict(dataset=DatasetConfig(image_size=(32, 32)), batch=1, distillation="none"),
            "batch must be at least 2 for batch norm",
        ),
        (
            dict(model=f"{__name__}:seven_channels", distillation="none"),
            f"logits of model '{__name__}:seven_channels' must have 5 channels, one per class, got 7",
        ),
        (
            dict(dataset=DatasetConfig(root=tmp_path)),
            "dataset.root must be None for scenes, which are generated, got '",
        ),
        (dict(device="tpu9"), "device must be a torch device such as 'cpu' or 'cuda', got 'tpu9'"),
    ):
        with pytest.raises(ValueError, match=message):
            train_student(small(tmp_path / "run", **changes))
    (tmp_path / "file").touch()
    cache = TeacherConfig(name="hiera_demo", untrained=True, cache=tmp_path / "file")
    with pytest.raises(ValueError, match=r"teacher\.cache must be a folder that can be written, got .*file"):
        train_student(small(tmp_path / "run", teacher=cache, dataset=DatasetConfig(image_size=(32, 32), views=1)))
    with pytest.raises(FileNotFoundError, match="train it with 'sward train-teacher demo'"):
        train_student(small(tmp_path / "run", teacher=TeacherConfig(name="hiera_demo", run=tmp_path / "nowhere")))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_batch_norm_images_change_statistics_and_no_weight(tmp_path: Path) -> None:
    states = []
    for name, images in (("running", None), ("estimated", 4)):
        train_student(small(tmp_path / name, iterations=3, batch_norm_images=images))
        states.append(checkpoints.load(RunFolder(tmp_path / name).last)["model"])
    running, estimated = states
    changed = {key for key in running if not torch.equal(running[key], estimated[key])}
    assert changed
    assert all("running_" in key or "num_batches" in key for key in changed)


def test_a_validation_that_failed_is_made_up_for_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Fixed views differ from epoch to epoch, and with them the statistics.
    dataset = DatasetConfig(name="scenes", image_size=(32, 32), views=2)
    options: dict[str, Any] = dict(
        distillation="none", dataset=dataset, iterations=8, evaluate_every=1, batch_norm_images=8
    )
    train_student(small(tmp_path / "whole", **options))
    failing = iter([True, False, True, False])

    def fail(*arguments: Any, **more: Any) -> Evaluation:
        if next(failing):
            raise ValueError("a mask broke")
        return evaluate(*arguments, **more)

    monkeypatch.setattr(loop, "evaluate", fail)
    for step in (4, 8):
        with pytest.raises(ValueError, match="a mask broke"):
            train_student(small(tmp_path / "run", **options, resume=step == 8))
        assert checkpoint(tmp_path / "run")["step"] == step
    train_student(small(tmp_path / "run", **options, resume=True))
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")


def test_a_run_without_a_defined_score_keeps_its_newest_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undefined = Evaluation(4, math.nan, math.nan, {})
    monkeypatch.setattr(loop, "evaluate", lambda *arguments, **options: undefined)
    train_student(small(tmp_path / "undefined", distillation="none"))
    assert checkpoints.load(tmp_path / "undefined/checkpoints/best.pt")["step"] == 4


class _LastIsPooled(nn.Module):
    """A layer that returns its map first and a pooled one last."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 4, stride=4)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.layer(images)
        return maps, maps.mean((-2, -1), keepdim=True)


class _Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stage, self.classify = _LastIsPooled(), nn.Conv2d(4, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.interpolate(self.classify(self.stage(images)[0]), images.shape[-2:])


class _TakesOneSize(DistillationLoss):
    def forward(self, inputs: DistillationInputs) -> DistillationOutput:
        maps = inputs.student["stage"]
        assert maps.shape[1:] == (4, 8, 8)
        return DistillationOutput(maps.mean(), {})


def test_the_trial_step_reads_layers_as_the_run_will(tmp_path: Path) -> None:
    student = _Student()
    teacher = FrozenTeacher(nn.Conv2d(3, 2, 1), [])
    config = small(tmp_path / "run", dataset=DatasetConfig(image_size=(32, 32)), student_taps=TapConfig(select=0))
    info = DatasetInfo("two", ("a", "b"), ((0, 0, 0), (1, 1, 1)))
    try_step(student, SegmentationCrossEntropy(), _TakesOneSize(["stage"], []), teacher, config, info)


def test_a_teacher_of_other_classes_cannot_label(tmp_path: Path) -> None:
    config = small(tmp_path / "run", dataset=DatasetConfig(image_size=(32, 32)), student_taps=TapConfig(select=0))
    info = DatasetInfo("two", ("a", "b"), ((0, 0, 0), (1, 1, 1)))
    student, teacher = _Student(), FrozenTeacher(nn.Conv2d(3, 3, 1), [LOGITS])
    with pytest.raises(ValueError, match="logits of the teacher must have 2 or 1 channels, one per class, got 3"):
        try_step(student, SegmentationCrossEntropy(), _TakesOneSize(["stage"], [LOGITS]), teacher, config, info)
