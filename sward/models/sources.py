"""Networks by the name of a library or of a function: `smp:Unet`, `timm:convnext_tiny`, `package.module:function`."""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sward.alignment import resize
from sward.models.heads import MultiLevelHead
from sward.models.inputs import IMAGENET, Renormalising, Statistics
from sward.models.teachers import Teacher
from sward.tensor_layouts import logits_of

FORMS = (
    "smp:Unet",
    "torchvision:lraspp_mobilenet_v3_large",
    "timm:convnext_tiny",
    "transformers:FOLDER",
    "package.module:function",
)
"""The forms of names besides the registered ones, by example."""


class Segmenter(Renormalising):
    """Any segmentation network as the trainer wants it: images to logits at the resolution of the images.

    The images have ImageNet's statistics; the network gets those that its weights expect, see `Renormalising`.

    Args:
        network: returns logits of any size: a tensor, a tuple whose first item they are, or a dictionary that holds
            them under `out` or `logits`. It stays reachable as `network`, which is the prefix of its layers.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return resize(
            logits_of(self.network(self.renormalised(images)), "network"), (images.shape[-2], images.shape[-1])
        )


class TimmTrunk(nn.Module):
    """A timm backbone that returns four maps: of its last four stages, or of four evenly spaced blocks of a plain ViT.

    Args:
        network: from `timm.create_model`.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        info: Any = network.feature_info
        strides = [each["reduction"] for each in info]
        count = len(strides)
        if count < 4:
            raise ValueError(f"a timm backbone must have at least four stages or blocks, got {count}")
        if len(set(strides)) == 1:
            self.indices = [round(count * quarter / 4) - 1 for quarter in (1, 2, 3, 4)]
        else:
            self.indices = list(range(count - 4, count))
        self.channels: tuple[int, ...] = tuple(info[index]["num_chs"] for index in self.indices)

    def stated_statistics(self) -> Statistics:
        """Return the statistics that timm states for the pretrained weights of the network."""
        network: Any = self.network
        stated = network.pretrained_cfg or {}
        return Statistics(tuple(stated.get("mean", IMAGENET.mean)), tuple(stated.get("std", IMAGENET.std)))

    def forward(self, images: Tensor) -> list[Tensor]:
        network: Any = self.network
        return network.forward_intermediates(images, indices=self.indices, output_fmt="NCHW", intermediates_only=True)


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


def build(name: str, num_classes: int, options: Mapping[str, Any], *, imagenet: bool = False) -> nn.Module:
    """Build the network `SOURCE:NAME`.

    Args:
        name: see `FORMS`. A backbone without a head gets a `MultiLevelHead`.
        num_classes: K.
        options: keyword arguments of the library's function. Strings are converted to the type that it declares.
        imagenet: give the encoder the library's ImageNet weights, from its cache or hub; the others are random.

    Returns:
        A network that takes images with ImageNet's statistics. Where its source states others for its pretrained
        weights, it renormalises the images itself.

    Raises:
        ValueError: if there is no such network or option, or it does not build; the message lists near matches.
        ModuleNotFoundError: if the library is not installed.
    """
    source, _, rest = name.partition(":")
    builder = _BUILDERS.get(source)
    if imagenet:
        if source not in ("smp", "torchvision", "timm"):
            raise ValueError(f"ImageNet weights must be for smp:, torchvision: or timm: models, got {name!r}")
        return _with_imagenet(name, num_classes, options)
    return _function(name, num_classes, options) if builder is None else builder(rest, num_classes, options, False)


def _with_imagenet(name: str, num_classes: int, options: Mapping[str, Any]) -> nn.Module:
    source, _, rest = name.partition(":")
    build(name, num_classes, options)  # So that any error below concerns the weights.
    try:
        # The hub's client announces every retry.
        with _quiet("huggingface_hub"):
            return _BUILDERS[source](rest, num_classes, options, True)
    except Exception as error:
        # Hubs, mirrors and caches raise errors of every kind.
        raise ValueError(
            f"the ImageNet weights of {name!r} must be in a cache or on a hub that can be reached, got "
            f"{type(error).__name__}; they are looked for {_imagenet_place(source, rest, options)}"
        ) from error


