"""The order of the training images does not depend on workers, processes or where a run starts."""

import pytest
import torch

from sward import data
from sward.training.batches import EpochSampler, batches

pytestmark = pytest.mark.usefixtures("few_images")


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
    for batch in expected[6:]:
        images, labels, names, teacher_images = next(late)
        assert names == batch.names
        assert torch.equal(images, batch.images)
        assert torch.equal(labels, batch.labels)
        assert teacher_images is batch.teacher_images is None
