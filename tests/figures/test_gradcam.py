"""Grad-CAM against numbers that do not come from its own code."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sward.figures.gradcam import ActivationRow, activation_figure, activation_inside, grad_cam
from tests.support.drawn_figures import DrawnFigure


class Tiny(nn.Module):
    """Two convolutions and a classifier at half resolution."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(4, 5, 3, padding=1))
        self.mix = nn.Conv2d(5, 6, 3, padding=1)
        self.classifier = nn.Conv2d(6, classes, 1)

    def head(self, maps: Tensor) -> Tensor:
        return self.classifier(torch.sigmoid(self.mix(maps)))

    def forward(self, images: Tensor) -> Tensor:
        return F.interpolate(self.head(self.features(images)), scale_factor=2, mode="bilinear")


@pytest.fixture
def image() -> Tensor:
    return torch.randn(3, 12, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def numerical(network: Tiny, image: Tensor, target: int, pixels: Tensor) -> Tensor:
    """The same map by central differences of the summed score with respect to every element of the feature map."""
    with torch.no_grad():
        maps = network.features(image[None])

        def score(changed: Tensor) -> float:
            logits = F.interpolate(network.head(changed), scale_factor=2, mode="bilinear")
            return float(logits[0, target][pixels].sum())

        gradient = torch.zeros_like(maps)
        for index in range(maps.numel()):
            step = torch.zeros_like(maps).flatten()
            step[index] = 1e-5
            step = step.view_as(maps)
            gradient.view(-1)[index] = (score(maps + step) - score(maps - step)) / 2e-5
        activation = torch.zeros(maps.shape[-2:], dtype=maps.dtype)
        for channel in range(maps.shape[1]):
            activation += gradient[0, channel].sum() / gradient[0, channel].numel() * maps[0, channel]
        activation = F.interpolate(activation.clamp(min=0)[None, None], size=image.shape[1:], mode="bilinear")[0, 0]
        return activation / activation.max()


@pytest.mark.parametrize("target", [0, 1, 2])
def test_map_equals_the_one_from_numerical_gradients(image: Tensor, target: int) -> None:
    network = Tiny().double().eval()
    pixels = torch.zeros(12, 16, dtype=torch.bool)
    pixels[3:9, 2:11] = True
    ours = grad_cam(network, "features", image, target, pixels)
    torch.testing.assert_close(ours, numerical(network, image, target, pixels).float(), atol=1e-5, rtol=1e-5)


def test_default_pixels_are_those_predicted_as_the_class(image: Tensor) -> None:
    network = Tiny().double().eval()
    predicted = network(image[None])[0].argmax(0)
    target = int(predicted.mode().values.mode().values)
    expected = grad_cam(network, "features", image, target, predicted == target)
    torch.testing.assert_close(grad_cam(network, "features", image, target), expected)


def test_a_frozen_network_and_no_grad_make_no_difference(image: Tensor) -> None:
    network = Tiny().double().eval()
    expected = grad_cam(network, "features", image, 1)
    network.requires_grad_(False)
    with torch.no_grad():
        torch.testing.assert_close(grad_cam(network, "features", image, 1), expected)


def test_one_logit_speaks_for_class_1_and_against_class_0(image: Tensor) -> None:
    network = Tiny(1).double().eval()
    pixels = torch.ones(12, 16, dtype=torch.bool)
    against = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in against.classifier.parameters():
            parameter.neg_()
    for target, alike in ((1, network), (0, against)):
        torch.testing.assert_close(
            grad_cam(network, "features", image, target, pixels),
            numerical(alike, image, 0, pixels).float(),
            atol=1e-5,
            rtol=1e-5,
        )


def test_what_speaks_against_the_class_is_nothing(image: Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 2, 1)).double()
    nn.init.zeros_(network[0].weight)
    nn.init.ones_(network[0].bias)
    nn.init.constant_(network[1].weight, -1.0)
    assert grad_cam(network, "0", image, 1).abs().max() == 0


