"""Hundreds of steps: half precision stays finite for every method, and the memory of a run does not grow."""

from __future__ import annotations

import math
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sward import methods, models
from sward.config import Precision, TeacherConfig
from sward.data import DatasetInfo, EvaluationTransform, SegmentationDataset
from sward.data.sample import voc_palette
from sward.evaluation import evaluate
from sward.losses import SegmentationCrossEntropy
from sward.runs import train_student
from sward.training import TrainingStep
from sward.training.observation import forget_peak_memory, peak_memory
from tests.support.training_runs import SMALL_SCENES, checkpoint, records, small, small_cirkd, teach

pytestmark = pytest.mark.usefixtures("few_images")


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of a few steps and the masks of the methods that need some."""
    folder = tmp_path_factory.mktemp("taught")
    teach(folder, iterations=20)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("method", ["none", *methods.METHODS])
def test_half_precision_stays_finite(
    method: str, precision: Precision, taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(methods.METHODS, "cirkd", small_cirkd)
    config = small(
        tmp_path / "run",
        distillation=method,
        dataset=SMALL_SCENES,
        iterations=500,
        precision=precision,
        teacher=TeacherConfig(run=taught / "teacher", masks=taught / f"{method}.pt", precision="bf16"),
    )
    train_student(config)
    losses = [record["loss"] for record in records(config.output) if "loss" in record]
    assert len(losses) == 500
    assert all(map(math.isfinite, losses))
    assert sum(losses[-50:]) < sum(losses[:50])
    assert all(value.isfinite().all() for value in checkpoint(config.output)["model"].values())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["none", "sward"])
def test_memory_does_not_grow_over_2000_steps(method: str, tmp_path: Path) -> None:
    config = small(tmp_path / "run", distillation=method, dataset=SMALL_SCENES, batch=2, iterations=2000, log_every=100)
    train_student(config)
    peaks = {record["step"]: record["peak_memory_bytes"] for record in records(config.output) if "loss" in record}
    # Allocators settle within the first steps; a leak of one small map per step would be 100 MB.
    assert peaks[2000] - peaks[500] < 2**24


class Large(SegmentationDataset):
    """Images of 2048x1024 pixels with 150 classes."""

    def __init__(self) -> None:
        info = DatasetInfo("large", tuple(map(str, range(150))), voc_palette(150))
        super().__init__(info, EvaluationTransform())

    def __len__(self) -> int:
        return 2

    def read(self, index: int) -> tuple[Tensor, Tensor, str]:
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(0, 256, (3, 1024, 2048), generator=generator, dtype=torch.uint8)
        return image, torch.randint(0, 150, (1024, 2048), generator=generator, dtype=torch.uint8), str(index)


def added_memory(work: str, connection: Any) -> None:
    torch.set_num_threads(1)
    network, dataset = models.build("unext", 150), Large()
    forget_peak_memory(torch.device("cpu"))
    before = peak_memory(torch.device("cpu")) or 0
    if work == "evaluate":
        evaluate(network, dataset, batch=1)
    else:
        sample = dataset[0]
        step = TrainingStep(network, SegmentationCrossEntropy())
        step(sample.image[None], sample.labels[None].long(), {}).loss.backward()
    connection.send((peak_memory(torch.device("cpu")) or 0) - before)


LOGITS = 150 * 1024 * 2048 * 4
"""Bytes of the logits of one image in float32."""


@pytest.mark.slow
@pytest.mark.parametrize(("work", "maps"), [("evaluate", 3.0), ("train", 6.0)])
def test_large_images_with_many_classes_stay_within_a_few_maps_of_logits(work: str, maps: float) -> None:
    mine, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=added_memory, args=(work, theirs))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert mine.recv() < maps * LOGITS
