"""The registry: every name builds, every stage it promises can be tapped, every mistake gets one sentence."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sward.features import FeatureTaps
from sward.models import build, describe, names
from sward.models.inputs import check_images

LARGE = tuple(name for name in names("teacher") if "base_plus" in name or "large" in name)
QUICK = tuple(name for name in names() if name not in LARGE and "hiera_small" not in name)


def test_names_by_role() -> None:
    assert names("student") == ("unext", "resunetpp", "mbv3s_deeplabv3plus", "smp_mbv3s_deeplabv3plus")
    assert set(names("student")) | set(names("teacher")) == set(names())
    for size in ("tiny", "small", "base_plus", "large"):
        for head in ("deeplabv3plus", "resunetpp"):
            assert f"sam2_hiera_{size}_{head}" in names("teacher")
    assert {"medsam2_hiera_tiny_resunetpp", "hiera_demo", "vit_small_dinov2"} < set(names("teacher"))
    with pytest.raises(ValueError, match="role must be"):
        names("assistant")


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_every_described_layer_can_be_tapped(name: str) -> None:
    description = describe(name)
    model = build(name, 3).eval()
    layers = [stage.layer for stage in description.stages]
    layers += [description.feature_layer, description.penultimate_layer]
    with torch.inference_mode(), FeatureTaps(model, layers) as taps:
        logits = model(torch.randn(1, 3, 64, 96))
        maps = taps.collect()
    assert logits.shape == (1, 3, 64, 96)
    for stage in description.stages:
        assert maps[stage.layer].shape == (1, stage.channels, 64 // stage.stride, 96 // stage.stride)
    assert maps[description.penultimate_layer].ndim == 4


def test_every_network_has_four_stages_that_descend() -> None:
    for name in names():
        strides = [stage.stride for stage in describe(name).stages]
        assert len(strides) == 4
        assert strides == sorted(strides)
        assert describe(name).feature_layer == describe(name).stages[-1].layer


def test_pairs_of_the_specification() -> None:
    """The student's finest stage is dropped and the rest goes level by level."""
    stages = {name: [(stage.channels, stage.stride) for stage in describe(name).stages] for name in names()}
    assert stages["mbv3s_deeplabv3plus"] == [(16, 4), (24, 8), (48, 16), (576, 16)]
    assert stages["resunetpp"] == [(32, 2), (64, 4), (128, 8), (256, 8)]
    assert stages["unext"] == [(32, 4), (128, 8), (160, 16), (256, 32)]
    assert stages["sam2_hiera_large_deeplabv3plus"] == [(144, 4), (288, 8), (576, 16), (1152, 32)]
    assert stages["medsam2_hiera_tiny_resunetpp"] == [(96, 4), (192, 8), (384, 16), (768, 32)]


def test_unknown_name_lists_near_matches() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'unet'; did you mean unext"):
        build("unet", 2)
    with pytest.raises(ValueError, match="sam2_hiera_large_deeplabv3plus"):
        describe("sam2_hiera_large_deeplab")


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        build("unext", 0)
    with pytest.raises(ValueError, match="model 'unext' has no option 'backend'; it has no options"):
        build("unext", 2, backend="timm")
    with pytest.raises(ValueError, match="model 'hiera_demo' has no option 'width'; its options are backend"):
        build("hiera_demo", 2, width=3)


@pytest.mark.parametrize("name", [name for name in QUICK if "medsam2" not in name])
def test_size_that_is_not_a_multiple_of_32(name: str) -> None:
    with pytest.raises(
        ValueError,
        match=r"image height and width must be positive multiples of 32, got 250x64; use 224 or 256 for the height",
    ):
        build(name, 2).eval()(torch.zeros(1, 3, 250, 64))


def test_input_check_names_the_nearest_sizes() -> None:
    with pytest.raises(ValueError, match="use 32 for the height and 96 or 128 for the width"):
        check_images(torch.zeros(1, 3, 20, 100))
    with pytest.raises(ValueError, match=r"images must have shape \[B, 3, H, W\], got \[1, 1, 32, 32\]"):
        check_images(torch.zeros(1, 1, 32, 32))
    check_images(torch.zeros(2, 3, 64, 96))


@pytest.mark.parametrize("name", ["unext", "resunetpp", "mbv3s_deeplabv3plus", "hiera_demo"])
def test_global_seed_fixes_the_weights(name: str) -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        states.append(build(name, 2).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_importing_the_models_pulls_in_no_heavy_package() -> None:
    code = (
        "import sys, sward.models\n"
        "heavy = {'timm', 'sam2', 'hydra', 'torchvision', 'segmentation_models_pytorch', 'ptflops', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
