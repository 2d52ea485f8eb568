"""Networks from a local folder of the transformers library: `transformers:FOLDER`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from sward.models.heads import MultiLevelHead
from sward.models.inputs import Renormalising, Statistics
from sward.models.libraries import library, quiet
from sward.models.segmenter import Segmenter
from sward.models.teachers import Teacher


class BackboneTrunk(nn.Module):
    """A backbone of the transformers library that returns four maps.

    Args:
        network: a backbone of the transformers library with four output stages.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        channels: Any = network.channels
        self.channels: tuple[int, ...] = tuple(channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        return list(self.network(images).feature_maps)


def build(place: str, num_classes: int, options: Mapping[str, Any], imagenet: bool) -> nn.Module:
    transformers: Any = library("transformers", "transformers")
    folder = _folder(place)
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, **options)
    local: dict[str, Any] = {"config": config, "local_files_only": True}
    if _is_segmentation(config):
        config.num_labels = num_classes
        kind = transformers.AutoModelForSemanticSegmentation
        if not _has_weights(folder):
            return Segmenter(kind.from_config(config))
        with quiet("transformers"):
            loaded, found = kind.from_pretrained(
                folder, ignore_mismatched_sizes=True, output_loading_info=True, **local
            )
        _check_complete(folder, loaded, found)
        segmenter = Segmenter(loaded)
        _expect_those_of(folder, segmenter)
        return segmenter
    stages = list(getattr(config, "stage_names", []))[1:]
    if len(stages) < 4:
        raise ValueError(f"transformers:{place} must have at least four stages, got {len(stages)}")
    config.out_features = [stages[round(len(stages) * quarter / 4) - 1] for quarter in (1, 2, 3, 4)]
    # Not AutoBackbone: its from_pretrained asks the hub about local folders too.
    kinds = transformers.models.auto.modeling_auto.MODEL_FOR_BACKBONE_MAPPING
    if type(config) not in kinds:
        raise ValueError(f"transformers:{place} must be a backbone or segment, got {type(config).__name__}")
    kind = kinds[type(config)]
    with quiet("transformers"):
        if _has_weights(folder):
            backbone, found = kind.from_pretrained(folder, output_loading_info=True, **local)
            _check_complete(folder, backbone, found)
        else:
            backbone = kind(config)
    trunk = BackboneTrunk(backbone)
    teacher = Teacher(trunk, MultiLevelHead(trunk.channels, num_classes, width=min(128, trunk.channels[-1])))
    if _has_weights(folder):
        _expect_those_of(folder, teacher)
    return teacher


_HEADLESS: set[str] = set()
"""Folders that were found to hold an encoder alone."""


def _check_complete(folder: str, network: Any, found: Mapping[str, Any]) -> None:
    """Refuse a folder without the weights of the encoder, and say so where it has none of the head.

    `found` is what `from_pretrained` says of its loading, which it only logs. Norms of a backbone's outputs are not in
    files of the whole network, and begin as identities.
    """
    replaced = {key[0] if isinstance(key, tuple) else key for key in found["mismatched_keys"]}
    missing = [
        key for key in found["missing_keys"] if key not in replaced and not key.startswith("hidden_states_norms")
    ]
    prefix = f"{network.base_model_prefix}."
    whole = hasattr(network, network.base_model_prefix)
    encoder = [key for key in missing if key.startswith(prefix) or not whole]
    if encoder:
        raise ValueError(
            f"{folder} must hold the weights of the whole encoder of {type(network).__name__}, got a file without "
            f"{len(encoder)} of them, such as {encoder[0]}; its names may have another prefix"
        )
    if missing:
        _HEADLESS.add(folder)
        warnings.warn(
            f"{folder} holds no weights of the head of {type(network).__name__}: {len(missing)}, such as {missing[0]}, "
            "start at random",
            stacklevel=5,
        )
    else:
        _HEADLESS.discard(folder)


def _expect_those_of(folder: str, network: Renormalising) -> None:
    """Let a network expect the statistics of the image processor in the folder of its weights, if there is one."""
    transformers: Any = library("transformers", "transformers")
    if not any((Path(folder) / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        return
    try:
        with quiet("transformers"):
            # Missing entries mean what the processor's class says.
            processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        network.expect(_statistics(processor))
    except Exception as error:  # each kind of processor raises errors of its own
        reason = " ".join(str(error).split())
        warnings.warn(
            f"the image processor in {folder} cannot be read, so the network sees ImageNet's statistics: {reason}",
            stacklevel=4,
        )
        return
    if getattr(processor, "do_flip_channel_order", None):
        warnings.warn(
            f"the image processor in {folder} asks for channels in the order blue, green, red; the network sees them "
            "as red, green, blue",
            stacklevel=4,
        )


def _statistics(processor: Any) -> Statistics:
    factor = 255 * (processor.rescale_factor if getattr(processor, "do_rescale", True) else 1)
    stated = (processor.image_mean, processor.image_std) if getattr(processor, "do_normalize", None) else (0.0, 1.0)
    mean, std = ((each,) * 3 if isinstance(each, int | float) else each for each in stated)
    return Statistics(tuple(each / factor for each in mean), tuple(each / factor for each in std))


def _folder(place: str) -> str:
    path = Path(place)
    folder = path.parent if path.is_file() else path
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"there is no config.json in {folder.absolute()}; name a local folder or its config")
    return str(folder.absolute())


def _has_weights(folder: str) -> bool:
    return any(any(Path(folder).glob(pattern)) for pattern in ("*.safetensors", "pytorch_model*.bin"))


def _is_segmentation(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING

    return type(config) in MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING


def own_weights(place: str, num_classes: int) -> Literal["none", "trunk", "all"]:
    """Return which weights a folder brings along: none, those of the encoder, or those of the head too."""
    folder = _folder(place)
    if not _has_weights(folder):
        return "none"
    transformers: Any = library("transformers", "transformers")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    whole = _is_segmentation(config) and config.num_labels == num_classes and folder not in _HEADLESS
    return "all" if whole else "trunk"
