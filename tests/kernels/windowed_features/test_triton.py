"""The Triton kernels compared with the specification: in Triton's interpreter without a GPU, else on the GPU."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

import tests.support.interpreter  # noqa: F401  (makes it fast)
from sward_kernels import windowed_feature_distillation
from sward_kernels.gpu import launching
from sward_kernels.windowed_features import plan
from sward_kernels.windowed_features.api import takes_features
from sward_kernels.windows import WindowGrid
from tests.support.distillation_cases import WEIGHTS
from tests.support.error_budget import FORWARD_FACTOR, GRADIENT_FACTOR, assert_within_budget
from tests.support.feature_cases import NAMES, TENSORS, Sides, assert_same, run, sides_like
from tests.support.tensor_cores import use_tensor_cores

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-10

pytestmark = pytest.mark.usefixtures("poison_empty_tensors")


def sides_of(*shape: int, **options: object) -> Sides:
    sides = sides_like(shape, **options)  # type: ignore[arg-type]
    if DEVICE == "cuda" and sides.features_student.dtype.itemsize > 2:
        pytest.skip("a GPU takes 16 bits, the interpreter more")
    return sides.to(DEVICE)


def against_reference(sides: Sides, window_size: int, shift: object = (0, 0), **options: object) -> None:
    actual = run(sides, window_size, shift, **options)  # type: ignore[arg-type]
    expected = run(sides, window_size, shift, implementation="reference", **options)  # type: ignore[arg-type]
    assert_same(actual, expected, TOLERANCE)


@pytest.mark.parametrize(
    ("window_size", "dim", "channels", "shape", "shift"),
    [
        (1, 8, (4, 4), (2, 3, 2), (0, 0)),
        (2, 16, (8, 3), (1, 5, 7), (1, 1)),  # 8 windows per group and groups that end inside a tile
        (3, 24, (16, 16), (2, 2, 2), (2, 1)),  # a map smaller than its window
        (4, 40, (20, 17), (1, 8, 6), (0, 3)),
        (7, 64, (24, 48), (1, 7, 9), (6, 6)),
        (8, 33, (64, 40), (1, 8, 15), (3, 0)),
    ],
)
def test_float64_equals_the_reference(
    window_size: int,
    dim: int,
    channels: tuple[int, int],
    shape: tuple[int, int, int],
    shift: tuple[int, int],
) -> None:
    against_reference(sides_of(*shape, dim=dim, channels=channels), window_size, shift, upstream=-2.5)


@pytest.mark.parametrize("own", TENSORS)
def test_gradients_are_the_slopes_of_the_loss(own: str) -> None:
    # Central differences along a random direction: independent of every formula of a gradient.
    sides = sides_of(1, 3, 4, dim=5, channels=(3, 4))
    gradient = getattr(run(sides, 2, (1, 1)).gradients, own)
    direction = torch.randn(gradient.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def loss_at(step: float) -> float:
        moved = sides._replace(**{own: getattr(sides, own) + step * direction})
        return windowed_feature_distillation(*moved, 2, (1, 1), terms=WEIGHTS, implementation="triton").loss.item()

    slope = (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5
    assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "sliced_channels_last", "expanded", "transposed"])
def test_every_layout_is_read_in_place(layout: str) -> None:
    against_reference(sides_of(2, 4, 5, layouts=(layout, "nchw")), 4, (1, 2))
    against_reference(sides_of(2, 4, 5, layouts=("nchw", layout)), 4, (1, 2))


def test_shifts_on_the_device_are_those_of_the_host() -> None:
    sides = sides_of(1, 6, 5)
    by_ints = run(sides, 4, (3, 1))
    for dtype in (torch.int32, torch.int64):
        assert_same(run(sides, 4, torch.tensor((3, 1), dtype=dtype, device=DEVICE)), by_ints, 0.0)


@pytest.mark.parametrize("kept", [(True, False, False), (False, True, False), (False, False, True)])
def test_a_weight_of_zero_skips_its_term(kept: tuple[bool, bool, bool]) -> None:
    weights = tuple(weight if keep else 0.0 for weight, keep in zip(WEIGHTS, kept))
    against_reference(sides_of(1, 6, 5), 4, (1, 1), terms=weights)


@pytest.mark.parametrize("wanted", [(0, 2), (1, 3), (0,), (3,)])
def test_gradients_of_some_tensors_are_those_of_all(wanted: tuple[int, ...]) -> None:
    sides = sides_of(1, 6, 4)
    every = run(sides, 4, (2, 1))
    leaves = Sides(*(tensor.clone().requires_grad_(index in wanted) for index, tensor in enumerate(sides)))
    windowed_feature_distillation(*leaves, 4, (2, 1), terms=WEIGHTS, implementation="triton").loss.backward()
    for index, leaf in enumerate(leaves):
        if index in wanted:
            assert torch.equal(leaf.grad, every.gradients[index])
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_program_may_go_through_several_groups(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Five windows in groups of one: of two or three programs, the last has groups past the end.
    monkeypatch.setattr(plan, "MOST_PROGRAMS", {"forward": most, "backward": most})
    launching.forget_calls()
    sides = sides_of(1, 5, 25, channels=(8, 4), layouts=("nchw", "channels_last"))
    against_reference(sides, 5, (1, 2))
    assert_same(run(sides, 5, (1, 2)), run(sides, 5, (1, 2)), 0.0)


def test_results_repeat_bit_for_bit() -> None:
    sides = sides_of(1, 9, 8, dtype=torch.float32)
    assert_same(run(sides, 8), run(sides, 8), 0.0)


def plain(sides: Sides, window_size: int) -> list[Tensor]:
    """Terms and gradients computed by PyTorch in the dtype of the inputs, whose error sets the budget."""
    leaves = [tensor.detach().requires_grad_() for tensor in sides]
    grid = WindowGrid(*sides.features_student.shape[-2:], window_size)
    (q_s, k_s, v_s), (q_t, k_t, v_t) = (
        (grid.partition(features, (0, 0)) @ weight.T).chunk(3, -1) for features, weight in zip(leaves[:2], leaves[2:])
    )
    log_a_s, log_a_t = ((q @ k.mT / math.sqrt(q.shape[-1])).log_softmax(-1) for q, k in ((q_s, k_s), (q_t, k_t)))
    attention = (log_a_t.exp() * (log_a_t - log_a_s)).sum(-1).mean()
    value = (1 - torch.cosine_similarity(v_s, v_t, dim=-1)).mean()
    context = (log_a_s.exp() @ v_s - log_a_t.exp() @ v_t).square().sum(-1).mean()
    loss = sum(weight * term for weight, term in zip(WEIGHTS, (attention, value, context)))
    return [loss.detach(), attention.detach(), value.detach(), context.detach(), *torch.autograd.grad(loss, leaves)]


def within_budget(sides: Sides, window_size: int) -> None:
    exact = run(sides.to(torch.float64), window_size, implementation="reference")
    ours = run(sides, window_size)
    for index, (name, truth, by_pytorch, by_kernel) in enumerate(
        zip(NAMES, exact.values, plain(sides, window_size), ours.values, strict=True)
    ):
        factor = FORWARD_FACTOR if index < 4 else GRADIENT_FACTOR
        assert_within_budget(by_kernel, by_pytorch, truth, factor, name, rounding=sides.features_student.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("window_size", "dim", "channels"), [(4, 32, 16), (8, 64, 32), (7, 40, 64)])
def test_error_is_within_that_of_the_plain_form(window_size: int, dim: int, channels: int, dtype: torch.dtype) -> None:
    sides = sides_of(1, window_size, window_size, dim=dim, channels=(channels, channels), dtype=dtype)
    within_budget(sides, window_size)


def large(sides: Sides, size: float) -> Sides:
    """The sides with the weights of queries and keys times the root of `size`."""
    factor = torch.ones(sides.weight_student.shape[0], 1, dtype=sides.weight_student.dtype, device=DEVICE)
    factor[: 2 * len(factor) // 3] = size**0.5
    return sides._replace(weight_student=sides.weight_student * factor, weight_teacher=sides.weight_teacher * factor)


@pytest.fixture(params=["plain", "tensor cores"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply fp32 as the interpreter does, and as three TF32 products."""
    if request.param == "tensor cores":
        if DEVICE == "cuda":
            pytest.skip("a GPU has tensor cores of its own")
        use_tensor_cores(monkeypatch)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize(
    ("dtype", "window_size", "tolerance"),
    [(torch.float64, 4, 1e-9), (torch.float32, 4, 1e-4), (torch.float32, 5, 1e-4)],
)
def test_logits_of_ten_thousand(dtype: torch.dtype, window_size: int, tolerance: float) -> None:
    sides = large(sides_of(1, window_size, window_size, channels=(16, 16), dtype=dtype), 1e4)
    truth = run(sides.to(torch.float64), window_size, implementation="reference")
    assert truth.result.attention > 1e3
    for name, one, other in zip(NAMES, run(sides, window_size).values, truth.values):
        assert (one.double() - other).abs().max() <= tolerance * other.abs().max(), name


