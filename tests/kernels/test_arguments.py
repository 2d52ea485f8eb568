"""What a stranger may pass to the operations by mistake: one sentence that names the argument, and ValueError."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from sward_kernels import prototype_discrimination, relational_kl, windowed_distillation

MAPS = torch.randn(2, 1, 6, 4, 4).unbind()
FEATURES, LABELS = torch.randn(1, 4, 3, 3), torch.zeros(1, 3, 3, dtype=torch.long)
VECTORS = torch.randn(2, 3, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: windowed_distillation(MAPS[0].numpy(), MAPS[1], 2), "qkv_student must be a torch.Tensor, got ndarray"),
        (lambda: windowed_distillation(MAPS[0], None, 2), "qkv_teacher must be a torch.Tensor, got NoneType"),
        (lambda: windowed_distillation(*MAPS, 2, 1), "shift must be two ints .*, got 1$"),
        (lambda: windowed_distillation(*MAPS, 2, None), "shift must be two ints .*, got None$"),
        (lambda: windowed_distillation(*MAPS, 2, terms=1.0), "terms must be three .*, got 1.0$"),
        (lambda: windowed_distillation(*MAPS, 2, terms=None), "terms must be three .*, got None$"),
        (lambda: windowed_distillation(*MAPS, 2, terms=("1", 1, 1)), r"terms must be three .*, got \('1', 1, 1\)$"),
        (lambda: windowed_distillation(*MAPS, 2, terms=torch.ones(3)), "terms must be three .*, got a tensor$"),
        (lambda: prototype_discrimination(FEATURES.numpy(), LABELS, 2), "features must be a torch.Tensor"),
        (lambda: prototype_discrimination(FEATURES, LABELS.numpy(), 2), "labels must be a torch.Tensor, got ndarray"),
        (lambda: prototype_discrimination(FEATURES, LABELS, 2, margin="1"), "margin must be a finite .*, got '1'$"),
        (lambda: prototype_discrimination(FEATURES, LABELS, 2, margin=None), "margin must be a finite .*, got None$"),
        (lambda: prototype_discrimination(FEATURES, LABELS, 2, terms=2.0), "terms must be two .*, got 2.0$"),
        (lambda: prototype_discrimination(FEATURES, LABELS, 2, ignore_index=None), "ignore_index must be an int"),
        (lambda: prototype_discrimination(FEATURES, LABELS, 2, ignore_index=255.0), "ignore_index must be an int"),
        (lambda: prototype_discrimination(FEATURES, LABELS, 2, normalize="no"), "normalize must be True or False"),
        (lambda: relational_kl(VECTORS.numpy(), VECTORS), "student must be a torch.Tensor, got ndarray"),
        (lambda: relational_kl(VECTORS, VECTORS, "1"), "temperature must be a positive finite number, got '1'"),
        (lambda: relational_kl(VECTORS, VECTORS, None), "temperature must be a positive finite number, got None"),
        (lambda: relational_kl(VECTORS, VECTORS, float("inf")), "temperature must be a positive finite .*, got inf"),
        (lambda: relational_kl(VECTORS, VECTORS, 0.0), "temperature must be a positive finite number, got 0.0"),
    ],
)
def test_a_wrong_type_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_numbers_of_numpy_and_lists_are_fine() -> None:
    expected = windowed_distillation(*MAPS, 2, (1, 0), terms=(1.0, 2.0, 0.5)).loss
    terms = [np.float32(1), np.float64(2), np.float32(0.5)]
    assert torch.equal(windowed_distillation(*MAPS, 2, [1, 0], terms=terms).loss, expected)
