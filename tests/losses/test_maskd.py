"""MasKD: masks, the two distances, and learning the tokens on a frozen teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sward.losses.maskd import MasKDLoss, ReceptiveTokens, mask_overlap
from sward.losses.masks import learn_masks, load_masks, mask_learning_loss, save_masks, teacher_fingerprint
from sward.losses.objective import SegmentationCrossEntropy
from tests.support.peers import TAPS, features, logits


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def tokens(channels: int, count: int, scale: float = 1.0, *, weighted: bool = False) -> ReceptiveTokens:
    masks = ReceptiveTokens(channels, tokens=count, weighted=weighted).double()
    nn.init.normal_(masks.tokens, std=scale)
    return masks


def per_mask_distance(masks: Tensor, student: Tensor, teacher: Tensor, epsilon: float) -> Tensor:
    """`[B, N, C]`: what both variants average, written with the large tensor the library avoids."""
    error = (masks[:, :, None] * student[:, None] - masks[:, :, None] * teacher[:, None]).square()
    return error.sum(dim=(3, 4)) / (masks.sum(dim=(2, 3)) + epsilon)[:, :, None]


def test_masks_are_sigmoids_of_inner_products() -> None:
    masks, maps = tokens(3, 2), random(1, 3, 2, 2)
    expected = 1 / (1 + torch.exp(-(masks.tokens[1] * maps[0, :, 1, 0]).sum()))
    torch.testing.assert_close(masks(maps)[0, 1, 1, 0], expected)


def test_logits_variant_equals_the_official_form() -> None:
    masks, student, teacher = tokens(4, 3), random(2, 4, 5, 6), random(2, 4, 5, 6)
    expected = 0.5 * per_mask_distance(masks(teacher), student, teacher, 1e-5).mean()
    torch.testing.assert_close(MasKDLoss(masks)(logits(student, teacher)).loss, expected.detach())


def test_features_variant_equals_the_official_form() -> None:
    masks, student, teacher = tokens(4, 3, weighted=True), random(2, 3, 5, 6), random(2, 4, 5, 6)
    method = MasKDLoss(masks, 3, level="features", **TAPS, weight=7.0).double()
    projected = method.projection(student)
    distance = per_mask_distance(masks(teacher), projected, teacher, 0.0).mean(dim=2)
    expected = 7.0 * (masks.weights(teacher) * distance).sum(dim=1).mean()
    torch.testing.assert_close(method(features(student, teacher)).loss, expected)
    torch.testing.assert_close(masks.weights(teacher).sum(dim=1), torch.ones(2, dtype=torch.float64))


def test_student_masks_join_after_the_warm_up_and_the_count_survives_a_restart() -> None:
    def build() -> MasKDLoss:
        torch.manual_seed(1)
        return MasKDLoss(tokens(4, 3), 4, level="features", **TAPS, student_masks_after=2).double()

    method, student, teacher = build(), random(2, 4, 5, 5), random(2, 4, 5, 5)
    losses = [method(features(student, teacher)).loss.item() for _ in range(4)]
    assert losses[0] == losses[1]
    assert losses[1] != losses[2]
    projected = method.projection(student)
    masks = method.masks(teacher) * method.masks(projected)
    expected = per_mask_distance(masks, projected, teacher, 0.0).mean(dim=2).sum(dim=1).mean()
    assert losses[3] == pytest.approx(expected.item(), rel=1e-10)
    restarted = build()
    restarted.load_state_dict(method.state_dict())
    assert restarted(features(student, teacher)).loss.item() == losses[3]
    evaluated = build().eval()
    assert [evaluated(features(student, teacher)).loss.item() for _ in range(3)] == [losses[0]] * 3


@pytest.mark.parametrize(("count", "channels", "size"), [(8, 19, (4, 4)), (3, 2, (16, 8)), (1, 5, (4, 4))])
def test_zero_tokens_and_a_constant_error(count: int, channels: int, size: tuple[int, int]) -> None:
    # Independent of all three but for the epsilon: M = 1/2, so the loss is delta^2 / 4.
    teacher = random(2, channels, *size)
    loss = MasKDLoss(tokens(channels, count, 0.0))(logits(teacher + 2.0, teacher)).loss.item()
    assert loss == pytest.approx(1.0, abs=2e-6)
    if size == (4, 4):
        assert loss == pytest.approx(0.99999875, abs=1e-9)


@pytest.mark.parametrize("level", ["logits", "features"])
def test_loss_is_quadratic_in_the_error_under_fixed_masks(level: str) -> None:
    masks, teacher, error = tokens(4, 3), random(2, 4, 5, 5), random(2, 4, 5, 5)
    if level == "logits":
        method, build = MasKDLoss(masks), logits
    else:
        method, build = MasKDLoss(masks, 4, level="features", **TAPS).double(), features
        with torch.no_grad():
            method.projection.weight.copy_(torch.eye(4)[:, :, None, None])  # type: ignore[union-attr]
            method.projection.bias.zero_()  # type: ignore[union-attr]
    none, once, thrice = (method(build(teacher + k * error, teacher)).loss for k in (0, 1, 3))
    assert none.item() == 0.0
    torch.testing.assert_close(thrice, 9.0 * once)


def test_gradient_in_closed_form_and_only_in_the_student() -> None:
    masks, student, teacher = tokens(4, 3), random(2, 4, 5, 5).requires_grad_(), random(2, 4, 5, 5).requires_grad_()
    method = MasKDLoss(masks)
    method(logits(student, teacher)).loss.backward()
    drawn = masks(teacher).detach()
    weights = (drawn.square() / (drawn.sum(dim=(2, 3), keepdim=True) + 1e-5)).sum(dim=1, keepdim=True)
    expected = weights * (student - teacher).detach() / (2 * 3 * 4)
    torch.testing.assert_close(student.grad, expected)
    assert teacher.grad is None
    assert not any(parameter.requires_grad for parameter in method.parameters())


@pytest.mark.parametrize("level", ["logits", "features"])
def test_gradcheck(level: str) -> None:
    student, teacher = random(2, 3, 4, 4).requires_grad_(), random(2, 3, 4, 4)
    if level == "logits":
        method = MasKDLoss(tokens(3, 2))
        assert torch.autograd.gradcheck(lambda s: method(logits(s, teacher)).loss, (student,))
    else:
        features_method = MasKDLoss(tokens(3, 2, weighted=True), 3, level="features", **TAPS).double()
        assert torch.autograd.gradcheck(lambda s: features_method(features(s, teacher)).loss, (student,))


def test_saturated_tokens_give_no_nan() -> None:
    masks = ReceptiveTokens(2, tokens=2)
    nn.init.constant_(masks.tokens, 100.0)
    student, teacher = torch.randn(1, 2, 4, 4, requires_grad=True), -torch.ones(1, 2, 4, 4)
    method = MasKDLoss(masks, 2, level="features", **TAPS)
    loss = method(features(student, teacher)).loss
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_overlap_of_known_masks() -> None:
    one, half = torch.ones(1, 1, 4, 4), torch.full((1, 1, 4, 4), 0.5)
    left = torch.zeros(1, 1, 4, 4)
    left[..., :2] = 1
    assert mask_overlap(torch.cat((one, one), dim=1)).item() == pytest.approx(1.0)
    assert mask_overlap(torch.cat((left, 1 - left), dim=1)).item() == 0.0
    assert mask_overlap(torch.cat((half, one), dim=1)).item() == pytest.approx(0.8)
    assert mask_overlap(one).item() == 0.0


def test_overlap_does_not_care_for_the_order_of_masks() -> None:
    masks = torch.rand(2, 5, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(mask_overlap(masks[:, torch.randperm(5)]), mask_overlap(masks))


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValueError, match="level must be 'logits' or 'features', got 'pixels'"):
        MasKDLoss(tokens(3, 2), level="pixels")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="level 'logits' does not go with student_tap 's'"):
        MasKDLoss(tokens(3, 2), 3, **TAPS)
    with pytest.raises(ValueError, match="needs student_channels"):
        MasKDLoss(tokens(3, 2), level="features", **TAPS)
    with pytest.raises(ValueError, match="channels and tokens must be positive"):
        ReceptiveTokens(3, tokens=0)
    with pytest.raises(ValueError, match="weight must be a finite number of at least 0, got -1"):
        MasKDLoss(tokens(3, 2), weight=-1)
    with pytest.raises(ValueError, match="4 channels, the loss was built for 3"):
        MasKDLoss(tokens(3, 2))(logits(random(1, 4, 2, 2), random(1, 4, 2, 2)))


# --- learning the tokens ---------------------------------------------------------------------------------------------


def teacher_network(heads: int = 2) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(6, heads, 1)
    )


def batches(count: int = 2) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(2, 3, 8, 8), torch.randint(0, 2, (2, 8, 8))) for _ in range(count)]


@pytest.mark.parametrize(("tap", "channels", "heads"), [("2", 6, 2), ("logits", 2, 2), ("logits", 2, 1), ("2", 6, 1)])
def test_learning_changes_the_masks_and_nothing_else(tap: str, channels: int, heads: int) -> None:
    teacher = teacher_network(heads).train()
    teacher[4].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    masks = ReceptiveTokens(channels, tokens=3, weighted=tap != "logits")
    untrained = masks.tokens.detach().clone()
    seen: list[float] = []
    learn_masks(
        masks, teacher, tap, batches(), SegmentationCrossEntropy(), steps=30,
        on_step=lambda step, terms: seen.append((terms["task"] + terms["diversity"]).item()),
    )  # fmt: skip
    assert not torch.equal(masks.tokens, untrained)
    assert len(seen) == 30
    assert seen[-1] < seen[0]
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert teacher.training
    assert [p.requires_grad for p in teacher.parameters()] == [True, True, True, True, False, True]
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not teacher[2]._forward_hooks


def test_masks_of_a_compiled_teacher_are_those_of_the_plain_one(tmp_path: Path) -> None:
    teacher, (images, labels), task = teacher_network().eval(), batches(1)[0], SegmentationCrossEntropy()
    compiled = torch.compile(teacher, backend="eager")
    masks = ReceptiveTokens(6, tokens=3)
    losses = [mask_learning_loss(masks, each, "2", images, labels, task).loss for each in (teacher, compiled)]
    torch.testing.assert_close(*losses)
    save_masks(tmp_path / "masks.pt", masks, compiled, "2")
    load_masks(tmp_path / "masks.pt", teacher, "2")


def test_learning_loss_is_the_task_loss_of_the_masked_teacher_plus_the_overlap() -> None:
    teacher, masks = teacher_network().eval().requires_grad_(False), tokens(6, 3).float()
    (images, labels), task = batches(1)[0], SegmentationCrossEntropy()
    output = mask_learning_loss(masks, teacher, "2", images, labels, task, diversity_weight=0.5)
    maps = teacher[:3](images)
    drawn = masks(maps)
    masked = sum(maps * drawn[:, n : n + 1] for n in range(3))
    expected = task(teacher[4](masked), labels) + 0.5 * mask_overlap(drawn)
    torch.testing.assert_close(output.loss, expected)


def test_learning_names_a_wrong_layer_wrong_channels_and_an_empty_loader() -> None:
    teacher, task = teacher_network(), SegmentationCrossEntropy()
    with pytest.raises(ValueError, match="no layer 'nowhere'"):
        learn_masks(ReceptiveTokens(6), teacher, "nowhere", batches(), task, steps=1)
    with pytest.raises(ValueError, match="has 6 channels, the masks are for 5"):
        learn_masks(ReceptiveTokens(5), teacher, "2", batches(), task, steps=1)
    with pytest.raises(ValueError, match="batches is empty"):
        learn_masks(ReceptiveTokens(6), teacher, "2", [], task, steps=1)
    flat = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Flatten(2), nn.Unflatten(2, (8, 8)), nn.Conv2d(6, 2, 1))
    with pytest.raises(ValueError, match=r"teacher's '1' must return maps \[B, C, h, w\], got shape \(2, 6, 64\)"):
        learn_masks(ReceptiveTokens(6), flat, "1", batches(), task, steps=1)


def test_saved_masks_come_back_for_their_teacher_only(tmp_path: Path) -> None:
    teacher, masks = teacher_network(), ReceptiveTokens(6, tokens=3, weighted=True)
    save_masks(tmp_path / "masks.pt", masks, teacher, "2")
    loaded = load_masks(tmp_path / "masks.pt", teacher, "2")
    assert isinstance(loaded, ReceptiveTokens)
    maps = torch.randn(1, 6, 4, 4)
    assert torch.equal(loaded.reconstruct(maps)[0], masks.reconstruct(maps)[0])
    with pytest.raises(ValueError, match="learned on the teacher's '2', not on '4'"):
        load_masks(tmp_path / "masks.pt", teacher, "4")
    with pytest.raises(ValueError, match="learned on other teacher weights"):
        load_masks(tmp_path / "masks.pt", teacher_network(), "2")
    masks.tokens.data[0, 0] = float("nan")
    save_masks(tmp_path / "broken.pt", masks, teacher, "2")
    with pytest.raises(ValueError, match=r"the masks in .*broken\.pt must be finite, got nan or infinity; learn them"):
        load_masks(tmp_path / "broken.pt", teacher, "2")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="holds no masks"):
        load_masks(tmp_path / "other.pt", teacher, "2")


def nudge_a_weight(teacher: nn.Sequential) -> None:
    teacher[0].bias.data[0] += 1e-6


def nudge_a_statistic(teacher: nn.Sequential) -> None:
    teacher[1].running_var[2] *= 1.0001


@pytest.mark.parametrize("change", [nudge_a_weight, nudge_a_statistic])
def test_fingerprint_sees_every_weight_and_statistic(change: Callable[[nn.Sequential], None]) -> None:
    teacher = teacher_network()
    before = teacher_fingerprint(teacher)
    assert teacher_fingerprint(teacher.eval()) == before
    with torch.no_grad():
        change(teacher)
    assert teacher_fingerprint(teacher) != before
