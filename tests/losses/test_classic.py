"""KD, CWD, attention transfer, FitNets and pairwise relations against hand-computed values and their invariances."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sward.losses.classic import AttentionTransferLoss, CWDLoss, FitNetLoss, KDLoss, PairwiseLoss
from tests.support.peers import TAPS, features, logits

METHODS = {
    "kd": lambda: KDLoss(ignore_index=None),
    "cwd": lambda: CWDLoss(4, 4, **TAPS),
    "at-code": lambda: AttentionTransferLoss(**TAPS),
    "at-paper": lambda: AttentionTransferLoss(**TAPS, mode="paper"),
    "pairwise": lambda: PairwiseLoss(**TAPS),
}


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def value(name: str, student: Tensor, teacher: Tensor) -> float:
    build = logits if name == "kd" else features
    return METHODS[name]()(build(student, teacher)).loss.item()


def rotation(channels: int) -> Tensor:
    return torch.linalg.qr(random(channels, channels))[0]


@pytest.mark.parametrize("name", METHODS)
def test_equal_maps_cost_nothing(name: str) -> None:
    same = random(2, 4, 6, 6)
    assert abs(value(name, same, same.clone())) < 1e-12
    assert value(name, same, random(2, 4, 6, 6)) > 1e-4


@pytest.mark.parametrize("name", METHODS)
def test_maps_of_different_grids_meet_on_the_smaller(name: str) -> None:
    student, teacher = random(2, 4, 6, 8), random(2, 4, 12, 8)
    resized = F.interpolate(teacher, size=(6, 8), mode="bilinear", align_corners=False)
    assert value(name, student, teacher) == pytest.approx(value(name, student, resized), rel=1e-12)
    assert value(name, teacher, student) == pytest.approx(value(name, resized, student), rel=1e-12)


def test_kd_of_one_pixel() -> None:
    student = torch.zeros(1, 2, 1, 1, dtype=torch.float64)
    teacher = torch.tensor([math.log(3.0), 0.0], dtype=torch.float64).view(1, 2, 1, 1)
    assert KDLoss()(logits(student, teacher)).loss.item() == pytest.approx(0.1308120, abs=5e-8)


def test_kd_ignores_a_constant_per_pixel() -> None:
    student, teacher = random(2, 4, 3, 3), random(2, 4, 3, 3)
    assert value("kd", student + random(2, 1, 3, 3), teacher + random(2, 1, 3, 3)) == pytest.approx(
        value("kd", student, teacher), rel=1e-10
    )


def test_kd_leaves_out_the_pixels_whose_centre_is_ignored() -> None:
    student, teacher = random(2, 4, 3, 5), random(2, 4, 3, 5)
    small = torch.randint(0, 4, (2, 3, 5)).where(torch.rand(2, 3, 5) < 0.6, 255)
    # Moved by two pixels of eight: the centres keep their labels, the corners do not.
    large = small.repeat_interleave(8, 1).repeat_interleave(8, 2).roll((2, 2), (1, 2))
    values = [KDLoss()(logits(student, teacher, labels)).loss for labels in (small, large)]
    assert values[0] == values[1]


def test_kd_is_the_mean_over_labelled_pixels_of_torchs_own_kl() -> None:
    student, teacher = random(2, 4, 5, 5), random(2, 4, 5, 5)
    labels = torch.randint(0, 4, (2, 5, 5))
    labels[:, :2] = 255
    keep = (labels != 255).flatten()
    rows = [z.permute(0, 2, 3, 1).reshape(-1, 4)[keep] / 3.0 for z in (student, teacher)]
    expected = 9.0 * F.kl_div(rows[0].log_softmax(1), rows[1].log_softmax(1), reduction="batchmean", log_target=True)
    actual = KDLoss(temperature=3.0)(logits(student, teacher, labels)).loss
    torch.testing.assert_close(actual, expected)


def test_kd_without_a_labelled_pixel_is_zero_with_zero_gradient() -> None:
    student = random(1, 3, 4, 4).requires_grad_()
    loss = KDLoss()(logits(student, random(1, 3, 4, 4), torch.full((1, 4, 4), 255))).loss
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad is not None
    assert not student.grad.any()


def test_kd_of_one_logit_heads_is_the_bernoulli_divergence() -> None:
    student, teacher = random(2, 1, 4, 4), random(2, 1, 4, 4)
    p, q = teacher.sigmoid(), student.sigmoid()
    expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    two = torch.cat((torch.zeros_like(teacher), teacher), dim=1)
    torch.testing.assert_close(KDLoss()(logits(student, teacher)).loss, expected)
    torch.testing.assert_close(KDLoss()(logits(student, two)).loss, expected)


def test_kd_refuses_different_classes() -> None:
    with pytest.raises(ValueError, match="same classes, got 3 and 4"):
        KDLoss()(logits(random(1, 3, 4, 4), random(1, 4, 4, 4)))


def test_cwd_of_two_pixels() -> None:
    student = torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    teacher = torch.tensor([4 * math.log(3.0), 0.0], dtype=torch.float64).view(1, 1, 1, 2)
    loss = CWDLoss(1, 1, **TAPS, weight=1.0)(features(student, teacher)).loss
    assert loss.item() == pytest.approx(2.0929926, abs=5e-8)


def test_cwd_ignores_a_constant_per_channel() -> None:
    student, teacher = random(2, 4, 3, 3), random(2, 4, 3, 3)
    assert value("cwd", student + random(2, 4, 1, 1), teacher) == pytest.approx(
        value("cwd", student, teacher), rel=1e-10
    )


def test_cwd_divides_by_the_teachers_channels() -> None:
    student, teacher = random(2, 3, 4, 4), random(2, 5, 4, 4)
    method = CWDLoss(3, 5, **TAPS, weight=1.0).double()
    loss = method(features(student, teacher)).loss
    projected = method.projection(student).flatten(2)
    expected = F.kl_div(
        (projected / 4).log_softmax(-1), (teacher.flatten(2) / 4).log_softmax(-1), reduction="sum", log_target=True
    )
    torch.testing.assert_close(loss, 16 * expected / (2 * 5))


def test_cwd_survives_logits_whose_softmax_underflows() -> None:
    student = torch.zeros(1, 1, 1, 2, requires_grad=True)
    loss = CWDLoss(1, 1, **TAPS)(features(student, torch.tensor([4000.0, -4000.0]).view(1, 1, 1, 2))).loss
    assert loss.item() == pytest.approx(3 * 16 * math.log(2.0), rel=1e-6)


def test_cwd_names_what_is_missing() -> None:
    with pytest.raises(ValueError, match="both student_channels and teacher_channels"):
        CWDLoss(3, **TAPS)
    with pytest.raises(ValueError, match="student has 3 and the teacher 4"):
        CWDLoss(**TAPS)(features(random(1, 3, 4, 4), random(1, 4, 4, 4)))


def test_attention_transfer_of_two_pixels() -> None:
    student = torch.tensor([1.0, 0.0], dtype=torch.float64).view(1, 1, 1, 2)
    teacher = torch.tensor([0.0, 1.0], dtype=torch.float64).view(1, 1, 1, 2)
    code = AttentionTransferLoss(**TAPS, weight=1.0)(features(student, teacher)).loss
    paper = AttentionTransferLoss(**TAPS, mode="paper", weight=1.0)(features(student, teacher)).loss
    assert code.item() == pytest.approx(1.0)
    assert paper.item() == pytest.approx(math.sqrt(2.0))


@pytest.mark.parametrize("name", ["at-code", "at-paper"])
def test_attention_transfer_ignores_scale_and_channel_rotations(name: str) -> None:
    student, teacher = random(2, 4, 5, 5), random(2, 3, 5, 5)
    turned = torch.einsum("dc,bchw->bdhw", rotation(4), student)
    expected = value(name, student, teacher)
    assert value(name, 7.0 * student, teacher) == pytest.approx(expected, rel=1e-10)
    assert value(name, turned, teacher) == pytest.approx(expected, rel=1e-10)


def test_attention_transfer_refuses_an_unknown_mode() -> None:
    with pytest.raises(ValueError, match="mode must be 'code' or 'paper', got 'other'"):
        AttentionTransferLoss(**TAPS, mode="other")  # type: ignore[arg-type]


def test_fitnet_is_the_mean_squared_error_behind_its_projection() -> None:
    method = FitNetLoss(4, 4, **TAPS, weight=1.0).double()
    with torch.no_grad():
        method.projection.weight.copy_(torch.eye(4)[:, :, None, None])
        method.projection.bias.zero_()
    teacher, error = random(2, 4, 3, 3), random(2, 4, 3, 3)
    assert method(features(teacher, teacher)).loss.item() == 0.0
    once, twice = (method(features(teacher + k * error, teacher)).loss for k in (1, 2))
    torch.testing.assert_close(once, error.square().mean())
    torch.testing.assert_close(twice, 4 * once)


def test_fitnet_does_not_care_for_the_order_of_the_teachers_channels() -> None:
    method = FitNetLoss(3, 5, **TAPS).double()
    student, teacher, order = random(2, 3, 4, 4), random(2, 5, 4, 4), torch.randperm(5)
    before = method(features(student, teacher)).loss
    with torch.no_grad():
        method.projection.weight.copy_(method.projection.weight[order].clone())
        method.projection.bias.copy_(method.projection.bias[order].clone())
    torch.testing.assert_close(method(features(student, teacher[:, order])).loss, before)


def test_pairwise_of_two_pixels() -> None:
    student = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64).view(1, 2, 1, 2)
    teacher = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64).view(1, 2, 1, 2)
    loss = PairwiseLoss(**TAPS, pool=1, weight=1.0)(features(student, teacher)).loss
    assert loss.item() == pytest.approx(0.5)


def test_pairwise_equals_the_map_of_pixels_by_pixels_and_its_gradient() -> None:
    student, teacher = random(2, 3, 7, 9).requires_grad_(), random(2, 5, 7, 9)
    relations = []
    for maps in (student, teacher):
        units = F.normalize(F.max_pool2d(maps, 2, ceil_mode=True).flatten(2), dim=1)
        relations.append(units.mT @ units)
    expected = (relations[0] - relations[1]).square().mean()
    actual = PairwiseLoss(**TAPS, weight=1.0)(features(student, teacher)).loss
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, student)[0], torch.autograd.grad(expected, student)[0])


def test_pairwise_in_float32_does_not_lose_a_small_difference() -> None:
    student = random(2, 16, 12, 12)
    teacher = student + 0.05 * random(2, 16, 12, 12)
    exact = value("pairwise", student, teacher)
    assert value("pairwise", student.float(), teacher.float()) == pytest.approx(exact, rel=1e-3)


def test_pairwise_ignores_channel_rotations_and_the_scale_of_a_pixel() -> None:
    student, teacher = random(2, 4, 5, 5), random(2, 3, 5, 5)
    method = PairwiseLoss(**TAPS, pool=1)
    expected = method(features(student, teacher)).loss
    turned = torch.einsum("dc,bchw->bdhw", rotation(4), student) * (0.1 + torch.rand(2, 1, 5, 5))
    torch.testing.assert_close(method(features(turned, teacher)).loss, expected)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: KDLoss(temperature=0), "temperature must be a positive finite number, got 0"),
        (lambda: KDLoss(weight=-1), "weight must be a finite number of at least 0, got -1"),
        (lambda: CWDLoss(temperature=-4.0), r"temperature must be a positive finite number, got -4\.0"),
        (lambda: CWDLoss(weight=float("inf")), "weight must be a finite number of at least 0, got inf"),
        (lambda: AttentionTransferLoss(**TAPS, weight=float("nan")), "weight must be .* got nan"),
        (lambda: FitNetLoss(3, 4, **TAPS, weight="10"), "weight must be a finite number of at least 0, got '10'"),
        (lambda: PairwiseLoss(**TAPS, pool=0), "pool must be an int of at least 1, got 0"),
        (lambda: PairwiseLoss(**TAPS, weight=-1), "weight must be a finite number of at least 0, got -1"),
    ],
)
def test_numbers_out_of_their_range_are_refused(build: Callable[[], nn.Module], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        build()
