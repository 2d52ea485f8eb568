"""Static quantisation of exported ONNX files to int8, and which layers do not survive it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from sward.deploy.metadata import Metadata
from sward.deploy.predictor import as_input

QUANTISED = ["Conv", "Gemm", "MatMul"]
"""ONNX operators that int8 changes: those with weights. The others stay fp32."""


def prepare(path: Path) -> Any:
    """Return an exported ONNX model with its batch norms folded into the convolutions before them."""
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        # ONNX Runtime's symbolic shapes do not know the padding's floor division.
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        return onnx.load(prepared)


def quantise(prepared: Any, metadata: Metadata, images: Iterator[Tensor], *, keep: Collection[str] = ()) -> Any:
    """Quantise a prepared model statically and per channel, with QDQ nodes.

    Args:
        prepared: of `prepare`.
        metadata: that of the file.
        images: uint8 `[3, H, W]` images that set the ranges of activations.
        keep: names of nodes that stay fp32.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, Any] | None:
            image = next(images, None)
            return None if image is None else {"images": as_input(image[None], metadata).numpy()}

    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / "prepared.onnx", Path(folder) / "quantised.onnx"
        onnx.save(prepared, before)
        quantize_static(
            before,
            after,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            op_types_to_quantize=QUANTISED,
            nodes_to_exclude=list(keep),
            # A layer that stays fp32 must not read what its predecessor rounded to 8 bits. Without such layers, rounded
            # outputs let ONNX Runtime compute all of a layer in int8.
            extra_options={"OpTypesToExcludeOutputQuantization": QUANTISED if keep else []},
        )
        return onnx.load(after)


def losses_per_layer(prepared: Any, quantised: Any, score: Callable[[bytes], float]) -> dict[str, float]:
    """Return how much each quantised layer costs when it is the only one: node name -> score of fp32 minus its score.

    Args:
        prepared: of `prepare`.
        quantised: of `quantise`.
        score: scores a serialised model; higher is better.
    """
    reference = score(prepared.SerializeToString())
    return {
        node.name: reference - score(_only(prepared, quantised, node.name).SerializeToString())
        for node in quantised.graph.node
        if node.op_type in QUANTISED and _dequantised(quantised, node)
    }


def layer_title(prepared: Any, name: str) -> str:
    """Return the name of a node's weights in the network; the node's own name where the graph does not keep it."""
    node = next(node for node in prepared.graph.node if node.name == name)
    weights = [each for each in node.input if each.startswith("network.") and each.endswith(".weight")]
    return weights[0].removeprefix("network.").removesuffix(".weight") if weights else name


def _dequantised(model: Any, node: Any) -> dict[int, Any]:
    """Return position -> DequantizeLinear node of the inputs of `node` that come from one."""
    makers = {output: each for each in model.graph.node for output in each.output}
    found = {index: makers[name] for index, name in enumerate(node.input) if name in makers}
    return {index: maker for index, maker in found.items() if maker.op_type == "DequantizeLinear"}


def _only(prepared: Any, quantised: Any, name: str) -> Any:
    """Return the fp32 model with the quantised inputs and weights of one node."""
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(prepared)
    quantisers = {each.output[0]: each for each in quantised.graph.node if each.op_type == "QuantizeLinear"}
    constants = {each.name: each for each in quantised.graph.initializer}
    present = {each.name for each in model.graph.initializer}
    place = next(index for index, node in enumerate(model.graph.node) if node.name == name)
    target = next(node for node in quantised.graph.node if node.name == name)
    added = []
    for index, dequantiser in _dequantised(quantised, target).items():
        maker = quantisers.get(dequantiser.input[0])
        for each in ([maker] if maker is not None else []) + [dequantiser]:
            added.append(each)
            for needed in each.input:
                if needed in constants and needed not in present:
                    model.graph.initializer.append(constants[needed])
                    present.add(needed)
        model.graph.node[place].input[index] = dequantiser.output[0]
    # Directly before the node that reads them: nodes of a graph are sorted.
    for each in reversed(added):
        model.graph.node.insert(place, each)
    return model
