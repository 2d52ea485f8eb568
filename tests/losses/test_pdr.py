"""PDRLoss: Eq. 16-19 by hand, and labels at any resolution. The kernels' own tests go deeper."""

import math
from typing import Any

import pytest
import torch

from sward.losses import PDRLoss


def test_two_classes_by_hand() -> None:
    # Class 0: (0,0), (2,0) -> mean (1,0), trace 2. Class 1: (1,1), (1,1) -> mean (1,1), trace 0. Distance 1.
    features = torch.tensor([[0.0, 2.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]).view(1, 2, 1, 4)
    labels = torch.tensor([0, 0, 1, 1]).view(1, 1, 4)
    output = PDRLoss(3, margin=1.3, terms=(2.0, 0.5))(features, labels)
    assert output.separation.item() == pytest.approx(0.3, abs=1e-6)
    assert output.compactness.item() == pytest.approx(1.0, abs=1e-6)
    assert output.loss.item() == pytest.approx(2.0 * 0.3 + 0.5 * 1.0, abs=1e-6)


def test_normalized_features_lie_on_the_unit_sphere() -> None:
    # Directions (1,0) and (0,1), lengths apart: sqrt(2) between prototypes, nothing inside a class.
    features = torch.tensor([[3.0, 5.0, 0.0, 0.0], [0.0, 0.0, 2.0, 7.0]]).view(1, 2, 1, 4)
    labels = torch.tensor([0, 0, 1, 1]).view(1, 1, 4)
    output = PDRLoss(2, margin=2.0, normalize=True)(features, labels)
    assert output.separation.item() == pytest.approx(2.0 - math.sqrt(2), abs=1e-6)
    assert output.compactness.item() == pytest.approx(0.0, abs=1e-6)


def test_labels_are_resized_by_nearest_neighbour() -> None:
    features = torch.randn(2, 5, 4, 6)
    small = torch.randint(0, 3, (2, 4, 6))
    large = small.repeat_interleave(8, 1).repeat_interleave(8, 2)
    assert PDRLoss(3)(features, large).loss.item() == PDRLoss(3)(features, small).loss.item()
    # The centre decides: moved by two pixels of eight, the corners of the cells hold their neighbours' labels.
    moved = large.roll((2, 2), (1, 2))
    assert PDRLoss(3)(features, moved).loss.item() == PDRLoss(3)(features, small).loss.item()


def test_ignored_pixels_have_no_gradient_and_no_say() -> None:
    features = torch.randn(1, 3, 2, 4, requires_grad=True)
    labels = torch.tensor([0, 1, 0, 1, 1, 0, 255, 255]).view(1, 2, 4)
    output = PDRLoss(2)(features, labels)
    output.loss.backward()
    assert features.grad is not None
    assert features.grad[0, :, 1, 2:].abs().sum() == 0
    assert features.grad[0, :, 0].abs().sum() > 0


def test_all_ignored_is_zero_with_zero_gradient() -> None:
    features = torch.randn(1, 3, 2, 2, requires_grad=True)
    output = PDRLoss(2)(features, torch.full((1, 2, 2), 255))
    output.loss.backward()
    assert output.loss.item() == 0
    assert features.grad is not None
    assert features.grad.abs().sum() == 0


def test_a_label_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"labels must be classes in 0\.\.2 or ignore_index=255, got 7"):
        PDRLoss(3)(torch.randn(1, 4, 2, 2), torch.full((1, 2, 2), 7))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_classes": 0}, "num_classes must be an int of at least 1, got 0"),
        ({"margin": -1.0}, "margin must be a finite number of at least 0, got -1.0"),
        ({"terms": (1.0,)}, r"terms must be two finite numbers .*, got \(1.0,\)"),
        ({"implementation": "cuda"}, "implementation must be one of .*, got 'cuda'"),
    ],
)
def test_wrong_settings_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PDRLoss(**{"num_classes": 2, **settings})
