"""From labels to classes: which labels are classes, which are ignored, and which are errors."""

import pytest
import torch

from sward_kernels import labels
from sward_kernels.labels import class_indices, class_indices_op


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint16])
def test_classes_keep_their_number_and_ignored_pixels_get_the_one_past_the_last(dtype: torch.dtype) -> None:
    given = torch.tensor([[0, 2, 255], [1, 255, 0]], dtype=torch.int64).to(dtype)
    classes = class_indices(given, 3, 255)
    assert classes.dtype == torch.int64
    assert classes.tolist() == [[0, 2, 3], [1, 3, 0]]


def test_ignore_index_may_be_a_class() -> None:
    assert class_indices(torch.tensor([0, 1, 2]), 3, 1).tolist() == [0, 3, 2]


@pytest.mark.parametrize("label", [-1, 3, 2**32])
def test_a_label_outside_the_classes_is_an_error_on_the_cpu(label: int) -> None:
    with pytest.raises(ValueError, match=rf"^labels must be classes in 0\.\.2 or ignore_index=255, got {label}$"):
        class_indices(torch.tensor([0, 255, label]), 3, 255)


def test_where_no_check_runs_a_label_outside_the_classes_has_no_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "require_classes", lambda *_: None)  # as on a GPU
    assert class_indices(torch.tensor([0, -1, 3, 2**32]), 3, 255).tolist() == [0, 3, 3, 3]


def test_operator() -> None:
    torch.library.opcheck(class_indices_op, (torch.tensor([[0, 255, 2]], dtype=torch.uint8), 3, 255))
