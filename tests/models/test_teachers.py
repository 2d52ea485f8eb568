"""Teachers: sizes of the trunks, equality of the two backends, freezing, and the DINOv2 wrapper against timm itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sward.models import build, load_trunk_checkpoint
from sward.models.heads import MultiLevelHead
from sward.models.teachers import HIERA_SPECS, DINOv2Trunk, HieraDemoTrunk, HieraSpec, Teacher, hiera_trunk

pytest.importorskip("sam2")
timm = pytest.importorskip("timm")

SMALL = HieraSpec(16, 1, (1, 1, 2, 1), (3,), window_spec=(8, 4, 14, 7))


def small_teacher(backend: str = "sam2") -> Teacher:
    return Teacher(hiera_trunk(SMALL, backend), MultiLevelHead(SMALL.channels, 3, width=8))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_tiny_trunk_has_the_published_size() -> None:
    assert count(hiera_trunk(HIERA_SPECS["tiny"])) == 26_849_472
    assert count(hiera_trunk(HIERA_SPECS["tiny"], "timm")) == 26_849_472


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["sam2", "timm"])
@pytest.mark.parametrize(
    ("size", "expected"), [("small", 33_947_328), ("base_plus", 68_675_712), ("large", 212_149_296)]
)
def test_larger_trunks_have_the_published_sizes(size: str, expected: int, backend: str) -> None:
    """The sizes of small and base+ are those of SAM 2.1's encoders (34.32 M and 69.11 M) less the neck."""
    assert count(hiera_trunk(HIERA_SPECS[size], backend)) == expected


@pytest.mark.parametrize("size", [(64, 64), (96, 160)])
def test_both_backends_compute_the_same(size: tuple[int, int], tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Through a checkpoint in the official layout, which both must load."""
    official = small_teacher("sam2")
    nn.init.normal_(official.trunk.pos_embed)
    nn.init.normal_(official.trunk.pos_embed_window)
    state = {f"image_encoder.trunk.{key}": value for key, value in official.trunk.state_dict().items()}
    torch.save({"model": state}, tmp_path / "official.pt")
    other = small_teacher("timm")
    load_trunk_checkpoint(other, tmp_path / "official.pt")
    images = torch.randn(2, 3, *size)
    with torch.inference_mode():
        for ours, theirs in zip(official.trunk(images), other.trunk(images), strict=True):
            assert torch.equal(ours, theirs)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r'backend must be "sam2" or "timm", got \'hub\''):
        build("hiera_demo", 2, backend="hub")


def test_frozen_trunk_stays_frozen_and_the_head_learns() -> None:
    model = Teacher(HieraDemoTrunk(), MultiLevelHead((32, *HieraDemoTrunk.SPEC.channels), 3, width=8))
    model.freeze_trunk()
    model.train()
    before = {key: value.clone() for key, value in model.trunk.state_dict().items()}
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert not any(module.training for module in model.trunk.modules())
    assert model.head.training
    assert all(torch.equal(before[key], value) for key, value in model.trunk.state_dict().items())
    assert all(parameter.grad is None for parameter in model.trunk.parameters())
    assert all(parameter.grad is not None for parameter in model.head.parameters())


def test_unfrozen_teacher_learns_everywhere() -> None:
    model = build("hiera_demo", 3)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_demo_teacher_is_small_and_a_hiera_on_both_backends() -> None:
    assert 1e6 < count(build("hiera_demo", 5)) < 4e6
    assert count(build("hiera_demo", 5)) == count(build("hiera_demo", 5, backend="timm"))
    assert any("MultiScaleAttention" in type(module).__name__ for module in build("hiera_demo", 5).modules())


class TestDINOv2:
    def test_maps_are_timm_s_own_at_the_native_grid(self) -> None:
        """37 x 37 tokens is the size of the position table, so nothing is resized but the 592-pixel image."""
        trunk = DINOv2Trunk(token_stride=16).eval()
        small = trunk.vit
        del small.blocks[3:]
        trunk.blocks = (0, 2)
        images = torch.randn(1, 3, 16 * 37, 16 * 37)
        resized = nn.functional.interpolate(images, size=(518, 518), mode="bilinear")
        with torch.inference_mode():
            expected = small.forward_intermediates(resized, indices=[0, 2], norm=True, intermediates_only=True)
            for maps, reference in zip(trunk(images), expected, strict=True):
                torch.testing.assert_close(maps, reference, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("token_stride", [8, 16])
    def test_token_stride_sets_the_grid(self, token_stride: int) -> None:
        model = build("vit_small_dinov2", 2, token_stride=token_stride).eval()
        seen: list[Tensor] = []
        model.levels[3].register_forward_hook(lambda module, inputs, output: seen.append(output))
        with torch.inference_mode():
            assert model(torch.randn(1, 3, 32, 64)).shape == (1, 2, 32, 64)
        assert seen[0].shape == (1, 384, 32 // token_stride, 64 // token_stride)

    def test_position_table_is_resized_by_plain_bicubic(self) -> None:
        trunk = DINOv2Trunk()
        nn.init.normal_(trunk.vit.pos_embed)
        assert torch.equal(trunk._position_table(37, 37), trunk.vit.pos_embed)
        table = trunk.vit.pos_embed[0, 1:, 5].reshape(1, 1, 37, 37)
        expected = nn.functional.interpolate(table, size=(8, 12), mode="bicubic")
        torch.testing.assert_close(trunk._position_table(8, 12)[0, 1:, 5].reshape(1, 1, 8, 12), expected)

    def test_a_token_stride_of_14_takes_the_image_as_it_is(self) -> None:
        trunk = DINOv2Trunk(token_stride=14).eval()
        del trunk.vit.blocks[1:]
        trunk.blocks = (0,)
        embedded: list[Tensor] = []
        trunk.vit.patch_embed.register_forward_pre_hook(lambda module, inputs: embedded.append(inputs[0]))
        images = torch.randn(1, 3, 224, 224)
        with torch.inference_mode():
            assert trunk(images)[0].shape == (1, 384, 16, 16)
            # 96 pixels are 6.9 tokens.
            assert trunk(images[..., :96, :])[0].shape == (1, 384, 7, 16)
        assert embedded[0] is images

    def test_token_stride_must_be_positive(self) -> None:
        with pytest.raises(ValueError, match="token_stride must be at least 1, got 0"):
            build("vit_small_dinov2", 2, token_stride=0)