def _imagenet_place(source: str, architecture: str, options: Mapping[str, Any]) -> str:
    """Say where the ImageNet weights of a network lie: a file of torch's hub, or a repository of Hugging Face's."""
    repository, address = None, None
    encoder = architecture if source == "timm" else ""
    if source == "smp":
        import segmentation_models_pytorch as smp

        builder: Any = getattr(smp, architecture)
        encoder = options.get("encoder_name", inspect.signature(builder).parameters["encoder_name"].default)
        stated: Any = smp.encoders.encoders.get(encoder, {}).get("pretrained_settings", {}).get("imagenet", {})
        repository, address = stated.get("repo_id"), stated.get("url")
        if repository is not None and "revision" in stated:
            repository += f"/snapshots/{stated['revision']}"
    if source == "timm" or encoder.startswith("tu-"):
        import timm

        settings: Any = timm.get_pretrained_cfg(encoder.removeprefix("tu-"))
        repository, address = getattr(settings, "hf_hub_id", None), getattr(settings, "url", None)
        if repository == "timm/":
            repository += f"{settings.architecture}.{settings.tag}"
    elif source == "torchvision":
        from torchvision import models

        backbone = inspect.signature(models.get_model_builder(architecture)).parameters["weights_backbone"].default
        address = type(backbone).DEFAULT.url
    if repository is not None:
        cache = Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME", "~/.cache/huggingface")) / "hub")
        return f"in {cache.expanduser() / ('models--' + repository.replace('/', '--', 1))} and on huggingface.co"
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    return f"at {folder if address is None else folder / address.rpartition('/')[2]} and on the internet"


