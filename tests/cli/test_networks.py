"""Networks of other libraries from the command line: trained, evaluated and used for prediction."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sward.cli.main import main

pytestmark = pytest.mark.usefixtures("few_images")

TINY = ["--dataset.image-size", "64", "64", "--batch", "2", "--iterations", "3", "--sward.window-size", "4"]


class Mine(nn.Module):
    """A user's module: a dictionary of logits at half the resolution of the images."""

    def __init__(self, num_classes: int, width: int = 4) -> None:
        super().__init__()
        sides = [3, width, 2 * width, 3 * width]
        self.encoder = nn.Sequential(*(nn.Conv2d(a, b, 3, 2, 1) for a, b in pairwise(sides)))
        self.head = nn.Conv2d(sides[-1], num_classes, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"out": self.head(self.encoder(images))}


@pytest.fixture(autouse=True)
def in_a_folder_with_a_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    Path("mine.py").write_text(
        f"from tests.support.token_network import TokenNetwork as hidden\nfrom {Mine.__module__} import Mine as build\n"
    )
    sys.modules[Mine.__module__] = sys.modules[__name__]
    sys.modules.pop("mine", None)
    torch.set_num_threads(1)


MINE = ["--model", "mine:build", "--model-options", "width=6"]
UNEXT = ["--model", "unext"]
UNET = ["--model", "smp:Unet", "--model-options", "encoder_name=mobilenet_v2"]
SWIN = ["timm:swin_s3_tiny_224", "img_size=64", "window_size=2", "embed_dim=12", "num_heads=(1,1,1,1)"]
VIT = ["timm:vit_tiny_patch16_224", "depth=4"]
PAIRS: dict[str, tuple[list[str], list[str]]] = {
    "Unet from Hiera": (UNET, ["hiera_demo"]),
    "DeepLabV3Plus from ConvNeXt": (
        ["--model", "smp:DeepLabV3Plus", "--model-options", "encoder_name=mobilenet_v2"],
        ["timm:convnext_atto"],
    ),
    "Segformer from ViT": (["--model", "smp:Segformer", "--model-options", "encoder_name=mit_b0"], VIT),
    "lraspp from ConvNeXt": (["--model", "torchvision:lraspp_mobilenet_v3_large"], ["timm:convnext_atto"]),
    "deeplabv3 from ViT with registers": (
        ["--model", "torchvision:deeplabv3_mobilenet_v3_large"],
        [*VIT, "reg_tokens=4"],
    ),
    "UNeXt from Swin": (UNEXT, SWIN),
    "UNeXt from ViT": (UNEXT, VIT),
    "UNeXt from SegFormer of transformers": (UNEXT, ["transformers:segformer"]),
    "UNeXt from a user's module": (UNEXT, ["mine:build", "width=32"]),
    "a user's module from Hiera": (MINE, ["hiera_demo"]),
    "a user's module from ViT with registers": (MINE, [*VIT, "reg_tokens=4"]),
    "a user's module from smp": (MINE, ["smp:Unet", "encoder_name=mobilenet_v2"]),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_any_pair_trains_evaluates_and_predicts(pair: str, capsys: pytest.CaptureFixture[str]) -> None:
    student, (teacher, *options) = PAIRS[pair]
    if teacher.startswith("transformers:"):
        transformers = pytest.importorskip("transformers")
        transformers.SegformerConfig(
            hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=16
        ).save_pretrained("segformer")
    words = [*student, "--teacher.untrained", "--teacher.name", teacher]
    words += ["--teacher.options", *options] if options else []
    assert main(["train", "demo", *words, *TINY, "--sward.pdr-layer", "None", "--output", "run"]) == 0, (
        capsys.readouterr().err
    )
    config = json.loads(Path("run/config.json").read_text())
    layers = config["sward"]["student_layers"], config["sward"]["teacher_layers"]
    assert len(layers[0]) == len(layers[1]) >= 3
    printed = capsys.readouterr().out
    assert f"student layers: {' '.join(layers[0])}" in printed
    assert f"teacher layers: {' '.join(layers[1])}" in printed
    assert main(["evaluate", "run"]) == 0
    Image.new("RGB", (50, 37)).save("photo.png")
    assert main(["predict", "run", "photo.png"]) == 0
    assert main(["train", "demo", *words, *TINY, "--sward.pdr-layer", "None", "--output", "run", "--resume"]) == 0


def test_how_layers_arrange_their_output_can_be_told(capsys: pytest.CaptureFixture[str]) -> None:
    layers = ["--student-layers", "encoder.4", "--teacher-layers", "network.encoder.2"]
    words = ["train", "demo", "--teacher.name", "mine:hidden", "--teacher.untrained", *layers, *TINY, "--output", "run"]
    assert main([*words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pass prefix_tokens=" in line
    assert not Path("run").exists()
    told = ["--teacher.taps.prefix-tokens", "11", "--teacher.taps.select", "tokens"]
    assert main([*words, *told]) == 0, capsys.readouterr().err
    taps = json.loads(Path("run/config.json").read_text())["teacher"]["taps"]
    assert taps == {"format": "auto", "prefix_tokens": 11, "select": "tokens"}
    assert main([*words, *told, "--resume"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["smp:Unet"], "teacher.weights must be a file for the teacher 'smp:Unet', got None; or try it with"),
        (["smp:Unet", "--teacher.run", "r"], "teacher.name must be left out with --teacher.run, got 'smp:Unet'"),
        (["transformers:nowhere"], "there is no config.json in"),
    ],
)
def test_a_named_teacher_is_never_replaced_by_another(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "demo", "--teacher.name", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"sward train: {message}")


def test_a_folder_of_transformers_brings_its_weights(capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=64, patch_size=16
    )
    transformers.Dinov2Model(config).save_pretrained("dinov2")
    teacher = ["--teacher.name", "transformers:dinov2", *TINY]
    assert main(["train", "demo", *teacher, "--sward.pdr-layer", "None", "--output", "run"]) == 0
    capsys.readouterr()
    assert main(["train", "demo", *teacher, "--distillation", "kd", "--output", "kd"]) == 2
    assert "must be a method that compares no logits for the teacher 'transformers:dinov2'" in capsys.readouterr().err
    model = ["--model", "transformers:dinov2", "--no-train-trunk", *TINY[:-2]]
    assert main(["train-teacher", "demo", *model, "--output", "teacher"]) == 0
    config.save_pretrained("bare")
    assert main(["train-teacher", "demo", "--model", "transformers:bare", *model[2:], "--output", "random"]) == 2
    assert "trunk_checkpoint must name the weights of a frozen trunk" in capsys.readouterr().err
