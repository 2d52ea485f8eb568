"""FreeKD: the Haar transform, prompts, and the band loss in both published forms."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sward.losses.freekd import FreeKDLoss, FrequencyPrompts, mask_jaccard
from sward.losses.masks import learn_masks, load_masks, save_masks
from sward.losses.objective import SegmentationCrossEntropy
from sward.losses.wavelets import HaarBands, haar_inverse, haar_transform
from tests.support.peers import TAPS, features


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def prompts(channels: int, count: int = 2, scale: float = 0.0) -> FrequencyPrompts:
    module = FrequencyPrompts(channels, tokens=count).double()
    nn.init.normal_(module.low, std=scale)
    nn.init.normal_(module.details, std=scale)
    return module


def unprojected(method: FreeKDLoss) -> FreeKDLoss:
    """The method with its projection set to the identity."""
    method = method.double()
    with torch.no_grad():
        method.projection.weight.copy_(torch.eye(method.projection.out_channels)[:, :, None, None])
        assert method.projection.bias is not None
        method.projection.bias.zero_()
    return method


def test_transform_of_a_block_with_four_corners() -> None:
    bands = haar_transform(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).view(1, 1, 2, 2), levels=1)
    assert bands.low.item() == 0.0
    assert bands.details[0].flatten().tolist() == [0.0, 0.0, 2.0]
    bands = haar_transform(torch.tensor([[1.0, 2.0], [3.0, 5.0]]).view(1, 1, 2, 2), levels=1)
    assert bands.low.item() == 5.5
    assert bands.details[0].flatten().tolist() == [-2.5, -1.5, 0.5]


@settings(max_examples=30)
@given(height=st.integers(1, 19), width=st.integers(1, 19), levels=st.integers(1, 4), seed=st.integers(0, 999))
def test_transform_keeps_energy_and_can_be_undone(height: int, width: int, levels: int, seed: int) -> None:
    torch.manual_seed(seed)
    maps = random(2, 3, height, width)
    bands = haar_transform(maps, levels)
    energy = bands.low.square().sum() + sum(detail.square().sum() for detail in bands.details)
    torch.testing.assert_close(energy, maps.square().sum())
    torch.testing.assert_close(haar_inverse(bands), maps)


def test_bands_are_finest_first() -> None:
    bands = haar_transform(random(1, 2, 16, 8), levels=3)
    assert bands.low.shape == (1, 2, 2, 1)
    assert [tuple(detail.shape[2:]) for detail in bands.details] == [(3, 8, 4), (3, 4, 2), (3, 2, 1)]


def test_masks_of_a_level_come_from_the_sum_of_its_orientations() -> None:
    module, bands = prompts(3, 2, 1.0), haar_transform(random(1, 3, 8, 8))
    low, *details = module(bands)
    expected = (module.details[1, 0] * bands.details[1][0, :, :, 1, 0].sum(dim=1)).sum().sigmoid()
    torch.testing.assert_close(details[1][0, 0, 1, 0], expected)
    torch.testing.assert_close(low[0, 1, 0, 0], (module.low[1] * bands.low[0, :, 0, 0]).sum().sigmoid())


def test_loss_equals_the_mean_over_all_five_axes() -> None:
    module, student, teacher = prompts(3, 2, 1.0), random(2, 3, 16, 8), random(2, 3, 16, 8)
    ours, theirs = haar_transform(student), haar_transform(teacher)
    low, *masks = module(theirs)
    high = sum(
        (m[:, :, None, None] * (a - b)[:, None]).abs().mean() for m, a, b in zip(masks, ours.details, theirs.details)
    )
    high_loss = unprojected(FreeKDLoss(module, 3, **TAPS))(features(student, teacher)).loss
    torch.testing.assert_close(high_loss, high)
    everything = high + (low[:, :, None] * (ours.low - theirs.low)[:, None]).abs().mean()
    all_loss = unprojected(FreeKDLoss(module, 3, **TAPS, bands="all"))(features(student, teacher)).loss
    torch.testing.assert_close(all_loss, everything)


def test_checkerboard_against_nothing() -> None:
    grid = torch.arange(8)
    board = (1.0 - 2.0 * ((grid[:, None] + grid) % 2)).double().view(1, 1, 8, 8)
    method = unprojected(FreeKDLoss(prompts(1), 1, **TAPS))
    assert method(features(board, torch.zeros_like(board))).loss.item() == pytest.approx(1 / 3, rel=1e-12)


def test_constant_offset_is_invisible_to_high_bands_and_counts_in_the_low_band() -> None:
    teacher = random(2, 3, 16, 8)
    high = unprojected(FreeKDLoss(prompts(3), 3, **TAPS))(features(teacher + 5.0, teacher)).loss
    everything = unprojected(FreeKDLoss(prompts(3), 3, **TAPS, bands="all"))(features(teacher + 5.0, teacher)).loss
    assert high.item() < 1e-14
    assert everything.item() == pytest.approx(20.0, rel=1e-12)


@pytest.mark.parametrize("preset", ["released", "paper"])
def test_equal_maps_cost_nothing_and_the_loss_is_homogeneous(preset: str) -> None:
    teacher, error = random(2, 3, 8, 8), random(2, 3, 8, 8)
    method = unprojected(FreeKDLoss(prompts(3, 2, 1.0), 3, **TAPS, bands="all" if preset == "paper" else "high"))
    none, once, thrice = (method(features(teacher + k * error, teacher)).loss for k in (0, 1, 3))
    assert none.item() == 0.0
    torch.testing.assert_close(thrice, 3.0 * once)


def test_zero_prompts_halve_the_unmasked_difference() -> None:
    student, teacher = random(2, 3, 8, 8), random(2, 3, 8, 8)
    unmasked = sum(
        (a - b).abs().mean() for a, b in zip(haar_transform(student).details, haar_transform(teacher).details)
    )
    loss = unprojected(FreeKDLoss(prompts(3), 3, **TAPS))(features(student, teacher)).loss
    torch.testing.assert_close(loss, unmasked / 2)


def test_presets() -> None:
    student, teacher = random(2, 4, 8, 8), random(2, 3, 8, 8)
    module = FrequencyPrompts.preset("released", 3).double()
    assert module.low.shape == (6, 3)
    released = FreeKDLoss.preset("released", module, 4, **TAPS).double()
    output = released(features(student, teacher))
    squared = (released.projection(student) - teacher).square().mean()
    torch.testing.assert_close(output.loss.float(), output.terms["freekd"] + 5.0 * squared.detach().float())
    paper = FreeKDLoss.preset("paper", FrequencyPrompts.preset("paper", 3).double(), 4, **TAPS).double()
    assert paper.bands == "all"
    assert paper.position_weight
    assert set(paper(features(student, teacher)).terms) == {"freekd"}
    with pytest.raises(ValueError, match="preset must be 'released' or 'paper', got 'mine'"):
        FreeKDLoss.preset("mine", module, 4, **TAPS)  # type: ignore[arg-type]


def test_position_weight_has_mean_one_and_prefers_a_channel_that_others_follow() -> None:
    # The second channel correlates with the first more than with itself; the third only with itself.
    common = random(1, 1, 8, 8)
    teacher = torch.cat((2 * common, common, random(1, 1, 8, 8)), dim=1)
    changed = [teacher.clone() for _ in range(3)]
    for channel, maps in enumerate(changed):
        maps[:, channel, 0, 0] += 1e-3
    method = unprojected(FreeKDLoss(prompts(3), 3, **TAPS, position_weight=True))
    plain = unprojected(FreeKDLoss(prompts(3), 3, **TAPS))
    ratio = [(method(features(m, teacher)).loss / plain(features(m, teacher)).loss).item() for m in changed]
    assert ratio[0] > 1.5 > ratio[2] > 0.5 > ratio[1]
    assert sum(ratio) == pytest.approx(3.0, rel=1e-3)


def test_position_weight_by_hand() -> None:
    grid = torch.arange(8)
    board = (1.0 - 2.0 * ((grid[:, None] + grid) % 2)).double()
    # A board times x has the product 64 x^2 / sqrt(64) with itself, and 0 with an empty channel. So the softmaxes are
    # (3/4, 1/4) and (1/2, 1/2) for the teacher, (1/2, 1/2) and (1/8, 7/8) for the student.
    student, teacher = torch.zeros(2, 1, 2, 8, 8, dtype=torch.float64)
    first, second = math.sqrt(math.log(3) / 8), math.sqrt(math.log(7) / 8)
    teacher[0, 0], student[0, 1] = first * board, second * board
    # Their columns' sums: 5/4 and 3/4 times 5/8 and 11/8 is 25/32 and 33/32, with the mean 29/32.
    weights = (25 / 29, 33 / 29)
    # A board of 1 costs 1/3, see above; the mean is over two channels.
    expected = (weights[0] * first + weights[1] * second) / 3 / 2
    method = unprojected(FreeKDLoss(prompts(2), 2, **TAPS, position_weight=True))
    assert method(features(student, teacher)).loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("bands", ["high", "all"])
def test_gradcheck(bands: str) -> None:
    method = FreeKDLoss(prompts(3, 2, 1.0), 3, **TAPS, bands=bands, mse_weight=5.0).double()  # type: ignore[arg-type]
    student, teacher = random(2, 3, 4, 4).requires_grad_(), random(2, 3, 4, 4)
    assert torch.autograd.gradcheck(lambda s: method(features(s, teacher)).loss, (student,))
    assert not any(parameter.requires_grad for parameter in method.prompts.parameters())


def test_jaccard_of_known_masks() -> None:
    masks = torch.cat((torch.full((1, 1, 4, 4), 0.5), torch.ones(1, 1, 4, 4)), dim=1)
    # Self-pairs give 1 each, the two mixed pairs 0.8 / (2 - 0.8).
    assert mask_jaccard(masks).item() == pytest.approx((2 + 2 * 0.8 / 1.2) / 4, rel=1e-6)


def test_reconstruction_with_masks_of_one_half_and_two_prompts_is_the_map_itself() -> None:
    maps = random(2, 3, 7, 9)
    torch.testing.assert_close(prompts(3, 2).reconstruct(maps)[0], maps)


def test_reconstruction_masks_band_by_band() -> None:
    module, maps = prompts(3, 2, 1.0), random(2, 3, 8, 8)
    bands = haar_transform(maps)
    low, *details = module(bands)
    masked = HaarBands(
        bands.low * low.sum(1, keepdim=True),
        tuple(b * m.sum(1)[:, None, None] for b, m in zip(bands.details, details)),
        bands.sizes,
    )
    result, diversity = module.reconstruct(maps)
    torch.testing.assert_close(result, haar_inverse(masked))
    torch.testing.assert_close(diversity, sum(mask_jaccard(m) for m in (low, *details)))


def test_prompts_are_learned_on_a_frozen_teacher_and_saved_with_it(tmp_path: Path) -> None:
    teacher = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1))
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    batches = [(torch.randn(2, 3, 8, 8), torch.randint(0, 2, (2, 8, 8)))]
    module, seen = FrequencyPrompts.preset("paper", 6), []
    learn_masks(
        module, teacher, "2", batches, SegmentationCrossEntropy(), steps=20,
        on_step=lambda step, terms: seen.append((terms["task"] + terms["diversity"]).item()),
    )  # fmt: skip
    assert seen[-1] < seen[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    save_masks(tmp_path / "prompts.pt", module, teacher, "2")
    loaded = load_masks(tmp_path / "prompts.pt", teacher, "2")
    assert isinstance(loaded, FrequencyPrompts)
    maps = torch.randn(1, 6, 8, 8)
    assert torch.equal(loaded.reconstruct(maps)[0], module.reconstruct(maps)[0])


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="channels, tokens and levels must be positive, got 3, 2, 0"):
        FrequencyPrompts(3, levels=0)
    with pytest.raises(ValueError, match="diversity must be 'dice' or 'jaccard', got 'cosine'"):
        FrequencyPrompts(3, diversity="cosine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bands must be 'high' or 'all', got 'low'"):
        FreeKDLoss(prompts(3), 3, **TAPS, bands="low")  # type: ignore[arg-type]
    for name in ("weight", "mse_weight"):
        with pytest.raises(ValueError, match=rf"^{name} must be a finite number of at least 0, got -1"):
            FreeKDLoss(prompts(3), 3, **TAPS, **{name: -1})
