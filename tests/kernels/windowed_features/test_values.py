"""Windowed distillation of features without Triton: the specification, arguments, dtypes, fallbacks."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from sward_kernels import windowed_distillation, windowed_feature_distillation
from sward_kernels.windowed import native
from tests.support.distillation_cases import WEIGHTS
from tests.support.feature_cases import Sides, assert_same, run, sides_like

NATIVE = pytest.param("native", marks=pytest.mark.skipif(native.LIBRARY.why_not() is not None, reason="needs C++"))


@pytest.mark.parametrize("implementation", ["reference", "eager", "auto", NATIVE])
def test_it_is_windowed_distillation_of_projected_features(implementation: str) -> None:
    dtype = torch.float32 if implementation == "native" else torch.float64
    sides = sides_like((2, 5, 6), dim=7, channels=(3, 5), dtype=dtype)
    leaves = Sides(*(tensor.clone().requires_grad_() for tensor in sides))
    # Eq. 8 as a sum over channels, pixel by pixel.
    qkv = [
        torch.einsum("oc,bchw->bohw", weight, features) for features, weight in zip(leaves[:2], leaves[2:], strict=True)
    ]
    expected = windowed_distillation(*qkv, 4, (1, 3), terms=WEIGHTS, implementation="reference")
    gradients = torch.autograd.grad(expected.loss, leaves)
    actual = run(sides, 4, (1, 3), implementation=implementation)
    for one, other in zip(actual.values, (*expected, *gradients), strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-5, atol=1e-6)


def test_the_student_is_the_first_and_the_third_argument() -> None:
    # One channel, D = 1, two pixels in a window of four; the other two tokens are padding, with key 0. The student's
    # logits are all 0, the teacher's are (ln 3, 0, 0, 0) in the first row and 0 in the second.
    features = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    even, peaked = torch.tensor([[0.0], [1.0], [1.0]]), torch.tensor([[1.0], [float(torch.tensor(3.0).log())], [1.0]])
    settings: dict[str, Any] = {"window_size": 2, "terms": (1.0, 0.0, 0.0)}
    p, q = torch.full((4,), 0.25), torch.tensor([3.0, 1.0, 1.0, 1.0]) / 6
    result = windowed_feature_distillation(features, features, even, peaked, **settings)
    assert result.loss.item() == pytest.approx((q * (q / p).log()).sum().item() / 2, rel=1e-5)
    swapped = windowed_feature_distillation(features, features, peaked, even, **settings)
    assert swapped.loss.item() == pytest.approx((p * (p / q).log()).sum().item() / 2, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_all_in_its_dtype_as_convolutions_would_be(dtype: torch.dtype) -> None:
    sides = sides_like((1, 4, 4), dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        actual = windowed_feature_distillation(*sides, 4)
        mixed = windowed_feature_distillation(sides[0], sides[1].to(dtype), *sides[2:], 4)
    expected = windowed_feature_distillation(*sides.to(dtype), 4)
    assert torch.equal(actual.loss, expected.loss)
    assert torch.equal(mixed.loss, expected.loss)


def test_autocast_leaves_float64_alone() -> None:
    sides = sides_like((1, 4, 4))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(windowed_feature_distillation(*sides, 4).loss, windowed_feature_distillation(*sides, 4).loss)


@pytest.mark.parametrize("channels", [(6, 9), (3, 129)])
def test_on_a_cpu_it_compiles_without_a_graph_break(channels: tuple[int, int]) -> None:
    torch._dynamo.reset()
    sides = sides_like((2, 9, 10), channels=channels, dtype=torch.float32)
    leaves = Sides(*(tensor.requires_grad_() for tensor in sides))
    compiled = torch.compile(
        lambda shift, *tensors: windowed_feature_distillation(*tensors, 4, shift).loss,
        fullgraph=True,
        backend="aot_eager",
    )
    shift = torch.tensor([1, 2])
    gradients = torch.autograd.grad(compiled(shift, *leaves), leaves)
    expected = torch.autograd.grad(windowed_feature_distillation(*leaves, 4, shift).loss, leaves)
    torch.testing.assert_close(gradients, expected)


F, W = torch.zeros(2, 4, 6, 5), torch.zeros(24, 4)
WRONG = [
    ((F.numpy(), F, W, W, 2), "features_student must be a torch.Tensor, got ndarray"),
    ((F, F, W, None, 2), "weight_teacher must be a torch.Tensor, got NoneType"),
    ((F.long(), F, W, W, 2), "features_student must have a floating dtype, got torch.int64"),
    ((F, F, W, W.long(), 2), "weight_teacher must have a floating dtype, got torch.int64"),
    ((F, F[0], W, W, 2), r"features_teacher must be a non-empty \[B, C, H, W\], got shape \(4, 6, 5\)"),
    ((F[:0], F[:0], W, W, 2), r"features_student must be a non-empty \[B, C, H, W\], got shape \(0, 4, 6, 5\)"),
    ((F, F, W[:23], W, 2), r"weight_student must be \[3 \* D, 4\], one column per channel of .*, got shape \(23, 4\)"),
    ((F, F, W, W[:, :3], 2), r"weight_teacher must be \[3 \* D, 4\], .* of features_teacher, got shape \(24, 3\)"),
    ((F, F, W[:0], W[:0], 2), r"weight_student must be \[3 \* D, 4\], .*, got shape \(0, 4\)"),
    ((F, F[..., :4], W, W, 2), r"must have the same batch, height and width, got shapes .*; align the two maps first"),
    ((F, F[:1], W, W, 2), "must have the same batch, height and width"),
    ((F, F, W, W[:21], 2), "weight_student and weight_teacher must have the same number of rows, got 24 and 21"),
    ((F, F.to("meta"), W, W, 2), "features and weights must be on the same device, got cpu and meta"),
    ((F, F.half(), W, W, 2), "must have the same dtype outside autocast and in float64, got torch.float16 and .*32"),
    ((F, F, W, W, 0), "window_size must be an int of at least 1, got 0"),
    ((F, F, W, W, 2, (0, 2)), "shift must be two ints"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_arguments_are_refused_in_one_sentence(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        windowed_feature_distillation(*arguments)


def test_wrong_options_are_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"implementation must be one of .*, got 'tritn'; did you mean 'triton'\?"):
        windowed_feature_distillation(F, F, W, W, 2, implementation="tritn")
    with pytest.raises(ValueError, match=r"terms must be three .*, got 1\.0"):
        windowed_feature_distillation(F, F, W, W, 2, terms=1.0)  # type: ignore[arg-type]


def test_without_triton_its_implementation_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sward_kernels.windowed_features.launch", raising=False)
    monkeypatch.delattr("sward_kernels.windowed_features.launch", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in [name for name in sys.modules if name.startswith("sward_kernels.windowed_features.")]:
        if name.rpartition(".")[2] in ("kernels", "plan", "tile_table"):
            monkeypatch.delitem(sys.modules, name)
    with pytest.raises(NotImplementedError, match="'triton' of windowed_feature_distillation cannot be loaded"):
        windowed_feature_distillation(F, F, W, W, 2, implementation="triton")
    assert_same(
        run(sides_like((1, 4, 4)), 2, implementation="auto"), run(sides_like((1, 4, 4)), 2, implementation="eager")
    )
