"""Networks of other libraries by name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sward import models
from sward.models.checkpoints import load_weights
from sward.models.teachers import Teacher


class Toy(nn.Module):
    def __init__(
        self, num_classes: int, width: int = 4, scale: float = 1.0, name: str = "a", flag: bool = False
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, 2, 1)
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": self.head(self.conv(images)), "aux": images}


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each])
    Path("mine.py").write_text(
        "import tests.models.test_sources as t\nbuild = t.Toy\nnumber = 3\ndef text(): return 'a'\n"
    )
    yield
    sys.modules.pop("mine", None)


SMALL_NETWORKS = {
    "smp:Unet": {"encoder_name": "resnet18"},
    "smp:Segformer": {"encoder_name": "mit_b0"},
    "torchvision:lraspp_mobilenet_v3_large": {},
    "timm:convnext_atto": {},
    "timm:vit_tiny_patch16_224": {"depth": "4", "reg_tokens": "2"},
}


@pytest.mark.parametrize("name", SMALL_NETWORKS)
def test_networks_of_libraries_give_logits_of_the_images_size(name: str) -> None:
    network = models.build(name, 3, **SMALL_NETWORKS[name]).eval()
    with torch.no_grad():
        assert network(torch.randn(1, 3, 64, 96)).shape == (1, 3, 64, 96)
    assert isinstance(network, Teacher) == name.startswith("timm:")


@pytest.mark.usefixtures("mine")
def test_a_function_of_the_current_folder() -> None:
    network = models.build("mine:build", 5, width="6")
    assert network.network.conv.out_channels == 6
    assert network(torch.randn(1, 3, 32, 32)).shape == (1, 5, 32, 32)


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mine:build", {"widht": 3}, r"model 'mine:build' has no option 'widht'; its options are num_classes, width"),
        ("mine:build", {"width": "a"}, "option 'width' of model 'mine:build' must be of type int, got 'a'"),
        ("mine:build", {"flag": "3"}, "option 'flag' .* must be of type bool, got 3"),
        ("mine:build", {"num_classes": 3}, "option 'num_classes' of model 'mine:build' must be left to sward"),
        ("smp:Unet", {"classes": 3}, "option 'classes' of model 'smp:Unet' must be left to sward"),
        ("mine:biuld", {}, r"must name a function or class of mine, got 'biuld'; did you mean \['build'\]"),
        ("mine:number", {}, "must name a function or class of mine"),
        ("mine:text", {}, "must return an nn.Module, got str"),
        ("absent.module:f", {}, "must name a library .* or a Python module that can be imported from"),
        (
            "smp:Unet",
            {"encoder_nam": "resnet18"},
            "model 'smp:Unet' has no option 'encoder_nam'; its options are encoder_",
        ),
        ("smp:Unett", {}, r"unknown model 'smp:Unett'; did you mean smp:Unet"),
        ("timm:convnext_tin", {}, r"unknown model 'timm:convnext_tin'; did you mean timm:convnext_tiny"),
        (
            "torchvision:lraspp",
            {},
            "unknown model 'torchvision:lraspp'; did you mean torchvision:deeplabv3.* or torchvision:lraspp_mobilenet",
        ),
    ],
)
def test_mistakes_end_in_one_sentence(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        models.build(name, 3, **options)
    assert "\n" not in str(caught.value)


def test_transformers_needs_a_local_folder(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(FileNotFoundError, match=r"there is no config.json in .*; name a local folder"):
        models.build(f"transformers:{tmp_path}", 2)


def test_segformer_and_dinov2_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    segformer = transformers.SegformerConfig(
        hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=16
    )
    dinov2 = transformers.Dinov2WithRegistersConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, patch_size=16, image_size=64
    )
    for name, config in (("segformer", segformer), ("dinov2", dinov2)):
        config.save_pretrained(tmp_path / name)
        network = models.build(f"transformers:{tmp_path / name}", 3).eval()
        assert network(torch.randn(1, 3, 64, 96)).shape == (1, 3, 64, 96)


def test_weights_of_transformers_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    config = transformers.SegformerConfig(
        hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=16, num_labels=3
    )
    segformer = transformers.SegformerForSemanticSegmentation(config)
    segformer.save_pretrained("segformer")
    config.save_pretrained("bare")
    dinov2 = transformers.Dinov2Model(
        transformers.Dinov2Config(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=56)
    )
    dinov2.save_pretrained("dinov2")
    capfd.readouterr()
    built = {classes: models.build("transformers:segformer", classes).network.state_dict() for classes in (3, 5)}
    stored = segformer.state_dict()
    for classes, state in built.items():
        same = [key for key, value in state.items() if value.shape == stored[key].shape]
        assert all(torch.equal(state[key], stored[key]) for key in same)
        assert (len(same) == len(stored)) == (classes == 3)
    trunk = models.build("transformers:dinov2", 2).trunk.network.state_dict()
    assert all(torch.equal(value, dinov2.state_dict()[key]) for key, value in trunk.items())
    assert "MISMATCH" not in "".join(capfd.readouterr())
    found = {(name, classes): models.own_weights(f"transformers:{name}", classes) for name, classes in _FOLDERS}
    assert found == _FOLDERS
    assert models.own_weights("timm:convnext_atto", 2) == models.own_weights("unext", 2) == "none"


def test_folders_without_the_weights_of_the_whole_network(tmp_path: Path) -> None:
    """transformers fills what is missing with random numbers and says so in its log only."""
    transformers = pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors.torch")
    tiny = dict(hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=16)
    config = transformers.SegformerConfig(**tiny, num_labels=2)
    transformers.SegformerModel(config).save_pretrained(tmp_path / "encoder")
    name = f"transformers:{tmp_path / 'encoder'}"
    with pytest.warns(UserWarning, match="holds no weights of the head of SegformerForSemanticSegmentation: "):
        models.build(name, 2)
    assert models.own_weights(name, 2) == "trunk"
    swin = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4
    )
    for kind, network in (
        ("whole", transformers.SegformerForSemanticSegmentation(config)),
        ("swin", transformers.SwinModel(swin)),
    ):
        network.save_pretrained(tmp_path / kind)
        models.build(f"transformers:{tmp_path / kind}", 2)
        file = tmp_path / kind / "model.safetensors"
        prefixed = {f"module.{key}": value for key, value in safetensors.load_file(file).items()}
        safetensors.save_file(prefixed, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"must hold the weights of the whole encoder .* another prefix"):
            models.build(f"transformers:{tmp_path / kind}", 2)


_FOLDERS = {("segformer", 3): "all", ("segformer", 5): "trunk", ("dinov2", 2): "trunk", ("bare", 3): "none"}


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "encoder.", "trunk.", "module.net."])
@pytest.mark.parametrize("under", [None, "model", "state_dict", "model_state_dict"])
def test_weights_load_strictly_whatever_wraps_them(prefix: str, under: str | None, tmp_path: Path) -> None:
    source, target = Toy(3), Toy(3)
    state: Any = {prefix + key: value for key, value in source.state_dict().items()}
    torch.save(state if under is None else {under: state, "epoch": 3}, tmp_path / "file.pt")
    said = load_weights(target, tmp_path / "file.pt")
    assert torch.equal(target.conv.weight, source.conv.weight)
    assert said.startswith("4 tensors from")
    assert (f"prefix {prefix!r} stripped" in said) == bool(prefix)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path, state = tmp_path / "file.pt", Toy(3).state_dict()
    cases = [
        ({key: value for key, value in state.items() if key != "conv.bias"}, r"must hold all 4 tensors .*: conv.bias"),
        ({**state, "extra": torch.zeros(1)}, "must hold the tensors of the network alone, got extra too"),
        ({**state, "head.bias": torch.zeros(7)}, r"head.bias in .* must have shape \(3,\), got \(7,\)"),
        ({**state, "head.bias": torch.full((3,), torch.nan)}, "head.bias in .* must be finite"),
    ]
    for content, message in cases:
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            load_weights(Toy(3), path)
    with pytest.raises(FileNotFoundError):
        load_weights(Toy(3), tmp_path / "absent.pt")


def test_imagenet_weights_without_a_hub_say_where_they_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision = pytest.importorskip("torchvision")

    def offline(*args: Any, **options: Any) -> Any:
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", offline)
    with pytest.raises(
        ValueError,
        match=r"ImageNet weights of .* got OSError; they are looked for at .*checkpoints/mobilenet_v3_large-\w+\.pth",
    ):
        models.build_with_imagenet("torchvision:lraspp_mobilenet_v3_large", 3)
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_HUB_CACHE", "/tmp/cache")
    monkeypatch.setattr(hub.file_download, "_hf_hub_download_to_cache_dir", offline)
    for name, repository in (
        ("smp:Unet", r"smp-hub--resnet34.imagenet/snapshots/\w+"),
        ("timm:convnext_atto", "timm--convnext_atto.d2_in1k"),
    ):
        with pytest.raises(ValueError, match=rf"they are looked for in /tmp/cache/models--{repository} and on hugging"):
            models.build_with_imagenet(name, 3)
    with pytest.raises(ValueError, match=r"in /tmp/cache/models--timm--mobilenetv3_small_100.\w+ and on hugging"):
        models.build_with_imagenet("smp:Unet", 3, encoder_name="tu-mobilenetv3_small_100")
    with pytest.raises(
        ValueError, match="ImageNet weights must be for smp:, torchvision: or timm: models, got 'unext'"
    ):
        models.build_with_imagenet("unext", 3)


def test_registered_names_are_taken_once() -> None:
    description = models.describe("unext")
    with pytest.raises(ValueError, match="name must be new and without a colon, got 'unext'"):
        models.register(description, Toy)
