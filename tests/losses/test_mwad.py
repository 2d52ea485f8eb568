"""MWADLoss against Eq. 1-15 written out, and its options."""

import importlib
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sward.alignment import ChannelProjection, project
from sward.losses import PAPER, MWADLoss, mwad
from sward_kernels import windowed_distillation, windowed_feature_distillation
from sward_kernels.windowed_features import native as windowed_features
from tests.support.error_budget import GRADIENT_FACTOR, assert_within_budget
from tests.support.operators import Operators

LITERAL = {name: getattr(PAPER, name) for name in ("teacher_normalization", "teacher_projections", "context_reduction")}


def maps(channels: list[int], sizes: list[tuple[int, int]], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(2, width, *size, dtype=dtype) for width, size in zip(channels, sizes, strict=True)]


def stage_by_hand(loss: MWADLoss, index: int, student: Tensor, teacher: Tensor, window: int) -> tuple[Tensor, ...]:
    """Eq. 1-13 token by token, for grids that the window divides and no shift."""
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    resized = F.interpolate(loss.phi[index](teacher), size=size, mode="bilinear", align_corners=False)
    qkv_t = loss.theta_teacher[index](resized)
    qkv_s = loss.theta_student[index](F.interpolate(student, size=size, mode="bilinear", align_corners=False))
    dim = qkv_t.shape[1] // 3
    attention, value, context = [], [], []
    for batch in range(qkv_t.shape[0]):
        for top in range(0, size[0], window):
            for left in range(0, size[1], window):
                tokens = [
                    qkv[batch, :, top : top + window, left : left + window].flatten(1).T.split(dim, dim=1)
                    for qkv in (qkv_t, qkv_s)
                ]
                (q_t, k_t, v_t), (q_s, k_s, v_s) = tokens
                a_t = torch.softmax(q_t @ k_t.T / math.sqrt(dim), dim=1)
                a_s = torch.softmax(q_s @ k_s.T / math.sqrt(dim), dim=1)
                attention.append((a_t * (a_t / a_s).log()).sum(1))
                value.append(1 - F.cosine_similarity(v_s, v_t, dim=1))
                context.append((a_s @ v_s - a_t @ v_t).square().sum(1))
    return tuple(torch.cat(each).mean() for each in (attention, value, context))


def test_two_stages_equal_the_equations() -> None:
    loss = MWADLoss(
        [4, 6], [5, 3], window_size=[4, 2], embed_dim=[8, 3], shift="none", terms=(0.5, 2.0, 1.5), **LITERAL
    ).double()
    student, teacher = maps([4, 6], [(8, 12), (8, 6)]), maps([5, 3], [(16, 8), (4, 6)])
    output = loss(student, teacher)
    expected = [stage_by_hand(loss, i, student[i], teacher[i], m) for i, m in ((0, 4), (1, 2))]
    for name, values in zip(("attention", "value", "context"), zip(*expected), strict=True):
        torch.testing.assert_close(getattr(output, name).double(), torch.stack(values).mean(), rtol=1e-6, atol=1e-7)
    total = sum(0.5 * a + 2.0 * v + 1.5 * c for a, v, c in expected) / 2
    torch.testing.assert_close(output.loss.double(), total.detach().double(), rtol=1e-6, atol=1e-7)


def test_merged_and_stacked_teacher_projections_agree() -> None:
    # A wide student takes the merged form, a narrow one the two convolutions; both must be Theta(phi(psi(f))).
    for student_channels, teacher_channels in ((96, 64), (4, 64)):
        loss = MWADLoss([student_channels], [teacher_channels], embed_dim=8).double()
        teacher = torch.randn(1, teacher_channels, 16, 16, dtype=torch.float64)
        student = torch.randn(1, student_channels, 8, 8, dtype=torch.float64)
        _, qkv_teacher = loss.project(0, student, teacher)
        resized = F.interpolate(loss.phi[0](teacher), size=(8, 8), mode="bilinear", align_corners=False)
        torch.testing.assert_close(qkv_teacher, loss.theta_teacher[0](resized), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("device", "channels", "channels_last"), [("meta", 8, True), ("meta", 9, False), ("cpu", 8, False)]
)
def test_narrow_features_on_a_gpu_are_projected_in_channels_last(
    device: str, channels: int, channels_last: bool
) -> None:
    # A tensor without data stands in for one on a GPU. The projection keeps the layout of its input.
    features = mwad._in_relation_layout(torch.empty(2, channels, 4, 6, device=device), 8)
    assert features.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert features.is_contiguous() != channels_last


