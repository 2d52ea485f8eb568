"""The DeepLabV3+ students and heads: sizes, shapes, and the parts that are easily got wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sward.models import build
from sward.models.deeplab import MobileNetV3DeepLabV3Plus
from sward.models.heads import (
    AtrousPyramid,
    DeepLabV3PlusHead,
    MultiLevelHead,
    PooledBatchNorm,
    ResUNetPlusPlusHead,
    resize,
)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("num_classes", "expected"), [(19, 3_307_603), (2, 3_303_234)])
def test_student_parameter_count(num_classes: int, expected: int) -> None:
    model = MobileNetV3DeepLabV3Plus(num_classes)
    assert count(model) == expected
    assert count(model.encoder) == 927_008


def test_smp_student_has_smp_size_and_downloads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*arguments: object, **options: object) -> None:
        raise AssertionError("tried to download weights")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", no_network)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", no_network)
    assert count(build("smp_mbv3s_deeplabv3plus", 19)) == 2_165_763


def test_encoder_keeps_stride_16() -> None:
    model = MobileNetV3DeepLabV3Plus(2).eval()
    assert model.encoder(torch.randn(1, 3, 64, 96)).shape == (1, 576, 4, 6)


@pytest.mark.parametrize("name", ["mbv3s_deeplabv3plus", "smp_mbv3s_deeplabv3plus"])
def test_logits_have_the_size_of_the_input(name: str) -> None:
    assert build(name, 5).eval()(torch.randn(2, 3, 32, 64)).shape == (2, 5, 32, 64)


def test_student_trains_on_a_batch_of_one() -> None:
    """The pooled branch of the pyramid holds one value per channel there, which plain batch norm refuses."""
    model = MobileNetV3DeepLabV3Plus(3)
    model(torch.randn(1, 3, 64, 64)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_pooled_batch_norm_is_batch_norm_from_two_images_on() -> None:
    pooled, plain = PooledBatchNorm(4), nn.BatchNorm2d(4)
    values = torch.randn(2, 4, 1, 1)
    torch.testing.assert_close(pooled(values), plain(values))
    torch.testing.assert_close(pooled.running_mean, plain.running_mean)


def test_pyramid_branches_see_their_rates() -> None:
    """A single hot pixel spreads to exactly the positions its dilation reaches."""
    for separable in (False, True):
        pyramid = AtrousPyramid(2, 3, (2, 4, 6), separable=separable)
        hot = torch.zeros(1, 2, 17, 17)
        hot[:, :, 8, 8] = 1
        for branch, rate in zip(pyramid.branches[1:], (2, 4, 6), strict=True):
            convolutions = nn.Sequential(*(layer for layer in branch if isinstance(layer, nn.Conv2d)))
            rows = convolutions(hot).abs().sum((0, 1, 3)).nonzero().flatten().tolist()
            assert rows == [8 - rate, 8, 8 + rate]


@pytest.mark.parametrize(
    ("head", "channels", "num_classes", "expected"),
    [
        (DeepLabV3PlusHead, (144, 288, 576, 1152), 19, 10_186_355),
        (ResUNetPlusPlusHead, (96, 192, 384, 768), 2, 11_157_586),
    ],
)
def test_teacher_heads_have_the_size_of_the_specification(
    head: type[nn.Module], channels: tuple[int, ...], num_classes: int, expected: int
) -> None:
    assert count(head(channels, num_classes)) == expected


@pytest.mark.parametrize("head", [DeepLabV3PlusHead, ResUNetPlusPlusHead])
def test_teacher_heads_work_at_the_first_level(head: type[nn.Module]) -> None:
    channels = (8, 16, 24, 32)
    levels = [torch.randn(1, width, 16 >> i, 24 >> i) for i, width in enumerate(channels)]
    assert head(channels, 3).eval()(levels).shape == (1, 3, 16, 24)


def test_multi_level_head_uses_every_level_and_doubles_on_request() -> None:
    channels = (8, 16, 24)
    levels = [torch.randn(2, width, 16 >> i, 8 >> i, requires_grad=True) for i, width in enumerate(channels)]
    assert MultiLevelHead(channels, 3, width=4)(levels).shape == (2, 3, 16, 8)
    logits = MultiLevelHead(channels, 3, width=4, upsample=True)(levels)
    assert logits.shape == (2, 3, 32, 16)
    logits.square().sum().backward()
    assert all(level.grad is not None and level.grad.any() for level in levels)


def test_resize_passes_a_map_of_that_size_through() -> None:
    maps = torch.randn(1, 2, 4, 6)
    assert resize(maps, (4, 6)) is maps
    expected = torch.tensor([[1.0, 1.25, 1.75, 2.0]])
    torch.testing.assert_close(resize(torch.tensor([[[[1.0, 2.0]]]]), (1, 4))[0, 0], expected)
