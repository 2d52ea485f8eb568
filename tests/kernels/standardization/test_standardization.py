"""Moments of channels and standardised maps, compared with PyTorch in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

from sward.alignment import Standardization
from sward_kernels.standardization import channel_moments, native, standardize
from tests.support.error_budget import FORWARD_FACTOR, assert_within_budget

pytestmark = pytest.mark.usefixtures("poison_empty_tensors")
LAYOUTS = ("nchw", "channels_last", "sliced", "transposed")
REASON = native.LIBRARY.why_not()


def maps(layout: str, batch: int, channels: int, height: int, width: int) -> Tensor:
    """Channels whose mean is up to a thousand times their spread, in all strides that have code of their own."""
    generator = torch.Generator().manual_seed(channels)
    values = torch.randn(batch, channels, height, width, generator=generator)
    values = (
        values * torch.logspace(-2, 2, channels)[:, None, None]
        + 10 * torch.randn(channels, generator=generator)[:, None, None]
    )
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        room = torch.full((batch, channels + 1, height + 2, width + 3), float("nan"))
        room[:, 1:, 1:-1, 2:-1] = values
        return room[:, 1:, 1:-1, 2:-1]
    return values.mT.contiguous().mT if layout == "transposed" else values


def resized(features: Tensor, mean: Tensor, scale: Tensor, size: tuple[int, int]) -> Tensor:
    mean, scale = mean.to(features.dtype), scale.to(features.dtype)
    standardized = (features - mean[:, None, None]) * scale[:, None, None]
    return F.interpolate(standardized, size, mode="bilinear", align_corners=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 1, 1, 3), (3, 5, 7, 9), (1, 19, 70, 90), (2, 16, 1, 1)])
def test_moments_are_those_of_all_positions(shape: tuple[int, int, int, int], layout: str) -> None:
    features = maps(layout, *shape)
    mean, variance = channel_moments(features)
    expected_variance, expected_mean = torch.var_mean(features.double(), dim=(0, 2, 3), correction=0)
    spread = expected_variance.sqrt()
    assert ((mean - expected_mean).abs() <= 1e-6 * spread + 1e-7 * expected_mean.abs()).all()
    assert ((variance - expected_variance).abs() <= 2e-6 * expected_variance).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_its_channel_alone(value: float, layout: str) -> None:
    features = maps(layout, 2, 19, 7, 9)
    features[1, 17, 3, 4] = value
    mean, variance = channel_moments(features)
    assert variance[17].isnan()
    assert not mean[17].isfinite()
    others = torch.arange(19) != 17
    assert mean[others].isfinite().all()
    assert variance[others].isfinite().all()
    standardised = standardize(features, mean.float(), variance.float().rsqrt(), (4, 5))
    assert standardised[:, 17].isnan().all()
    assert standardised[:, others].isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(7, 9), (3, 4), (1, 1), (20, 11), (5, 30)])
def test_a_standardised_map_is_as_exact_as_plain_pytorch(size: tuple[int, int], layout: str) -> None:
    features = maps(layout, 2, 19, 7, 9)
    mean, variance = (moment.float() for moment in channel_moments(features))
    scale = variance.rsqrt()
    actual = standardize(features, mean, scale, size)
    reference = resized(features, mean, scale, size)
    oracle = resized(features.double(), mean, scale, size)
    assert_within_budget(actual, reference, oracle, FORWARD_FACTOR, "standardised map")
    assert actual.is_contiguous(
        memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_a_resize_one_infinity_stays_one(layout: str) -> None:
    features = maps(layout, 1, 6, 5, 5)
    features[0, 2, 1, 1] = torch.inf
    standardized = standardize(features, torch.zeros(6), torch.ones(6), (5, 5))
    assert standardized.isfinite().logical_not().sum() == 1


def test_a_tangent_is_kept() -> None:
    features, tangent = torch.randn(2, 1, 3, 4, 4)
    mean, scale = torch.ones(3), torch.full((3,), 2.0)
    _, found = torch.func.jvp(lambda each: standardize(each, mean, scale, (4, 4)), (features,), (tangent,))
    torch.testing.assert_close(found, 2 * tangent)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_do_not_depend_on_the_number_of_threads(layout: str) -> None:
    features = maps(layout, 3, 19, 13, 10)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            mean, variance = channel_moments(features)
            results.append((mean, variance, standardize(features, mean, variance.rsqrt(), (6, 6))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_a_gradient_reaches_the_map_where_one_is_wanted() -> None:
    features = maps("nchw", 2, 3, 6, 6).double().requires_grad_()
    mean, scale = torch.randn(2, 3, dtype=torch.float64)
    torch.autograd.gradcheck(lambda each: standardize(each, mean, scale, (4, 3)), features)
    single = features.detach().float().requires_grad_()
    (gradient,) = torch.autograd.grad(standardize(single, mean.float(), scale.float(), (4, 3)).sum(), single)
    (expected,) = torch.autograd.grad(standardize(features, mean, scale, (4, 3)).sum(), features)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-6)


def test_without_a_compiler_pytorch_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    features = maps("nchw", 2, 19, 7, 9)
    fast, slow = Standardization(19), Standardization(19)
    first = fast(features)
    monkeypatch.setattr(native, "serves", lambda features: False)
    second = slow(features)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-3 if REASON is None else 0)
    for one, other in zip(fast.buffers(), slow.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=0)


@pytest.mark.skipif(REASON is not None, reason=f"the C++ does not compile here: {REASON}")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: str) -> None:
    features = maps(layout, 2, 9, 6, 5)
    mean, variance = native.moments(features)
    opcheck(native.moments, (features,))
    opcheck(native.standardize, (features, mean, variance.rsqrt(), 4, 3))
