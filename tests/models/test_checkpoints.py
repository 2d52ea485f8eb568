"""Trunk checkpoints in each accepted layout, written here with random weights, and every refusal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sward.models import build, load_trunk_checkpoint
from sward.models.heads import MultiLevelHead
from sward.models.teachers import DINOv2Trunk, HieraSpec, Teacher, hiera_trunk

pytest.importorskip("sam2")
timm = pytest.importorskip("timm")

SMALL = HieraSpec(16, 1, (1, 1, 2, 1), (3,))


def teacher(backend: str = "sam2", spec: HieraSpec = SMALL) -> Teacher:
    return Teacher(hiera_trunk(spec, backend), MultiLevelHead(spec.channels, 2, width=8))


@pytest.fixture(scope="module")
def source() -> Teacher:
    return teacher()


def official_state(model: Teacher) -> dict[str, Tensor]:
    """As in sam2.1_hiera_*.pt and MedSAM2_*.pt: the trunk among the neck, the memory and the mask decoder."""
    state = {f"image_encoder.trunk.{key}": value for key, value in model.trunk.state_dict().items()}
    others = ("image_encoder.neck.convs.0.conv.weight", "memory_attention.norm.weight", "sam_mask_decoder.x", "maskmem")
    return state | {key: torch.ones(2) for key in others}


def timm_state(model: Teacher) -> dict[str, Tensor]:
    state = {
        key.replace("mlp.layers.0", "mlp.fc1").replace("mlp.layers.1", "mlp.fc2"): value
        for key, value in model.trunk.state_dict().items()
    }
    return state | {"head.norm.weight": torch.ones(2)}


def assert_same_trunk(loaded: Teacher, source: Teacher) -> None:
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        for ours, theirs in zip(loaded.trunk(images), source.trunk(images), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", ["sam2", "timm"])
@pytest.mark.parametrize("layout", ["official", "official_unwrapped", "timm", "timm_features", "safetensors"])
def test_every_layout_loads_into_both_backends(source: Teacher, tmp_path: Path, layout: str, backend: str) -> None:
    path = tmp_path / "checkpoint.pt"
    if layout == "official":
        torch.save({"model": official_state(source)}, path)
    elif layout == "official_unwrapped":
        torch.save(official_state(source), path)
    elif layout == "timm":
        torch.save(timm_state(source), path)
    elif layout == "timm_features":
        torch.save({f"model.{key}": value for key, value in timm_state(source).items() if "head" not in key}, path)
    else:
        safetensors = pytest.importorskip("safetensors.torch")
        path = path.with_suffix(".safetensors")
        safetensors.save_file({key: value.contiguous() for key, value in timm_state(source).items()}, path)
    loaded = teacher(backend)
    head = {key: value.clone() for key, value in loaded.head.state_dict().items()}
    load_trunk_checkpoint(loaded, path)
    assert_same_trunk(loaded, source)
    assert all(torch.equal(value, head[key]) for key, value in loaded.head.state_dict().items())


def test_dinov2_layout(tmp_path: Path) -> None:
    def small_vit() -> Teacher:
        trunk = DINOv2Trunk(blocks=(0, 1, 2, 3))
        del trunk.vit.blocks[4:]
        return Teacher(trunk, MultiLevelHead((384,) * 4, 2, width=8))

    source, loaded = small_vit(), small_vit()
    path = tmp_path / "dinov2_vits14_pretrain.pth"
    torch.save(source.trunk.vit.state_dict() | {"mask_token": torch.zeros(1, 384)}, path)
    load_trunk_checkpoint(loaded, path)
    assert_same_trunk(loaded, source)


NAMES_OF_TIMM = {"timm:convnext_atto": {}, "timm:vit_tiny_patch16_224": {"depth": 4, "reg_tokens": 2}}


@pytest.mark.parametrize("prefix", ["", "module.", "image_encoder.trunk.", "module.image_encoder.trunk.", "backbone."])
@pytest.mark.parametrize("name", NAMES_OF_TIMM)
def test_trunks_of_timm_load_the_files_of_timm(name: str, prefix: str, tmp_path: Path) -> None:
    options = NAMES_OF_TIMM[name]
    whole = timm.create_model(name.removeprefix("timm:"), num_classes=7, **options)
    path = tmp_path / "timm.pt"
    torch.save({"state_dict": {prefix + key: value for key, value in whole.state_dict().items()}}, path)
    loaded = build(name, 2, **options)
    said = load_trunk_checkpoint(loaded, path)
    trunk = loaded.trunk.network.state_dict()
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in trunk.items())
    assert said.startswith(f"{len(trunk)} tensors from {path}")
    assert (f"prefix {prefix!r} stripped" in said) == bool(prefix)
    incomplete = {key: value for key, value in whole.state_dict().items() if "blocks.1.mlp.fc1.bias" not in key}
    torch.save(incomplete, path)
    with pytest.raises(ValueError, match=r"lacks \d+ of \d+ trunk tensors, among them '.*blocks.1.mlp.fc1.bias'"):
        load_trunk_checkpoint(loaded, path)


def refusal(model: nn.Module, content: object, path: Path) -> str:
    torch.save(content, path)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        load_trunk_checkpoint(model, path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_refuses_a_file_that_is_not_there(source: Teacher, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint at .*absent\.pt"):
        load_trunk_checkpoint(source, tmp_path / "absent.pt")


@pytest.mark.parametrize("name", ["notes.pt", "notes.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", b"\x80\x02\x95" + bytes(20)])
def test_refuses_a_file_that_is_no_checkpoint(source: Teacher, tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"is not a checkpoint that .* can read"):
        load_trunk_checkpoint(source, tmp_path / name)


def test_refuses_code_in_a_checkpoint(source: Teacher, tmp_path: Path) -> None:
    message = refusal(teacher(), {"model": SMALL}, tmp_path / "pickle.pt")
    assert "weights_only=True" in message


def test_refuses_a_file_without_tensors(tmp_path: Path) -> None:
    assert "holds no state dict" in refusal(teacher(), {"epoch": 3}, tmp_path / "epoch.pt")


def test_refuses_a_state_without_a_trunk(source: Teacher, tmp_path: Path) -> None:
    state = {key: value for key, value in official_state(source).items() if "trunk" not in key}
    assert "holds no trunk; expected 'image_encoder.trunk.pos_embed'" in refusal(teacher(), state, tmp_path / "x.pt")


def test_refuses_missing_tensors(source: Teacher, tmp_path: Path) -> None:
    state = official_state(source)
    del state["image_encoder.trunk.blocks.2.mlp.layers.1.bias"]
    message = refusal(teacher(), {"model": state}, tmp_path / "x.pt")
    assert "lacks 1 of" in message
    assert "'blocks.2.mlp.fc2.bias'" in message


def test_refuses_unknown_tensors(source: Teacher, tmp_path: Path) -> None:
    state = official_state(source) | {"image_encoder.trunk.blocks.9.norm1.bias": torch.ones(1)}
    assert "holds 1 tensors that the trunk lacks, among them 'blocks.9" in refusal(teacher(), state, tmp_path / "x.pt")


def test_refuses_other_shapes(source: Teacher, tmp_path: Path) -> None:
    wider = teacher(spec=HieraSpec(24, 1, (1, 1, 2, 1), (3,)))
    message = refusal(wider, official_state(source), tmp_path / "x.pt")
    assert "with shape [" in message
    assert "but the model's trunk has [" in message


def test_refuses_the_transformers_layout(tmp_path: Path) -> None:
    state = {"vision_encoder.backbone.pos_embed": torch.zeros(1), "mask_decoder.x": torch.zeros(1)}
    assert "layout of the transformers library" in refusal(teacher(), state, tmp_path / "model.pt")


def test_refuses_a_sam2_of_another_size_by_name(tmp_path: Path) -> None:
    """A small Hiera's file for a tiny teacher; only the names and the position table are needed to tell."""
    state = {f"image_encoder.trunk.blocks.{block}.norm1.bias": torch.zeros(1) for block in range(16)}
    state["image_encoder.trunk.pos_embed"] = torch.zeros(1, 96, 7, 7)
    message = refusal(build("medsam2_hiera_tiny_resunetpp", 2), {"model": state}, tmp_path / "x.pt")
    assert "holds a trunk of size 'small', but the model's trunk is 'tiny'" in message


def test_refuses_a_student() -> None:
    with pytest.raises(ValueError, match="model must be a teacher with a trunk, got UNeXt"):
        load_trunk_checkpoint(build("unext", 2), "anything.pt")
