"""Networks see the statistics that their weights expect, whatever the data pipeline normalises with."""

from __future__ import annotations

import copy
import inspect
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sward import models
from sward.data import IMAGENET_MEAN, IMAGENET_STD, normalise
from sward.models.inputs import IMAGENET, Renormalising, Statistics
from sward.models.segmenter import Segmenter
from sward.training.teacher_cache import TrunkCache
from tests.support.transformers_folder import write_segformer

HALF = Statistics((0.5,) * 3, (0.5,) * 3)
CLIP = Statistics((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
UNCHANGED = Statistics((0.0,) * 3, (1.0,) * 3)


def photos(height: int = 32, width: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(height)
    return torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=generator)


class Seen(nn.Module):
    """Returns what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Tensor:
        return images


def near(found: Statistics, wanted: Statistics) -> bool:
    return torch.allclose(torch.tensor([found.mean, found.std]), torch.tensor([wanted.mean, wanted.std]), atol=1e-6)


@pytest.mark.parametrize("statistics", [HALF, CLIP, UNCHANGED])
def test_weights_see_the_statistics_that_they_expect(statistics: Statistics) -> None:
    network, images = Segmenter(Seen()), photos()
    network.expect(statistics)
    mean, std = (torch.tensor(values).double()[:, None, None] for values in (statistics.mean, statistics.std))
    by_hand = (images.double() / 255 - mean) / std
    assert (network(normalise(images)).double() - by_hand).abs().max() < 2e-6
    assert near(network.expected(), statistics)


def test_imagenets_statistics_cost_nothing() -> None:
    network, images = Segmenter(Seen()), normalise(photos())
    network.expect(HALF)
    network.expect(Statistics(tuple(round(each, 3) for each in IMAGENET_MEAN), IMAGENET_STD))
    assert network.renormalised(images) is images
    assert list(network.state_dict()) == ["network.weight"]
    assert network.expected() is IMAGENET


def test_statistics_travel_with_the_weights() -> None:
    source, target = Segmenter(Seen()), Segmenter(Seen())
    source.expect(HALF)
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    target.load_state_dict(torch.load(buffer, weights_only=True))
    assert near(target.expected(), HALF)
    assert near(copy.deepcopy(target).expected(), HALF)
    # Checkpoints of earlier versions state nothing, and their weights were trained on ImageNet's statistics.
    target.load_state_dict({"network.weight": torch.ones(1)})
    assert target.expected() is IMAGENET
    assert near(source.expected(), HALF)


@pytest.fixture
def hub_is_a_stub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let timm take random weights for pretrained ones."""
    timm = pytest.importorskip("timm")
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda *args, **options: create(*args, **{**options, "pretrained": False})
    )


@pytest.mark.usefixtures("hub_is_a_stub")
@pytest.mark.parametrize(
    ("name", "statistics"),
    [("test_vit", HALF), ("test_efficientnet", IMAGENET), ("vit_tiny_patch16_224.augreg_in21k", HALF)],
)
def test_timm_networks_expect_what_timm_states_for_their_weights(name: str, statistics: Statistics) -> None:
    pretrained = models.build_with_imagenet(f"timm:{name}", 2)
    assert isinstance(pretrained, Renormalising)
    assert near(pretrained.expected(), statistics)
    # Random weights expect nothing.
    scratch = models.build(f"timm:{name}", 2)
    assert isinstance(scratch, Renormalising)
    assert scratch.expected() is IMAGENET
    assert scratch.state_dict().keys() == pretrained.state_dict().keys() - {"renormalisation"}
    images, seen = normalise(photos()), []
    pretrained.trunk.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    pretrained.eval()(images)
    torch.testing.assert_close(seen[0], pretrained.renormalised(images), rtol=0, atol=0)


def test_a_trunk_file_of_timm_brings_the_statistics_that_timm_states(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    for name, statistics in (("test_vit", HALF), ("test_efficientnet", IMAGENET)):
        torch.save(timm.create_model(name).state_dict(), tmp_path / "timm.pt")
        network: Any = models.build(f"timm:{name}", 2)
        said = models.load_trunk_checkpoint(network, tmp_path / "timm.pt")
        assert near(network.expected(), statistics)
        assert ("images have mean 0.5 0.5 0.5 and standard deviation 0.5 0.5 0.5" in said) == (statistics is HALF)


def test_a_trunk_of_a_run_keeps_the_statistics_of_the_run(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    network: Any = models.build("timm:test_vit", 2)
    run: Any = models.build("timm:test_vit", 2)
    for statistics in (CLIP, IMAGENET):
        run.expect(statistics)
        torch.save({"model": run.state_dict()}, tmp_path / "best.pt")
        models.load_trunk_checkpoint(network, tmp_path / "best.pt")
        assert near(network.expected(), statistics)


@pytest.mark.usefixtures("hub_is_a_stub")
@pytest.mark.parametrize(("encoder", "statistics"), [("tu-test_convnext", HALF), ("resnet18", CLIP)])
def test_smp_networks_expect_what_is_stated_for_their_encoder(
    encoder: str, statistics: Statistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    safetensors = pytest.importorskip("safetensors.torch")
    scratch: Any = models.build("smp:FPN", 2, encoder_name=encoder, encoder_depth=4 if "convnext" in encoder else 5)
    assert scratch.expected() is IMAGENET
    safetensors.save_file(scratch.network.encoder.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"mean": CLIP.mean, "std": CLIP.std}))
    monkeypatch.setattr(smp.encoders, "hf_hub_download", lambda repo, filename, revision: str(tmp_path / filename))
    options = {"encoder_name": encoder, "encoder_depth": 4 if "convnext" in encoder else 5}
    network: Any = models.build_with_imagenet("smp:FPN", 2, **options)
    assert near(network.expected(), statistics)


def test_torchvisions_weights_expect_imagenets_statistics() -> None:
    models_of_torchvision = pytest.importorskip("torchvision.models")
    names = models_of_torchvision.list_models(module=models_of_torchvision.segmentation)
    for name in names:
        parameters = inspect.signature(models_of_torchvision.get_model_builder(name)).parameters
        transforms = type(parameters["weights_backbone"].default).DEFAULT.transforms()
        assert (tuple(transforms.mean), tuple(transforms.std)) == (IMAGENET_MEAN, IMAGENET_STD)
    assert len(names) >= 6


@pytest.mark.parametrize(
    "processor",
    [
        {"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        {"image_mean": list(CLIP.mean), "image_std": list(CLIP.std)},
        {"do_normalize": False},
        {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [63.0] * 3},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
        {"image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)},
    ],
)
def test_a_folder_of_transformers_gives_what_it_gives_with_its_own_processor(
    processor: dict[str, Any], tmp_path: Path
) -> None:
    write_segformer(tmp_path, **processor)
    transformers = pytest.importorskip("transformers")
    images = photos(64, 96)
    seen = transformers.AutoImageProcessor.from_pretrained(tmp_path)(list(images), return_tensors="pt")["pixel_values"]
    library = transformers.AutoModelForSemanticSegmentation.from_pretrained(tmp_path).eval()
    network: Any = models.build(f"transformers:{tmp_path}", 3).eval()
    with torch.no_grad():
        expected, found = library(seen).logits, network.network(network.renormalised(normalise(images))).logits
        wrong = network.network(normalise(images)).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=float(1e-4 * expected.std()))
    # The fault was of the size of the output's own spread.
    same = processor.get("image_mean") == list(IMAGENET_MEAN)
    assert (float((wrong - expected).abs().max() / expected.std()) < 1e-4) == same
    assert (network.renormalisation is None) == same


def test_a_backbone_of_transformers_sees_its_own_statistics(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=56)
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "dinov2")
    transformers.ViTImageProcessor().save_pretrained(tmp_path / "dinov2")
    network: Any = models.build(f"transformers:{tmp_path / 'dinov2'}", 2)
    assert near(network.expected(), HALF)


def test_folders_without_weights_or_without_a_processor_get_imagenets_statistics(tmp_path: Path) -> None:
    write_segformer(tmp_path / "plain")
    write_segformer(tmp_path / "bare", image_mean=[0.5] * 3, image_std=[0.5] * 3)
    (tmp_path / "bare/model.safetensors").unlink()
    for folder in ("plain", "bare"):
        network: Any = models.build(f"transformers:{tmp_path / folder}", 3)
        assert network.expected() is IMAGENET


def test_what_a_processor_asks_for_in_vain_is_said(tmp_path: Path) -> None:
    write_segformer(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "NoSuchProcessor"}))
    with pytest.warns(UserWarning, match="image processor in .* cannot be read, so the network sees ImageNet's"):
        models.build(f"transformers:{tmp_path}", 3)
    pytest.importorskip("transformers").MobileViTImageProcessor().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="asks for channels in the order blue, green, red"):
        network: Any = models.build(f"transformers:{tmp_path}", 3)
    assert near(network.expected(), UNCHANGED)


