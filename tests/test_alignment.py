"""phi and psi (Eq. 1-3), and the resize of labels."""

import copy
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sward.alignment import ChannelProjection, Standardization, aligned_size, resize, resize_labels, resize_to_common


def test_common_grid_is_the_smaller_side_by_side() -> None:
    first, second = torch.zeros(1, 2, 8, 20), torch.zeros(1, 3, 16, 5)
    assert aligned_size(first, second) == (8, 5)
    assert [tuple(each.shape) for each in resize_to_common(first, second)] == [(1, 2, 8, 5), (1, 3, 8, 5)]


def test_a_map_of_the_right_size_is_passed_through_untouched() -> None:
    features = torch.randn(1, 2, 4, 4)
    assert resize(features, (4, 4)).data_ptr() == features.data_ptr()


def test_halving_averages_two_by_two_blocks() -> None:
    # Bilinear without corner alignment or antialiasing samples the middle of each 2x2 block.
    features = torch.arange(16.0).view(1, 1, 4, 4)
    torch.testing.assert_close(resize(features, (2, 2)), F.avg_pool2d(features, 2))


@pytest.mark.parametrize("size", [(3, 5), (8, 8), (13, 4), (20, 21)])
def test_projection_and_resize_commute_bias_included(size: tuple[int, int]) -> None:
    phi = ChannelProjection(5, 3).double()
    features = torch.randn(2, 5, 8, 8, dtype=torch.float64)
    expected = resize(phi(features), size)
    torch.testing.assert_close(phi.project_and_resize(features, size), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(phi(resize(features, size)), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("source", "target", "taken"),
    [
        (6, 2, [1, 4]),
        (9, 4, [1, 3, 5, 7]),
        (2, 4, [0, 0, 1, 1]),
        (4, 2, [0, 3]),  # the centres 1 and 3 lie between two pixels
        (16, 4, [1, 6, 9, 14]),
        (2, 5, [0, 0, 0, 1, 1]),
    ],
)
def test_labels_take_the_pixel_at_the_centre_of_the_cell(source: int, target: int, taken: list[int]) -> None:
    labels = torch.arange(source)
    assert resize_labels(labels.expand(2, 3, -1), (3, target))[1, 2].tolist() == taken
    assert resize_labels(labels[:, None].expand(2, -1, 3), (target, 3))[1, :, 2].tolist() == taken


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("size", [(2, 3), (4, 6), (5, 7), (16, 24)])
@pytest.mark.parametrize("pick", ["centre", "corner"])
def test_labels_are_never_mixed_and_keep_their_dtype(
    pick: Literal["centre", "corner"], size: tuple[int, int], dtype: torch.dtype
) -> None:
    labels = torch.randint(0, 200, (2, 9, 15)).to(dtype)
    # 9 x 15 has no centre between two pixels at these sizes.
    mode = "nearest-exact" if pick == "centre" else "nearest"
    expected = F.interpolate(labels[:, None].double(), size=size, mode=mode)[:, 0]
    resized = resize_labels(labels, size, pick=pick)
    assert resized.dtype == dtype
    assert torch.equal(resized.double(), expected)


@pytest.mark.parametrize(
    ("source", "target"), [(288, 128), (192, 64), (256, 128), (256, 64), (256, 16), (64, 192), (100, 128)]
)
def test_labels_lie_where_the_features_are(source: int, target: int) -> None:
    side = torch.arange(source) + 0.5
    generator = torch.Generator().manual_seed(source)
    apart = []
    for _ in range(16):
        row, column = (torch.rand(2, generator=generator) * 0.2 + 0.4) * source
        disc = (side[:, None] - row).square() + (side - column).square() < (0.3 * source) ** 2
        features = F.interpolate(disc[None, None].float(), (target, target), mode="bilinear", antialias=True)[0, 0]
        labels = resize_labels(disc[None].long(), (target, target))[0]
        apart.append(centroid(labels) - centroid(features))
    # On average: a single disc of few pixels has a ragged edge.
    assert torch.stack(apart).mean(0).abs().max() < 0.05


def test_few_labels_differ_from_the_majority_of_their_cell() -> None:
    """Polyp-like masks on a grid of 16 x 16: what the losses see at stride 16 or of a small image."""
    differ = foreground = 0
    rows, columns = torch.meshgrid(torch.arange(288) + 0.5, torch.arange(384) + 0.5, indexing="ij")
    for seed in range(20):
        draw = torch.rand(5, generator=torch.Generator().manual_seed(seed))
        y, x = rows - 288 * (0.3 + 0.4 * draw[0]), columns - 384 * (0.3 + 0.4 * draw[1])
        angle = torch.atan2(y, x)
        radius = 40 + 70 * draw[2]
        mask = (x.square() + y.square()).sqrt() < radius * (1 + 0.2 * (2 * angle).cos() + 0.1 * (5 * angle).sin())
        majority = F.avg_pool2d(mask[None, None].float(), (18, 24))[0, 0] > 0.5
        differ += int((resize_labels(mask[None], (16, 16))[0] != majority).sum())
        foreground += int(majority.sum())
    assert differ / (20 * 256) < 0.015
    assert differ / foreground < 0.05


def centroid(mass: Tensor) -> Tensor:
    """Row and column of the centre of mass, in pixels."""
    rows, columns = (torch.arange(side, dtype=torch.float64) + 0.5 for side in mass.shape)
    return torch.stack([(mass.sum(1) * rows).sum(), (mass.sum(0) * columns).sum()]) / mass.sum()


def test_labels_with_a_channel_axis_are_refused() -> None:
    with pytest.raises(ValueError, match=r"labels must be \[B, H, W\], got shape \(2, 1, 4, 4\)"):
        resize_labels(torch.zeros(2, 1, 4, 4, dtype=torch.int64), (2, 2))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced", "one pixel", "one channel"])
def test_a_projection_is_a_convolution(layout: str, bias: bool) -> None:
    maps = torch.randn(2, 1 if layout == "one channel" else 5, 7, 6, dtype=torch.float64)
    if layout == "channels_last":
        maps = maps.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        maps = maps[:, :, 1:, 2:]
    elif layout == "one pixel":
        maps = maps[:, :, :1, :1]
    phi = ChannelProjection(maps.shape[1], 3, bias=bias).double()
    inputs = (maps.requires_grad_(), *phi.parameters())
    actual, expected = phi(maps), F.conv2d(maps, phi.weight, phi.bias)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)
    upstream = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(actual, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


# Standardization

SCALES = torch.tensor([1e-3, 1.0, 30.0, 1000.0])
OFFSETS = torch.tensor([1.0, 1000.0, 0.0, -5.0])


def unequal_maps(*batches: int) -> list[Tensor]:
    return [torch.randn(batch, 4, 6, 5) * SCALES[:, None, None] + OFFSETS[:, None, None] for batch in batches]


def channels_of(maps: Tensor) -> Tensor:
    return maps.double().transpose(0, 1).flatten(1)


def test_the_first_map_is_standardised_by_itself() -> None:
    (maps,) = unequal_maps(2)
    result = channels_of(Standardization(4)(maps))
    # The first channel's mean is a thousand times its spread: float32 leaves four digits of it.
    torch.testing.assert_close(result.mean(1), torch.zeros(4).double(), rtol=0, atol=2e-4)
    torch.testing.assert_close(result.var(1, correction=0), torch.ones(4).double(), rtol=0, atol=1e-4)


def test_in_evaluation_the_maps_that_were_seen_have_mean_0_and_variance_1_together() -> None:
    batches = unequal_maps(3, 1, 5)
    batches[1] = batches[1] * 2 + 1
    standardization = Standardization(4)
    for maps in batches:
        standardization(maps)
    everything = channels_of(torch.cat(batches))
    assert standardization.count == everything.shape[1]
    torch.testing.assert_close(standardization.mean.double(), everything.mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(standardization.variance.double(), everything.var(1, correction=0), rtol=1e-4, atol=0)
    before = {name: value.clone() for name, value in standardization.state_dict().items()}
    result = channels_of(standardization.eval()(torch.cat(batches)))
    torch.testing.assert_close(result.var(1, correction=0), torch.ones(4).double(), rtol=0, atol=1e-4)
    assert all(torch.equal(before[name], value) for name, value in standardization.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_constant_channel_gives_zeros(dtype: torch.dtype) -> None:
    maps = torch.randn(2, 3, 7, 9).to(dtype)
    maps[:, 0], maps[:, 1] = 0.0, 1000.1
    result = Standardization(3)(maps)
    assert (result[:, :2] == 0).all()
    assert result[:, 2].std() > 0.9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_maps_of_16_bit_are_computed_in_32(dtype: torch.dtype) -> None:
    (maps,) = unequal_maps(2)
    half = maps.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        result = Standardization(4)(half)
    assert result.dtype == torch.float32
    assert torch.equal(result, Standardization(4)(half.float()))


def test_before_anything_was_seen_a_map_is_returned_as_it_is() -> None:
    (maps,) = unequal_maps(2)
    assert torch.equal(Standardization(4).eval()(maps), maps)


def test_statistics_that_were_saved_go_on_bit_for_bit() -> None:
    batches = unequal_maps(2, 2, 3)
    whole, first, second = (Standardization(4) for _ in range(3))
    for maps in batches:
        whole(maps)
    first(batches[0])
    second.load_state_dict(first.state_dict())
    for maps in batches[1:]:
        second(maps)
    assert all(torch.equal(whole.state_dict()[name], value) for name, value in second.state_dict().items())


def test_a_map_that_overflowed_spoils_its_own_step_only() -> None:
    good, bad, later = unequal_maps(2, 2, 3)
    bad[1, 2, 0, 0] = torch.inf
    seen, alone = Standardization(4), Standardization(4)
    for maps in (good, bad, later):
        seen(maps)
    for maps in (good, later):
        alone(maps)
    assert all(torch.equal(alone.state_dict()[name], value) for name, value in seen.state_dict().items())
    first = Standardization(4)
    first(bad)
    assert torch.equal(first(good), Standardization(4)(good))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_in_16_bit_keeps_exact_statistics(dtype: torch.dtype) -> None:
    (maps,) = unequal_maps(2)
    exact = Standardization(4)
    exact(1000 * maps)
    turned = copy.deepcopy(exact).to(dtype)
    assert exact.variance.max() > torch.finfo(torch.float16).max
    assert all(torch.equal(exact.state_dict()[name], value) for name, value in turned.state_dict().items())
    assert turned.double().mean.dtype == torch.float64
