"""phi and psi (Eq. 1-3), and the resize of labels."""

import pytest
import torch
import torch.nn.functional as F

from sward.alignment import ChannelProjection, aligned_size, resize, resize_labels, resize_to_common


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


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("size", [(2, 3), (4, 6), (5, 7), (16, 24)])
def test_labels_take_the_nearest_pixel_and_keep_their_dtype(dtype: torch.dtype, size: tuple[int, int]) -> None:
    labels = torch.randint(0, 200, (2, 8, 12)).to(dtype)
    expected = F.interpolate(labels[:, None].double(), size=size, mode="nearest")[:, 0]
    resized = resize_labels(labels, size)
    assert resized.dtype == dtype
    assert torch.equal(resized.double(), expected)


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
