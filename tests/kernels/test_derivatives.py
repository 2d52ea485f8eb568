"""What the operations refuse instead of a wrong derivative, and gradients at the edges of what numbers hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sward_kernels import (
    prototype_discrimination,
    relational_kl,
    windowed_distillation,
    windowed_feature_distillation,
)
from sward_kernels.labels import class_indices, class_indices_op
from sward_kernels.prototypes import plan as prototypes
from sward_kernels.windowed import eager
from sward_kernels.windowed.plan import Layout, Problem, plan_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAMILIES = ("ampere", "ada", "hopper", "cdna", "interpreter")


def relation(maps: Tensor, implementation: str) -> Tensor:
    torch.manual_seed(1)
    return relational_kl(maps.flatten(2).mT, torch.randn(2, 64, 5), implementation=implementation)


def windows(maps: Tensor, implementation: str) -> Tensor:
    torch.manual_seed(1)
    return windowed_distillation(maps, torch.randn(2, 12, 8, 8), 4, implementation=implementation).loss


def prototypes_of(maps: Tensor, implementation: str) -> Tensor:
    labels = torch.arange(128).reshape(2, 8, 8) % 3
    return prototype_discrimination(maps, labels, 3, implementation=implementation).loss


def features(maps: Tensor, implementation: str) -> Tensor:
    torch.manual_seed(1)
    other, weights = torch.randn(2, 12, 8, 8), torch.randn(2, 24, 12)
    return windowed_feature_distillation(maps, other, *weights, 4, implementation=implementation).loss


OPERATIONS: list[Callable[[Tensor, str], Tensor]] = [relation, windows, prototypes_of]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("implementation", ["eager", "auto"])
def test_a_second_derivative_is_refused_and_not_wrong(
    operation: Callable[[Tensor, str], Tensor], implementation: str
) -> None:
    """Behind a network whose own second derivative hides that of the operation."""
    weight = torch.randn(12, 12, requires_grad=True)
    images = torch.randn(2, 12, 8, 8)

    def loss(name: str) -> Tensor:
        return operation(torch.einsum("oc,bchw->bohw", weight, images).tanh(), name)

    (gradient,) = torch.autograd.grad(loss("reference"), weight, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), weight)
    assert second.norm() > 0
    with pytest.raises(RuntimeError, match="differentiable once; use implementation='reference' for more"):
        torch.autograd.grad(loss(implementation), weight, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss(implementation), weight)[0], gradient.detach())


@pytest.mark.parametrize("operation", [windows, features])
@pytest.mark.parametrize("implementation", ["eager", "native", "triton"])
def test_forward_mode_is_refused_and_not_zero(operation: Callable[[Tensor, str], Tensor], implementation: str) -> None:
    if implementation == "triton":
        pytest.importorskip("triton")
    maps, tangent = torch.randn(2, 12, 8, 8).to(DEVICE), torch.randn(2, 12, 8, 8).to(DEVICE)
    if DEVICE == "cpu":
        _, expected = torch.func.jvp(lambda each: operation(each, "reference"), (maps,), (tangent,))
        assert expected != 0
    with pytest.raises(NotImplementedError, match="forward-mode derivatives need implementation='reference'"):
        torch.func.jvp(lambda each: operation(each, implementation), (maps,), (tangent,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_passes_own_whole_windows_or_neither_does(family: str, dtype: torch.dtype) -> None:
    """Otherwise the backward pass reads statistics that the forward pass has not saved."""
    for window_size in range(1, 33):
        for dim in (8, 16, 24, 32, 48, 64, 65, 96, 128, 129, 192, 256):
            for layouts in ((True, True), (True, False), (False, False)):
                student, teacher = (Layout(channels_last, False) for channels_last in layouts)
                problem = Problem(
                    window_size=window_size,
                    dim=dim,
                    dtype=dtype,
                    precision="ieee",
                    family=family,
                    active_terms=(True, True, True),
                    wide=False,
                    student_layout=student,
                    teacher_layout=teacher,
                )
                forward = plan_of(problem, "forward", SAVE=True)
                backward = plan_of(problem, "backward", WANTS_STUDENT_GRADIENT=True, WANTS_TEACHER_GRADIENT=True)
                assert forward.statistics == backward.statistics, (window_size, dim, layouts)


def test_a_shift_of_any_stride_is_read_as_its_numbers() -> None:
    pytest.importorskip("triton")
    columns = torch.tensor([[1, 0], [3, 0]], device=DEVICE)
    features = [torch.randn(1, 16, 8, 8, device=DEVICE) for _ in range(2)]
    weights = [torch.randn(48, 16, device=DEVICE) / 4 for _ in range(2)]
    maps = [torch.randn(1, 48, 8, 8, device=DEVICE) for _ in range(2)]
    for shift in (columns[:, 0], torch.tensor([2], device=DEVICE).expand(2)):
        for operation, tensors in (
            (windowed_distillation, maps),
            (windowed_feature_distillation, [each.half() for each in (*features, *weights)]),
        ):
            found, expected = (
                operation(*tensors, 4, each, implementation="triton").loss for each in (shift, tuple(shift.tolist()))
            )
            assert found == expected


@pytest.mark.parametrize("temperature", [0.1, 0.01, 0.005])
def test_images_that_point_the_other_way_have_a_gradient_at_low_temperatures(temperature: float) -> None:
    pytest.importorskip("triton")
    direction = torch.randn(8, device=DEVICE)
    student = torch.stack([direction, -direction])[:, None] + 0.1 * torch.randn(2, 5, 8, device=DEVICE)
    teacher = torch.stack([direction, -direction])[:, None] + 0.1 * torch.randn(2, 5, 8, device=DEVICE)

    def gradient(implementation: str, dtype: torch.dtype) -> Tensor:
        leaf = student.to(dtype).requires_grad_()
        loss = relational_kl(leaf, teacher.to(dtype), temperature, implementation=implementation)
        (found,) = torch.autograd.grad(loss, leaf)
        return found

    exact = gradient("reference", torch.float64)
    error = (gradient("triton", torch.float32).double() - exact).norm() / exact.norm()
    assert error <= (2e-2 if DEVICE == "cuda" else 1e-4)


def test_the_relation_in_cpp_keeps_small_divergences() -> None:
    from sward_kernels.relation.native import LOWEST_TEMPERATURE

    direction = torch.randn(4)
    student = torch.stack([direction, -direction])[:, None] + 1e-2 * torch.randn(2, 6, 4)
    teacher = student + 1e-2 * torch.randn(2, 6, 4)
    exact = relational_kl(student.double(), teacher.double(), LOWEST_TEMPERATURE, implementation="reference")
    found = relational_kl(student, teacher, LOWEST_TEMPERATURE, implementation="native")
    assert abs(found.item() - exact.item()) <= 1e-5


def test_gradients_of_weights_are_those_without_autocast() -> None:
    pytest.importorskip("triton")
    tensors = [torch.randn(1, 8, 4, 4), torch.randn(1, 8, 4, 4), torch.randn(24, 8), torch.randn(24, 8)]
    leaves = [each.to(DEVICE, torch.bfloat16).requires_grad_() for each in tensors]

    def gradients(enabled: bool) -> tuple[Tensor, ...]:
        loss = windowed_feature_distillation(*leaves, 4, implementation="triton").loss
        with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
            return torch.autograd.grad(loss, leaves)

    assert all(torch.equal(one, other) for one, other in zip(gradients(True), gradients(False)))


@pytest.mark.parametrize("seed", range(3))
def test_gradients_of_a_spike_fit_fp16(seed: int) -> None:
    """Before the division by the number of pixels, the gradient of a score of the context term exceeds 65504."""
    pytest.importorskip("triton")
    torch.manual_seed(seed)
    student, teacher = torch.randn(1, 16, 4, 4), torch.randn(1, 16, 4, 4)
    teacher[:, 3, 0, 0] = 60
    tensors = [student, teacher, torch.randn(96, 16) / 4, torch.randn(96, 16) / 4]
    assert_gradients_of_features(tensors, (1.0, 1.0, 1.0), 2e-2)


@pytest.mark.parametrize("weight", [1e-6, 1.0, 1e4])
def test_fp16_gradients_do_not_depend_on_the_scale_of_the_terms(weight: float) -> None:
    """In float16 the gradients of the scores would vanish or overflow, and no loss scale could bring them back."""
    pytest.importorskip("triton")
    torch.manual_seed(0)
    maps, weights = torch.randn(2, 1, 16, 8, 8), torch.randn(2, 48, 16) / 4
    assert_gradients_of_features([*maps, *weights], (weight,) * 3, 1e-3)
    for window_size in (4, 9):  # of one tile and of several
        leaves = [each.to(DEVICE, torch.float16).requires_grad_() for each in torch.randn(2, 1, 24, 9, 9)]
        exact = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
        loss = windowed_distillation(*leaves, window_size, terms=(weight,) * 3, implementation="triton").loss
        reference = windowed_distillation(*exact, window_size, terms=(weight,) * 3, implementation="reference").loss
        assert_close_gradients(loss, leaves, reference, exact, weight, 1e-3)


def test_peaked_attention_of_larger_windows_keeps_its_context_gradient_in_fp16() -> None:
    """Forward takes the mean of dA from a dZ that is rounded as backward's; else they would not cancel."""
    pytest.importorskip("triton")
    torch.manual_seed(1)
    leaves = [(40 * each).to(DEVICE, torch.float16).requires_grad_() for each in torch.randn(2, 1, 48, 9, 9)]
    exact = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
    loss = windowed_distillation(*leaves, 9, terms=(0.0, 0.0, 1.0), implementation="triton").loss
    reference = windowed_distillation(*exact, 9, terms=(0.0, 0.0, 1.0), implementation="reference").loss
    assert_close_gradients(loss, leaves, reference, exact, 1.0, 2e-2)


