"""Windowed distillation of features in C++: compared with the reference in float64, and where it is chosen."""

from __future__ import annotations

import platform
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sward_kernels import cpp, windowed_feature_distillation
from sward_kernels.windowed import native as windowed
from sward_kernels.windowed_features import native
from sward_kernels.windowed_features.api import projects_inside
from tests.support.distillation_cases import LAYOUTS, SCALARS, WEIGHTS
from tests.support.error_budget import FORWARD_FACTOR, GRADIENT_FACTOR, assert_within_budget
from tests.support.feature_cases import NAMES, TENSORS, Outcome, Sides, assert_same, run, sides_like
from tests.support.operators import Operators

REASON = native.LIBRARY.why_not()
pytestmark = [
    pytest.mark.usefixtures("poison_empty_tensors"),
    pytest.mark.skipif(REASON is not None, reason=f"the C++ does not compile here: {REASON}"),
]

# Up to D channels, queries and keys are never made; above, they are.
CHANNELS = {"both folded": (8, 3), "student wide": (21, 5), "teacher wide": (8, 21), "both wide": (9, 40)}
GRIDS = {"divides": (2, 16, 32), "does not divide": (3, 13, 19), "several groups of windows": (1, 9, 150)}


def check(sides: Sides, *arguments: Any, implementation: str = "native", **keywords: Any) -> Outcome:
    """Run native and compare its error with that of the reference in fp32."""
    oracle = run(sides.to(torch.float64), *arguments, implementation="reference", **keywords)
    reference = run(sides, *arguments, implementation="reference", **keywords)
    with Operators() as operators:
        actual = run(sides, *arguments, implementation=implementation, **keywords)
    assert "windowed_feature_distillation_native" in operators.returned
    for name, one, plain, exact in zip(NAMES, actual.values, reference.values, oracle.values, strict=True):
        assert_within_budget(one, plain, exact, FORWARD_FACTOR if name in SCALARS else GRADIENT_FACTOR, name)
    return actual


def check_few_pixels(sides: Sides, *arguments: Any) -> None:
    """Like `check`, for so few pixels that roundings do not average out, and the reference may be closer by luck.

    A term rounds like the numbers near 1 that it is the difference of, a gradient like the largest.
    """
    oracle = run(sides.to(torch.float64), *arguments, implementation="reference")
    reference = run(sides, *arguments, implementation="reference")
    actual = run(sides, *arguments, implementation="native")
    for name, one, other, truth in zip(NAMES, actual.values, reference.values, oracle.values, strict=True):
        size = max(truth.abs().max().item(), 1.0 if name in SCALARS else 0.0)
        allowed = 3 * ((other.double() - truth).abs().max().item() + 8 * torch.finfo(torch.float32).eps * size)
        assert (one.double() - truth).abs().max().item() <= allowed, name


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("channels", CHANNELS.values(), ids=CHANNELS)
@pytest.mark.parametrize("window_size", [1, 4, 7, 8, 16])
def test_native_matches_reference(window_size: int, channels: tuple[int, int], grid: tuple[int, int, int]) -> None:
    sides = sides_like(grid, dim=8, channels=channels, dtype=torch.float32, seed=1)
    check(sides, window_size, (window_size // 2, window_size - 1))


@pytest.mark.parametrize("channels", [(32, 128), (128, 33)])
def test_the_papers_width(channels: tuple[int, int]) -> None:
    check(sides_like((2, 24, 20), dim=64, channels=channels, dtype=torch.float32), 8, (3, 5), implementation="auto")


@settings(max_examples=40)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    side = data.draw(st.integers(1, 9), "window_size")
    # With one channel the gradient of a cosine is rounding alone, which grows with 1 / |v|.
    batch, dim, height, width, own, other = (
        data.draw(st.integers(low, high), name)
        for name, low, high in (
            *(("batch", 1, 3), ("dim", 2, 9), ("height", 1, 14), ("width", 1, 80)),
            *(("student's channels", 2, 12), ("teacher's channels", 2, 12)),
        )
    )
    shift = (data.draw(st.integers(0, side - 1), "dy"), data.draw(st.integers(0, side - 1), "dx"))
    layouts = tuple(data.draw(st.sampled_from(sorted(LAYOUTS)), "layout") for _ in range(2))
    sides = sides_like(
        (batch, height, width),
        dim=dim,
        channels=(own, other),
        layouts=(layouts[0], layouts[1]),
        dtype=torch.float32,
        seed=height + width,
    )
    check_few_pixels(sides, side, shift)


@pytest.mark.parametrize("layouts", [(one, other) for one in LAYOUTS for other in LAYOUTS if "nchw" in (one, other)])
def test_layouts(layouts: tuple[str, str]) -> None:
    sides = sides_like((2, 10, 19), channels=(9, 8), layouts=layouts, dtype=torch.float32)
    before = Sides(*(tensor.clone() for tensor in sides))
    outcome = run(sides, 8, (1, 2), implementation="native")
    # The arithmetic does not depend on the layout.
    assert_same(outcome, run(Sides(*map(torch.Tensor.contiguous, sides)), 8, (1, 2), implementation="native"), 0)
    for tensor, old, gradient in zip(sides, before, outcome.gradients, strict=True):
        assert torch.equal(tensor, old)
        assert gradient.stride() == torch.empty_like(tensor).stride()


@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 2, 1), (0, 0, 0)])
@pytest.mark.parametrize("channels", [(6, 9), (9, 6)])
def test_weights(channels: tuple[int, int], weights: tuple[float, float, float]) -> None:
    sides = sides_like((1, 5, 8), channels=channels, dtype=torch.float32)
    if any(weights):
        check(sides, 4, (1, 2), terms=weights)
    else:
        outcome = run(sides, 4, terms=weights, implementation="native")
        assert all((value == 0).all() for value in outcome.values)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_every_shift(as_tensor: bool) -> None:
    sides = sides_like((2, 6, 7), dim=3, channels=(3, 4), dtype=torch.float32)
    for shift in ((dy, dx) for dy in range(3) for dx in range(3)):
        check_few_pixels(sides, 3, torch.tensor(shift) if as_tensor else shift)


