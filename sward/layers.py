"""List the layers of any network that can be distilled, and choose the ones that are used by default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sward.features import evaluating, own_prefix_tokens, version_of
from sward.tensor_layouts import Layout, layouts, logits_of, resolve, without_doubt

ENCODER_NAMES = ("levels", "trunk", "encoder", "backbone", "features")
"""Names under which networks keep the part that is distilled; the first that exists counts."""


@dataclass(frozen=True)
class Layer:
    """A layer that returns one map, or tokens that form a map."""

    name: str
    """Module path as in `named_modules()`."""
    kind: str
    """Its class."""
    format: str
    """`"nchw"`, `"nhwc"` or `"tokens"`."""
    channels: int
    grid: tuple[int, int]
    """Height and width of the map."""
    stride: int
    """Pixels of the image per cell of the map, rounded."""
    parameters: int
    """Number of its parameters."""


@dataclass(frozen=True)
class LayerChoice:
    """The layers of a network that methods tap by default."""

    stages: tuple[str, ...]
    """Layers for MWAD, highest resolution first."""
    deepest: str
    """The layer of the deepest encoder map."""
    penultimate: str
    """The layer whose output is the input of the classifier; the deepest one if there is none."""


def survey(network: nn.Module, image_size: tuple[int, int]) -> list[Layer]:
    """List the layers that return a map or tokens, in the order in which they finish.

    Runs the network on one blank image of `image_size`, and on one of twice that size if it accepts it.

    Raises:
        ValueError: if the network does not run on such an image.
    """
    return _survey(network, image_size)[0]


def choose(network: nn.Module, image_size: tuple[int, int], *, num_classes: int | None = None) -> LayerChoice:
    """Choose layers to distil: the last of each stride of the encoder, or four evenly spaced blocks of a plain ViT.

    The encoder is the part under a name of `ENCODER_NAMES`, or else what runs before the resolution rises again. Of
    more than four strides, the four deepest are taken.

    Args:
        network: any network of images.
        image_size: height and width of an image that it accepts.
        num_classes: K, with which the classifier and what returns its logits are left out, unless there is nothing
            else; None where the network has no classifier.

    Raises:
        ValueError: if the network does not run on an image of that size, or has no layer that returns a map.
    """
    layers, penultimate = _survey(network, image_size)
    layers = _without_wrappers(layers)
    inside = _encoder(_before_the_logits(layers, penultimate, num_classes) or layers)
    if not inside:
        raise ValueError(f"student and teacher must have layers that return maps, got {type(network).__name__}")
    last = {layer.stride: layer for layer in inside}
    stages = [last[stride] for stride in sorted(last)][-4:]
    if len(stages) == 1 or _is_plain_transformer(inside):
        stages = _evenly_spaced(inside) or stages
    names = tuple(layer.name for layer in stages)
    return LayerChoice(names, names[-1], penultimate or names[-1])


def _without_wrappers(layers: list[Layer]) -> list[Layer]:
    """Leave out modules that hold every other layer, such as a network behind a normalisation of its own."""
    outermost = min(layers, key=lambda layer: layer.name.count("."), default=None)
    if outermost is None:
        return layers
    others = [layer for layer in layers if layer is not outermost]
    if others and all(layer.name.startswith(f"{outermost.name}.") for layer in others):
        return _without_wrappers(others)
    return layers


def _before_the_logits(layers: list[Layer], penultimate: str | None, num_classes: int | None) -> list[Layer]:
    if num_classes is None:
        return layers
    names = [layer.name for layer in layers]
    widths = (1, 2) if num_classes == 2 else (num_classes,)
    if penultimate not in names:
        # A head that reads a view of the tokens says nothing of where they come from.
        while layers and layers[-1].channels in widths:
            layers = layers[:-1]
        return layers
    after = names.index(penultimate)
    return [layer for place, layer in enumerate(layers) if place <= after or layer.channels not in widths]


def default_layers(
    name: str, network: nn.Module, image_size: tuple[int, int], *, num_classes: int | None = None
) -> LayerChoice:
    """Return the layers of a network that methods tap: those of its description, or chosen if it has none."""
    from sward import models  # Imported here: the libraries of networks are not needed to distil.

    if name not in models.names():
        return choose(network, image_size, num_classes=num_classes)
    description = models.describe(name)
    stages = tuple(stage.layer for stage in description.stages)
    return LayerChoice(stages, description.feature_layer, description.penultimate_layer)


def paired(
    student: tuple[str, ...], teacher: tuple[str, ...], *, student_named: bool = False, teacher_named: bool = False
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the deepest stages of both networks, as many as the one with fewer stages has.

    Stages that the user has named all stay, so those of the other network are as many.

    Raises:
        ValueError: if the other network has too few stages of its own choice.
    """
    if student_named and teacher_named:
        return student, teacher
    count = len(student) if student_named else len(teacher) if teacher_named else min(len(student), len(teacher))
    for side, stages in (("student", student), ("teacher", teacher)):
        if len(stages) < count:
            raise ValueError(
                f"{side}_layers must be named too, {count} as for the other network, got none; the {side} has "
                f"{len(stages)} stages of its own: {' '.join(stages)}"
            )
    return student[-count:], teacher[-count:]