def test_gradient_reaches_every_projection_and_the_student_but_not_the_teacher() -> None:
    loss = MWADLoss([4], [5], window_size=4, embed_dim=8, teacher_projections="learned")
    student, teacher = torch.randn(1, 4, 8, 8, requires_grad=True), torch.randn(1, 5, 8, 8, requires_grad=True)
    loss([student], [teacher]).loss.backward()
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in loss.parameters())


def test_frozen_teacher_projections_are_semi_orthogonal_and_stay() -> None:
    loss = MWADLoss([4], [6], window_size=4, embed_dim=8, teacher_projections="frozen")
    rows = loss.phi[0].weight.flatten(1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(4), rtol=0, atol=1e-6)
    columns = loss.theta_teacher[0].weight.flatten(1)
    torch.testing.assert_close(columns.T @ columns, torch.eye(4), rtol=0, atol=1e-6)
    student = torch.randn(1, 4, 8, 8, requires_grad=True)
    loss([student], [torch.randn(1, 6, 8, 8)]).loss.backward()
    assert {name for name, parameter in loss.named_parameters() if parameter.grad is not None} == {
        "theta_student.0.weight"
    }
    assert student.grad is not None


def test_frozen_teacher_projections_stay_so_where_everything_is_thawed() -> None:
    """As after a warm-up with a frozen backbone, `distiller.requires_grad_(True)`."""
    loss = MWADLoss([4], [5], window_size=4, embed_dim=8).requires_grad_(True)
    optimizer = torch.optim.AdamW(loss.parameters(), lr=0.1)
    before = [parameter.clone() for parameter in (*loss.phi.parameters(), *loss.theta_teacher.parameters())]
    student = torch.randn(2, 4, 8, 8, requires_grad=True)
    loss([student], [torch.randn(2, 5, 8, 8)]).loss.backward()
    optimizer.step()
    after = [*loss.phi.parameters(), *loss.theta_teacher.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert loss.theta_student[0].weight.grad is not None


def test_maps_of_the_student_without_gradient_are_warned_of_once() -> None:
    loss = MWADLoss([4], [5], window_size=4, embed_dim=8)
    student, teacher = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8, 8)
    with pytest.warns(UserWarning, match="no map in student_features has a gradient, so the student learns nothing"):
        loss([student], [teacher])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss([student], [teacher])
        other = MWADLoss([4], [5], window_size=4, embed_dim=8)
        other([student.requires_grad_()], [teacher])
        other.eval()([student.detach()], [teacher])
        with torch.no_grad():
            other.train()([student.detach()], [teacher])


def test_context_mean_divides_the_sum_by_the_width() -> None:
    summed = MWADLoss(
        [4], [5], window_size=4, embed_dim=8, shift="none", terms=(0.0, 0.0, 1.0), context_reduction="sum"
    )
    averaged = MWADLoss(
        [4], [5], window_size=4, embed_dim=8, shift="none", terms=(0.0, 0.0, 1.0), context_reduction="mean"
    )
    averaged.load_state_dict(summed.state_dict())
    student, teacher = maps([4], [(8, 8)], torch.float32), maps([5], [(8, 8)], torch.float32)
    one, other = summed(student, teacher), averaged(student, teacher)
    torch.testing.assert_close(other.loss, one.loss / 8)
    torch.testing.assert_close(other.context, one.context / 8)


@pytest.mark.parametrize("strategy", ["none", "deterministic"])
def test_fixed_strategies_repeat(strategy: str) -> None:
    loss = MWADLoss([4], [5], window_size=4, embed_dim=8, shift=strategy)  # type: ignore[arg-type]
    student, teacher = maps([4], [(8, 8)], torch.float32), maps([5], [(8, 8)], torch.float32)
    assert loss(student, teacher).loss.item() == loss(student, teacher).loss.item()


def test_deterministic_shift_is_half_a_window() -> None:
    fixed = MWADLoss([4], [5], window_size=4, embed_dim=8, shift="none")
    shifted = MWADLoss([4], [5], window_size=4, embed_dim=8, shift="deterministic")
    shifted.load_state_dict(fixed.state_dict())
    student, teacher = maps([4], [(8, 8)], torch.float32), maps([5], [(8, 8)], torch.float32)
    rolled = [[each.roll((-2, -2), dims=(2, 3)) for each in side] for side in (student, teacher)]
    torch.testing.assert_close(shifted(student, teacher).loss, fixed(*rolled).loss)