@pytest.mark.parametrize("channels", [(6, 9), (9, 6)])
@pytest.mark.parametrize("wanted", [(name,) for name in TENSORS] + [TENSORS[::2], TENSORS[1::2]])
def test_what_wants_no_gradient_gets_none_and_changes_nothing(
    wanted: tuple[str, ...], channels: tuple[int, int]
) -> None:
    sides = sides_like((1, 5, 8), channels=channels, dtype=torch.float32)
    every = run(sides, 4, (1, 2), implementation="native")
    leaves = {name: tensor.clone().requires_grad_(name in wanted) for name, tensor in sides._asdict().items()}
    with Operators() as operators:
        result = windowed_feature_distillation(
            **leaves, window_size=4, shift=(1, 2), terms=WEIGHTS, implementation="native"
        )
    _, *gradients = operators.returned["windowed_feature_distillation_native"]
    assert [gradient.numel() > 0 for gradient in gradients] == [name in wanted for name in TENSORS]
    result.loss.backward()
    for name, leaf in leaves.items():
        if name in wanted:
            assert torch.equal(leaf.grad, getattr(every.gradients, name))
        else:
            assert leaf.grad is None
    with torch.no_grad():
        plain = windowed_feature_distillation(*sides, 4, (1, 2), terms=WEIGHTS, implementation="native")
    assert all(torch.equal(one, other) for one, other in zip(plain, every.result, strict=True))