def assert_gradients_of_features(tensors: list[Tensor], terms: tuple[float, float, float], bound: float) -> None:
    leaves = [each.to(DEVICE, torch.float16).requires_grad_() for each in tensors]
    exact = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
    loss = windowed_feature_distillation(*leaves, 4, terms=terms, implementation="triton").loss
    reference = windowed_feature_distillation(*exact, 4, terms=terms, implementation="reference").loss
    assert_close_gradients(loss, leaves, reference, exact, terms[0], bound)


def assert_close_gradients(
    loss: Tensor, leaves: list[Tensor], reference: Tensor, exact: list[Tensor], weight: float, bound: float
) -> None:
    """The upstream gradient undoes the weight, so that the gradients that are stored fit fp16."""
    found = torch.autograd.grad(loss / weight, leaves)
    expected = torch.autograd.grad(reference / weight, exact)
    for mine, right in zip(found, expected, strict=True):
        assert (mine.cpu().double() - right).norm() < bound * right.norm()


def test_more_statistics_than_32_bits_address_are_refused() -> None:
    pytest.importorskip("triton")
    # Twelve numbers in memory; every image of one pixel is padded to a window of 1024 tokens.
    maps = torch.zeros(1, 12, 1, 1, device=DEVICE).expand(2**20, 12, 1, 1).requires_grad_()
    with pytest.raises(NotImplementedError, match="takes up to 429496729 tokens, padding included, got 1073741824"):
        windowed_distillation(maps, maps.detach(), 32, implementation="triton")


