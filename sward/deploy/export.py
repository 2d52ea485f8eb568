"""Write a trained network as ONNX or as a `torch.export` program (`.pt2`)."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.fx.experimental._config as symbolic_shapes
from torch import nn

from sward import atomic, models
from sward.deploy.metadata import Metadata
from sward.deploy.network import DeployedNetwork
from sward.models.inputs import SIZE_MULTIPLE

OPSET = 18
"""ONNX operator set of exported files."""

SUFFIXES = (".onnx", ".pt2")


def write_network(network: nn.Module, metadata: Metadata, path: Path) -> Metadata:
    """Write `network` to `path`; the suffix selects the format, and `metadata` the input, output and size.

    Args:
        network: a network of `sward.models`, on the CPU. Only its forward pass is written.
        metadata: what the file says about itself.
        path: ends in `.onnx` or `.pt2`.

    Returns:
        The metadata that the file holds.

    Raises:
        ValueError: if the suffix is another one, or the network cannot be exported, as teachers cannot with free height
            and width.
        ModuleNotFoundError: if `onnx` or `onnxscript` is not installed.
    """
    check_path(path)
    if metadata.fixed_size is None and metadata.model in models.names("teacher"):
        # torch.export takes minutes to find this out.
        raise ValueError(
            f"network {metadata.model} must be exported with a fixed size, got free height and width; "
            "its windows depend on the size of the image: use --size HEIGHT WIDTH"
        )
    metadata = replace(metadata, opset=OPSET if path.suffix == ".onnx" else None)
    if path.suffix == ".onnx":
        require_onnx()
    program = _traced(DeployedNetwork(network, metadata.input, metadata.output), metadata)
    if path.suffix == ".pt2":
        buffer = io.BytesIO()
        extra = {"sward.json": json.dumps(metadata.to_strings())}
        torch.export.save(program, buffer, extra_files=extra)
        atomic.write(path, buffer.getbuffer())
        return metadata
    # The exporter reports its stages on stdout.
    with redirect_stdout(io.StringIO()), _quiet(), _refusing(metadata.model, "written as ONNX", "try a .pt2 file"):
        onnx_program: Any = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            # Not "argmax": that is the name of the graph's own node.
            output_names=["classes" if metadata.output == "argmax" else metadata.output],
            verbose=False,
        )
    model = onnx_program.model_proto
    _name_sizes(model)
    model.doc_string = f"{metadata.model} trained on {metadata.dataset}, exported by sward {metadata.version}"
    for key, value in metadata.to_strings().items():
        model.metadata_props.add(key=key, value=value)
    atomic.write(path, model.SerializeToString())
    return metadata


def check_path(path: Path) -> None:
    """Raise ValueError unless `path` ends in a suffix that `write_network` knows."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"output must end in {' or '.join(SUFFIXES)}, got {path}")


def require_onnx() -> None:
    """Raise ModuleNotFoundError unless the packages of the extra `export` are installed."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"ONNX files need {package}, which is not installed: pip install 'sward[export]'")


def _traced(network: DeployedNetwork, metadata: Metadata) -> torch.export.ExportedProgram:
    # Sizes that are neither special (0, 1, multiples) nor equal to each other.
    height, width = metadata.fixed_size or (3 * SIZE_MULTIPLE + 5, 4 * SIZE_MULTIPLE + 3)
    images = torch.zeros(2, 3, height, width, dtype=torch.uint8 if metadata.input == "uint8" else torch.float32)
    free: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
    if metadata.fixed_size is None:
        free[2] = torch.export.Dim("height", min=1, max=2**16)
        free[3] = torch.export.Dim("width", min=1, max=2**16)
    # Without the patch, torch decides memory layouts by comparing sizes and then refuses the sizes it excluded.
    patched = symbolic_shapes.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    what, remedy = "exported for any batch", ""
    if metadata.fixed_size is None:
        what, remedy = "exported for any batch and size", "try a fixed size, --size HEIGHT WIDTH"
    with patched, _quiet(), _refusing(metadata.model, what, remedy):
        return torch.export.export(network, (images,), dynamic_shapes=(free,))


@contextmanager
def _refusing(model: str, what: str, remedy: str) -> Iterator[None]:
    """Turn torch's reason, which can be pages long, into one sentence."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # torch has a class of its own for each reason
        lines = (line.strip() for line in str(error).splitlines())
        reason = next(filter(None, lines), type(error).__name__)
        raise ValueError(f"network {model} cannot be {what}: {reason}{remedy and '; '}{remedy}") from error


def _name_sizes(model: Any) -> None:
    """Call the free sizes of input and output batch, height and width, in place of torch's symbols."""
    names: dict[str, str] = {}
    for dimension, name in zip(model.graph.input[0].type.tensor_type.shape.dim, ("batch", "", "height", "width")):
        if dimension.dim_param:
            names[dimension.dim_param] = name
    for value in (*model.graph.input, *model.graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in names:
                dimension.dim_param = names[dimension.dim_param]
    del model.graph.value_info[:]


@contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # torch logs whole graphs where it fails.
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)
