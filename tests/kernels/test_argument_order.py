"""Student first, teacher second, in every operation: a swap changes the value, and positions agree with names."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from sward_kernels import relational_kl, windowed_distillation
from sward_kernels.windowed import native

TRITON = pytest.param(
    "triton", marks=pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
)
NATIVE = pytest.param("native", marks=pytest.mark.skipif(native.LIBRARY.why_not() is not None, reason="needs C++"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("implementation", ["reference", "eager", "compiled", NATIVE, TRITON])
def test_windowed_distillation_takes_the_student_first(implementation: str) -> None:
    device = "cpu" if implementation == "native" else DEVICE
    # Two pixels in a window of four tokens, D = 1; the other two tokens are padding, with key 0. One side's logits are
    # all 0, the other's are (ln 3, 0, 0, 0): KL(q || p) = sum q log(q / p), with the teacher's q first, is asymmetric.
    even = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]], device=device).view(1, 3, 1, 2)
    peaked = torch.tensor([[1.0, 1.0], [float(torch.tensor(3.0).log()), 0.0], [1.0, 1.0]], device=device)
    peaked = peaked.view(1, 3, 1, 2)
    settings = {"window_size": 2, "terms": (1.0, 0.0, 0.0), "implementation": implementation}
    p, q = torch.tensor([0.25] * 4, dtype=torch.float64), torch.tensor([3.0, 1.0, 1.0, 1.0], dtype=torch.float64) / 6
    by_hand = (q * (q / p).log()).sum().item()
    by_name = windowed_distillation(qkv_student=even, qkv_teacher=peaked, **settings)
    assert by_name.loss.item() == pytest.approx(by_hand, rel=1e-5)
    assert torch.equal(windowed_distillation(even, peaked, **settings).loss, by_name.loss)
    swapped = windowed_distillation(peaked, even, **settings)
    assert swapped.loss.item() == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-5)
    assert swapped.loss.item() != pytest.approx(by_hand, rel=1e-2)


@pytest.mark.parametrize("implementation", ["reference", "eager", "compiled", NATIVE, TRITON])
def test_the_gradient_of_windowed_distillation_reaches_the_side_it_is_asked_for(implementation: str) -> None:
    device = "cpu" if implementation == "native" else DEVICE
    student, teacher = torch.randn(2, 1, 6, 4, 4, device=device).unbind()
    student.requires_grad_()
    result = windowed_distillation(student, teacher, 4, implementation=implementation)
    (gradient,) = torch.autograd.grad(result.loss, student)
    # A step against the gradient lowers the loss, which it would not do if it were the other side's.
    moved = windowed_distillation(student - 1e-2 * gradient, teacher, 4, implementation=implementation)
    slope = (result.loss - moved.loss).item() / 1e-2
    assert slope == pytest.approx(gradient.square().sum().item(), rel=0.1)


@pytest.mark.parametrize("implementation", ["reference", "eager", TRITON])
def test_relational_kl_takes_the_student_first(implementation: str) -> None:
    # Two pixels at a right angle and two of one direction: softmax rows (1, e^-10) / (1 + e^-10) and (1/2, 1/2).
    apart = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64, device=DEVICE)
    alike = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]], dtype=torch.float64, device=DEVICE)
    by_name = relational_kl(student=apart, teacher=alike, implementation=implementation)
    assert by_name.item() == pytest.approx(4.3068982, abs=5e-6)
    assert relational_kl(apart, alike, implementation=implementation).item() == by_name.item()
    swapped = relational_kl(alike, apart, implementation=implementation)
    assert swapped.item() == pytest.approx(0.6926482, abs=1e-3)
