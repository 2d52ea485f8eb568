"""Smaller number formats for exported ONNX files: fp16, and int8 with static quantisation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from sward import atomic
from sward.deploy.metadata import Metadata

Precision = Literal["fp32", "fp16", "int8"]
"""Format of weights and activations."""

CALIBRATION_IMAGES = 64
"""Training images that set the ranges of int8 activations."""

SAMPLED_IMAGES = 8
"""Calibration images on which single layers are judged."""


def check_precision(precision: Precision, path: Path) -> None:
    """Raise ValueError for a smaller format in a file that is not ONNX."""
    if precision != "fp32" and path.suffix != ".onnx":
        raise ValueError(f"output must end in .onnx for {precision}, got {path}")


def to_fp16(path: Path, metadata: Metadata) -> Metadata:
    """Convert an fp32 ONNX file in place and return the metadata that it now holds.

    Input and output keep their types: users of the file notice nothing.
    """
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = convert_float_to_float16(onnx.load(path), keep_io_types=True)
    return save(model, replace(metadata, precision="fp16"), path)


def save(model: Any, metadata: Metadata, path: Path) -> Metadata:
    """Write an ONNX model with this metadata and return the metadata."""
    del model.metadata_props[:]
    for key, value in metadata.to_strings().items():
        model.metadata_props.add(key=key, value=value)
    atomic.write(path, model.SerializeToString())
    return metadata
