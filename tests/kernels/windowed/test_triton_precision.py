"""fp32 on tensor cores, emulated in Triton's interpreter: what the tests of `test_triton.py` claim holds there too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import tests.support.interpreter  # noqa: F401  (makes it fast)
from sward_kernels.windowed import launch, plan
from sward_kernels.windowed.tile_table import Tiles
from tests.kernels.windowed import test_triton as plain_products
from tests.support.distillation_cases import assert_same, maps_like, run
from tests.support.tensor_cores import use_tensor_cores

pytestmark = [
    pytest.mark.usefixtures("poison_empty_tensors", "tensor_cores"),
    pytest.mark.skipif(plain_products.DEVICE == "cuda", reason="a GPU has tensor cores of its own"),
]


@pytest.fixture
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tensor_cores(monkeypatch)


@pytest.fixture
def tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "product_precision", lambda *_: "tf32")


def float32_maps(window_size: int, dim: int = 8) -> tuple[Tensor, Tensor]:
    return maps_like((1, 3 * dim, window_size, window_size), dtype=torch.float32)


@pytest.mark.parametrize(("window_size", "dim", "tolerance"), [(4, 8, 1e-4), (5, 8, 1e-4), (7, 64, 1e-3)])
def test_logits_of_ten_thousand(window_size: int, dim: int, tolerance: float) -> None:
    plain_products.test_logits_of_ten_thousand(torch.float32, window_size, dim, tolerance)


@pytest.mark.parametrize(("dim", "tolerance"), [(8, 1e-4), (64, 1e-3)])
def test_logits_of_ten_thousand_in_tiles(dim: int, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # The kernels of larger windows rely on forward's scores, and a product with its operands exchanged differs.
    monkeypatch.setattr(plan, "tiles_of", lambda *_: Tiles(16, 16, 16, 1))
    plain_products.test_logits_of_ten_thousand(torch.float32, 5, dim, tolerance)


def test_two_keys_that_nearly_tie_cost_no_more_than_in_plain_pytorch() -> None:
    # At 1e4 the last bit of a score moves a probability of one half by 1e-3, whoever computes it.
    student, teacher = float32_maps(8)
    for qkv in (student, teacher):
        qkv[:, :16] *= 1e2
    ours = run(student, teacher, 8, implementation="triton")
    truth = run(student.double(), teacher.double(), 8, implementation="reference")
    by_pytorch = plain_products.plain(student, teacher, 8)
    for by_kernel, exact, plain in zip(ours[1:], truth[1:], by_pytorch[-2:]):
        assert (by_kernel - exact).abs().max() <= 3 * (plain - exact).abs().max()


@pytest.mark.parametrize(("window_size", "dim"), [(4, 32), (8, 40), pytest.param(9, 16, marks=pytest.mark.slow)])
def test_error_is_within_that_of_the_plain_form(window_size: int, dim: int) -> None:
    plain_products.test_error_is_within_that_of_the_plain_form(window_size, dim, torch.float32)


@pytest.mark.parametrize("window_size", [4, 8])
def test_identical_sides(window_size: int) -> None:
    plain_products.test_identical_sides(window_size)


@pytest.mark.parametrize("window_size", [4, 8])
def test_tf32_is_within_the_rounding_of_its_operands(window_size: int, tf32: None) -> None:
    student, teacher = float32_maps(window_size)
    ours = run(student, teacher, window_size, implementation="triton")
    truth = run(student.double(), teacher.double(), window_size, implementation="reference")
    for by_kernel, exact in zip((*ours.result, *ours[1:]), (*truth.result, *truth[1:])):
        error = (by_kernel.double() - exact).abs().max()
        assert error <= 4 * 2.0**-11 * exact.abs().max()
    assert (ours.gradient_student.double() - truth.gradient_student).abs().max() > 1e-6  # it was TF32


def test_identical_sides_in_tf32(tf32: None) -> None:
    plain_products.test_identical_sides(8)


def test_results_are_repeatable() -> None:
    sides = float32_maps(8)
    assert_same(run(*sides, 8, implementation="triton"), run(*sides, 8, implementation="triton"), 0.0)


@pytest.mark.parametrize(("dtype", "roundings"), [(torch.float32, 16), (torch.bfloat16, 2)])
def test_gradients_do_not_depend_on_the_last_bits_of_the_forward_pass(
    dtype: torch.dtype, roundings: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A GPU may find the scores again with another instruction: then the saved log-sum-exps do not fit them exactly.
    student, teacher = (side.to(dtype) for side in float32_maps(8))
    student[:, :16] *= 10
    teacher[:, :16] *= 10
    expected = run(student, teacher, 8, implementation="triton")
    backward = launch._backward_operator

    def disturbed(upstream: Tensor, student: Tensor, teacher: Tensor, statistics: Tensor, *rest: object) -> object:
        noise = torch.rand(statistics.shape, generator=torch.Generator().manual_seed(0)) - 0.5
        return backward(upstream, student, teacher, statistics + 0.02 * noise, *rest)

    monkeypatch.setattr(launch, "_backward_operator", disturbed)
    actual = run(student, teacher, 8, implementation="triton")
    for one, other in zip(actual[1:], expected[1:]):
        assert (one - other).abs().max() <= roundings * torch.finfo(dtype).eps * other.abs().max()