def test_classes_of_permuted_labels_have_the_strides_that_compilers_expect() -> None:
    labels = torch.randint(0, 3, (2, 4, 6)).transpose(1, 2)
    torch.library.opcheck(class_indices_op, (labels, 3, 255))
    assert class_indices(labels, 3, 255).is_contiguous()


def test_labels_that_reach_far_have_64_bit_offsets() -> None:
    features = torch.randn(1, 16, 4, 2)
    near = torch.zeros(1, 4, 2, dtype=torch.uint8)
    far = torch.empty_strided((1, 4, 2), (1, 2**30, 1), dtype=torch.uint8, device="meta")
    assert not prototypes.problem_of(features, near, 3, False).wide
    assert prototypes.problem_of(features, far, 3, False).wide


def test_rolled_maps_have_gradients_in_the_order_of_their_maps() -> None:
    maps = torch.randn(2, 12, 5, 5, device="meta").to(memory_format=torch.channels_last)
    terms, shift = (1.0, 1.0, 1.0), torch.ones(2, device="meta", dtype=torch.int64)
    # Not through the operator, which runs its shape function for such maps.
    _, student, teacher = eager._run(maps, maps, 4, [0, 0], shift, terms, True, True, compiled=False)
    assert student.stride() == teacher.stride() == maps.stride()
