"""Windowed distillation under torch.compile: an operator in a user's graph, and the compiled implementation."""

import csv
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from sward_kernels import windowed_distillation
from sward_kernels.windowed import eager, native
from tests.support.distillation_cases import (
    LAYOUTS,
    SCALARS,
    WEIGHTS,
    assert_outcome_within_budget,
    assert_same,
    maps_like,
    run,
)


@pytest.fixture
def compilations() -> Callable[[], int]:
    """Count the graphs that Dynamo has compiled since the test began."""
    torch._dynamo.utils.counters.clear()
    return lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("gradients", [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: str, gradients: tuple[bool, bool]) -> None:
    student, teacher = maps_like((2, 6, 5, 9), layout=layout, dtype=torch.float32)
    for offsets, shift in (((1, 2), None), ((0, 0), torch.tensor([1, 2]))):
        for operator in (eager.eager, native.native):
            opcheck(operator, (student, teacher, 4, offsets, shift, WEIGHTS, *gradients))


def test_native_in_a_users_compile() -> None:
    def step(student: Tensor, teacher: Tensor, shift: Tensor) -> Tensor:
        return windowed_distillation(student * 2, teacher * 2, 4, shift, terms=WEIGHTS).loss * 3

    student, teacher = maps_like((2, 6, 8, 9), dtype=torch.float32)
    expected = run(student * 2, teacher * 2, 4, (1, 2), implementation="native", upstream=3.0)
    student.requires_grad_(), teacher.requires_grad_()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    gradients = torch.autograd.grad(compiled(student, teacher, torch.tensor([1, 2])), (student, teacher))
    torch.testing.assert_close(gradients[0], 2 * expected.gradient_student)
    torch.testing.assert_close(gradients[1], 2 * expected.gradient_teacher)


def test_one_graph_in_a_users_compile(compilations: Callable[[], int]) -> None:
    def step(student: Tensor, teacher: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
        result = windowed_distillation(student * 2, teacher * 2, 4, shift, terms=WEIGHTS, implementation="eager")
        return (result.loss * 3, *result)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape, shift in (((5, 6, 8, 9), (1, 2)), ((3, 6, 12, 20), (0, 3)), ((4, 6, 7, 30), (3, 0))):
        student, teacher = maps_like(shape)
        expected = run(student * 2, teacher * 2, 4, shift, implementation="reference", upstream=3.0)
        student.requires_grad_(), teacher.requires_grad_()
        loss, *terms = compiled(student, teacher, torch.tensor(shift))
        gradients = torch.autograd.grad(loss, (student, teacher))
        torch.testing.assert_close(tuple(terms), tuple(expected.result))
        torch.testing.assert_close(gradients, (2 * expected.gradient_student, 2 * expected.gradient_teacher))
    assert compilations() == 1


def test_compiled_matches_reference_and_compiles_once(compilations: Callable[[], int]) -> None:
    cases = (
        ((2, 6, 8, 16), (1, 2)),
        ((3, 6, 8, 16), (0, 0)),  # another batch
        ((2, 6, 13, 19), (3, 3)),  # another size, one that does not divide
        ((1, 6, 2, 3), (2, 1)),  # smaller than a window
        ((1, 6, 4, 4), (0, 1)),  # one window
        ((16, 6, 4, 4), (1, 0)),
        ((1, 6, 40, 168), torch.tensor([3, 1])),  # several chunks
    )
    for shape, shift in cases:
        student, teacher = maps_like(shape)
        expected = run(student, teacher, 4, shift, implementation="reference")
        assert_same(run(student, teacher, 4, shift, implementation="compiled"), expected)
        assert_same(run(student, teacher, 4, shift, implementation="compiled", terms=(2.0, 0.5, 3.0)),
                    run(student, teacher, 4, shift, implementation="reference", terms=(2.0, 0.5, 3.0)))  # fmt: skip
    assert compilations() <= 1  # 0 if another test of this session needed the same chunk before
    with torch.inference_mode():
        result = windowed_distillation(student, teacher, 4, shift, terms=WEIGHTS, implementation="compiled")
    for name in SCALARS:
        torch.testing.assert_close(getattr(result, name), getattr(expected.result, name))


def test_compiled_does_not_depend_on_what_was_compiled_before() -> None:
    # Dynamo would make D and the window side dynamic at the second kind of chunk, which gave wrong results for D = 1.
    for dim, window_size in ((2, 4), (1, 3)):
        student, teacher = maps_like((1, 3 * dim, 9, 10))
        arguments = {"window_size": window_size, "terms": (1.0, 0.0, 1.0)}
        actual = windowed_distillation(student, teacher, **arguments, implementation="compiled")
        expected = windowed_distillation(student, teacher, **arguments, implementation="reference")
        torch.testing.assert_close(tuple(actual), tuple(expected))


def test_compiled_inside_a_users_compile() -> None:
    student, teacher = maps_like((2, 6, 8, 16))
    expected = run(student, teacher, 4, (1, 2), implementation="reference")
    student.requires_grad_(), teacher.requires_grad_()
    step = torch.compile(
        lambda: windowed_distillation(student, teacher, 4, (1, 2), terms=WEIGHTS, implementation="compiled").loss,
        fullgraph=True,
        backend="aot_eager",
    )
    step().backward()
    torch.testing.assert_close(student.grad, expected.gradient_student)


@pytest.mark.parametrize(
    ("window_size", "layout"),
    [
        pytest.param(8, "nchw", marks=pytest.mark.slow),
        pytest.param(8, "channels_last", marks=pytest.mark.slow),
        pytest.param(7, "nchw", marks=pytest.mark.slow),
        pytest.param(7, "channels_last", marks=pytest.mark.slow),
        pytest.param(16, "sliced", marks=pytest.mark.slow),
        pytest.param(2, "nchw", marks=pytest.mark.slow),
        pytest.param(1, "nchw", marks=pytest.mark.slow),
        pytest.param(1, "channels_last", marks=pytest.mark.slow),
    ],
)
def test_compiled_stays_in_the_error_budget(window_size: int, layout: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):  # one compilation: chunks of 16-bit maps are fp32
        student, teacher = maps_like((2, 72, 30, 37), dtype=dtype, layout=layout)
        arguments = (window_size, (window_size // 2, window_size - 1))
        oracle = run(student.double(), teacher.double(), *arguments, implementation="reference")
        reference = run(student, teacher, *arguments, implementation="reference")
        actual = run(student, teacher, *arguments, implementation="compiled")
        assert_outcome_within_budget(actual, reference, oracle)
        again = run(student, teacher, *arguments, implementation="compiled")
        assert all(torch.equal(*pair) for pair in zip(actual.result, again.result))
        assert torch.equal(actual.gradient_student, again.gradient_student)


@pytest.mark.slow
@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1)])
@pytest.mark.parametrize("gradients", [(True, True), (True, False), (False, True), (False, False)])
def test_compiled_terms_and_sides(weights: tuple[float, float, float], gradients: tuple[bool, bool]) -> None:
    outcomes = []
    for implementation in ("compiled", "reference"):
        maps = maps_like((2, 6, 9, 16))
        for one, wanted in zip(maps, gradients):
            one.requires_grad_(wanted)
        result = windowed_distillation(*maps, 4, (1, 2), terms=weights, implementation=implementation)
        if any(gradients):
            result.loss.backward()
        outcomes.append((*(value.detach() for value in result), *(one.grad for one in maps if one.requires_grad)))
    torch.testing.assert_close(*outcomes, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_benchmark_runs_and_checks_before_it_times(tmp_path: Path) -> None:
    script = Path(__file__).parents[3] / "benchmarks" / "mwad_throughput.py"
    run_once = subprocess.run(
        [sys.executable, script, "--quick", "--results", tmp_path], capture_output=True, text=True, check=False
    )
    assert run_once.returncode == 0, run_once.stderr
    assert "compiled over torch.compile(reference)" in run_once.stdout
    (table,) = tmp_path.glob("*.csv")
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {"reference", "torch.compile(reference)", "eager", "compiled"} <= {row["provider"] for row in rows}
    assert all(row["gate"] == "green" for row in rows)
