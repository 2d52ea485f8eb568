"""Windowed distillation in C++ compared with the reference in float64, and what happens without a compiler."""

import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sward_kernels import cpp, windowed_distillation
from sward_kernels.windowed import native
from tests.support.distillation_cases import (
    LAYOUTS,
    SCALARS,
    WEIGHTS,
    Outcome,
    assert_outcome_within_budget,
    assert_same,
    maps_like,
    run,
)

REASON = native.LIBRARY.why_not()
pytestmark = [
    pytest.mark.usefixtures("poison_empty_tensors"),
    pytest.mark.skipif(REASON is not None, reason=f"the C++ does not compile here: {REASON}"),
]

SHAPES = {
    "divides": (2, 6, 16, 32),
    "does not divide": (3, 27, 13, 19),
    "several groups of windows": (1, 192, 9, 150),
}
SMALL_SHAPES = {"smaller than a window": (2, 6, 3, 2), "one row": (1, 3, 1, 21), "one pixel": (1, 6, 1, 1)}


def check(student: Tensor, teacher: Tensor, *arguments: object, **keywords: object) -> Outcome:
    """Run native and compare its error with that of the reference in fp32."""
    oracle = run(student.double(), teacher.double(), *arguments, implementation="reference", **keywords)
    reference = run(student, teacher, *arguments, implementation="reference", **keywords)
    actual = run(student, teacher, *arguments, implementation="native", **keywords)
    assert_outcome_within_budget(actual, reference, oracle)
    return actual


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("window_size", [1, 2, 4, 7, 8, 16])
def test_native_matches_reference(window_size: int, shape: tuple[int, int, int, int]) -> None:
    student, teacher = maps_like(shape, dtype=torch.float32)
    check(student, teacher, window_size, (window_size // 2, window_size - 1))


def check_few_pixels(student: Tensor, teacher: Tensor, *arguments: object) -> None:
    """Like `check`, for so few pixels that roundings do not average out, and the reference may be closer by luck.

    A term rounds like the numbers near 1 that it is the difference of, a gradient like the largest.
    """
    oracle = run(student.double(), teacher.double(), *arguments, implementation="reference")
    reference = run(student, teacher, *arguments, implementation="reference")
    actual = run(student, teacher, *arguments, implementation="native")
    outcomes = [(*outcome.result, *outcome[1:]) for outcome in (actual, reference, oracle)]
    for name, one, other, truth in zip((*SCALARS, "gradient_student", "gradient_teacher"), *outcomes):
        size = max(truth.abs().max().item(), 1.0 if name in SCALARS else 0.0)
        allowed = 3 * ((other.double() - truth).abs().max().item() + 8 * torch.finfo(torch.float32).eps * size)
        assert (one.double() - truth).abs().max().item() <= allowed, name


@pytest.mark.parametrize("shape", SMALL_SHAPES.values(), ids=SMALL_SHAPES)
@pytest.mark.parametrize("window_size", [1, 2, 7, 8, 16])
def test_few_pixels(window_size: int, shape: tuple[int, int, int, int]) -> None:
    student, teacher = maps_like(shape, dtype=torch.float32)
    check_few_pixels(student, teacher, window_size, (window_size // 2, window_size - 1))


@pytest.mark.parametrize("window_size", [4, 8])
@pytest.mark.parametrize("student_layout", LAYOUTS)
@pytest.mark.parametrize("teacher_layout", LAYOUTS)
def test_layouts(student_layout: str, teacher_layout: str, window_size: int) -> None:
    _, teacher = maps_like((2, 33, 10, 19), layout=teacher_layout, dtype=torch.float32)
    student, _ = maps_like((2, 33, 10, 19), layout=student_layout, dtype=torch.float32)
    before = student.clone(), teacher.clone()
    outcome = run(student, teacher, window_size, (1, 2), implementation="native")
    # The arithmetic does not depend on the layout.
    assert_same(
        outcome, run(student.contiguous(), teacher.contiguous(), window_size, (1, 2), implementation="native"), 0
    )
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])
    for maps, gradient in ((student, outcome.gradient_student), (teacher, outcome.gradient_teacher)):
        assert gradient.stride() == torch.empty_like(maps).stride()


@pytest.mark.parametrize("as_tensor", [False, True])
def test_every_shift(as_tensor: bool) -> None:
    student, teacher = maps_like((2, 3, 6, 7), dtype=torch.float32)
    for shift in ((dy, dx) for dy in range(4) for dx in range(4)):
        check_few_pixels(student, teacher, 4, torch.tensor(shift) if as_tensor else shift)


@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 2, 1), (1, 0, 0.5), (0, 0, 0)])
def test_weights(weights: tuple[float, float, float]) -> None:
    student, teacher = maps_like((1, 6, 5, 8), dtype=torch.float32)
    if any(weights):
        check(student, teacher, 4, (1, 2), terms=weights)
    else:
        terms = windowed_distillation(student, teacher, 4, terms=weights, implementation="native")
        assert [term.item() for term in terms] == [0, 0, 0, 0]


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_side_without_gradient_gets_none_and_changes_nothing(side: str) -> None:
    maps = dict(zip(("student", "teacher"), maps_like((1, 6, 5, 8), dtype=torch.float32)))
    both = run(*maps.values(), 4, (1, 2), implementation="native")
    maps[side].requires_grad_()
    result = windowed_distillation(*maps.values(), 4, (1, 2), terms=WEIGHTS, implementation="native")
    result.loss.backward()
    assert torch.equal(maps[side].grad, getattr(both, f"gradient_{side}"))
    assert all(value.grad is None for name, value in maps.items() if name != side)
    with torch.no_grad():
        for name, term in zip(SCALARS, windowed_distillation(*maps.values(), 4, (1, 2), terms=WEIGHTS)):
            assert torch.equal(term, getattr(both.result, name))


