"""Transforms: image and labels stay together, sizes, fills, statistics."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from sward.data import transforms
from sward.data.transforms import (
    EvaluationTransform,
    FlipRotateResize,
    ScaleCrop,
    TrainingTransform,
    denormalise,
    flip_training,
    normalise,
    parse_size,
    polyp_training,
    resize_image,
    street_training,
)


def squares(height: int, width: int, side: int = 16) -> tuple[Tensor, Tensor]:
    """Labels 0 to 3 in squares, and an image whose grey is 40 + 50 * label: the label can be read off the image."""
    y, x = torch.meshgrid(torch.arange(height) // side, torch.arange(width) // side, indexing="ij")
    labels = ((y + 2 * x) % 4).to(torch.uint8)
    return (40 + 50 * labels).expand(3, -1, -1).contiguous(), labels


def read_off(image: Tensor) -> Tensor:
    """The label each pixel of a `squares` image stands for, 255 where it is black fill."""
    grey = denormalise(image).float().mean(0)
    return torch.where(grey < 15, 255, ((grey - 40) / 50).round().clamp(0, 3)).long()


def test_normalise_is_torchvision_with_imagenet_statistics() -> None:
    image = torch.randint(0, 256, (3, 9, 7), dtype=torch.uint8)
    expected = v2.functional.normalize(
        v2.functional.to_dtype(image, torch.float32, scale=True), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    )
    torch.testing.assert_close(normalise(image), expected)
    assert torch.equal(denormalise(normalise(image)), image)
    batch = torch.stack([image, image])
    assert torch.equal(normalise(batch)[1], normalise(image))


@pytest.mark.parametrize(
    ("transform", "size"),
    [
        (street_training((64, 96)), (64, 96)),
        (street_training((64, 64), resize_first=True), (64, 64)),
        (TrainingTransform([ScaleCrop((96, 96), (0.3, 0.4))]), (96, 96)),
        (flip_training(), (160, 224)),
        (TrainingTransform(polyp_training((128, 128)).steps[:-1]), (128, 128)),  # without the colour jitter
    ],
)
def test_labels_follow_the_image(transform: TrainingTransform, size: tuple[int, int]) -> None:
    image, labels = squares(160, 224, side=40)
    for seed in range(8):
        torch.manual_seed(seed)
        moved, moved_labels = transform(image, labels)
        assert moved.shape == (3, *size)
        assert moved_labels.shape == size
        assert moved.dtype == torch.float32
        assert moved_labels.dtype == torch.int64
        assert type(moved) is type(moved_labels) is Tensor
        # Interpolated edges may read as a class in between; everything else must agree.
        assert (read_off(moved) == moved_labels).float().mean() > 0.75
        assert set(moved_labels.unique().tolist()) <= {0, 1, 2, 3, 255}


@pytest.mark.parametrize("factor", [1.75, 2])
@pytest.mark.parametrize(
    "transform",
    [
        street_training((64, 96)),
        street_training((64, 96), resize_first=True),
        polyp_training((64, 96)),
        flip_training((64, 96)),
    ],
    ids=["crop", "resize and crop", "rotate", "flip"],
)
def test_the_same_draws_at_another_size_are_the_same_view(transform: TrainingTransform, factor: float) -> None:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (1, 3, 8, 12), generator=generator).float()
    image = torch.nn.functional.interpolate(coarse, size=(240, 360), mode="bicubic").clamp(0, 255)[0].to(torch.uint8)
    labels = torch.zeros(240, 360, dtype=torch.uint8)
    size = round(64 * factor), round(96 * factor)
    larger = transform.at(size)
    shapes, differences, others = set(), [], []
    for seed in range(8):
        torch.manual_seed(seed)
        view = transform(image, labels)[0]
        torch.manual_seed(seed)
        again = larger(image, labels)[0]
        shapes.add(tuple(again.shape))
        resized = torch.nn.functional.interpolate(again[None], size=(64, 96), mode="bilinear", antialias=True)[0]
        # Fill of the crop, and the row beside it, may end a pixel earlier or later.
        inside = (denormalise(view) > 8).all(0) & (denormalise(resized) > 8).all(0)
        differences.append((view - resized).abs()[:, inside].mean())
        others.append((view - resized.flip(-1)).abs()[:, inside].mean())
    assert shapes == {(3, *size)}
    assert max(differences) < 0.1
    assert min(others) > 4 * max(differences)


def test_flips_at_another_size_take_the_label_at_the_centre_of_each_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(v2.RandomHorizontalFlip, "__init__", lambda self: v2.Transform.__init__(self))
    monkeypatch.setattr(v2.RandomHorizontalFlip, "forward", lambda self, *pair: pair)
    monkeypatch.setattr(v2.RandomVerticalFlip, "forward", lambda self, *pair: pair)
    # A column of 9 labels in 3 pixels: their centres are those of labels 1, 4 and 7; `v2.Resize` takes 0, 3 and 6.
    labels = torch.arange(9, dtype=torch.uint8)[:, None].expand(9, 6).contiguous()
    moved_image, moved = flip_training().at((3, 2))(torch.zeros(3, 9, 6, dtype=torch.uint8), labels)
    assert moved.tolist() == [[1, 1], [4, 4], [7, 7]]
    assert moved_image.shape == (3, 3, 2)


def test_a_transform_of_your_own_has_no_other_size() -> None:
    with pytest.raises(ValueError, match=r"resized must be given .* got None for \(64, 64\)"):
        TrainingTransform([]).at((64, 64))


def test_crop_larger_than_the_scaled_image_is_filled_with_black_and_ignore() -> None:
    image, labels = torch.full((3, 32, 32), 255, dtype=torch.uint8), torch.ones(32, 32, dtype=torch.uint8)
    moved, moved_labels = TrainingTransform([ScaleCrop((64, 64), (1.0, 1.0))])(image, labels)
    assert (moved_labels == 1).sum() == 32 * 32
    assert (moved_labels == 255).sum() == 64 * 64 - 32 * 32
    assert (denormalise(moved)[0][moved_labels == 255] == 0).all()
    assert (denormalise(moved)[0][moved_labels == 1] == 255).all()


def test_scale_crop_at_scale_one_is_a_plain_crop() -> None:
    image, labels = squares(96, 128)
    torch.manual_seed(1)
    moved, moved_labels = TrainingTransform([ScaleCrop((32, 64), (1.0, 1.0))])(image, labels)
    windows = labels.unfold(0, 32, 1).unfold(1, 64, 1)
    assert (windows == moved_labels).all(-1).all(-1).any()
    assert torch.equal(read_off(moved), moved_labels)


def test_scale_crop_draws_scales_over_the_whole_range() -> None:
    """A stripe of known width measures the scale that was drawn."""
    image = torch.zeros(3, 128, 256, dtype=torch.uint8)
    labels = torch.zeros(128, 256, dtype=torch.uint8)
    labels[:, 64:192] = 1
    labels = labels.roll(32, 1)
    widths = []
    for seed in range(200):
        torch.manual_seed(seed)
        out = TrainingTransform([ScaleCrop((128, 1024), (0.5, 2.0))])(image, labels)[1]
        widths.append(int((out[64] == 1).sum()) / 128)
    assert 0.5 <= min(widths) < 0.55
    assert 1.85 < max(widths) <= 2.0
    assert abs(np.mean(np.log(widths))) < 0.08  # log-uniform around 1


def test_cityscapes_crop_never_needs_padding() -> None:
    image = torch.full((3, 1024, 2048), 200, dtype=torch.uint8)
    labels = torch.zeros(1024, 2048, dtype=torch.uint8)
    torch.manual_seed(0)
    for scale in (0.5, 2.0):
        out = TrainingTransform([ScaleCrop((512, 1024), (scale, scale))])(image, labels)
        assert out[0].shape == (3, 512, 1024)
        assert (out[1] == 0).all()


def test_rotation_marks_what_it_uncovers_as_ignored() -> None:
    image, labels = torch.full((3, 64, 64), 128, dtype=torch.uint8), torch.zeros(64, 64, dtype=torch.uint8)
    uncovered = []
    for seed in range(6):
        torch.manual_seed(seed)
        moved, moved_labels = polyp_training((64, 64))(image, labels)
        uncovered.append((moved_labels == 255).float().mean().item())
        assert (denormalise(moved).float().mean(0)[moved_labels == 255] < 100).float().mean() > 0.8
    assert max(uncovered) > 0.05


def disc(height: int, width: int, row: float = 0.5, column: float = 0.5, radius: float = 0.3) -> tuple[Tensor, Tensor]:
    """A white ellipse on black and its labels; place and radius are shares of the sides."""
    y, x = ((torch.arange(side) + 0.5) / side for side in (height, width))
    labels = ((y[:, None] - row).square() + (x - column).square() < radius**2).to(torch.uint8)
    return (255 * labels).expand(3, -1, -1).contiguous(), labels


def centroid(mass: Tensor) -> Tensor:
    rows, columns = (torch.arange(side, dtype=torch.float64) + 0.5 for side in mass.shape)
    return torch.stack([(mass.sum(1) * rows).sum(), (mass.sum(0) * columns).sum()]) / mass.sum()


@pytest.mark.parametrize(
    ("source", "size"),
    [
        ((288, 288), (128, 128)),
        ((192, 192), (64, 64)),
        ((256, 256), (128, 128)),
        ((288, 384), (128, 128)),
        ((500, 574), (128, 128)),
        ((360, 480), (128, 160)),
        ((64, 64), (192, 192)),
        ((100, 120), (128, 128)),
    ],
)
@pytest.mark.parametrize("kind", ["resize", "crop", "street", "polyps"])
def test_labels_lie_where_the_image_is(kind: str, source: tuple[int, int], size: tuple[int, int]) -> None:
    scales = size[0] / source[0], size[1] / source[1]
    steps: dict[str, Any] = {
        "resize": ScaleCrop(size, (1.0, 1.0), relative=True),
        "crop": ScaleCrop(size, (min(scales), 1.2 * max(scales))),
        "street": street_training(size, resize_first=True).steps[0],
        "polyps": polyp_training(size).steps[0],
    }
    apart = []
    for seed in range(24):
        torch.manual_seed(seed)
        row, column = (0.5 + 0.1 * (torch.rand(2) - 0.5)).tolist()
        torch.manual_seed(seed)
        # Nothing may cancel out because the picture was flipped.
        flipped = torch.rand(2).flip(0) < 0.5 if kind == "polyps" else torch.zeros(2, dtype=torch.bool)
        torch.manual_seed(seed)
        moved, labels = TrainingTransform([steps[kind]])(*disc(*source, row, column, radius=0.25))
        offset = centroid((labels == 1).double()) - centroid(denormalise(moved)[0].double())
        apart.append(torch.where(flipped, -offset, offset))
    # On average: a single disc of few pixels has a ragged edge.
    assert torch.stack(apart).mean(0).abs().max() < 0.05


@pytest.mark.parametrize("radius", [95 / 288, 115 / 288])
def test_a_resized_disc_is_the_disc_drawn_at_that_size(radius: float) -> None:
    resize = TrainingTransform([ScaleCrop((128, 128), (1.0, 1.0), relative=True)])
    rotate = TrainingTransform([FlipRotateResize((128, 128), 30)])
    expected = disc(128, 128, radius=radius)[1].bool()
    for transform, least in ((resize, 0.9990), *[(rotate, 0.996)] * 3):
        found = transform(*disc(288, 288, radius=radius))[1] == 1
        assert 2 * (found & expected).sum() / (found.sum() + expected.sum()) >= least


def test_a_rotation_turns_the_result_without_shearing_it() -> None:
    """A circle in an oblong picture stays the circle it was."""
    image, labels = disc(192, 320)
    y, x = torch.arange(192) - 95.5, torch.arange(320) - 159.5
    labels = (y[:, None].square() + x.square() < 80**2).to(torch.uint8)
    small = (y[:96, None] + 48).square() + (x[:160] + 80).square() < 40**2
    for _ in range(4):
        turned = FlipRotateResize((96, 160), 30)(image, labels)[1] == 1
        assert 2 * (turned & small).sum() / (turned.sum() + small.sum()) > 0.99


def test_flips_go_both_ways() -> None:
    image = torch.zeros(3, 48, 48, dtype=torch.uint8)
    image[:, :8, :8] = 255
    corners = set()
    for seed in range(32):
        torch.manual_seed(seed)
        moved, labels = FlipRotateResize((24, 24), 0)(image, image[0] // 255)
        corners.add(tuple((moved[0] > 127).nonzero().float().mean(0).gt(12).tolist()))
        assert torch.equal(moved[0] > 127, labels == 1)
    assert len(corners) == 4


def test_an_ignored_border_stays_ignored_and_where_it_was() -> None:
    image, labels = disc(288, 288, radius=0.2)
    labels[:36], labels[-36:], labels[:, :72] = 255, 255, 255
    moved = TrainingTransform([ScaleCrop((128, 128), (1.0, 1.0), relative=True)])(image, labels)[1]
    ignored = torch.zeros(128, 128, dtype=torch.bool)
    ignored[:16] = ignored[-16:] = ignored[:, :32] = True
    assert torch.equal(moved == 255, ignored)
    torch.manual_seed(1)
    turned = TrainingTransform([FlipRotateResize((128, 128), 30)])(image, labels)[1]
    # At least what was ignored before; the corners that the rotation uncovers come on top.
    assert (turned == 255).sum() >= 0.97 * ignored.sum()
    assert set(turned.unique().tolist()) == {0, 1, 255}


def test_a_crop_at_the_pictures_own_scale_is_not_resampled() -> None:
    """Resizing first would have thrown half of the pixels away."""
    image = torch.randint(0, 256, (3, 128, 192), dtype=torch.uint8)
    labels = image[0] // 16
    moved, moved_labels = ScaleCrop((64, 96), (2.0, 2.0), relative=True)(image, labels)
    windows = image.unfold(1, 64, 1).unfold(2, 96, 1)
    assert (windows == moved[:, None, None]).all(-1).all(-1).all(0).any()
    assert torch.equal(moved[0] // 16, moved_labels)


@pytest.mark.parametrize(("source", "size"), [((512, 512), (128, 128)), ((288, 384), (128, 128))])
def test_rotated_images_are_antialiased_as_resized_ones(source: tuple[int, int], size: tuple[int, int]) -> None:
    """White noise has what aliases: without a filter before sampling its contrast would stay."""
    image = torch.randint(0, 256, (3, *source), dtype=torch.uint8)
    resized = resize_image(image, size).float().std()
    turned = FlipRotateResize(size, 30)(image, torch.zeros(source, dtype=torch.uint8))[0][:, 32:-32, 32:-32]
    assert 0.9 < turned.float().std() / resized < 1.15


def test_evaluation_resizes_the_image_and_leaves_the_labels() -> None:
    image, labels = squares(96, 130)
    resized, kept = EvaluationTransform((64, 64))(image, labels)
    assert resized.shape == (3, 64, 64)
    assert torch.equal(kept, labels.long())
    expected = v2.functional.resize(image, [64, 64], antialias=True)
    assert (denormalise(resized).int() - expected.int()).abs().max() <= 1
    same, _ = EvaluationTransform(None)(image, labels)
    assert torch.equal(denormalise(same), image)


def test_parse_size() -> None:
    assert parse_size(64) == (64, 64)
    assert parse_size([32, 64]) == (32, 64)
    for wrong in (0, (64, -1), (1, 2, 3), (1.5, 2)):
        with pytest.raises(ValueError, match="image_size must be a positive number or"):
            parse_size(wrong)


def test_training_without_torchvision_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchvision", None)
    with pytest.raises(ModuleNotFoundError, match=r"need torchvision, .* pip install 'sward\[models\]'"):
        transforms.street_training((32, 32))


def test_colour_jitter_draws_and_computes_what_torchvision_does() -> None:
    image = torch.randint(256, (3, 40, 56), dtype=torch.uint8)
    labels = tv_tensors.Mask(torch.zeros(40, 56, dtype=torch.uint8))
    limits = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.02}
    for seed in range(12):
        results = []
        for step in (transforms.ColourJitter(**limits), v2.ColorJitter(**limits)):
            torch.manual_seed(seed)
            results.append((step(tv_tensors.Image(image), labels)[0].as_subclass(torch.Tensor), torch.rand(1)))
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
