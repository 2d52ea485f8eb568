"""CIRKD's mini-batch relation: hand-computed values, invariances, and implementations compared with the reference."""

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
from sward_kernels.relation import api, eager, native
from tests.support.error_budget import FORWARD_FACTOR, GRADIENT_FACTOR

IMPLEMENTATIONS = ("reference", "eager")


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def by_hand(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The loss, one pair of images at a time, with torch's own KL."""
    total = torch.zeros((), dtype=student.dtype)
    for i in range(len(student)):
        for j in range(len(student)):
            rows = [
                F.cosine_similarity(x[i][:, None], x[j][None], dim=-1).div(temperature).log_softmax(-1)
                for x in (student, teacher)
            ]
            total = total + F.kl_div(rows[0], rows[1], reduction="batchmean", log_target=True)
    return total / len(student) ** 2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_pixels(implementation: str) -> None:
    student = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    teacher = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]], dtype=torch.float64)
    assert relational_kl(student, teacher, implementation=implementation).item() == pytest.approx(4.3068982, abs=5e-8)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_value_and_gradient_equal_the_formula(implementation: str) -> None:
    student, teacher = random(3, 7, 5).requires_grad_(), random(3, 7, 4)
    expected, actual = (
        by_hand(student, teacher, 0.3),
        relational_kl(student, teacher, 0.3, implementation=implementation),
    )
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (actual, expected)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradcheck(implementation: str) -> None:
    student, teacher = random(2, 5, 3).requires_grad_(), random(2, 5, 3)
    assert torch.autograd.gradcheck(lambda s: relational_kl(s, teacher, implementation=implementation), (student,))


@settings(max_examples=25)
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
    student, teacher = random(images, pixels, channels[0]).requires_grad_(), random(images, pixels, channels[1])
    with mock.patch.dict(eager.TILE_ELEMENTS, cpu=tile):
        actual = relational_kl(student, teacher, temperature, implementation="eager")
    expected = relational_kl(student, teacher, temperature, implementation="reference")
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (actual, expected)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_invariances(implementation: str) -> None:
    student, teacher = random(3, 20, 4), random(3, 20, 6)
    expected = relational_kl(student, teacher, implementation=implementation)
    rotation, order = torch.linalg.qr(random(4, 4))[0], torch.randperm(20)
    for changed_student, changed_teacher in (
        (student @ rotation, teacher),
        (student * (0.1 + torch.rand(3, 20, 1)), teacher * (0.1 + torch.rand(3, 20, 1))),
        (student[:, order], teacher[:, order]),
        (student[[2, 0, 1]], teacher[[2, 0, 1]]),
    ):
        actual = relational_kl(changed_student, changed_teacher, implementation=implementation)
        torch.testing.assert_close(actual, expected)
    assert expected > 0
    assert abs(relational_kl(student, student @ rotation, implementation=implementation)) < 1e-12


NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(native.LIBRARY.why_not() is not None, reason="the C++ does not compile here")
)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, NATIVE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_computed_in_float32(implementation: str, dtype: torch.dtype) -> None:
    student, teacher = random(2, 64, 8, dtype=dtype).requires_grad_(), random(2, 64, 8, dtype=dtype)
    exact_student = student.detach().double().requires_grad_()
    exact = relational_kl(exact_student, teacher.double(), implementation="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = relational_kl(student, teacher, implementation=implementation)
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
    loss = relational_kl(maps.flatten(2).mT, teacher.flatten(2).mT, implementation="eager")
    (once,) = torch.autograd.grad(loss, maps, retain_graph=True)
    (scaled,) = torch.autograd.grad(-3.0 * loss, maps)
    torch.testing.assert_close(scaled, -3.0 * once)
    dense = relational_kl(maps.flatten(2).mT.contiguous(), teacher.flatten(2).mT.contiguous(), implementation="eager")
    assert torch.equal(loss, dense)


def test_repeats_bit_for_bit_and_needs_no_gradient() -> None:
    student, teacher = random(2, 50, 4, dtype=torch.float32).requires_grad_(), random(2, 50, 4, dtype=torch.float32)
    results = []
    for _ in range(2):
        loss = relational_kl(student, teacher)
        results.append((loss, torch.autograd.grad(loss, student)[0]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    with torch.inference_mode():
        assert torch.equal(relational_kl(student, teacher), results[0][0])
    teacher.requires_grad_()
    assert not relational_kl(student.detach(), teacher).requires_grad


@pytest.mark.parametrize("implementation", ["reference", "eager", "native"])
def test_a_zero_vector_has_no_gradient(implementation: str) -> None:
    """Of a map behind a ReLU, say. The derivative of its unit vector would be 1e12."""
    student, teacher = random(1, 6, 4, dtype=torch.float32), random(1, 6, 4, dtype=torch.float32)
    student[0, 2] = 0.0
    teacher[0, 3] = 0.0
    student.requires_grad_()
    loss = relational_kl(student, teacher, implementation=implementation)
    assert loss.isfinite()
    (gradient,) = torch.autograd.grad(loss, student)
    assert not gradient[0, 2].any()
    assert 0 < gradient.norm() < 10


@pytest.mark.parametrize("transposed", [False, True])  # CIRKD passes flattened maps: channels, then pixels
@pytest.mark.parametrize("wants_gradient", [False, True])
def test_registered_operator(wants_gradient: bool, transposed: bool) -> None:
    units = [F.normalize(random(2, 6, c, dtype=torch.float32), dim=-1) for c in (3, 4)]
    if transposed:
        units = [each.mT.contiguous().mT for each in units]
    for name, operator in api._OPERATORS.items():
        if name == "eager" or native.LIBRARY.why_not() is None:
            torch.library.opcheck(operator, (*units, 0.1, wants_gradient))


def test_compiles_as_one_graph() -> None:
    student, teacher = random(2, 6, 4).requires_grad_(), random(2, 6, 3)
    compiled = torch.compile(relational_kl, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(student, teacher), relational_kl(student, teacher)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (actual, expected)))


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        ((2, 5), (2, 5, 3), {}, r"student must be a non-empty \[B, P, C\] tensor, got shape \(2, 5\)"),
        ((2, 0, 3), (2, 0, 3), {}, "student must be a non-empty"),
        ((2, 5, 3), (2, 6, 3), {}, r"same images and pixels \[B, P\], got \(2, 5\) and \(2, 6\)"),
        ((2, 5, 3), (2, 5, 3), {"temperature": 0.0}, "temperature must be a positive finite number, got 0.0"),
        ((2, 5, 3), (2, 5, 3), {"implementation": "fast"}, "implementation must be one of 'auto', .*, got 'fast'"),
    ],
)
def test_bad_arguments_are_named(
    student: tuple[int, ...], teacher: tuple[int, ...], options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        relational_kl(torch.zeros(student), torch.zeros(teacher), **options)  # type: ignore[arg-type]


def test_integer_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"teacher must have a floating dtype, got torch\.int64"):
        relational_kl(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3, dtype=torch.int64))


