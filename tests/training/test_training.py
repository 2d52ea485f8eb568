"""The loop, its batches and schedules, and resuming."""

import json
import math
from pathlib import Path

import pytest
import torch

from sward import checkpointing, data
from sward.config import OptimizerConfig, TeacherConfig
from sward.runs import train_student
from sward.tracking import RunFolder
from sward.training import EpochSampler, batches, estimate_batch_norm, learning_rate
from tests.support.training_runs import SPLITS, small


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    for split, count in SPLITS.items():
        monkeypatch.setitem(data.scenes.SPLITS, split, count)


def test_sampler_visits_every_image_once_and_differently_each_epoch() -> None:
    sampler = EpochSampler(11, 5, seed=1)
    first = list(sampler)
    sampler.epoch = 1
    assert [len(batch) for batch in first] == [5, 5]
    assert len({index for batch in first for index in batch}) == 10
    assert list(sampler) != first
    sampler.epoch, sampler.skip = 0, 1
    assert list(sampler) == first[1:]


def test_processes_take_parts_of_the_same_global_batch() -> None:
    whole = list(EpochSampler(20, 6, seed=1))
    parts = [list(EpochSampler(20, 6, seed=1, part=part, parts=3)) for part in range(3)]
    assert [[index for part in batch for index in part] for batch in zip(*parts)] == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_started_late_are_those_of_the_whole_stream(workers: int) -> None:
    dataset = data.build("scenes", "train", image_size=(32, 32), train=True, seed=5)
    whole = batches(dataset, 4, seed=5)
    expected = [next(whole) for _ in range(9)]
    late = batches(dataset, 4, seed=5, workers=workers, start=6)
    for sample in expected[6:]:
        image, labels, names = next(late)
        assert names == sample.name
        assert torch.equal(image, sample.image)
        assert torch.equal(labels, sample.labels)


def test_schedules_by_hand() -> None:
    poly = learning_rate(OptimizerConfig(schedule="poly", power=0.9), 10)
    assert [poly(0), poly(5), poly(10)] == pytest.approx([1.0, 0.5**0.9, 0.0])
    cosine = learning_rate(OptimizerConfig(schedule="cosine"), 8)
    assert [cosine(0), cosine(2), cosine(4), cosine(8)] == pytest.approx([1.0, 0.5 + math.sqrt(0.5) / 2, 0.5, 0.0])
    warm = learning_rate(OptimizerConfig(schedule="cosine", warmup=4), 8)
    assert [warm(0), warm(3), warm(4), warm(6)] == pytest.approx([0.25, 1.0, 1.0, 0.5])


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
        assert record["loss"] == pytest.approx(record["task"] + 2 * record["mwad"] + record["pdr"], rel=1e-5)
    assert records[-1]["validation"]["images"] == 4
    assert json.loads((result.run / "config.json").read_text())["sward"]["embed_dim"] == 8
    assert (result.run / "environment.json").exists()
    assert (result.run / "checkpoints" / "best.pt").exists()


def test_distillation_lowers_its_own_loss(tmp_path: Path) -> None:
    result = train_student(small(tmp_path / "run", iterations=40))
    records = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
    mwad = [record["mwad"] for record in records if "mwad" in record]
    assert sum(mwad[-5:]) < 0.5 * sum(mwad[:5])


def test_a_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    train_student(small(tmp_path / "run", distillation="none"))
    with pytest.raises(ValueError, match="already holds a run; continue it with --resume"):
        train_student(small(tmp_path / "run", distillation="none"))


def test_mistakes_are_found_before_any_work(tmp_path: Path) -> None:
    for changes, message in (
        (dict(epochs=2), "exactly one of iterations and epochs"),
        (dict(batch=100), "batch is 100, but the training set has only 18 images"),
        (dict(distillation="swrad"), "unknown distillation method 'swrad'; did you mean 'sward'"),
        (dict(model="unet"), "did you mean unext"),
        (dict(device="tpu9"), "device 'tpu9' is not a device"),
    ):
        with pytest.raises(ValueError, match=message):
            train_student(small(tmp_path / "run", **changes))
    with pytest.raises(FileNotFoundError, match="train it with 'sward train-teacher demo'"):
        train_student(small(tmp_path / "run", teacher=TeacherConfig(name="hiera_demo", run=tmp_path / "nowhere")))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_batch_norm_takes_the_statistics_of_whole_batches_and_leaves_random_numbers_alone() -> None:
    dataset = data.build("scenes", "train", image_size=(32, 32), train=True, seed=5)
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3, momentum=0.01), torch.nn.Dropout()).eval()
    before = torch.get_rng_state()
    estimate_batch_norm(model, dataset, images=7, batch=3)
    views = torch.stack([dataset[index].image for index in range(6)])
    torch.testing.assert_close(model[0].running_mean, views.mean((0, 2, 3)))
    variances = torch.stack([half.transpose(0, 1).flatten(1).var(1) for half in views.split(3)])
    torch.testing.assert_close(model[0].running_var, variances.mean(0))
    assert model[0].momentum == 0.01
    assert not model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_batch_norm_images_change_statistics_and_no_weight(tmp_path: Path) -> None:
    states = []
    for name, images in (("running", None), ("estimated", 4)):
        train_student(small(tmp_path / name, iterations=3, batch_norm_images=images))
        states.append(checkpointing.load(RunFolder(tmp_path / name).last)["model"])
    running, estimated = states
    changed = {key for key in running if not torch.equal(running[key], estimated[key])}
    assert changed
    assert all("running_" in key or "num_batches" in key for key in changed)