@settings(max_examples=40)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    side = data.draw(st.integers(1, 9), "window_size")
    # With one channel the gradient of a cosine is rounding alone, which grows with 1 / |v|.
    batch, dim, height, width = (
        data.draw(st.integers(low, high), name)
        for name, low, high in (("batch", 1, 3), ("dim", 2, 9), ("height", 1, 14), ("width", 1, 80))
    )
    shift = (data.draw(st.integers(0, side - 1), "dy"), data.draw(st.integers(0, side - 1), "dx"))
    layout = data.draw(st.sampled_from(sorted(LAYOUTS)), "layout")
    maps = maps_like((batch, 3 * dim, height, width), layout=layout, dtype=torch.float32, seed=height + width)
    check_few_pixels(*maps, side, shift)


def test_logits_of_ten_thousand() -> None:
    student, teacher = maps_like((1, 3, 8, 8), dtype=torch.float32)
    teacher[:, 0], student[:, 0] = 1e4, -1e4
    teacher[:, 1], student[:, 1] = teacher[:, 1].sign(), student[:, 1].sign()
    assert check(student, teacher, 4, (1, 2)).result.attention > 1e3


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_peaked_attention_takes_no_longer() -> None:
    """Attention far from the peak is below the normal numbers of fp32, with which a processor computes slowly."""

    def seconds(scale: float) -> float:
        maps = [scale * each for each in maps_like((2, 192, 32, 32), dtype=torch.float32)]
        times = []
        for _ in range(10):
            start = time.process_time()
            run(*maps, 8, (3, 3), implementation="native")
            times.append(time.process_time() - start)
        return min(times)

    peaked, flat = seconds(7.0), seconds(1.0)
    assert peaked < 2 * flat, (peaked, flat)


def test_small_numbers_of_others_stay() -> None:
    maps = maps_like((1, 6, 8, 8), dtype=torch.float32)
    run(*maps, 8, (0, 0), implementation="native")
    assert (torch.full((4,), 1e-39) * 1).min() > 0