@pytest.mark.usefixtures("products")
def test_two_keys_that_nearly_tie_cost_no_more_than_in_plain_pytorch() -> None:
    # At 1e4 the last bit of a score moves a probability of one half by 1e-3, whoever computes it.
    sides = large(sides_of(1, 7, 7, dim=64, channels=(16, 16), dtype=torch.float32), 1e4)
    truth = run(sides.to(torch.float64), 7, implementation="reference")
    for name, one, by_pytorch, exact in zip(NAMES, run(sides, 7).values, plain(sides, 7), truth.values, strict=True):
        rounding = torch.finfo(torch.float32).eps * exact.abs().max()
        assert (one - exact).abs().max() <= 3 * ((by_pytorch - exact).abs().max() + rounding), name


def test_error_of_products_on_tensor_cores_is_within_that_of_the_plain_form(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cuda":
        pytest.skip("a GPU has tensor cores of its own")
    use_tensor_cores(monkeypatch)
    within_budget(sides_of(1, 8, 8, dim=40, channels=(32, 32), dtype=torch.float32), 8)


def test_identical_sides() -> None:
    sides = sides_of(1, 9, 8, dtype=torch.float32)
    same = Sides(sides[0], sides[0].clone(), sides[2], sides[2].clone())
    outcome = run(same, 8, terms=(1.0, 0.0, 1.0))
    assert abs(outcome.result.attention.item()) < 1e-6
    assert outcome.result.context.item() == 0
    for gradient in outcome.gradients:
        assert gradient.abs().max() < 1e-7


def test_a_zero_pixel_has_value_one_and_its_values_no_gradient() -> None:
    sides = sides_of(1, 4, 4)
    sides.features_student[:, :, 1, 2] = 0
    against_reference(sides, 4)
    outcome = run(sides, 4, terms=(0.0, 1.0, 0.0))
    assert (outcome.gradients.features_student[:, :, 1, 2] == 0).all()


def test_float16_gradients_survive_a_loss_scale_and_short_vectors() -> None:
    sides = sides_of(1, 8, 8, dtype=torch.float16)
    truth = run(sides.to(torch.float64), 8, implementation="reference")
    scaled = run(sides, 8, upstream=2.0**14)
    for ours, exact in zip(scaled.gradients, truth.gradients):
        assert (ours.double() / 2.0**14 - exact).abs().max() <= 5e-3 * exact.abs().max()
    # The gradient of a cosine is one over the vector's length, here beyond what float16 holds.
    short = run(sides._replace(features_student=sides.features_student * 2.0**-22), 8)
    assert all(torch.isfinite(gradient).all() for gradient in short.gradients)


@settings(
    max_examples=8,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    window_size=st.integers(1, 6),
    dim=st.integers(1, 20),
    channels=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 9)),
    layouts=st.tuples(*[st.sampled_from(["nchw", "channels_last", "sliced", "sliced_channels_last"])] * 2),
    terms=st.tuples(*[st.sampled_from([0.0, 0.5, 1.0])] * 3).filter(any),
    fraction=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    most=st.integers(1, 3),
)
def test_any_shape_layout_shift_and_terms(
    window_size: int,
    dim: int,
    channels: tuple[int, int],
    shape: tuple[int, int, int],
    layouts: tuple[str, str],
    terms: tuple[float, float, float],
    fraction: tuple[float, float],
    most: int,
) -> None:
    shift = (int(fraction[0] * window_size), int(fraction[1] * window_size))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "MOST_PROGRAMS", {"forward": most, "backward": most})
        launching.forget_calls()
        against_reference(
            sides_of(*shape, dim=dim, channels=channels, layouts=layouts), window_size, shift, terms=terms
        )


