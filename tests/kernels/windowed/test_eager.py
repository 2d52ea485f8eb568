"""Windowed distillation: the eager implementation compared with the reference, and the behaviour of both."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness import peak_extra_bytes
from sward_kernels import windowed_distillation
from sward_kernels.windowed import api, eager
from tests.support.distillation_cases import (
    LAYOUTS,
    SCALARS,
    WEIGHTS,
    assert_outcome_within_budget,
    assert_same,
    maps_like,
    run,
)
from tests.support.error_budget import GRADIENT_FACTOR, assert_within_budget

pytestmark = pytest.mark.usefixtures("poison_empty_tensors")


@pytest.fixture(params=["one chunk", "many chunks"])
def chunking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The maps of a test fit in one chunk, so a second run cuts them into many chunks, as large maps are."""
    if request.param == "many chunks":
        monkeypatch.setattr(eager, "SCORE_ELEMENTS_CPU", 3 * 16 * 16)


SHAPES = {
    "divides": (2, 6, 16, 32),
    "does not divide": (3, 9, 13, 19),
    "smaller than a window": (2, 6, 3, 2),
    "one row": (1, 3, 1, 21),
}


@pytest.mark.usefixtures("chunking")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("window_size", [1, 2, 4, 7, 8, 16])
def test_eager_matches_reference(window_size: int, shape: tuple[int, int, int, int]) -> None:
    student, teacher = maps_like(shape)
    shift = (window_size // 2, window_size - 1)
    expected = run(student, teacher, window_size, shift, implementation="reference")
    assert_same(run(student, teacher, window_size, shift), expected)


@pytest.mark.usefixtures("chunking")
@pytest.mark.parametrize("as_tensor", [False, True])
def test_every_shift(as_tensor: bool) -> None:
    student, teacher = maps_like((2, 3, 6, 7))
    for shift in ((dy, dx) for dy in range(4) for dx in range(4)):
        expected = run(student, teacher, 4, shift, implementation="reference")
        given_shift = torch.tensor(shift, dtype=torch.int32 if sum(shift) % 2 else torch.int64) if as_tensor else shift
        assert_same(run(student, teacher, 4, given_shift), expected)
        if as_tensor:
            assert_same(run(student, teacher, 4, given_shift, implementation="reference"), expected)


@pytest.mark.usefixtures("chunking")
@pytest.mark.parametrize("student_layout", LAYOUTS)
@pytest.mark.parametrize("teacher_layout", LAYOUTS)
def test_layouts(student_layout: str, teacher_layout: str) -> None:
    _, teacher = maps_like((2, 6, 6, 9), layout=teacher_layout)
    student, _ = maps_like((2, 6, 6, 9), layout=student_layout)
    before = student.clone(), teacher.clone()
    outcome = run(student, teacher, 4, (1, 2))
    assert_same(outcome, run(student.contiguous(), teacher.contiguous(), 4, (1, 2), implementation="reference"))
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])
    for maps, gradient in ((student, outcome.gradient_student), (teacher, outcome.gradient_teacher)):
        assert gradient.stride() == torch.empty_like(maps).stride()


@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 2, 1), (1, 0, 0.5), (0, 0, 0)])
def test_weights(weights: tuple[float, float, float]) -> None:
    student, teacher = maps_like((1, 6, 5, 8))
    if not any(weights):
        assert [term.item() for term in windowed_distillation(student, teacher, 4, terms=weights)] == [0, 0, 0, 0]
        return
    expected = run(student, teacher, 4, (1, 2), terms=weights, implementation="reference")
    assert_same(run(student, teacher, 4, (1, 2), terms=weights), expected)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_side_without_gradient_gets_none_and_changes_nothing(side: str) -> None:
    maps = dict(zip(("student", "teacher"), maps_like((1, 6, 5, 8))))
    both = run(*maps.values(), 4, (1, 2))
    maps[side].requires_grad_()
    result = windowed_distillation(*maps.values(), 4, (1, 2), terms=WEIGHTS, implementation="eager")
    result.loss.backward()
    assert torch.equal(maps[side].grad, getattr(both, f"gradient_{side}"))
    assert all(value.grad is None for name, value in maps.items() if name != side)


