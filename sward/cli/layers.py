"""`sward layers`: the layers of a network that can be distilled."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import tyro

from sward import layers, models
from sward.cli import printing


@dataclasses.dataclass
class Layers:
    """List every layer that returns a map or tokens, and mark those that are distilled by default."""

    model: Annotated[str, tyro.conf.Positional]
    """A registered network, or a name such as smp:Unet, timm:convnext_tiny or package.module:function."""
    image_size: tuple[int, int] = (256, 256)
    """Height and width of the images."""
    num_classes: int = 2
    """Classes of the network's head."""
    options: tuple[str, ...] = ()
    """Options of its builder, as KEY=VALUE."""
    json: bool = False
    """Print JSON instead of a table."""


def show(settings: Layers) -> None:
    """Print the layers of a network.

    Raises:
        ValueError: if there is no such network or it does not run at that size.
    """
    options = {}
    for word in settings.options:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"options must be KEY=VALUE, got {word!r}")
        options[key] = value
    network = models.build(settings.model, settings.num_classes, **options)
    found = layers.survey(network, settings.image_size)
    chosen = layers.default_layers(
        settings.model, network, settings.image_size, num_classes=settings.num_classes
    ).stages
    if settings.json:
        rows = [{**dataclasses.asdict(layer), "default": layer.name in chosen} for layer in found]
        print(json.dumps(rows, indent=2))
        return
    printing.print_table(
        f"{settings.model} at {settings.image_size[0]}x{settings.image_size[1]}; * is distilled by default",
        ("layer", "class", "output", "stride", "channels", "grid", "parameters"),
        [
            (
                f"{'* ' if layer.name in chosen else '  '}{layer.name}",
                layer.kind,
                layer.format,
                str(layer.stride),
                str(layer.channels),
                f"{layer.grid[0]}x{layer.grid[1]}",
                f"{layer.parameters:,}",
            )
            for layer in found
        ],
    )