def test_stochastic_shifts_follow_their_generator_and_visit_every_offset() -> None:
    loss = MWADLoss([4, 4], [5, 5], window_size=[2, 3], embed_dim=8, generator=torch.Generator().manual_seed(3))
    drawn = [tuple(int(each) for each in loss._draw_shift(2, torch.device("cpu"))) for _ in range(60)]
    assert set(drawn) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert loss.generator is not None
    loss.generator.manual_seed(3)
    assert [tuple(int(each) for each in loss._draw_shift(2, torch.device("cpu"))) for _ in range(60)] == drawn


def test_evaluation_mode_does_not_shift_and_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    loss = MWADLoss([4], [5], window_size=4, embed_dim=8, generator=generator).eval()
    before = generator.get_state()
    student, teacher = maps([4], [(8, 8)], torch.float32), maps([5], [(8, 8)], torch.float32)
    assert loss(student, teacher).loss.item() == loss(student, teacher).loss.item()
    assert torch.equal(before, generator.get_state())


def test_the_paper_s_recipe_is_its_equations_bit_for_bit() -> None:
    """Parameters drawn in this order, and these operations on them; no buffers."""
    torch.manual_seed(0)
    # The reference, since what `auto` is on a CPU makes one matrix of the projections of queries and keys.
    options = {"implementation": "reference", "shift": "deterministic", **LITERAL}
    loss = MWADLoss([4, 96], [5, 64], window_size=4, embed_dim=8, **options)
    torch.manual_seed(0)
    phi = [ChannelProjection(5, 4), ChannelProjection(64, 96)]
    theta_teacher, theta_student = ([ChannelProjection(width, 24, bias=False) for width in (4, 96)] for _ in range(2))
    student, teacher = maps([4, 96], [(8, 8), (4, 8)], torch.float32), maps([5, 64], [(8, 8), (8, 8)], torch.float32)
    qkv_teacher = theta_teacher[0](phi[0](teacher[0]))
    first = windowed_distillation(theta_student[0](student[0]), qkv_teacher, 4, (2, 2), implementation="reference").loss
    # The wide student merges the two convolutions of its teacher.
    matrix = theta_teacher[1].weight.flatten(1)
    small = F.interpolate(teacher[1], size=(4, 8), mode="bilinear", align_corners=False)
    merged = project(small, matrix @ phi[1].weight.flatten(1), matrix @ phi[1].bias)
    second = windowed_distillation(theta_student[1](student[1]), merged, 4, (2, 2), implementation="reference").loss
    assert torch.equal(loss(student, teacher).loss, torch.stack([first, second]).mean())
    assert not list(loss.buffers())
    assert all(parameter.requires_grad for parameter in loss.parameters())


def test_standardised_teachers_are_those_with_mean_0_and_variance_1() -> None:
    loss = MWADLoss([4], [5], window_size=4, embed_dim=8, shift="none")
    raw = MWADLoss([4], [5], window_size=4, embed_dim=8, shift="none", teacher_normalization="none")
    raw.load_state_dict({name: value for name, value in loss.state_dict().items() if "standardization" not in name})
    student, (teacher,) = maps([4], [(4, 4)], torch.float32), maps([5], [(8, 8)], torch.float32)
    scales, offsets = torch.tensor([30.0, 1.0, 0.01, 5.0, 1.0]), torch.tensor([100.0, 0.0, 1.0, -3.0, 0.0])
    teacher = teacher * scales[:, None, None] + offsets[:, None, None]
    flat = teacher.transpose(0, 1).flatten(1)
    by_hand = (flat - flat.mean(1, keepdim=True)) / flat.std(1, correction=0, keepdim=True)
    by_hand = by_hand.unflatten(1, (2, 8, 8)).transpose(0, 1)
    expected = raw(student, [by_hand]).loss
    assert raw(student, [teacher]).loss > 1.1 * expected
    torch.testing.assert_close(loss(student, [teacher]).loss, expected)
    torch.testing.assert_close(loss.eval()(student, [teacher]).loss, expected)


def test_diagnostics_see_standardised_maps_and_leave_the_statistics_alone() -> None:
    loss = MWADLoss([4], [5], window_size=4, embed_dim=8)
    student, teacher = maps([4], [(8, 8)], torch.float32), maps([5], [(8, 8)], torch.float32)
    teacher[0][:, 0] += 1000.0
    collapsed = loss.diagnostics(student, teacher)
    loss(student, teacher)
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    healthy = loss.diagnostics(student, teacher)
    assert all(torch.equal(before[name], value) for name, value in loss.state_dict().items())
    assert healthy["stage0/teacher/value_cosine"] < 0.7 < collapsed["stage0/teacher/value_cosine"]
    loss.eval()(student, [each + 1 for each in teacher])
    assert all(torch.equal(before[name], value) for name, value in loss.state_dict().items())


