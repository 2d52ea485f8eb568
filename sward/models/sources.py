"""Networks by the name of a library or of a function: `smp:Unet`, `timm:convnext_tiny`, `package.module:function`."""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sward.models import transformers_folder
from sward.models.heads import MultiLevelHead
from sward.models.inputs import IMAGENET, Statistics
from sward.models.libraries import library, quiet
from sward.models.segmenter import Segmenter
from sward.models.teachers import Teacher

FORMS = (
    "smp:Unet",
    "torchvision:lraspp_mobilenet_v3_large",
    "timm:convnext_tiny",
    "transformers:FOLDER",
    "package.module:function",
)
"""The forms of names besides the registered ones, by example."""


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
        with quiet("huggingface_hub"):
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
    smp: Any = library("smp", "segmentation_models_pytorch", "segmentation-models-pytorch")
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
    library("torchvision", "torchvision")
    from torchvision import models

    known = models.list_models(module=models.segmentation)
    if architecture not in known:
        raise ValueError(_unknown("torchvision", architecture, known))
    fixed = {"weights": None, "weights_backbone": "DEFAULT" if imagenet else None, "num_classes": num_classes}
    # All of torchvision's backbones for segmentation expect ImageNet's statistics.
    return Segmenter(_call(f"torchvision:{architecture}", models.get_model_builder(architecture), fixed, options))


def _timm(architecture: str, num_classes: int, options: Mapping[str, Any], imagenet: bool) -> Teacher:
    timm: Any = library("timm", "timm")
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


def own_weights(name: str, num_classes: int) -> Literal["none", "trunk", "all"]:
    """Return which weights the network `name` brings along: those of a `transformers:` folder, with or without a head.

    A classifier for another number of classes is replaced by a random one, so it does not count. That a folder has no
    weights of a head is known once the network was built.
    """
    source, _, place = name.partition(":")
    return transformers_folder.own_weights(place, num_classes) if source == "transformers" else "none"


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
    "transformers": transformers_folder.build,
}