def test_zero_vectors() -> None:
    student, teacher = maps_like((1, 6, 8, 8), dtype=torch.float32)
    teacher[:, 4:, 0] = 0
    student[:, 4:, :, 1] = 0
    student[:, 4:, 3] *= 1e-9  # below the floor of the norm product, but not zero
    actual = check(student, teacher, 4, (1, 2), terms=(0, 1, 0))
    assert actual.gradient_student[:, :, :, 1].abs().max() == actual.gradient_teacher[:, :, 0].abs().max() == 0


def test_equal_sides_have_no_attention_and_no_context() -> None:
    _, teacher = maps_like((2, 24, 16, 16), dtype=torch.float32)
    outcome = run(teacher, teacher.clone(), 8, (3, 5), terms=(1, 0, 1), implementation="native")
    assert outcome.result.attention == outcome.result.context == outcome.result.loss == 0
    assert outcome.gradient_teacher.abs().max() == outcome.gradient_student.abs().max() == 0


@pytest.mark.parametrize("channel", [0, 2, 4], ids=["query", "key", "value"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_number_that_is_none_stays_in_its_window(poison: float, channel: int) -> None:
    student, teacher = maps_like((1, 6, 5, 12), dtype=torch.float32)
    student[0, channel, 1, 5] = poison
    outcome = run(student, teacher, 4, implementation="native")
    assert not outcome.result.loss.isfinite()
    bad = ~outcome.gradient_student.isfinite()
    assert bad.any()
    bad[:, :, :4, 4:8] = False
    assert not bad.any()


def test_bits_do_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = maps_like((2, 24, 19, 40), dtype=torch.float32)
    outcomes = []
    for threads in (1, 2, 3, 1):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        outcomes.append(run(student, teacher, 8, (3, 5), implementation="native"))
    for outcome in outcomes[1:]:
        assert_same(outcome, outcomes[0], 0.0)


def test_retained_graph_and_upstream_gradients() -> None:
    student, teacher = maps_like((1, 6, 5, 8), dtype=torch.float32)
    expected = run(student, teacher, 4, (1, 2), implementation="native")
    student.requires_grad_(), teacher.requires_grad_()
    loss = windowed_distillation(student, teacher, 4, (1, 2), terms=WEIGHTS, implementation="native").loss
    for upstream in (-3.0, 0.0, 0.25):
        gradients = torch.autograd.grad(loss * upstream, (student, teacher), retain_graph=True)
        torch.testing.assert_close(gradients[0], upstream * expected.gradient_student)
        torch.testing.assert_close(gradients[1], upstream * expected.gradient_teacher)
    loss.backward()
    assert torch.equal(student.grad, expected.gradient_student)


def fresh() -> cpp.Library:
    """The library as in a new process, not loaded yet."""
    return cpp.Library(native.LIBRARY.operation, native.LIBRARY.source)


@pytest.fixture
def nothing_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for compiled libraries."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sward_kernels.fallback._warned", set())
    monkeypatch.setattr(native, "LIBRARY", fresh())
    return tmp_path / "sward_kernels"


def test_the_library_is_compiled_once(nothing_compiled: Path) -> None:
    assert fresh().why_not() is None
    (library,) = nothing_compiled.iterdir()
    written = library.stat().st_mtime_ns
    assert fresh().why_not() is None
    assert [path.stat().st_mtime_ns for path in nothing_compiled.iterdir()] == [written]


@pytest.mark.parametrize("compiler", ["no-such-compiler", "failing"])
def test_without_a_compiler_auto_warns_once_and_runs_eager(
    compiler: str, nothing_compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiler == "failing":
        script = tmp_path / "failing"
        script.write_text("#!/bin/sh\necho called >> $0.log\necho 'native.cpp:1: error: no luck today' >&2\nexit 1\n")
        script.chmod(0o755)
        compiler = str(script)
    monkeypatch.setenv("CXX", compiler)
    student, teacher = maps_like((1, 6, 8, 8), dtype=torch.float32)
    reason = "no C\\+\\+ compiler" if compiler == "no-such-compiler" else "no luck today"
    with pytest.warns(RuntimeWarning, match=f"eager instead of native: .*{reason}"):
        actual = run(student, teacher, 4, implementation="auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(student, teacher, 4, implementation="auto")
    assert_same(actual, run(student, teacher, 4), 0.0)
    if compiler != "no-such-compiler":
        assert Path(f"{compiler}.log").read_text() == "called\n"  # a compiler that failed is not tried at every step
    with pytest.raises(NotImplementedError, match=f"implementation='native' .*{reason}.*use 'eager'"):
        windowed_distillation(student, teacher, 4, implementation="native")


def test_two_processes_may_compile_at_once(nothing_compiled: Path) -> None:
    code = "from sward_kernels.windowed import native; raise SystemExit(native.LIBRARY.why_not())"
    processes = [subprocess.Popen([sys.executable, "-c", code], env=os.environ) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert [path.suffix for path in nothing_compiled.iterdir()] == [".so"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(dtype: torch.dtype) -> None:
    student, teacher = maps_like((2, 6, 9, 8), dtype=torch.float32)
    expected = run(student, teacher, 4, (1, 2), implementation="native")
    torch.set_default_dtype(dtype)
    try:
        assert_same(run(student, teacher, 4, (1, 2), implementation="native"), expected, 0.0)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_graph_without_a_compiler_is_eager(nothing_compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    maps = maps_like((1, 6, 8, 8), dtype=torch.float32)
    compiled = torch.compile(lambda *both: windowed_distillation(*both, 4).loss, fullgraph=True, backend="eager")
    with pytest.warns(RuntimeWarning, match="eager instead of native"):
        loss = compiled(*maps)
    assert loss == windowed_distillation(*maps, 4, implementation="eager").loss


def test_a_compiler_with_arguments(nothing_compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "c++ -pipe")
    assert fresh().why_not() is None


def test_a_compiler_of_blanks_or_with_an_open_quote(nothing_compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "  ")
    assert cpp.compiler() == ["c++"]
    monkeypatch.setenv("CXX", "'c++ -pipe")
    reason = fresh().why_not()
    assert reason is not None
    assert reason.startswith('found no C++ compiler "\'c++ -pipe" (set CXX')


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names parts of x86-64")
@pytest.mark.parametrize(("without", "width"), [("-mno-avx512f", 8), ("-mno-avx512f -mno-avx", 4)])
def test_narrower_vectors_give_the_same_within_the_budget(
    without: str, width: int, nothing_compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", f"c++ {without}")
    assert native.LIBRARY.functions.vector_width() == width
    for window_size in (3, 8):
        check(*maps_like((2, 27, 13, 19), dtype=torch.float32), window_size, (1, 2))


def test_a_cache_that_cannot_be_written_leaves_eager(nothing_compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    occupied = nothing_compiled.parent / "file"
    occupied.touch()
    # A folder without permission would not stop root.
    monkeypatch.setenv("XDG_CACHE_HOME", str(occupied))
    student, teacher = maps_like((1, 6, 8, 8), dtype=torch.float32)
    with pytest.warns(RuntimeWarning, match="eager instead of native: .*Not a directory"):
        actual = run(student, teacher, 4, implementation="auto")
    assert_same(actual, run(student, teacher, 4), 0.0)


def test_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    assert fresh().why_not() == "Could not determine home directory."


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_maps_are_computed_in_32(dtype: torch.dtype) -> None:
    for layout in LAYOUTS.values():
        student, teacher = (layout(each) for each in maps_like((2, 27, 13, 19), dtype=dtype))
        actual = check(student, teacher, 8, (3, 5))
        assert actual.result.loss.dtype == torch.float32
        assert torch.equal(
            actual.result.loss, run(student.float(), teacher.float(), 8, (3, 5), implementation="native").result.loss
        )
    auto = run(student, teacher, 8, (3, 5), implementation="auto")
    assert_same(auto, actual, 0.0)


def test_other_dtypes_are_refused_by_name() -> None:
    with pytest.raises(NotImplementedError, match=r"takes maps of fp32, bf16 or fp16 on a CPU, got torch\.float64"):
        windowed_distillation(*maps_like((1, 6, 4, 4), dtype=torch.float64), 4, implementation="native")