def test_64_bit_offsets_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = sides_of(2, 6, 4, layouts=("channels_last", "nchw"))
    narrow = run(sides, 4, (1, 2))
    monkeypatch.setattr(launching, "WIDE_FROM", 0)
    launching.forget_calls()
    assert_same(run(sides, 4, (1, 2)), narrow, 0.0)


@pytest.mark.parametrize(
    ("window_size", "dim", "channels", "message"),
    [
        (9, 8, (8, 8), "up to 64 tokens, .*, got window_size=9, D=8 and 8 channels of torch.bfloat16"),
        (2, 65, (8, 8), "D up to 64 .*, got window_size=2, D=65"),
        (2, 8, (8, 65), r"up to \d+ channels of 16 bits, got window_size=2, D=8 and 65 channels"),
    ],
)
def test_sizes_the_kernels_do_not_serve(window_size: int, dim: int, channels: tuple[int, int], message: str) -> None:
    sides = sides_like((1, 3, 3), dim=dim, channels=channels, dtype=torch.bfloat16).to(DEVICE)
    with pytest.raises(NotImplementedError, match=message):
        run(sides, window_size)


@pytest.mark.parametrize(
    ("family", "expected"), [("ampere", (64, 64, 0)), ("hopper", (64, 64, 0)), ("cdna", (32, 32, 0))]
)
def test_most_channels_of_a_gpu(family: str, expected: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sward_kernels.windowed_features.api.family_of", lambda _: family)
    device = torch.device("cuda")
    for dtype, most in zip((torch.bfloat16, torch.float16, torch.float32), expected):
        assert takes_features(most, 1, 64, 8, dtype, device) == (most > 0)
        assert not takes_features(most + 1, 1, 64, 8, dtype, device)
        assert not takes_features(1, most + 1, 64, 8, dtype, device)
