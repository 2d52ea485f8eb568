"""Smaller number formats for exported ONNX files: fp16, and int8 with static quantisation."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from sward import atomic
from sward.deploy.metadata import Metadata
from sward.deploy.predictor import as_input

Precision = Literal["fp32", "fp16", "int8"]
"""Format of weights and activations."""

CALIBRATION_IMAGES = 64
"""Training images that set the ranges of int8 activations."""

QUANTISED = ["Conv", "Gemm", "MatMul"]
"""ONNX operators that int8 changes: those with weights. The others stay fp32."""


def check_precision(precision: Precision, path: Path) -> None:
    """Raise ValueError for a smaller format in a file that is not ONNX."""
    if precision != "fp32" and path.suffix != ".onnx":
        raise ValueError(f"output must end in .onnx for {precision}, got {path}")


def convert(path: Path, metadata: Metadata, precision: Precision, images: Iterator[Tensor]) -> Metadata:
    """Convert an fp32 ONNX file in place.

    Args:
        path: file that `write_network` wrote.
        metadata: its metadata.
        precision: `"fp16"` or `"int8"`.
        images: for int8: uint8 `[3, H, W]` images like those that the network will see.

    Returns:
        The metadata that the file now holds.
    """
    metadata = replace(metadata, precision=precision)
    model = _to_fp16(path) if precision == "fp16" else _to_int8(path, metadata, images)
    del model.metadata_props[:]
    for key, value in metadata.to_strings().items():
        model.metadata_props.add(key=key, value=value)
    atomic.write(path, model.SerializeToString())
    return metadata


def _to_fp16(path: Path) -> Any:
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    # Input and output keep their types: users of the file notice nothing.
    return convert_float_to_float16(onnx.load(path), keep_io_types=True)


def _to_int8(path: Path, metadata: Metadata, images: Iterator[Tensor]) -> Any:
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, Any] | None:
            image = next(images, None)
            return None if image is None else {"images": as_input(image[None], metadata).numpy()}

    with tempfile.TemporaryDirectory() as folder:
        prepared, quantised = Path(folder) / "prepared.onnx", Path(folder) / "quantised.onnx"
        # Folds batch norms into convolutions. ONNX Runtime's symbolic shapes do not know the padding's floor division.
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            quantised,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            op_types_to_quantize=QUANTISED,
        )
        return onnx.load(quantised)