@pytest.mark.parametrize("kind", ["segmenter", "teacher"])
def test_files_of_whole_networks_state_their_statistics(kind: str, tmp_path: Path) -> None:
    def build() -> Any:
        return Segmenter(nn.Conv2d(3, 2, 1)) if kind == "segmenter" else models.build("timm:test_vit", 2)

    pytest.importorskip("timm")
    run, network = build(), build()
    for statistics, sentence in ((CLIP, "mean 0.481 0.458 0.408"), (IMAGENET, "mean 0.485 0.456 0.406")):
        run.expect(statistics)
        for wrapper in ("", "module."):
            state = {wrapper + key: value for key, value in run.state_dict().items()}
            torch.save({"model": state}, tmp_path / "best.pt")
            network.expect(HALF)
            assert f"; its images have {sentence}" in models.load_weights(network, tmp_path / "best.pt")
            assert near(network.expected(), statistics)
            assert all(torch.equal(value, run.state_dict()[key]) for key, value in network.state_dict().items())
    assert "images" not in models.load_weights(network, tmp_path / "best.pt")
    torch.save({**run.state_dict(), "renormalisation": torch.ones(3)}, tmp_path / "best.pt")
    with pytest.raises(ValueError, match=r"renormalisation in .* must have shape \(2, 3, 1, 1\), got \(3,\)"):
        models.load_weights(network, tmp_path / "best.pt")


@torch.no_grad()
def test_a_cache_of_a_trunk_tells_statistics_apart(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    network: Any = models.build("timm:test_vit", 2).eval()
    images = normalise(photos(64, 64))
    found = []
    for statistics in (IMAGENET, HALF, IMAGENET):
        network.expect(statistics)
        network.trunk_cache = None
        # The trunk runs on one image at a time in front of a cache.
        direct = torch.cat([network(image[None]) for image in images])
        network.trunk_cache = TrunkCache(network.trunk, tmp_path)
        torch.testing.assert_close(network(images), direct, rtol=0, atol=1e-5)
        found.append((network.trunk_cache.files.hits, network.trunk_cache.files.misses))
    assert found == [(0, 2), (0, 2), (2, 0)]
