"""CIRKD's mini-batch relation: hand-computed values, invariances, and every implementation against the reference."""

from __future__ import annotations

import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sward_kernels import relational_kl
from sward_kernels.relation import api, eager

IMPLEMENTATIONS = ("reference", "eager")


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def by_hand(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """Pair by pair with torch's own KL."""
    total = torch.zeros((), dtype=teacher.dtype)
    for i in range(len(teacher)):
        for j in range(len(teacher)):
            rows = [
                F.cosine_similarity(x[i][:, None], x[j][None], dim=-1).div(temperature).log_softmax(-1)
                for x in (student, teacher)
            ]
            total = total + F.kl_div(rows[0], rows[1], reduction="batchmean", log_target=True)
    return total / len(teacher) ** 2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_pixels(implementation: str) -> None:
    student = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    teacher = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]], dtype=torch.float64)
    assert relational_kl(teacher, student, implementation=implementation).item() == pytest.approx(4.3068982, abs=5e-8)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_value_and_gradient_equal_the_formula(implementation: str) -> None:
    teacher, student = random(3, 7, 4), random(3, 7, 5).requires_grad_()
    expected, actual = (
        by_hand(teacher, student, 0.3),
        relational_kl(teacher, student, 0.3, implementation=implementation),
    )
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (actual, expected)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradcheck(implementation: str) -> None:
    teacher, student = random(2, 5, 3), random(2, 5, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: relational_kl(teacher, s, implementation=implementation), (student,))


