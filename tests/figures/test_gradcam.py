"""Grad-CAM against numbers that do not come from its own code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sward.figures.gradcam import ActivationRow, activation_figure, grad_cam


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


def test_one_logit_is_the_score_of_class_1(image: Tensor) -> None:
    network = Tiny(1).double().eval()
    pixels = torch.ones(12, 16, dtype=torch.bool)
    torch.testing.assert_close(
        grad_cam(network, "features", image, 1, pixels),
        numerical(network, image, 0, pixels).float(),
        atol=1e-5,
        rtol=1e-5,
    )


def test_what_speaks_against_the_class_is_nothing(image: Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 2, 1)).double()
    nn.init.zeros_(network[0].weight)
    nn.init.ones_(network[0].bias)
    nn.init.constant_(network[1].weight, -1.0)
    assert grad_cam(network, "0", image, 1).abs().max() == 0


def test_an_unknown_class_is_refused(image: Tensor) -> None:
    with pytest.raises(ValueError, match="target must be one of the network's classes 0 to 2, got 3"):
        grad_cam(Tiny().double(), "features", image, 3)


def test_figure_is_written_and_repeats(tmp_path: Path) -> None:
    rows = []
    for height, width in ((20, 30), (24, 24)):
        truth = torch.zeros(height, width, dtype=torch.bool)
        truth[5:10, 5:12] = True
        maps = {"teacher": torch.rand(height, width), "SWARD": torch.zeros(height, width)}
        rows.append(ActivationRow("scenes", torch.full((3, height, width), 90, dtype=torch.uint8), truth, maps))
    first, second = (activation_figure(rows, tmp_path / name / "figure1.png") for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    assert first.with_suffix(".svg").read_bytes() == second.with_suffix(".svg").read_bytes()