class ChannelsLast(nn.Module):
    """A stage whose output is `[B, H, W, C]`, as those of Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Sequential(nn.Linear(3, 5))
        self.head = nn.Conv2d(5, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.stage(images.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def test_a_layer_of_another_layout_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"layer must return maps \[B, C, h, w\] that .* got 'stage', whose output is tok"
    ):
        grad_cam(ChannelsLast(), "stage", torch.randn(3, 8, 12), 1)


def test_an_unknown_class_is_refused(image: Tensor) -> None:
    with pytest.raises(ValueError, match="target must be one of the network's classes 0 to 2, got 3"):
        grad_cam(Tiny().double(), "features", image, 3)


@pytest.fixture
def rows() -> list[ActivationRow]:
    """A class in the left half, which one network sees and the other does not; and a row without the class."""
    left = torch.zeros(20, 30, dtype=torch.bool)
    left[:, :15] = True
    image = torch.tensor([120, 90, 60], dtype=torch.uint8)[:, None, None]
    return [
        ActivationRow(
            "scenes, wire", image.expand(3, 20, 30), left, {"teacher": left.float(), "SWARD": torch.zeros(20, 30)}
        ),
        ActivationRow(
            "polyps",
            image.expand(3, 24, 24),
            torch.zeros(24, 24, dtype=torch.bool),
            {"teacher": torch.zeros(24, 24), "SWARD": torch.ones(24, 24)},
        ),
    ]


def test_figure_lays_each_heat_map_over_the_grey_image(
    rows: list[ActivationRow], tmp_path: Path, drawn_figures: list[DrawnFigure]
) -> None:
    path = activation_figure(rows, tmp_path / "figure1.png")
    (drawn,) = drawn_figures
    assert path == drawn.path
    panels = drawn.panels()
    assert [[axis.get_title() for axis in row] for row in panels] == [["image", "teacher", "SWARD"], [""] * 3]
    assert [row[0].get_ylabel() for row in panels] == ["scenes, wire", "polyps"]
    assert [[axis.get_xlabel() for axis in row] for row in panels] == [
        ["50 % of the image", "100 % inside", "no activation"],
        ["0 % of the image", "no activation", "0 % inside"],
    ]
    assert [bar.get_ylabel() for bar in drawn.colour_bars()] == ["activation relative to the map's maximum"]

    # The image has mean 90. Over it lies inferno, with opacity 0.25 where the map is 0 and 0.85 where it is 1.
    colour, cold, hot = (120, 90, 60), (67.5, 67.5, 68.5), (227.7, 230.25, 152.9)
    (image, teacher, student), (other_image, other_teacher, other_student) = panels
    for axis, place, expected in (
        (image, (7, 4), colour),
        (image, (22, 4), colour),
        (teacher, (7, 4), hot),
        (teacher, (22, 4), cold),
        (student, (7, 4), cold),
        (other_image, (12, 12), colour),
        (other_teacher, (12, 12), cold),
        (other_student, (12, 12), hot),
    ):
        assert drawn.colour_at(axis, *place) == pytest.approx(expected, abs=3)

    # The outline of the class: all along the boundary in every panel, and none where the class is not.
    white = [[bool(outline_colours(drawn, axis, 14.5).min() > 200) for axis in row] for row in panels]
    assert white == [[True] * 3, [False] * 3]
    drawn.assert_svg_beside()


def test_the_share_inside_weighs_the_activation_by_its_height_and_a_small_map_by_the_pixels_it_covers() -> None:
    truth = torch.zeros(2, 4, dtype=torch.bool)
    truth[:, :1] = True
    assert activation_inside(torch.tensor([[3.0, 1.0, 0.0, 0.0]] * 2), truth) == pytest.approx(0.75)
    # One value for the whole image: a quarter of it lies on the class, which covers a quarter.
    assert activation_inside(torch.ones(1, 1), truth) == pytest.approx(0.25)
    assert math.isnan(activation_inside(torch.zeros(2, 4), truth))


def outline_colours(drawn: DrawnFigure, axis: object, x: float) -> np.ndarray:
    """Per height, the brightest of the colours within half a pixel of the vertical line at `x`."""
    near = [[drawn.colour_at(axis, x + shift, y) for shift in (-0.4, -0.2, 0, 0.2, 0.4)] for y in (4, 8, 12, 16)]
    return np.array(near).min(axis=2).max(axis=1)


def test_the_same_figure_is_the_same_file(rows: list[ActivationRow], tmp_path: Path) -> None:
    first, second = (activation_figure(rows, tmp_path / name / "figure1.png") for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    assert first.with_suffix(".svg").read_bytes() == second.with_suffix(".svg").read_bytes()