MEMORY = """
import resource, sys, torch
from sward_kernels import relational_kl

def step(pixels):
    student = torch.randn(2, pixels, 8, requires_grad=True)
    relational_kl(student, torch.randn(2, pixels, 8)).backward()

step(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(int(sys.argv[1]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize(
    ("pixels", "mebibytes"), [(4096, 40), pytest.param(8192, 60, marks=pytest.mark.slow)], ids=["4096", "8192"]
)
def test_memory_of_two_images(pixels: int, mebibytes: float) -> None:
    # One map of pixels by pixels takes 64 MiB or 256 MiB; the plain form stores a dozen.
    command = [sys.executable, "-c", MEMORY, str(pixels)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=500, env=environment)
    assert float(result.stdout) < mebibytes


def outcome(student: Tensor, teacher: Tensor, temperature: float, implementation: str) -> tuple[Tensor, Tensor]:
    leaf = student.detach().requires_grad_()
    loss = relational_kl(leaf, teacher, temperature, implementation=implementation)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.skipif(native.LIBRARY.why_not() is not None, reason="the C++ does not compile here")
@pytest.mark.parametrize("temperature", [0.03, 0.1, 1.0])
@pytest.mark.parametrize("shape", [(1, 5, 3, 4), (2, 128, 16, 9), (3, 150, 20, 70), (2, 300, 65, 5)])
def test_native_is_as_exact_as_plain_pytorch(shape: tuple[int, int, int, int], temperature: float) -> None:
    images, pixels, student_channels, teacher_channels = shape
    student, teacher = (
        random(images, pixels, channels, dtype=torch.float32) for channels in (student_channels, teacher_channels)
    )
    reference = outcome(student, teacher, temperature, "reference")
    oracle = outcome(student.double(), teacher.double(), temperature, "reference")
    actual = outcome(student, teacher, temperature, "native")
    factors = {"loss": FORWARD_FACTOR, "gradient": GRADIENT_FACTOR}
    for (name, factor), one, other, truth in zip(factors.items(), actual, reference, oracle, strict=True):
        # A score is a cosine over the temperature, and the reference may be closer by luck in few of them.
        band = torch.finfo(torch.float32).eps / temperature * truth.abs().max().clamp(min=1 if name == "loss" else 0)
        error, allowed = ((each.double() - truth).abs().max() for each in (one, other))
        assert error <= factor * (allowed + band), f"{name}: {error:.1e}, the reference {allowed:.1e}"


@pytest.mark.skipif(native.LIBRARY.why_not() is not None, reason="the C++ does not compile here")
def test_native_does_not_depend_on_the_number_of_threads() -> None:
    student, teacher = random(3, 150, 20, dtype=torch.float32), random(3, 150, 9, dtype=torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(outcome(student, teacher, 0.1, "native"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for later in results[1:] for one, other in zip(results[0], later, strict=True))


def test_native_refuses_what_it_is_not_written_for() -> None:
    units = random(1, 3, 2)
    with pytest.raises(NotImplementedError, match=r"takes at most 2048 fp32 pixels per image on a CPU .* use 'eager'"):
        relational_kl(units, units, implementation="native")
    with pytest.raises(NotImplementedError, match=r"temperature of at least 0.03, .* and 0.01; use 'eager'"):
        relational_kl(units.float(), units.float(), 0.01, implementation="native")
    # auto runs eager without a warning.
    assert relational_kl(units, units).dtype == torch.float64
    assert relational_kl(units.float(), units.float(), 0.01) == 0