# Of 33 and 45 rows of windows, some parts of the sums have one and some two.
@pytest.mark.parametrize("grid", [(3, 41, 10), (3, 60, 5), (1, 9, 70)])
@pytest.mark.parametrize("channels", [(6, 9), (20, 8)])
def test_bits_do_not_depend_on_threads(
    channels: tuple[int, int], grid: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = sides_like(grid, channels=channels, dtype=torch.float32)
    outcomes = []
    for threads in (1, 2, 3, 1):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        outcomes.append(check(sides, 4, (3, 1)))
    for outcome in outcomes[1:]:
        assert_same(outcome, outcomes[0], 0.0)


def test_retained_graph_and_upstream_gradients() -> None:
    sides = sides_like((1, 5, 8), channels=(6, 9), dtype=torch.float32)
    expected = run(sides, 4, (1, 2), implementation="native").gradients
    leaves = Sides(*(tensor.requires_grad_() for tensor in sides))
    loss = windowed_feature_distillation(*leaves, 4, (1, 2), terms=WEIGHTS, implementation="native").loss
    for upstream in (-3.0, 0.0, 0.25):
        gradients = torch.autograd.grad(loss * upstream, leaves, retain_graph=True)
        torch.testing.assert_close(gradients, tuple(upstream * each for each in expected))


@pytest.mark.parametrize("channels", [(6, 8), (9, 8)])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_number_that_is_none_stays_in_its_window(poison: float, channels: tuple[int, int]) -> None:
    sides = sides_like((1, 5, 12), channels=channels, dtype=torch.float32)
    sides.features_student[0, 2, 1, 5] = poison
    outcome = run(sides, 4, implementation="native")
    assert not outcome.result.loss.isfinite()
    bad = ~outcome.gradients.features_student.isfinite()
    assert bad.any()
    bad[:, :, :4, 4:8] = False
    assert not bad.any()
    assert not outcome.gradients.weight_student.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_features_are_computed_in_32(dtype: torch.dtype) -> None:
    sides = sides_like((2, 13, 19), channels=(6, 9), dtype=dtype)
    wide = run(sides.to(torch.float32), 8, (3, 5), implementation="native")
    actual = run(sides, 8, (3, 5), implementation="auto")
    for one, other in zip(actual.result, wide.result, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(actual.gradients, wide.gradients, strict=True):
        assert torch.equal(one, other.to(dtype))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names a part of x86-64")
def test_narrower_vectors_give_the_same_within_the_budget(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "c++ -mno-avx512f")
    monkeypatch.setattr(native, "LIBRARY", cpp.Library(native.LIBRARY.operation, native.LIBRARY.source))
    for window_size in (3, 8):
        check(sides_like((2, 13, 19), dim=9, channels=(8, 21), dtype=torch.float32, seed=1), window_size, (1, 2))


def test_it_is_chosen_where_it_is_faster() -> None:
    def inside(implementation: str, *sizes: int, dtype: torch.dtype = torch.float32) -> bool:
        return projects_inside(implementation, *sizes, dtype, torch.device("cpu"))  # type: ignore[arg-type]

    for implementation in ("auto", "native"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert inside(implementation, 128, 128, 64, 16, dtype=dtype)
        assert not inside(implementation, 129, 8, 64, 8)
        assert not inside(implementation, 8, 129, 64, 8)
        assert not inside(implementation, 8, 8, 64, 17)
        assert not inside(implementation, 8, 8, 64, 8, dtype=torch.float64)
    assert not any(inside(implementation, 8, 8, 64, 8) for implementation in ("reference", "eager", "compiled"))


@pytest.mark.parametrize("channels", [(129, 8), (8, 129)])
def test_wider_features_are_projected_first(channels: tuple[int, int]) -> None:
    sides = sides_like((1, 4, 4), channels=channels, dtype=torch.float32)
    with Operators() as operators:
        run(sides, 4, implementation="auto")
    assert list(operators.returned) == ["windowed_distillation_native"]


def test_without_a_compiler_auto_warns_once_and_runs_eager(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("sward_kernels.fallback._warned", set())
    for module in (native, windowed):
        monkeypatch.setattr(module, "LIBRARY", cpp.Library(module.LIBRARY.operation, module.LIBRARY.source))
    sides = sides_like((1, 8, 8), dtype=torch.float32)
    with pytest.warns(RuntimeWarning, match=r"eager instead of native: .*no C\+\+ compiler"):
        actual = run(sides, 4, implementation="auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(sides, 4, implementation="auto")
    assert_same(actual, run(sides, 4, implementation="eager"), 0.0)
    with pytest.raises(NotImplementedError, match=r"implementation='native' .*no C\+\+ compiler"):
        run(sides, 4, implementation="native")
