"""ResUNet++ against its published size and against its blocks written out by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sward.models.resunetpp import (
    AttentionGate,
    DecoderBlock,
    ResidualBlock,
    ResUNetPlusPlus,
    SqueezeExcitation,
    SummedASPP,
)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("num_classes", "expected"), [(1, 4_062_993), (2, 4_063_010)])
def test_parameter_count(num_classes: int, expected: int) -> None:
    assert count(ResUNetPlusPlus(num_classes)) == expected


def test_parameter_counts_of_the_blocks() -> None:
    model = ResUNetPlusPlus(1)
    convolutions = (9 * 3 * 16 + 16) + (9 * 16 * 16 + 16) + (3 * 16 + 16)
    assert count(model.encoder[0]) == convolutions + 2 * (2 * 16) + 2 * 16 * 2
    assert count(model.bridge) == 4 * (9 * 128 * 256 + 256 + 2 * 256) + 256 * 256 + 256
    gate = (2 * 64 + 9 * 64 * 256 + 256) + 2 * (2 * 256 + 9 * 256 * 256 + 256)
    assert count(model.decoder[0].attention) == gate


def test_stages_have_the_published_shapes() -> None:
    model = ResUNetPlusPlus(2).eval()
    maps, shapes = torch.randn(1, 3, 64, 32), []
    for stage in [*model.encoder, model.bridge]:
        maps = stage(maps)
        shapes.append(tuple(maps.shape[1:]))
    assert shapes == [(16, 64, 32), (32, 32, 16), (64, 16, 8), (128, 8, 4), (256, 8, 4)]
    assert model(torch.randn(1, 3, 64, 32)).shape == (1, 2, 64, 32)


def test_squeeze_excitation_by_hand() -> None:
    block = SqueezeExcitation(8).double()
    squeeze, excite = block.gate[0].weight, block.gate[2].weight
    assert squeeze.shape == (1, 8)
    maps = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    gate = torch.sigmoid((maps.mean((2, 3)) @ squeeze.T).clamp(min=0) @ excite.T)
    torch.testing.assert_close(block(maps), maps * gate[:, :, None, None])


def test_residual_block_by_hand() -> None:
    torch.manual_seed(0)
    block = ResidualBlock(4, 8, stride=2).eval()
    norm, _, first, second_norm, _, second = block.main
    for layer in (norm, second_norm, block.skip[1]):
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    maps = torch.randn(1, 4, 6, 6)

    def normalise(x: torch.Tensor, layer: nn.BatchNorm2d) -> torch.Tensor:
        return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias)

    main = F.conv2d(normalise(maps, norm).relu(), first.weight, first.bias, stride=2, padding=1)
    main = F.conv2d(normalise(main, second_norm).relu(), second.weight, second.bias, padding=1)
    skip = normalise(F.conv2d(maps, block.skip[0].weight, block.skip[0].bias, stride=2), block.skip[1])
    torch.testing.assert_close(block(maps), block.excitation(main + skip))


def test_the_stem_does_not_rectify_the_image() -> None:
    assert isinstance(ResUNetPlusPlus(1).encoder[0].main[0], nn.Conv2d)
    assert isinstance(ResUNetPlusPlus(1).encoder[1].main[0], nn.BatchNorm2d)


def test_pyramid_sums_its_branches() -> None:
    pyramid = SummedASPP(3, 5).eval()
    maps = torch.randn(1, 3, 20, 20)
    total = torch.zeros(1, 5, 20, 20)
    for (convolution, norm), rate in zip(pyramid.branches, (1, 6, 12, 18), strict=True):
        total = total + norm(F.conv2d(maps, convolution.weight, convolution.bias, padding=rate, dilation=rate))
    torch.testing.assert_close(pyramid(maps), F.conv2d(total, pyramid.project.weight, pyramid.project.bias))


def test_gate_is_an_unbounded_product() -> None:
    """No sigmoid: a gate of constant 7 multiplies the map by 7."""
    gate = AttentionGate(4, 6).eval()
    nn.init.zeros_(gate.gate[2].weight)
    nn.init.constant_(gate.gate[2].bias, 7.0)
    maps = torch.randn(1, 6, 4, 4)
    torch.testing.assert_close(gate(torch.randn(1, 4, 8, 8), maps), 7 * maps)


def test_gate_pools_the_skip_path() -> None:
    gate = AttentionGate(4, 6).eval()
    skip, maps = torch.randn(1, 4, 8, 8), torch.randn(1, 6, 4, 4)
    pooled = gate.from_skip(skip).reshape(1, 6, 4, 2, 4, 2).amax((3, 5))
    torch.testing.assert_close(gate(skip, maps), gate.gate(pooled + gate.from_maps(maps)) * maps)


def test_decoder_block_joins_gated_map_and_skip() -> None:
    block = DecoderBlock(4, 6, 8).eval()
    skip, maps = torch.randn(1, 4, 8, 8), torch.randn(1, 6, 4, 4)
    gated = block.attention(skip, maps).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(block(skip, maps), block.refine(torch.cat([gated, skip], dim=1)))