def test_a_stage_of_padding_is_warned_of_once() -> None:
    loss = MWADLoss([4, 4, 4], [5, 5, 5], window_size=[4, 8, 8], embed_dim=8)
    sizes = [(4, 4), (4, 8), (4, 4)]
    student, teacher = maps([4] * 3, sizes, torch.float32), maps([5] * 3, sizes, torch.float32)
    student[0].requires_grad_()
    sentence = "75% of the tokens of MWAD's stage 2 are padding: its aligned grid is 4x4 and its windows 8x8"
    with pytest.warns(UserWarning, match=f"^{sentence}; use smaller windows there") as caught:
        loss(student, teacher)
    # The second stage is half padding, which is not most of it.
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(student, teacher)


FLOATING = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("student_dtype", FLOATING)
@pytest.mark.parametrize("teacher_dtype", FLOATING)
@pytest.mark.parametrize("width", [96, 4], ids=["merged projections", "stacked projections"])
def test_features_of_any_dtype_are_projected_in_that_of_the_parameters(
    width: int, student_dtype: torch.dtype, teacher_dtype: torch.dtype
) -> None:
    loss = MWADLoss([width], [64], window_size=4, embed_dim=8, shift="none", **LITERAL)
    student, teacher = maps([width], [(8, 8)], student_dtype), maps([64], [(8, 8)], teacher_dtype)
    leaves = [student[0].requires_grad_(), student[0].detach().float().requires_grad_()]
    actual, expected = loss(leaves[:1], teacher).loss, loss(leaves[1:], [teacher[0].float()]).loss
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)
    actual.backward()
    expected.backward()
    gradient, exact = (leaf.grad for leaf in leaves)
    assert gradient is not None
    assert exact is not None
    assert gradient.dtype == student_dtype
    assert torch.equal(gradient, exact.to(student_dtype))


