"""Taps on named layers: whatever the layout, the maps of the latest pass of this network, or an error."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sward.features import FeatureTaps, map_channels


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 5, 3)), nn.Flatten())


def test_catches_what_each_layer_returned_with_gradient() -> None:
    net, images = network(), torch.randn(2, 3, 8, 8)
    with FeatureTaps(net, ["2.0", "0"]) as taps:
        net(images)
        caught = taps.collect()
    assert list(caught) == ["2.0", "0"]
    torch.testing.assert_close(caught["0"], net[0](images))
    caught["2.0"].sum().backward()
    assert net[0].weight.grad is not None


def test_detached_taps_carry_no_gradient() -> None:
    net = network()
    with FeatureTaps(net, ["0"], detach=True) as taps:
        net(torch.randn(1, 3, 8, 8))
        assert not taps.collect()["0"].requires_grad


def test_hooks_are_gone_after_exit_even_when_the_body_raises() -> None:
    net = network()
    with pytest.raises(KeyError), FeatureTaps(net, ["0", "2"]):
        raise KeyError
    assert not any(module._forward_hooks for module in net.modules())


def test_opening_twice_installs_one_hook() -> None:
    net = network()
    with FeatureTaps(net, ["0"]) as taps:
        taps.open()
        assert len(net[0]._forward_hooks) == 1


def test_nothing_of_an_earlier_pass_is_handed_out_again() -> None:
    net = network()
    with FeatureTaps(net, ["0"]) as taps:
        net(torch.randn(1, 3, 8, 8))
        taps.collect()
        with pytest.raises(RuntimeError, match="'0' has produced no output since the last collect"):
            taps.collect()


def test_unknown_layer_names_near_matches() -> None:
    with pytest.raises(ValueError, match=r"layer '2\.1' does not exist in Sequential; did you mean one of .*'2\.0'"):
        FeatureTaps(network(), ["2.1"])


def test_a_layer_that_returns_no_map_is_named() -> None:
    net = network()
    with FeatureTaps(net, ["3"]), pytest.raises(ValueError, match=r"layer '3' must return maps .* got shape \(1, 80\)"):
        net(torch.randn(1, 3, 8, 8))


class Arranged(nn.Module):
    """A convolution with stride 4 whose output is arranged by `arrange`."""

    def __init__(self, arrange: Any, channels: int = 8, stride: int = 4) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, channels, stride, stride)
        self.layer = _Arrange(arrange)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.embed(images)
        self.layer(maps)
        return maps


class _Arrange(nn.Module):
    def __init__(self, arrange: Any) -> None:
        super().__init__()
        self.arrange = arrange

    def forward(self, maps: Tensor) -> Any:
        return self.arrange(maps)


def tokens_behind(count: int) -> Any:
    def arrange(maps: Tensor) -> Tensor:
        tokens = maps.flatten(2).transpose(1, 2)
        return torch.cat([tokens.new_full((len(maps), count, maps.shape[1]), 99.0), tokens], dim=1)

    return arrange


ARRANGEMENTS = {
    "nchw": lambda maps: maps,
    "nhwc": lambda maps: maps.permute(0, 2, 3, 1),
    "tokens": tokens_behind(0),
    "class token": tokens_behind(1),
    "registers": tokens_behind(5),
    "tuple": lambda maps: (None, maps),
    "dictionary": lambda maps: {"out": maps, "aux": 2 * maps},
    "one tensor": lambda maps: {"anything": maps, "size": 3},
}


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("size", [(32, 32), (32, 64)])
@pytest.mark.parametrize("channels", [8, 5])
def test_every_layout_gives_the_same_map(arrangement: str, size: tuple[int, int], channels: int) -> None:
    """8 channels on a grid of 8x8 cells read both ways: the second image size decides."""
    net, images = Arranged(ARRANGEMENTS[arrangement], channels), torch.randn(2, 3, *size)
    with FeatureTaps(net, ["layer"]) as taps:
        maps = net(images)
        torch.testing.assert_close(taps.collect()["layer"], maps)
        larger = torch.cat([images, images], dim=2)
        maps = net(larger)
        torch.testing.assert_close(taps.collect()["layer"], maps)


def test_finding_the_layout_changes_neither_mode_nor_random_numbers_nor_statistics() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.Dropout(0.5))
    images = torch.randn(1, 3, 32, 32)
    with FeatureTaps(net, ["1"], detach=True) as taps:
        net(images)
        state, seen = torch.get_rng_state(), net[1].num_batches_tracked.item()
        taps.collect()
    assert torch.equal(torch.get_rng_state(), state)
    assert net[1].num_batches_tracked == seen
    assert all(module.training for module in net.modules())


def test_finding_the_layout_feeds_no_other_taps() -> None:
    """The blank image on which a doubt is settled is no pass of the network to those who did not ask."""
    net = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 5, 1))
    images = torch.randn(2, 3, 32, 32)
    with FeatureTaps(net, ["0"]) as asking, FeatureTaps(net, ["0", "1"], format="nchw") as other:
        logits = net(images)
        asking.collect()
        maps = other.collect()
    assert torch.equal(maps["1"], logits)
    assert maps["0"].shape == (2, 8, 8, 8)
    assert maps["0"].requires_grad


class FixedSize(Arranged):
    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-1] != 32:
            raise AssertionError("32 pixels only")
        return super().forward(images)


def test_a_doubt_that_no_second_size_settles_is_refused_with_the_cure() -> None:
    net = FixedSize(ARRANGEMENTS["nhwc"])
    with FeatureTaps(net, ["layer"]) as taps:
        net(torch.randn(2, 3, 32, 32))
        with pytest.raises(ValueError, match=r"reads one way only, .*8x8 nchw or 8x8 nhwc; pass format='nchw' or"):
            taps.collect()
    with FeatureTaps(net, ["layer"], format="nhwc") as taps:
        maps = net(torch.randn(2, 3, 32, 32))
        torch.testing.assert_close(taps.collect()["layer"], maps)


def test_prefix_tokens_that_no_shape_tells_are_refused_with_the_cure() -> None:
    net = Arranged(tokens_behind(11), stride=8)
    with FeatureTaps(net, ["layer"]) as taps:
        net(torch.randn(1, 3, 32, 32))
        with pytest.raises(ValueError, match=r"got \(1, 27, 8\) for images .*; pass prefix_tokens="):
            taps.collect()
    with FeatureTaps(net, ["layer"], prefix_tokens=11) as taps:
        maps = net(torch.randn(1, 3, 32, 32))
        torch.testing.assert_close(taps.collect()["layer"], maps)


def test_a_format_that_the_grid_contradicts_is_refused() -> None:
    net = Arranged(ARRANGEMENTS["nhwc"], channels=5)
    with FeatureTaps(net, ["layer"], format="nchw") as taps:
        net(torch.randn(1, 3, 32, 32))
        with pytest.raises(ValueError, match="format must be 'nhwc' or 'auto' for layer 'layer', got 'nchw'"):
            taps.collect()


def test_windows_in_the_batch_are_refused() -> None:
    net = Arranged(lambda maps: maps.reshape(4 * len(maps), maps.shape[1], 4, -1))
    with FeatureTaps(net, ["layer"]) as taps:
        net(torch.randn(1, 3, 32, 32))
        with pytest.raises(ValueError, match="layer 'layer' must return one map per image"):
            taps.collect()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "hwc"}, "format must be one of 'auto', 'nchw', 'nhwc', 'tokens', got 'hwc'"),
        ({"prefix_tokens": -1}, "prefix_tokens must be 'auto' or a number of at least 0, got -1"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureTaps(network(), ["0"], **options)


def test_an_item_that_is_no_tensor_lists_what_there_is() -> None:
    net = Arranged(lambda maps: (maps, 8, 8))
    with (
        FeatureTaps(net, ["layer"]),
        pytest.raises(ValueError, match=r"select must name .* got 2; it holds \{0: shape"),
    ):
        net(torch.randn(1, 3, 32, 32))
    with FeatureTaps(net, ["layer"], select=0) as taps:
        maps = net(torch.randn(1, 3, 32, 32))
        assert taps.collect()["layer"] is not None
        assert maps.shape == (1, 8, 8, 8)


def test_a_copy_of_the_network_never_feeds_the_original() -> None:
    net, images = network(), torch.randn(1, 3, 8, 8)
    with FeatureTaps(net, ["0"]) as taps:
        net(images)
        average = copy.deepcopy(net)
        with torch.no_grad():
            average[0].weight.zero_()
            average(images)
        caught = taps.collect()["0"]
    torch.testing.assert_close(caught, net[0](images))
    assert caught.requires_grad


class Trainer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.taps = FeatureTaps(self.net, ["0"]).open()


def test_taps_copied_or_pickled_with_their_network_belong_to_the_copy() -> None:
    original, images = Trainer(), torch.randn(1, 3, 8, 8)
    for copied in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
        with torch.no_grad():
            copied.net[0].weight.mul_(2.0)
        original.net(images)
        copied.net(images)
        torch.testing.assert_close(copied.taps.collect()["0"], copied.net[0](images))
        torch.testing.assert_close(original.taps.collect()["0"], original.net[0](images))


def test_a_network_saved_with_open_taps_loads_without_this_package(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    with FeatureTaps(net, ["0"]):
        torch.save(net, tmp_path / "net.pt")
    code = (
        "import sys, torch; sys.modules['sward'] = None\n"
        f"net = torch.load({str(tmp_path / 'net.pt')!r}, weights_only=False); print(net(torch.ones(1, 3, 4, 4)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout.strip() == "torch.Size([1, 4, 2, 2])", done.stderr


def test_a_pass_without_collect_is_replaced_by_the_next() -> None:
    net = network()
    with FeatureTaps(net, ["0"]) as taps:
        net(torch.randn(4, 3, 8, 8))
        net(torch.randn(2, 3, 8, 8))
        assert len(taps.collect()["0"]) == 2


def test_a_pass_that_skips_a_layer_hands_out_nothing_older() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.skip = nn.Conv2d(3, 4, 1), False

        def forward(self, images: Tensor) -> Tensor:
            return images if self.skip else self.layer(images)

    net = Skips()
    with FeatureTaps(net, ["layer"]) as taps:
        net(torch.randn(1, 3, 8, 8))
        net.skip = True
        net(torch.randn(1, 3, 8, 8))
        with pytest.raises(RuntimeError, match="'layer' has produced no output"):
            taps.collect()


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)
        self.use_reentrant = use_reentrant

    def forward(self, images: Tensor) -> Tensor:
        return checkpoint(lambda x: self.second(self.first(x)), images, use_reentrant=self.use_reentrant)


def test_activation_checkpointing_recomputes_without_leaving_maps_behind() -> None:
    net, images = Checkpointed(use_reentrant=False), torch.randn(1, 3, 8, 8)
    with FeatureTaps(net, ["first"]) as taps:
        logits = net(images)
        caught = taps.collect()["first"]
        (logits.sum() + caught.square().sum()).backward()
        with pytest.raises(RuntimeError, match="has produced no output"):
            taps.collect()
    expected = net.first.weight.grad
    net.zero_grad()
    maps = net.first(images)
    (net.second(maps).sum() + maps.square().sum()).backward()
    torch.testing.assert_close(expected, net.first.weight.grad)


def test_reentrant_checkpointing_gives_no_gradient_and_is_refused() -> None:
    net = Checkpointed(use_reentrant=True)
    with FeatureTaps(net, ["first"]), pytest.raises(ValueError, match="use_reentrant=False"):
        net(torch.randn(1, 3, 8, 8, requires_grad=True))


@pytest.mark.parametrize("detach", [True, False])
def test_a_map_that_an_in_place_activation_overwrites_is_refused(detach: bool) -> None:
    net, images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)), torch.randn(1, 3, 8, 8)
    with FeatureTaps(net, ["0"], detach=detach) as taps:
        net(images)
        with pytest.raises(ValueError, match=r"layer '0' must return a map that stays as it is, .* probably '1'"):
            taps.collect()
    with FeatureTaps(net, ["1"], detach=detach) as taps:
        result = net(images)
        assert torch.equal(taps.collect()["1"], result)
        with torch.inference_mode():
            net(images)
            assert torch.equal(taps.collect()["1"], result)


@pytest.mark.parametrize("in_place", [True, False])
def test_taps_opened_after_the_first_call_of_a_compiled_network(in_place: bool) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    run: Any = net
    if in_place:
        net.compile(backend="eager", dynamic=False)
    else:
        run = torch.compile(net, backend="eager", dynamic=False)
    run(torch.randn(4, 3, 8, 8))
    with FeatureTaps(run, ["0"]) as taps:
        for batch in (2, 4, 2):
            images = torch.randn(batch, 3, 8, 8)
            run(images)
            torch.testing.assert_close(taps.collect()["0"], net[0](images))
        run(torch.randn(2, 3, 8, 8))
        run(torch.randn(4, 3, 8, 8))
        assert len(taps.collect()["0"]) == 4


def test_an_exported_network_holds_no_trace_of_its_taps() -> None:
    net, images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.randn(1, 3, 8, 8)
    with FeatureTaps(net, ["0"]) as taps:
        net(images)
        exported = torch.export.export(net, (images,))
        torch.testing.assert_close(taps.collect()["0"], net[0](images))
    torch.testing.assert_close(exported.module()(images), net(images))


def test_map_channels_restores_every_modules_own_mode() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4).eval())
    assert map_channels(net, ["1", "0"], (16, 16)) == [4, 4]
    assert net.training
    assert not net[1].training


def test_swin_and_vision_transformers_of_timm() -> None:
    timm = pytest.importorskip("timm")
    images = torch.randn(1, 3, 64, 96)
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=(64, 96),
        window_size=4,
        embed_dim=16,
        depths=(1, 1, 1, 1),
        num_heads=(1, 1, 1, 1),
    ).eval()
    with torch.no_grad(), FeatureTaps(swin, ["layers.0", "layers.3"]) as taps:
        swin(images)
        maps = taps.collect()
    assert [maps[layer].shape for layer in maps] == [(1, 16, 16, 24), (1, 128, 2, 3)]
    vit = timm.create_model(
        "vit_small_patch16_224", img_size=(64, 96), embed_dim=32, depth=2, num_heads=2, reg_tokens=4
    ).eval()
    with torch.no_grad(), FeatureTaps(vit, ["blocks.1"]) as taps:
        vit(images)
        caught = taps.collect()["blocks.1"]
        raw = vit.forward_intermediates(images, indices=[1], norm=False, intermediates_only=True)[0]
    torch.testing.assert_close(caught, raw)
