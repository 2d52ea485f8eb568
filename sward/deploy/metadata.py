"""What an exported file says about itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from sward import __version__
from sward.config import TrainingConfig
from sward.data import IMAGENET_MEAN, IMAGENET_STD, DatasetInfo, evaluation_size
from sward.deploy.network import Input, Output
from sward.models.inputs import SIZE_MULTIPLE


@dataclass(frozen=True)
class Metadata:
    """Stored in the file, one JSON value per field: ONNX metadata `sward.FIELD`, or `sward.json` in a `.pt2`."""

    model: str
    """Name of the network (`sward.models.names()`)."""
    dataset: str
    """Name of the data set that it was trained on."""
    classes: tuple[str, ...]
    """Class names by index."""
    palette: tuple[tuple[int, int, int], ...]
    """Colours by class."""
    image_size: tuple[int, int] | None
    """Height and width at which it was evaluated: resize images to it. None: images keep their size."""
    image_range: tuple[float, float] | None = None
    """Values that become 0 and 255 in images with more than 8 bits per channel; None: such images are refused."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of the normalisation, for RGB of 0 to 1. Part of the graph unless `input` is `"normalised"`."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Standard deviation of the normalisation."""
    input: Input = "uint8"
    """What the images hold."""
    output: Output = "logits"
    """What the network returns."""
    fixed_size: tuple[int, int] | None = None
    """Height and width that the file is limited to; None: any size."""
    size_multiple: int = SIZE_MULTIPLE
    """The graph pads height and width to multiples of this, and crops the result."""
    precision: str = "fp32"
    """`"fp32"`, `"fp16"` or `"int8"`."""
    opset: int | None = None
    """ONNX operator set; None for a `.pt2`."""
    source: str = ""
    """Checkpoint that was exported."""
    version: str = __version__
    """Version of sward."""

    def to_strings(self) -> dict[str, str]:
        """Return one JSON text per field."""
        return {f"sward.{name}": json.dumps(value) for name, value in asdict(self).items()}

    @classmethod
    def from_strings(cls, stored: Mapping[str, str], path: Path) -> Metadata:
        """Inverse of `to_strings`; ignores entries that are not sward's.

        Raises:
            ValueError: if entries are missing; the message names `path`.
        """
        missing = [field.name for field in fields(cls) if f"sward.{field.name}" not in stored]
        if missing:
            raise ValueError(f"{path} must be written by 'sward export', got a file without sward.{missing[0]}")
        values = {field.name: json.loads(stored[f"sward.{field.name}"]) for field in fields(cls)}
        for name in ("classes", "image_size", "image_range", "mean", "std", "fixed_size"):
            values[name] = None if values[name] is None else tuple(values[name])
        values["palette"] = tuple(tuple(colour) for colour in values["palette"])
        return cls(**values)

    @classmethod
    def of_run(cls, config: TrainingConfig, info: DatasetInfo, weights: Path) -> Metadata:
        """Describe the network of a run with the weights of one of its checkpoints."""
        return cls(
            config.model,
            info.name,
            info.classes,
            info.palette,
            evaluation_size(config.dataset.name, config.dataset.image_size),
            config.dataset.image_range,
            source=str(weights.absolute()),
        )

    def info(self) -> DatasetInfo:
        """Return the classes and colours as a `DatasetInfo`."""
        return DatasetInfo(self.dataset, self.classes, self.palette)
