"""UNeXt against its published size and against operations written out by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sward.models.unext import ShiftedBlock, ShiftedMLP, UNeXt, shift_channel_groups


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameter_counts_of_the_network_and_its_parts() -> None:
    model = UNeXt(2)
    assert count(model) == 1_471_938
    # conv 3x3 with bias + batch norm
    assert count(model.encoder[2]) == 9 * 32 * 128 + 128 + 2 * 128
    # patch embedding + its norm + (norm, two linear, depthwise 3x3) + last norm
    block = 2 * 160 + 2 * (160 * 160 + 160) + 9 * 160 + 160
    assert count(model.encoder[3]) == 9 * 128 * 160 + 160 + 2 * 160 + block + 2 * 160
    assert count(model.up[4]) == 9 * 16 * 16 + 16
    assert count(UNeXt(1)) == 1_471_938 - 17


def test_stages_have_the_published_shapes() -> None:
    model = UNeXt(3).eval()
    maps, shapes = torch.randn(2, 3, 64, 96), []
    for stage in model.encoder:
        maps = stage(maps)
        shapes.append(tuple(maps.shape[1:]))
    assert shapes == [(16, 32, 48), (32, 16, 24), (128, 8, 12), (160, 4, 6), (256, 2, 3)]
    assert model(torch.randn(2, 3, 64, 96)).shape == (2, 3, 64, 96)


@pytest.mark.parametrize("dim", [2, 3])
def test_shift_is_the_padded_roll_cropped(dim: int) -> None:
    """The published recipe: pad 2 on all sides, roll group j by j - 2, crop the original window."""
    maps = torch.randn(2, 128, 6, 5)
    height, width = maps.shape[-2:]
    groups = F.pad(maps, (2, 2, 2, 2)).chunk(5, dim=1)
    assert [group.shape[1] for group in groups] == [26, 26, 26, 26, 24]
    rolled = torch.cat([group.roll(j - 2, dims=dim) for j, group in enumerate(groups)], dim=1)
    torch.testing.assert_close(
        shift_channel_groups(maps, dim), rolled[..., 2 : 2 + height, 2 : 2 + width], rtol=0, atol=0
    )


def test_shift_of_a_column_by_hand() -> None:
    column = torch.tensor([1.0, 2.0, 3.0]).reshape(1, 1, 3, 1).repeat(1, 5, 1, 1)
    expected = [[3, 0, 0], [2, 3, 0], [1, 2, 3], [0, 1, 2], [0, 0, 1]]
    assert shift_channel_groups(column, dim=2)[0, :, :, 0].tolist() == expected


def test_shifted_block_is_the_residual_of_the_written_out_mlp() -> None:
    torch.manual_seed(0)
    block = ShiftedBlock(10).double()
    torch.nn.init.normal_(block.norm.weight)
    maps = torch.randn(1, 10, 4, 3, dtype=torch.float64)
    mlp: ShiftedMLP = block.mlp

    normed = maps - maps.mean(1, keepdim=True)
    normed = normed / (maps.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    normed = normed * block.norm.weight[:, None, None] + block.norm.bias[:, None, None]
    hidden = F.conv2d(shift_channel_groups(normed, 2), mlp.fc1.weight[:, :, None, None], mlp.fc1.bias)
    hidden = F.conv2d(hidden, mlp.depthwise.weight, mlp.depthwise.bias, padding=1, groups=10)
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    hidden = F.conv2d(shift_channel_groups(hidden, 3), mlp.fc2.weight[:, :, None, None], mlp.fc2.bias)
    torch.testing.assert_close(block(maps), maps + hidden, rtol=1e-10, atol=1e-12)


def test_convolution_stage_pools_before_it_rectifies() -> None:
    stage = UNeXt(2).encoder[0].eval()
    images = torch.randn(1, 3, 8, 8)
    normed = stage.norm(stage.conv(images))
    expected = normed.reshape(1, 16, 4, 2, 4, 2).amax((3, 5)).clamp(min=0)
    torch.testing.assert_close(stage(images), expected)


def test_decoder_adds_the_skips() -> None:
    """With every decoder convolution at zero, only the last skip reaches the last up-convolution."""
    model = UNeXt(2).eval()
    for up in model.up[:-1]:
        torch.nn.init.zeros_(up.conv.weight)
        torch.nn.init.zeros_(up.conv.bias)
    images = torch.randn(1, 3, 32, 32)
    first_stage = model.encoder[0](images)
    torch.testing.assert_close(model(images), model.classifier(model.up[4](first_stage)))


def test_initialisation_of_the_token_layers() -> None:
    torch.manual_seed(0)
    stage = UNeXt(2).encoder[4]
    assert stage.block.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not stage.block.mlp.fc1.bias.any()
    assert stage.embed.weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.02)
    assert stage.block.mlp.depthwise.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.1)
    assert not stage.embed.bias.any()


def test_same_seed_same_weights() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(UNeXt(2).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