@pytest.mark.parametrize(("window_size", "student_channels", "inside"), [(4, 6, True), (9, 6, False), (4, 65, False)])
@pytest.mark.parametrize("recipe", ["paper", "recommended"])
def test_triton_projects_narrow_features_inside_its_kernels(
    window_size: int, student_channels: int, inside: bool, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    importlib.import_module("tests.support.interpreter")  # makes it fast
    if torch.cuda.is_available():
        pytest.skip("compares in float64, which the kernels take in the interpreter only")
    used = []

    def spy(*tensors: Tensor, **options: object) -> object:
        used.append([tuple(tensor.shape) for tensor in tensors])
        return windowed_feature_distillation(*tensors, **options)

    monkeypatch.setattr(mwad, "windowed_feature_distillation", spy)
    options = {"window_size": window_size, "embed_dim": 8, "shift": "deterministic"} | (
        LITERAL if recipe == "paper" else {}
    )
    student = torch.randn(1, student_channels, 9, 8, dtype=torch.float64)
    teacher = torch.randn(1, 5, 8, 11, dtype=torch.float64)
    outcomes = []
    for implementation in ("triton", "reference"):
        torch.manual_seed(1)
        loss = MWADLoss([student_channels], [5], implementation=implementation, **options).double()
        leaf = student.clone().requires_grad_()
        output = loss([leaf], [teacher])
        output.loss.backward()
        outcomes.append([output.loss, *output[1:4], leaf.grad, *(each.grad for each in loss.parameters())])
    # On the common grid, and the teacher's features behind phi.
    map_shape, weight_shape = (1, student_channels, 8, 8), (24, student_channels)
    assert used == ([[map_shape, map_shape, weight_shape, weight_shape]] if inside else [])
    for one, other in zip(*outcomes, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("window_size", "student_channels", "inside"), [(4, 6, True), (17, 6, False), (4, 129, False)])
@pytest.mark.parametrize("recipe", ["paper", "recommended"])
def test_on_a_cpu_narrow_features_are_projected_inside_the_operation(
    window_size: int, student_channels: int, inside: bool, recipe: str
) -> None:
    if windowed_features.LIBRARY.why_not() is not None:
        pytest.skip("the C++ does not compile here")
    options = {"window_size": window_size, "embed_dim": 8, "shift": "deterministic"} | (
        LITERAL if recipe == "paper" else {}
    )
    student, teacher = torch.randn(1, student_channels, 9, 8), torch.randn(1, 5, 8, 11)
    outcomes = []
    for implementation, dtype in (("auto", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        torch.manual_seed(1)
        loss = MWADLoss([student_channels], [5], implementation=implementation, **options).to(dtype)
        leaf = student.to(dtype, copy=True).requires_grad_()
        with Operators() as operators:
            output = loss([leaf], [teacher.to(dtype)])
        output.loss.backward()
        outcomes.append([output.loss, *output[1:4], leaf.grad, *(each.grad for each in loss.parameters())])
        if implementation == "auto":
            assert ("windowed_feature_distillation_native" in operators.returned) == inside
    for one, plain, exact in zip(*outcomes, strict=True):
        assert (one is None) == (exact is None)
        if one is not None:
            assert_within_budget(one, plain, exact, GRADIENT_FACTOR, "a term or a gradient")


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("width", [96, 4], ids=["merged projections", "stacked projections"])
def test_under_autocast_features_of_any_dtype_are_projected_in_its_own(width: int, dtype: torch.dtype) -> None:
    loss = MWADLoss([width], [64], embed_dim=8)
    student, teacher = maps([width], [(8, 8)], dtype), maps([64], [(8, 8)], dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert {qkv.dtype for qkv in loss.project(0, student[0], teacher[0])} == {torch.bfloat16}


def test_a_half_precision_teacher_compiles_without_a_graph_break() -> None:
    torch._dynamo.reset()
    loss = MWADLoss([96, 4], [64, 5], window_size=4, embed_dim=8).eval()
    student = maps([96, 4], [(8, 8), (4, 4)], torch.float32)
    teacher = maps([64, 5], [(8, 8), (8, 8)], torch.bfloat16)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(student, teacher).loss
    torch.testing.assert_close(compiled, loss(student, teacher).loss)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(student_channels=[4], teacher_channels=[4, 5]), "same number of stages, at least one, got 1 and 2"),
        (dict(student_channels=[], teacher_channels=[]), "at least one, got 0 and 0"),
        (dict(student_channels=[4], teacher_channels=[4], shift="random"), "shift must be one of 'stochastic'"),
        (
            dict(student_channels=[4], teacher_channels=[4], window_size=[8, 8]),
            "window_size must be one number or one per",
        ),
        (dict(student_channels=4, teacher_channels=[4]), "student_channels must be a list, one per stage, got 4"),
        (
            dict(student_channels=[4], teacher_channels=[4], window_size=4.0),
            "window_size must be a whole number or a list of them, one per stage, got 4.0",
        ),
        (dict(student_channels=[4], teacher_channels=[4], window_size="8"), "must be a whole number .* got '8'"),
        (dict(student_channels=[4], teacher_channels=[4], window_size=0), "window_size must be at least 1, got 0"),
        (dict(student_channels=[4], teacher_channels=[4], teacher_projections="fixed"), "teacher_projections must be"),
        (
            dict(student_channels=[4], teacher_channels=[4], teacher_normalization="whiten"),
            "teacher_normalization must be one of 'none', 'standardize', got 'whiten'",
        ),
        (
            dict(student_channels=[4], teacher_channels=[4], terms=(1, 1)),
            r"terms must be three .*, got \(1, 1\)",
        ),
        (
            dict(student_channels=[4], teacher_channels=[4], implementation="cuda"),
            "must be one of .*, got 'cuda'",
        ),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MWADLoss(**arguments)


def test_wrong_features_are_refused_in_one_sentence() -> None:
    loss = MWADLoss([4], [5])
    with pytest.raises(ValueError, match=r"student_features\[0\] must be \[B, 4, H, W\].*got shape \(1, 3, 8, 8\)"):
        loss([torch.zeros(1, 3, 8, 8)], [torch.zeros(1, 5, 8, 8)])
    with pytest.raises(
        ValueError, match=r"student_features must be a list of maps.*got dict_values; .* list\(maps\.val"
    ):
        loss({"a": torch.zeros(1, 4, 8, 8)}.values(), [torch.zeros(1, 5, 8, 8)])
    with pytest.raises(ValueError, match="teacher_features must hold 1 maps, one per stage, got 2"):
        loss([torch.zeros(1, 4, 8, 8)], [torch.zeros(1, 5, 8, 8)] * 2)
