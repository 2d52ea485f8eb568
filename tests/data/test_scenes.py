"""Generated scenes: repeatable, balanced enough to learn from, and hard where they mean to be."""

import numpy as np
import pytest
import torch

from sward import data
from sward.data import scenes
from sward.data.scenes import BACKGROUND, INFO, render
from tests.support.executed_lines import count_lines


def test_a_scene_is_a_function_of_seed_index_and_size() -> None:
    image, labels = render(3, 5, 64, 96)
    again, same = render(3, 5, 64, 96)
    assert image.shape == (64, 96, 3)
    assert labels.shape == (64, 96)
    assert image.dtype == labels.dtype == np.uint8
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(labels, same)
    for other in (render(3, 6, 64, 96), render(4, 5, 64, 96)):
        assert (image != other[0]).mean() > 0.9


@pytest.mark.parametrize("size", [32, 64])
def test_a_picture_for_figures_is_the_same_scene_with_more_pixels(size: int) -> None:
    """At 32 pixels the textures are as coarse as the images need them, in the picture too."""
    dataset = data.build("scenes", "val", train=False, image_size=size)
    for index in range(6):
        image, labels, _ = dataset.read(index)
        large, large_labels = dataset.picture(index)
        assert large.shape == (3, 4 * size, 4 * size)
        # The label at the corner of four pixels may differ along an outline.
        assert (large_labels[::4, ::4] == labels).float().mean() > 0.93
        averaged = torch.nn.functional.avg_pool2d(large.float(), 4)
        difference = (averaged - image).abs().mean()
        other = (averaged - dataset.read(index + 6)[0]).abs().mean()
        assert difference < 0.5 * other


def test_scenes_leave_global_random_states_alone() -> None:
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002 - the global state is what is being watched
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    data.build("scenes", "train", train=True, image_size=64)[0]
    assert torch.equal(before[0], torch.get_rng_state())
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002


def test_splits_share_no_image_and_longer_splits_keep_their_images() -> None:
    train, val, test = (data.build("scenes", split, train=False, image_size=64) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (1024, 128, 128)
    assert not torch.equal(train[0].image, val[0].image)
    assert not torch.equal(val[0].image, test[0].image)
    longer = data.build("scenes", "val", train=False, image_size=64, count=300)
    assert len(longer) == 300
    assert torch.equal(longer[127].image, val[127].image)
    with pytest.raises(IndexError, match="scenes has 128 samples"):
        val[128]


def test_a_series_has_training_images_of_its_own_and_the_same_validation() -> None:
    student, teacher, third = (
        data.build("scenes", "train", train=False, image_size=64, count=8, series=series) for series in range(3)
    )
    pictures = [sample.image for dataset in (student, teacher, third) for sample in dataset]
    pictures += [data.build("scenes", split, train=False, image_size=64)[0].image for split in ("val", "test")]
    assert len({picture.numpy().tobytes() for picture in pictures}) == 3 * 8 + 2
    plain, other = (data.build("scenes", "val", train=False, image_size=64, series=series) for series in (0, 1))
    assert torch.equal(plain[3].image, other[3].image)


def test_the_seed_changes_the_flips_but_not_the_scenes() -> None:
    first, second = (data.build("scenes", "train", train=False, image_size=64, seed=seed) for seed in (0, 1))
    assert torch.equal(first[4].image, second[4].image)
    flipped = [data.build("scenes", "train", train=True, image_size=64, seed=seed)[4].labels for seed in range(12)]
    plain = first[4].labels
    variants = [plain, plain.flip(0), plain.flip(1), plain.flip(0, 1)]
    matches = {next(i for i, variant in enumerate(variants) if torch.equal(variant, each)) for each in flipped}
    assert matches == {0, 1, 2, 3}


def test_every_class_is_there_and_none_takes_all() -> None:
    labels = [render(0, index, 128, 128)[1] for index in range(60)]
    shares = np.bincount(np.concatenate(labels, axis=None), minlength=5) / (60 * 128 * 128)
    assert 0.5 < shares[BACKGROUND] < 0.75
    assert shares[BACKGROUND + 1 :].min() > 0.05
    present = np.array([[(each == label).any() for label in range(5)] for each in labels])
    assert present.mean(0).min() > 0.4


def test_colour_gives_the_classes_away_no_better_than_chance() -> None:
    """The nearest class mean in colour, what a network without any context could learn, hardly beats the prior."""
    scenes = [render(0, index, 128, 128) for index in range(40)]
    pixels = np.concatenate([image.reshape(-1, 3) for image, _ in scenes]).astype(float)
    labels = np.concatenate([label.ravel() for _, label in scenes])
    means = np.stack([pixels[labels == label].mean(0) for label in range(5)])
    nearest = ((pixels[:, None] - means) ** 2).sum(-1).argmin(1)
    recall = [(nearest == label)[labels == label].mean() for label in range(5)]
    assert np.mean(recall) < 0.3


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (128, 256), (96, 64)])
def test_sizes(size: tuple[int, int]) -> None:
    sample = data.build("scenes", "train", train=True, image_size=size)[1]
    assert sample.image.shape == (3, *size)
    assert sample.labels.shape == size
    assert sample.image.dtype == torch.float32
    assert sample.labels.dtype == torch.int64
    assert int(sample.labels.max()) < INFO.num_classes


@pytest.mark.parametrize("index", range(4))
def test_drawing_never_loops_over_pixels(index: int) -> None:
    """Only array operations grow with the image: sixteen times the pixels run not one more line of Python."""
    few, many = (count_lines(lambda side=side: render(0, index, side, side), scenes) for side in (64, 256))
    assert few == many
    assert few < 64 * 64 / 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "training"}, "split must be train, val or test for scenes, got 'training'"),
        ({"image_size": 16}, r"at least 32, got \(16, 16\)"),
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"series": -1}, "series must be 0 or more, got -1"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
    ],
)
def test_wrong_settings(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.build("scenes", **{"split": "train", "train": True, "image_size": 64, **options})