@settings(max_examples=40)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    side = data.draw(st.integers(1, 6), "window_size")
    shape = tuple(
        data.draw(st.integers(low, high), name)
        for name, low, high in (("batch", 1, 3), ("dim", 1, 5), ("height", 1, 14), ("width", 1, 14))
    )
    shape = (shape[0], 3 * shape[1], *shape[2:])
    shift = (data.draw(st.integers(0, side - 1), "dy"), data.draw(st.integers(0, side - 1), "dx"))
    layout = data.draw(st.sampled_from(sorted(LAYOUTS)), "layout")
    scale = data.draw(st.sampled_from([1e-3, 1.0, 30.0]), "scale")
    student, teacher = maps_like(shape, layout=layout, scale=scale, seed=sum(shape))
    expected = run(student, teacher, side, shift, implementation="reference")
    assert_same(run(student, teacher, side, shift), expected)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window_size", [4, 7, 16])
def test_error_budget(window_size: int, dtype: torch.dtype, layout: str) -> None:
    student, teacher = maps_like((2, 72, 18, 40), dtype=dtype, layout=layout)
    arguments = (window_size, (1, 2))
    oracle = run(student.double(), teacher.double(), *arguments, implementation="reference")
    reference = run(student, teacher, *arguments, implementation="reference")
    actual = run(student, teacher, *arguments)
    assert_outcome_within_budget(actual, reference, oracle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_ten_thousand(dtype: torch.dtype) -> None:
    # D = 1: a score is q * k, here between -1e4 and 1e4, so that rows of both sides are one-hot or tied
    student, teacher = maps_like((1, 3, 8, 8), dtype=dtype)
    teacher[:, 0], student[:, 0] = 1e4, -1e4
    teacher[:, 1], student[:, 1] = teacher[:, 1].sign(), student[:, 1].sign()
    oracle = run(student.double(), teacher.double(), 4, (1, 2), implementation="reference")
    reference = run(student, teacher, 4, (1, 2), implementation="reference")
    actual = run(student, teacher, 4, (1, 2))
    assert oracle.result.attention > 1e3
    if dtype == torch.float64:
        return assert_same(actual, oracle)
    assert_outcome_within_budget(actual, reference, oracle)


def test_zero_vectors() -> None:
    student, teacher = maps_like((1, 6, 8, 8))
    teacher[:, 4:, 0] = 0
    student[:, 4:, :, 1] = 0
    student[:, 4:, 3] *= 1e-9  # below the floor of the norm product, but not zero
    expected = run(student, teacher, 4, (1, 2), terms=(0, 1, 0), implementation="reference")
    actual = run(student, teacher, 4, (1, 2), terms=(0, 1, 0))
    assert_same(actual, expected)
    assert actual.gradient_student[:, :, :, 1].abs().max() == actual.gradient_teacher[:, :, 0].abs().max() == 0
    for zeros in (torch.zeros_like(teacher), torch.zeros_like(teacher).float()):
        outcome = run(zeros, zeros, 4, (1, 2))
        assert outcome.result.value == 1
        assert outcome.gradient_teacher.abs().max() == outcome.gradient_student.abs().max() == 0


def test_equal_sides_have_no_attention_and_no_context() -> None:
    _, teacher = maps_like((2, 24, 16, 16), dtype=torch.float32)
    outcome = run(teacher, teacher.clone(), 8, (3, 5), terms=(1, 0, 1))
    assert outcome.result.attention == outcome.result.context == outcome.result.loss == 0
    assert outcome.gradient_teacher.abs().max() == outcome.gradient_student.abs().max() == 0


@pytest.mark.parametrize(
    ("scale", "upstream"),
    [
        (0.05, 65536.0),  # small gradients, divided by 9216 pixels, exist in fp16 only under GradScaler's scale
        (30.0, 1e-2),  # large ones fit into fp16 only once they are divided
    ],
)
def test_fp16_gradients_neither_vanish_nor_overflow(scale: float, upstream: float) -> None:
    student, teacher = maps_like((1, 6, 96, 96), dtype=torch.float16, scale=scale)
    oracle = run(student.double(), teacher.double(), 4, implementation="reference", upstream=upstream)
    reference = run(student, teacher, 4, implementation="reference", upstream=upstream)
    actual = run(student, teacher, 4, upstream=upstream)
    assert run(student, teacher, 4, upstream=9216.0).gradient_student.isinf().any() == (scale > 1)
    for name in ("gradient_student", "gradient_teacher"):
        gradients = (getattr(outcome, name) for outcome in (actual, reference, oracle))
        assert_within_budget(*gradients, GRADIENT_FACTOR, name)


@pytest.mark.parametrize("implementation", ["reference", "eager"])
def test_gradcheck(implementation: str) -> None:
    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return windowed_distillation(student, teacher, 4, (3, 1), terms=WEIGHTS, implementation=implementation).loss

    for shape, layout in (((1, 6, 5, 3), "nchw"), ((2, 3, 3, 4), "channels_last")):
        maps = [one.requires_grad_() for one in maps_like(shape, layout=layout)]
        assert torch.autograd.gradcheck(loss, maps)


def test_retained_graph_and_upstream_gradients() -> None:
    student, teacher = maps_like((1, 6, 5, 8))
    expected = run(student, teacher, 4, (1, 2))
    student.requires_grad_(), teacher.requires_grad_()
    loss = windowed_distillation(student, teacher, 4, (1, 2), terms=WEIGHTS, implementation="eager").loss
    for upstream in (-3.0, 0.0, 0.25):
        gradients = torch.autograd.grad(loss * upstream, (student, teacher), retain_graph=True)
        torch.testing.assert_close(gradients[0], upstream * expected.gradient_student, rtol=1e-14, atol=0)
        torch.testing.assert_close(gradients[1], upstream * expected.gradient_teacher, rtol=1e-14, atol=0)
    loss.backward()
    assert torch.equal(student.grad, expected.gradient_student)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_two_losses_on_one_input() -> None:
    student, teacher = maps_like((1, 6, 8, 8))
    first, second = run(student, teacher, 4, (1, 2)), run(student, teacher, 2, (0, 1), upstream=2.0)
    student.requires_grad_()
    losses = [
        windowed_distillation(student, teacher, *arguments, terms=WEIGHTS, implementation="eager").loss
        for arguments in ((4, (1, 2)), (2, (0, 1)))
    ]
    (losses[0] + 2 * losses[1]).backward()
    torch.testing.assert_close(student.grad, first.gradient_student + second.gradient_student, rtol=1e-14, atol=1e-16)


def test_one_tensor_as_both_sides() -> None:
    qkv, _ = maps_like((1, 6, 8, 8))
    shared = run(qkv, qkv, 4)
    qkv.requires_grad_()
    windowed_distillation(qkv, qkv, 4, terms=WEIGHTS, implementation="eager").loss.backward()
    torch.testing.assert_close(qkv.grad, shared.gradient_teacher + shared.gradient_student)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradient(context: type) -> None:
    student, teacher = maps_like((1, 6, 8, 8))
    expected = run(student, teacher, 4).result
    student.requires_grad_()
    with context():
        result = windowed_distillation(student, teacher * 1, 4, terms=WEIGHTS, implementation="eager")
    assert not result.loss.requires_grad
    for name in SCALARS:
        assert torch.equal(getattr(result, name), getattr(expected, name))


def test_terms_are_detached_scalars() -> None:
    student, teacher = maps_like((1, 6, 8, 8), dtype=torch.bfloat16)
    for implementation in ("reference", "eager"):
        result = windowed_distillation(student, teacher.requires_grad_(), 4, implementation=implementation)
        assert result.loss.requires_grad
        for name, term in zip(SCALARS, result):
            assert term.shape == ()
            assert term.dtype == torch.float32
            assert name == "loss" or not term.requires_grad


def test_bitwise_repeatable() -> None:
    student, teacher = maps_like((2, 24, 19, 40), dtype=torch.float32)
    first = run(student, teacher, 8, (3, 5))
    for _ in range(3):
        again = run(student, teacher, 8, (3, 5))
        assert all(torch.equal(*pair) for pair in zip(first.result, again.result))
        assert torch.equal(first.gradient_teacher, again.gradient_teacher)
        assert torch.equal(first.gradient_student, again.gradient_student)


def test_autocast_takes_two_dtypes_and_keeps_its_own_precision() -> None:
    student, teacher = maps_like((1, 6, 8, 8), dtype=torch.float32)
    expected = run(student, teacher, 4)
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(student, teacher, 4)
        mixed = run(student, teacher.bfloat16(), 4)
    assert_same(inside, expected, 0.0)
    assert mixed.gradient_teacher.dtype == torch.bfloat16
    assert mixed.gradient_student.dtype == torch.float32
    reference = run(student, teacher.bfloat16().float(), 4)
    assert torch.equal(mixed.gradient_student, reference.gradient_student)


def peak_bytes(shape: tuple[int, int, int, int], with_gradient: bool) -> int:
    student, teacher = (maps.requires_grad_(with_gradient) for maps in maps_like(shape, dtype=torch.float32))

    def call() -> object:
        result = windowed_distillation(student, teacher, 8, (3, 5), implementation="eager")
        return torch.autograd.grad(result.loss, (student, teacher)) if with_gradient else result

    return peak_extra_bytes(call, torch.device("cpu"))


def test_memory() -> None:
    shape = (4, 72, 128, 256)
    gradients = 2 * 4 * math.prod(shape)
    assert peak_bytes(shape, True) <= 1.3 * gradients  # the buffers, scaled in place, beside one chunk
    small, large = (peak_bytes((batch, *shape[1:]), False) for batch in (1, 4))
    assert large <= small + 1024  # without a gradient there is one chunk, whatever the size of the maps


def test_permuting_pixels_of_a_window_changes_nothing() -> None:
    student, teacher = maps_like((1, 6, 4, 4))
    order = torch.randperm(16)
    expected = run(student, teacher, 4)
    shuffled = run(*(maps.flatten(2)[:, :, order].unflatten(2, (4, 4)) for maps in (student, teacher)), 4)
    torch.testing.assert_close(shuffled.result, expected.result)
    unshuffled = shuffled.gradient_student.flatten(2)
    torch.testing.assert_close(unshuffled, expected.gradient_student.flatten(2)[:, :, order])


GOOD = maps_like((1, 6, 4, 4), dtype=torch.float32)


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        (
            (GOOD[0][:, :5], GOOD[1][:, :5], 4),
            {},
            r"qkv_student must be .* \[B, 3 \* D, H, W\] .*, got shape \(1, 5, 4, 4\)",
        ),
        ((GOOD[0][0], GOOD[1], 4), {}, r"qkv_student must be .*, got shape \(6, 4, 4\)"),
        ((GOOD[0], GOOD[1][:0], 4), {}, r"qkv_teacher must be a non-empty .*, got shape \(0, 6, 4, 4\)"),
        ((GOOD[0], GOOD[1][..., :3], 4), {}, r"the same shape, got \(1, 6, 4, 4\) and \(1, 6, 4, 3\)"),
        ((GOOD[0].int(), GOOD[1].int(), 4), {}, "qkv_student must have a floating dtype, got torch.int32"),
        ((GOOD[0], GOOD[1].double(), 4), {}, "the same dtype outside autocast, got torch.float32 and torch.float64"),
        ((GOOD[0], GOOD[1].to("meta"), 4), {}, "on the same device, got cpu and meta"),
        ((*GOOD, 0), {}, "window_size must be an int of at least 1, got 0"),
        ((*GOOD, 4.0), {}, "window_size must be an int of at least 1, got 4.0"),
        ((*GOOD, 4, (4, 0)), {}, r"shift must be two ints \(dy, dx\), .*below window_size=4, got \(4, 0\)"),
        ((*GOOD, 4, (0, -1)), {}, r"shift must be .*, got \(0, -1\)"),
        ((*GOOD, 4, (1,)), {}, r"shift must be .*, got \(1,\)"),
        ((*GOOD, 4, torch.tensor([0, 4])), {}, r"shift must be .*, got \(0, 4\)"),
        (
            (*GOOD, 4, torch.tensor([0.0, 1.0])),
            {},
            r"shift must be int32 or int64, .*, got torch.float32 of shape",
        ),
        ((*GOOD, 4, torch.tensor(1)), {}, r"shift must be .*, got torch.int64 of shape \(\) on cpu"),
        ((*GOOD, 4), {"terms": (1, float("nan"), 1)}, r"terms must be three finite numbers .*, got \(1, nan, 1\)"),
        ((*GOOD, 4), {"terms": (1, -1, 1)}, r"terms must be .*, got \(1, -1, 1\)"),
        ((*GOOD, 4), {"terms": (1, 1)}, r"terms must be .*, got \(1, 1\)"),
        (
            (*GOOD, 4),
            {"implementation": "egaer"},
            "must be one of .*, got 'egaer'; did you mean 'eager'",
        ),
        (
            (*GOOD, 4),
            {"implementation": "numpy"},
            "must be one of 'auto', 'reference', .*, got 'numpy'$",
        ),
    ],
)
def test_argument_errors(arguments: tuple, keywords: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        windowed_distillation(*arguments, **keywords)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("dtype", "window_size", "expected"),
    [
        (torch.float32, 4, "native"),
        (torch.float32, 16, "native"),
        (torch.float32, 17, "eager"),
        (torch.float64, 4, "eager"),
        (torch.bfloat16, 4, "native"),
        (torch.bfloat16, 17, "eager"),
    ],
)
def test_auto_on_the_cpu(dtype: torch.dtype, window_size: int, expected: str) -> None:
    student, teacher = maps_like((1, 6, 8, 8), dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = run(student, teacher, window_size, implementation="auto")
    assert_same(actual, run(student, teacher, window_size, implementation=expected), 0.0)


def test_auto_warns_once_when_triton_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise NotImplementedError("this size is not served.")

    monkeypatch.setattr(api, "_preferred", lambda qkv, window_size: "triton")
    monkeypatch.setattr(api, "_triton_launcher", lambda: refuse)
    monkeypatch.setattr("sward_kernels.fallback._warned", set())
    student, teacher = maps_like((1, 6, 8, 8), dtype=torch.float32)
    with pytest.warns(RuntimeWarning, match="eager instead of triton: this size is not served"):
        actual = run(student, teacher, 4, implementation="auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(student, teacher, 4, implementation="auto")
    assert_same(actual, run(student, teacher, 4), 0.0)
    with pytest.raises(NotImplementedError, match="this size"):
        run(student, teacher, 4, implementation="triton")


def test_triton_that_cannot_be_loaded_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    # An import looks in both places, and an earlier test may have loaded the module already.
    monkeypatch.delattr(sys.modules["sward_kernels.windowed"], "launch", raising=False)
    monkeypatch.setitem(sys.modules, "sward_kernels.windowed.launch", None)
    with pytest.raises(NotImplementedError, match="implementation='triton' of windowed_distillation cannot be loaded"):
        windowed_distillation(*GOOD, 4, implementation="triton")