def typed_options(name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the values of options to the types of the parameters of `function`, by annotation or default.

    Raises:
        ValueError: for an option that `function` does not have, or a value of another type.
    """
    parameters = inspect.signature(function).parameters
    anything = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    known = [
        key
        for key, each in parameters.items()
        if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL, each.POSITIONAL_ONLY)
    ]
    converted = {}
    for key, value in options.items():
        # A function that takes any option passes it on or ignores it; one letter off a name of its own is a mistake.
        if key not in known and (not anything or difflib.get_close_matches(key, known, n=1, cutoff=0.9)):
            raise ValueError(f"model {name!r} has no option {key!r}; its options are {', '.join(known)}")
        converted[key] = _typed(name, key, value, parameters.get(key))
    return converted


def _typed(name: str, key: str, value: Any, parameter: inspect.Parameter | None) -> Any:
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            value = {"true": True, "false": False, "none": None}.get(value.lower(), value)
    wanted: Any = None if parameter is None else parameter.annotation
    if wanted in ("int", "float", "bool", "str"):
        wanted = {"int": int, "float": float, "bool": bool, "str": str}[wanted]
    if wanted not in (int, float, bool, str) and parameter is not None:
        wanted = type(parameter.default)
    if wanted is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    checked = wanted in (int, float, bool, str) and value is not None
    if checked and (not isinstance(value, wanted) or (wanted is int and isinstance(value, bool))):
        raise ValueError(f"option {key!r} of model {name!r} must be of type {wanted.__name__}, got {value!r}")
    return value


def _smp(architecture: str, num_classes: int, options: Mapping[str, Any], imagenet: bool) -> nn.Module:
    smp: Any = _library("smp", "segmentation_models_pytorch", "segmentation-models-pytorch")
    known = [each.__name__ for each in _subclasses(smp.base.SegmentationModel)]
    if architecture not in known:
        raise ValueError(_unknown("smp", architecture, known))
    function = getattr(smp, architecture)
    fixed = {"encoder_weights": "imagenet" if imagenet else None, "classes": num_classes}
    network = Segmenter(_call(f"smp:{architecture}", function, fixed, options))
    if imagenet:
        of_timm = getattr(getattr(network.network.encoder, "model", None), "pretrained_cfg", None)
        encoder = options.get("encoder_name", inspect.signature(function).parameters["encoder_name"].default)
        stated = of_timm or smp.encoders.get_preprocessing_params(encoder, "imagenet")
        network.expect(Statistics(tuple(stated["mean"]), tuple(stated["std"])))
    return network


def _torchvision(architecture: str, num_classes: int, options: Mapping[str, Any], imagenet: bool) -> nn.Module:
    _library("torchvision", "torchvision")
    from torchvision import models

    known = models.list_models(module=models.segmentation)
    if architecture not in known:
        raise ValueError(_unknown("torchvision", architecture, known))
    fixed = {"weights": None, "weights_backbone": "DEFAULT" if imagenet else None, "num_classes": num_classes}
    # All of torchvision's backbones for segmentation expect ImageNet's statistics.
    return Segmenter(_call(f"torchvision:{architecture}", models.get_model_builder(architecture), fixed, options))


def _timm(architecture: str, num_classes: int, options: Mapping[str, Any], imagenet: bool) -> Teacher:
    timm: Any = _library("timm", "timm")
    if not timm.is_model(architecture):
        raise ValueError(_unknown("timm", architecture, timm.list_models()))
    given = typed_options(f"timm:{architecture}", timm.create_model, options)
    problem: Exception | None = None
    # Any image size where the network allows it: plain ViTs take the first option, Swin the second pair.
    for flexible in ({"dynamic_img_size": True}, {"strict_img_size": False, "dynamic_mask": True}, {}):
        try:
            network = timm.create_model(architecture, pretrained=imagenet, num_classes=0, **{**flexible, **given})
            break
        except (TypeError, RuntimeError, AssertionError, ValueError) as error:
            problem = error
    else:
        raise ValueError(f"model 'timm:{architecture}' must accept its options, got {dict(given)}: {problem}")
    trunk = TimmTrunk(network)
    teacher = Teacher(trunk, MultiLevelHead(trunk.channels, num_classes, width=min(128, trunk.channels[-1])))
    if imagenet or given.get("checkpoint_path"):
        teacher.expect(trunk.stated_statistics())
    return teacher


def _transformers(place: str, num_classes: int, options: Mapping[str, Any], imagenet: bool) -> nn.Module:
    transformers: Any = _library("transformers", "transformers")
    folder = _folder(place)
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, **options)
    local: dict[str, Any] = {"config": config, "local_files_only": True}
    if _is_segmentation(config):
        config.num_labels = num_classes
        kind = transformers.AutoModelForSemanticSegmentation
        if not _has_weights(folder):
            return Segmenter(kind.from_config(config))
        with _quiet("transformers"):
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
    with _quiet("transformers"):
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
    transformers: Any = _library("transformers", "transformers")
    if not any((Path(folder) / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        return
    try:
        with _quiet("transformers"):
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


def own_weights(name: str, num_classes: int) -> Literal["none", "trunk", "all"]:
    """Return which weights the network `name` brings along: those of a `transformers:` folder, with or without a head.

    A classifier for another number of classes is replaced by a random one, so it does not count. That a folder has no
    weights of a head is known once the network was built.
    """
    source, _, place = name.partition(":")
    if source != "transformers" or not _has_weights(_folder(place)):
        return "none"
    transformers: Any = _library("transformers", "transformers")
    folder = _folder(place)
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    whole = _is_segmentation(config) and config.num_labels == num_classes and folder not in _HEADLESS
    return "all" if whole else "trunk"


@contextmanager
def _quiet(library: str) -> Iterator[None]:
    """Keep the reports and warnings of a library's loader out of the output."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _function(name: str, num_classes: int, options: Mapping[str, Any]) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), attribute]):
        raise ValueError(f"model {name!r} must be written as 'package.module:function', got no such names")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        # The console script does not look into the current folder, where a user's module lies.
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and module_name.split(".")[0] == error.name.split(".")[0]:
            raise ValueError(
                f"model {name!r} must name a library ({', '.join(_BUILDERS)}) or a Python module that can be imported "
                f"from {Path.cwd()}, got {module_name!r}"
            ) from error
        raise
    function = getattr(module, attribute, None)
    if not callable(function):
        near = difflib.get_close_matches(attribute, dir(module), n=3, cutoff=0.4)
        raise ValueError(
            f"model {name!r} must name a function or class of {module_name}, got {attribute!r}; did you mean {near}?"
        )
    parameters = inspect.signature(function).parameters
    anything = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    fixed = {"num_classes": num_classes} if anything or "num_classes" in parameters else {}
    network = _call(name, function, fixed, options)
    if not isinstance(network, nn.Module):
        raise ValueError(f"model {name!r} must return an nn.Module, got {type(network).__name__}")
    return network if isinstance(network, Teacher) else Segmenter(network)


def _call(name: str, function: Callable[..., Any], fixed: dict[str, Any], options: Mapping[str, Any]) -> Any:
    for key in options:
        if key in fixed:
            raise ValueError(f"option {key!r} of model {name!r} must be left to sward, got {options[key]!r}")
    given = typed_options(name, function, options)
    try:
        return function(**fixed, **given)
    except (TypeError, KeyError, ValueError, AssertionError) as error:
        raise ValueError(f"model {name!r} must accept its options, got {given}: {error}") from error


def _library(source: str, module: str, package: str | None = None) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"models '{source}:...' need the package {package or module}; install it with 'pip install "
            f"{package or module}'"
        ) from error


def _unknown(source: str, name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or sorted(known)[:6]
    return f"unknown model '{source}:{name}'; did you mean {' or '.join(f'{source}:{each}' for each in near)}?"


def _subclasses(kind: type) -> list[type]:
    direct: list[type] = kind.__subclasses__()
    return [each for one in direct for each in (one, *_subclasses(one))]


_BUILDERS: dict[str, Callable[[str, int, Mapping[str, Any], bool], nn.Module]] = {
    "smp": _smp,
    "torchvision": _torchvision,
    "timm": _timm,
    "transformers": _transformers,
}