def _encoder(layers: list[Layer]) -> list[Layer]:
    # Global pooling has no stride, and dropout may pass attention matrices that look like maps.
    layers = [layer for layer in layers if layer.grid != (1, 1) and "Drop" not in layer.kind] or layers
    strides = {layer.name: layer.stride for layer in layers}
    inside: dict[str, set[int]] = {layer.name: set() for layer in layers}
    for layer in layers:
        for name in _around(layer.name):
            inside.setdefault(name, set()).add(layer.stride)

    def at_a_stage(layer: Layer) -> bool:
        """Return False for a part of a stage of another stride, such as the first convolution of the next stage.

        A layer that holds more than two strides is not a stage but holds the stages.
        """
        around = [name for name in _around(layer.name) if name in strides and len(inside[name]) <= 2]
        return all(strides[name] == layer.stride for name in around)

    maps = [layer for layer in layers if at_a_stage(layer)]
    for name in ENCODER_NAMES:
        within = [layer for layer in maps if name in layer.name.split(".")[:-1][:3]]
        if len(within) > 1:
            return within
    deepest, found = 0, []
    for layer in maps:
        if layer.stride < deepest:
            break
        deepest = layer.stride
        found.append(layer)
    return found


def _around(name: str) -> list[str]:
    """Return the paths of the modules that hold the layer `name`."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def _is_plain_transformer(layers: list[Layer]) -> bool:
    blocks = [layer for layer in layers if layer.format == "tokens"]
    return len({layer.stride for layer in blocks}) == 1 and 2 * len(blocks) > len(layers)


def _evenly_spaced(layers: list[Layer]) -> list[Layer]:
    families: dict[tuple[str, int, int], list[Layer]] = {}
    for layer in layers:
        parent, _, index = layer.name.rpartition(".")
        if index.isdigit():
            families.setdefault((parent, layer.stride, layer.channels), []).append(layer)
    blocks = max(families.values(), key=len, default=[])
    if len(blocks) < 4:
        return blocks
    return [blocks[round(len(blocks) * quarter / 4) - 1] for quarter in (1, 2, 3, 4)]


def _survey(network: nn.Module, size: tuple[int, int]) -> tuple[list[Layer], str | None]:
    outputs, penultimate = _outputs(network, size)
    double = (2 * size[0], 2 * size[1])
    try:
        larger, _ = _outputs(network, double)
    except ValueError:
        larger = {}
    modules = dict(network.named_modules())
    found = []
    for name, output in outputs.items():
        layout = _layout(network, name, output, size, larger.get(name), double)
        if layout is not None:
            module = modules[name]
            found.append(
                Layer(
                    name=name,
                    kind=type(module).__name__,
                    format=layout.format,
                    channels=layout.to_map(output).shape[1],
                    grid=layout.grid,
                    stride=max(1, round(size[0] / layout.grid[0])),
                    parameters=sum(parameter.numel() for parameter in module.parameters()),
                )
            )
    return found, penultimate


def _layout(
    network: nn.Module,
    name: str,
    output: Tensor,
    size: tuple[int, int],
    larger: Tensor | None,
    double: tuple[int, int],
) -> Layout | None:
    if output.dim() not in (3, 4) or not output.is_floating_point():
        return None
    images, second = (1, 3, *size), (1, 3, *double)
    own = own_prefix_tokens(network, name) if output.dim() == 3 else None
    prefix_tokens = "auto" if own is None else own
    only = without_doubt(layouts(output, images, prefix_tokens=prefix_tokens), images)  # type: ignore[arg-type]
    if only is not None:
        return only
    ways = resolve(output, images, None if larger is None else (larger, second), prefix_tokens=prefix_tokens)  # type: ignore[arg-type]
    return ways[0] if len(ways) == 1 else None


def _outputs(network: nn.Module, size: tuple[int, int]) -> tuple[dict[str, Tensor], str | None]:
    """Return each layer's output without its data, in the order in which they finish, and the penultimate layer."""
    outputs: dict[str, Tensor] = {}
    makers: dict[int, str] = {}
    alive: list[tuple[str, Tensor, int | None]] = []
    classifier_inputs: list[tuple[str | None, int]] = []

    def before(module: nn.Module, arguments: Any) -> None:
        if isinstance(module, (nn.Conv2d, nn.Linear)) and arguments and isinstance(arguments[0], Tensor):
            width = module.out_channels if isinstance(module, nn.Conv2d) else module.out_features
            # Looked up now: a temporary is freed, and a later output may get its id.
            classifier_inputs.append((makers.get(id(arguments[0])), width))

    def after(name: str) -> Any:
        def keep(module: nn.Module, arguments: Any, output: Any) -> None:
            if isinstance(output, (tuple, list)) and len(output) == 1:
                (output,) = output
            if isinstance(output, Tensor):
                outputs.pop(name, None)
                outputs[name] = torch.empty_like(output, device="meta")
                makers[id(output)] = name
                alive.append((name, output, version_of(output)))  # An id is unique only while the tensor lives.

        return keep

    handles = []
    for name, module in network.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(before))
            handles.append(module.register_forward_hook(after(name)))
    parameter = next(network.parameters())
    try:
        with evaluating(network), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            logits = network(parameter.new_zeros(1, 3, *size))
    except Exception as error:
        raise ValueError(
            f"image_size must be a size that {type(network).__name__} accepts, got {size[0]}x{size[1]}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    classes = _classes(logits)
    for name, output, version in alive:
        if version_of(output) != version:
            outputs.pop(name, None)  # The layer behind it works in place: taps refuse such a map.
    fed = [source for source, width in classifier_inputs if width == classes]
    return outputs, fed[-1] if fed else None


def _classes(output: Any) -> int | None:
    try:
        return logits_of(output, "network").shape[1]
    except ValueError:
        return None
