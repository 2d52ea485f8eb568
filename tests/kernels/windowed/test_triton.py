"""The Triton kernels compared with the equations: in Triton's interpreter without a GPU, else on the GPU."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

import tests.support.interpreter  # noqa: F401  (makes it fast)
from sward_kernels import windowed_distillation
from sward_kernels.gpu import launching
from sward_kernels.windowed import plan
from sward_kernels.windowed.tile_table import Tiles
from sward_kernels.windows import WindowGrid
from tests.support.distillation_cases import SCALARS, WEIGHTS, Outcome, assert_same, maps_like, run
from tests.support.error_budget import FORWARD_FACTOR, GRADIENT_FACTOR, assert_within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A GPU passes weights and 1/n to the kernel as fp32, the interpreter as they are.
TOLERANCE = 1e-6 if DEVICE == "cuda" else 1e-10

pytestmark = pytest.mark.usefixtures("poison_empty_tensors")


def maps(*shape: int, dim: int = 8, **options: object) -> tuple[Tensor, Tensor]:
    batch, height, width = shape
    student, teacher = maps_like((batch, 3 * dim, height, width), **options)  # type: ignore[arg-type]
    return student.to(DEVICE), teacher.to(DEVICE)


def against_reference(
    student: Tensor, teacher: Tensor, window_size: int, shift: object = (0, 0), **options: object
) -> None:
    actual = run(student, teacher, window_size, shift, implementation="triton", **options)  # type: ignore[arg-type]
    expected = run(student, teacher, window_size, shift, implementation="reference", **options)  # type: ignore[arg-type]
    assert_same(actual, expected, TOLERANCE)


SIDES = [
    # window side, D, (B, H, W), shift
    (1, 8, (2, 3, 2), (0, 0)),
    (2, 16, (1, 5, 7), (1, 1)),  # 8 windows a program and groups that end inside a tile
    (3, 24, (2, 2, 2), (2, 1)),  # a map smaller than its window
    (4, 40, (1, 8, 6), (0, 3)),
    (7, 32, (1, 7, 9), (6, 6)),
    (8, 72, (1, 8, 15), (3, 0)),
    pytest.param(12, 16, (1, 13, 12), (11, 1), marks=pytest.mark.slow),
    (12, 8, (1, 12, 12), (0, 5)),
    pytest.param(14, 64, (1, 14, 15), (13, 13), marks=pytest.mark.slow),
    pytest.param(16, 128, (1, 16, 16), (8, 8), marks=pytest.mark.slow),
    pytest.param(16, 256, (1, 9, 16), (8, 8), marks=pytest.mark.slow),
    pytest.param(32, 16, (1, 32, 30), (31, 0), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("window_size", "dim", "shape", "shift"), SIDES)
def test_float64_equals_the_reference(
    window_size: int, dim: int, shape: tuple[int, int, int], shift: tuple[int, int]
) -> None:
    against_reference(*maps(*shape, dim=dim), window_size, shift, upstream=-2.5)


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "sliced_channels_last", "expanded", "transposed"])
def test_every_layout_is_read_in_place(layout: str) -> None:
    student, teacher = maps(2, 4, 5, dim=8, layout=layout)
    against_reference(student, teacher.contiguous(), 4, (1, 2))
    against_reference(student.contiguous(), teacher, 4, (1, 2))


@pytest.mark.parametrize("shift", [(0, 0), (0, 3), (3, 0), (3, 3)])
def test_corner_shifts_as_ints_and_on_the_device(shift: tuple[int, int]) -> None:
    student, teacher = maps(1, 6, 5)
    against_reference(student, teacher, 4, shift)
    by_ints = run(student, teacher, 4, shift, implementation="triton")
    for dtype in (torch.int32, torch.int64):
        by_tensor = run(student, teacher, 4, torch.tensor(shift, dtype=dtype, device=DEVICE), implementation="triton")
        assert_same(by_tensor, by_ints, 0.0)


@pytest.mark.parametrize("window_size", [4, 9])
@pytest.mark.parametrize("kept", [(True, False, False), (False, True, False), (False, False, True)])
def test_a_weight_of_zero_skips_its_term(kept: tuple[bool, bool, bool], window_size: int) -> None:
    student, teacher = maps(1, 9, 5)
    weights = tuple(weight if keep else 0.0 for weight, keep in zip(WEIGHTS, kept))
    against_reference(student, teacher, window_size, (1, 1), terms=weights)


@pytest.mark.parametrize("window_size", [4, 9])
@pytest.mark.parametrize("side", [0, 1])
def test_one_sided_gradient_is_that_of_both(side: int, window_size: int) -> None:
    both = run(*maps(1, 9, 4), window_size, (2, 1), implementation="triton")
    sides = list(maps(1, 9, 4))
    sides[side].requires_grad_()
    windowed_distillation(*sides, window_size, (2, 1), terms=WEIGHTS, implementation="triton").loss.backward()
    assert torch.equal(sides[side].grad, both[1 + side])
    assert sides[1 - side].grad is None


def plain(qkv_student: Tensor, qkv_teacher: Tensor, window_size: int) -> list[Tensor]:
    """Terms and gradients computed by PyTorch in the dtype of the inputs, whose error sets the budget."""
    grid = WindowGrid(*qkv_student.shape[-2:], window_size)
    maps = [qkv.detach().requires_grad_() for qkv in (qkv_student, qkv_teacher)]
    (q_s, k_s, v_s), (q_t, k_t, v_t) = (grid.partition(qkv, (0, 0)).chunk(3, -1) for qkv in maps)
    log_a_s, log_a_t = ((q @ k.mT / math.sqrt(q.shape[-1])).log_softmax(-1) for q, k in ((q_s, k_s), (q_t, k_t)))
    attention = (log_a_t.exp() * (log_a_t - log_a_s)).sum(-1).mean()
    value = (1 - torch.cosine_similarity(v_s, v_t, dim=-1)).mean()
    context = (log_a_s.exp() @ v_s - log_a_t.exp() @ v_t).square().sum(-1).mean()
    loss = sum(weight * term for weight, term in zip(WEIGHTS, (attention, value, context)))
    return [loss.detach(), attention, value, context, *torch.autograd.grad(loss, maps)]


BUDGETED = [
    (4, 32, torch.float32),
    (4, 32, torch.bfloat16),
    (8, 40, torch.bfloat16),
    (8, 40, torch.float16),
    # Tiled windows, and fp32 of 64 tokens, take many programs: half a minute each in the interpreter.
    *(
        pytest.param(*size, dtype, marks=pytest.mark.slow)
        for size in ((8, 40), (9, 16), (12, 64))
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ),
]


@pytest.mark.parametrize(("window_size", "dim", "dtype"), BUDGETED)
def test_error_is_within_that_of_the_plain_form(window_size: int, dim: int, dtype: torch.dtype) -> None:
    student, teacher = maps(1, window_size, window_size, dim=dim, dtype=dtype)
    exact = run(student.double(), teacher.double(), window_size, implementation="reference")
    ours = run(student, teacher, window_size, implementation="triton")
    names = (*SCALARS, "gradient_student", "gradient_teacher")
    values = zip(names, (*exact.result, *exact[1:]), plain(student, teacher, window_size), (*ours.result, *ours[1:]))
    for index, (name, truth, by_pytorch, by_kernel) in enumerate(values):
        factor = FORWARD_FACTOR if index < 4 else GRADIENT_FACTOR
        assert_within_budget(by_kernel, by_pytorch, truth, factor, name, rounding=dtype)


def test_bfloat16_has_no_bias() -> None:
    # A kernel that truncates instead of rounding to nearest has errors of one sign.
    student, teacher = maps(2, 8, 8, dim=32, dtype=torch.bfloat16)
    ours = run(student, teacher, 8, implementation="triton")
    truth = run(student.double(), teacher.double(), 8, implementation="reference")
    for kernel, exact in zip(ours[1:], truth[1:]):
        outward = (kernel.double().abs() - exact.abs()).mean()
        assert outward.abs() < 0.1 * (kernel.double() - exact).abs().mean()


@pytest.mark.parametrize(
    ("dtype", "window_size", "dim", "tolerance"),
    [
        (torch.float64, 4, 8, 1e-9),
        (torch.float32, 4, 8, 1e-4),
        (torch.float32, 5, 8, 1e-4),
        (torch.float32, 7, 64, 1e-3),
        pytest.param(torch.float32, 9, 8, 1e-4, marks=pytest.mark.slow),
        pytest.param(torch.float64, 9, 8, 1e-9, marks=pytest.mark.slow),
    ],
)
def test_logits_of_ten_thousand(dtype: torch.dtype, window_size: int, dim: int, tolerance: float) -> None:
    student, teacher = maps(1, window_size, window_size, dim=dim, dtype=dtype)
    for qkv in (student, teacher):
        qkv[:, : 2 * dim] *= 1e2 * (8 / dim) ** 0.25  # Q and K, so that logits reach 1e4
    ours = run(student, teacher, window_size, implementation="triton")
    truth = run(student.double(), teacher.double(), window_size, implementation="reference")
    assert truth.result.attention > 1e3
    as_double = Outcome(type(ours.result)(*(x.double() for x in ours.result)), *(x.double() for x in ours[1:]))
    assert_same(as_double, truth, tolerance)


@pytest.mark.parametrize("window_size", [4, pytest.param(9, marks=pytest.mark.slow)])
def test_identical_sides(window_size: int) -> None:
    _, teacher = maps(1, 9, 8, dtype=torch.float32)
    result = run(teacher, teacher.clone(), window_size, terms=(1.0, 0.0, 1.0), implementation="triton")
    assert abs(result.result.attention.item()) < 1e-6
    assert result.result.context.item() == 0
    for gradient in result[1:]:
        assert gradient.abs().max() < 1e-7


def test_a_zero_vector_has_value_one_and_no_gradient() -> None:
    student, teacher = maps(1, 4, 4)
    student[:, 16:, 1, 2] = 0
    against_reference(student, teacher, 4)


def test_float16_gradients_survive_a_loss_scale_and_many_pixels() -> None:
    student, teacher = maps(1, 8, 8, dtype=torch.float16)
    scaled = run(student, teacher, 8, implementation="triton", upstream=2.0**14)
    plain_gradient = run(student.double(), teacher.double(), 8, implementation="reference")
    for ours, truth in zip(scaled[1:], plain_gradient[1:]):
        assert (ours.double() / 2.0**14 - truth).abs().max() <= 3e-3 * truth.abs().max()


@settings(
    max_examples=8,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    window_size=st.integers(1, 6),
    dim=st.integers(1, 20),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 9)),
    layouts=st.tuples(*[st.sampled_from(["nchw", "channels_last", "sliced", "sliced_channels_last"])] * 2),
    terms=st.tuples(*[st.sampled_from([0.0, 0.5, 1.0])] * 3).filter(any),
    fraction=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    tiled=st.booleans(),
)
def test_any_shape_layout_shift_and_terms(
    window_size: int,
    dim: int,
    shape: tuple[int, int, int],
    layouts: tuple[str, str],
    terms: tuple[float, float, float],
    fraction: tuple[float, float],
    tiled: bool,
) -> None:
    shift = (int(fraction[0] * window_size), int(fraction[1] * window_size))
    student, _ = maps(*shape, dim=dim, layout=layouts[0])
    _, teacher = maps(*shape, dim=dim, layout=layouts[1])
    with pytest.MonkeyPatch.context() as patch:
        if tiled:  # the kernels of large windows, from 17 tokens
            patch.setattr(plan, "tiles_of", lambda *_: Tiles(16, 16, 16, 1))
        launching.forget_calls()
        against_reference(student, teacher, window_size, shift, terms=terms)


@pytest.mark.parametrize("window_size", [4, pytest.param(9, marks=pytest.mark.slow)])
def test_64_bit_offsets_give_the_same_bits(window_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = maps(2, 9, 4, layout="channels_last")
    narrow = run(*sides, window_size, (1, 2), implementation="triton")
    monkeypatch.setattr(launching, "WIDE_FROM", 0)
    launching.forget_calls()
    assert_same(run(*sides, window_size, (1, 2), implementation="triton"), narrow, 0.0)


def test_float32_products_follow_the_setting_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    mi300, mi250 = torch.device("cuda", 0), torch.device("cuda", 1)
    monkeypatch.setattr(launching, "has_tf32", lambda device: device == mi300)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    assert launching.product_precision(torch.float32, "ampere", mi300) == "tf32x3"
    assert launching.product_precision(torch.float32, "cdna", mi300) == "ieee"
    try:
        matmul.fp32_precision = "tf32"
        assert launching.product_precision(torch.float32, "hopper", mi250) == "tf32"
        assert launching.product_precision(torch.bfloat16, "hopper", mi250) == "ieee"
        assert launching.product_precision(torch.float32, "cdna", mi300) == "tf32"
        assert launching.product_precision(torch.float32, "cdna", mi250) == "ieee"
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize(("architecture", "expected"), [("gfx942:sramecc+:xnack-", True), ("gfx90a", False)])
def test_tf32_of_amd_gpus(architecture: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(gcnArchName=architecture)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert launching.has_tf32.__wrapped__(torch.device("cuda")) is expected


def test_sizes_the_kernels_do_not_serve() -> None:
    with pytest.raises(NotImplementedError, match="window_size up to 32 and D up to 256"):
        windowed_distillation(*maps(1, 4, 4), 33, implementation="triton")
    with pytest.raises(NotImplementedError, match="D=257"):
        windowed_distillation(*maps(1, 2, 2, dim=257), 2, implementation="triton")