@settings(max_examples=25, deadline=None)
@given(
    images=st.integers(1, 4),
    pixels=st.integers(1, 40),
    channels=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    temperature=st.sampled_from([0.05, 0.1, 1.0]),
    tile=st.sampled_from([1, 37, 400]),
    seed=st.integers(0, 999),
)
def test_tiles_of_any_size_equal_the_reference(
    images: int, pixels: int, channels: tuple[int, int], temperature: float, tile: int, seed: int
) -> None:
    torch.manual_seed(seed)
    teacher, student = random(images, pixels, channels[0]), random(images, pixels, channels[1]).requires_grad_()
    with mock.patch.dict(eager.TILE_ELEMENTS, cpu=tile):
        actual = relational_kl(teacher, student, temperature, implementation="eager")
    expected = relational_kl(teacher, student, temperature, implementation="reference")
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (actual, expected)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_invariances(implementation: str) -> None:
    teacher, student = random(3, 20, 6), random(3, 20, 4)
    expected = relational_kl(teacher, student, implementation=implementation)
    rotation, order = torch.linalg.qr(random(4, 4))[0], torch.randperm(20)
    for changed_teacher, changed_student in (
        (teacher, student @ rotation),
        (teacher * (0.1 + torch.rand(3, 20, 1)), student * (0.1 + torch.rand(3, 20, 1))),
        (teacher[:, order], student[:, order]),
        (teacher[[2, 0, 1]], student[[2, 0, 1]]),
    ):
        actual = relational_kl(changed_teacher, changed_student, implementation=implementation)
        torch.testing.assert_close(actual, expected)
    assert expected > 0
    assert abs(relational_kl(student @ rotation, student, implementation=implementation)) < 1e-12


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_computed_in_float32(implementation: str, dtype: torch.dtype) -> None:
    teacher, student = random(2, 64, 8, dtype=dtype), random(2, 64, 8, dtype=dtype).requires_grad_()
    exact_student = student.detach().double().requires_grad_()
    exact = relational_kl(teacher.double(), exact_student, implementation="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = relational_kl(teacher, student, implementation=implementation)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), exact, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(actual, student)
    (exact_gradient,) = torch.autograd.grad(exact, exact_student)
    assert gradient.dtype == dtype
    error = (gradient.double() - exact_gradient).norm() / exact_gradient.norm()
    assert error < 4 * torch.finfo(dtype).eps + 1e-6


def test_strided_inputs_and_a_second_backward_with_another_upstream_gradient() -> None:
    maps = random(2, 6, 3, 5).requires_grad_()
    teacher = random(2, 4, 3, 5)
    loss = relational_kl(teacher.flatten(2).mT, maps.flatten(2).mT, implementation="eager")
    (once,) = torch.autograd.grad(loss, maps, retain_graph=True)
    (scaled,) = torch.autograd.grad(-3.0 * loss, maps)
    torch.testing.assert_close(scaled, -3.0 * once)
    dense = relational_kl(teacher.flatten(2).mT.contiguous(), maps.flatten(2).mT.contiguous(), implementation="eager")
    assert torch.equal(loss, dense)


def test_repeats_bit_for_bit_and_needs_no_gradient() -> None:
    teacher, student = random(2, 50, 4, dtype=torch.float32), random(2, 50, 4, dtype=torch.float32).requires_grad_()
    results = []
    for _ in range(2):
        loss = relational_kl(teacher, student)
        results.append((loss, torch.autograd.grad(loss, student)[0]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    with torch.inference_mode():
        assert torch.equal(relational_kl(teacher, student), results[0][0])
    teacher.requires_grad_()
    assert not relational_kl(teacher, student.detach()).requires_grad


def test_a_zero_vector_gives_no_nan() -> None:
    teacher, student = random(1, 6, 4), random(1, 6, 4)
    student[0, 2] = 0.0
    teacher[0, 3] = 0.0
    student.requires_grad_()
    loss = relational_kl(teacher, student)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, student)[0].isfinite().all()


@pytest.mark.parametrize("with_gradient", [False, True])
def test_registered_operator(with_gradient: bool) -> None:
    units = [F.normalize(random(2, 6, c, dtype=torch.float32), dim=-1) for c in (3, 4)]
    torch.library.opcheck(api._eager, (*units, 0.1, with_gradient))


def test_compiles_as_one_graph() -> None:
    teacher, student = random(2, 6, 3), random(2, 6, 4).requires_grad_()
    compiled = torch.compile(relational_kl, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(teacher, student), relational_kl(teacher, student)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (actual, expected)))


@pytest.mark.parametrize(
    ("teacher", "student", "options", "message"),
    [
        ((2, 5), (2, 5, 3), {}, r"teacher must be a non-empty \[B, P, C\] tensor, got shape \(2, 5\)"),
        ((2, 0, 3), (2, 0, 3), {}, "teacher must be a non-empty"),
        ((2, 5, 3), (2, 6, 3), {}, r"same images and pixels \[B, P\], got \(2, 5\) and \(2, 6\)"),
        ((2, 5, 3), (2, 5, 3), {"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ((2, 5, 3), (2, 5, 3), {"implementation": "fast"}, "implementation must be one of"),
    ],
)
def test_bad_arguments_are_named(
    teacher: tuple[int, ...], student: tuple[int, ...], options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        relational_kl(torch.zeros(teacher), torch.zeros(student), **options)  # type: ignore[arg-type]


def test_integer_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"student must be floating point, got torch\.int64"):
        relational_kl(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3, dtype=torch.int64))


MEMORY = """
import resource, sys, torch
from sward_kernels import relational_kl

def step(pixels):
    student = torch.randn(2, pixels, 8, requires_grad=True)
    relational_kl(torch.randn(2, pixels, 8), student).backward()

step(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(int(sys.argv[1]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize(
    ("pixels", "mebibytes"), [(4096, 40), pytest.param(8192, 60, marks=pytest.mark.slow)], ids=["4096", "8192"]
)
def test_memory_of_two_images(pixels: int, mebibytes: float) -> None:
    # One map of pixels by pixels is 64 MiB or 256 MiB; the plain form holds a dozen.
    command = [sys.executable, "-c", MEMORY, str(pixels)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=500, env=environment)
    assert float(result.stdout) < mebibytes
