"""`sward doctor`: versions, devices and kernel implementations on this machine."""

from __future__ import annotations

import importlib.util
import shlex

import torch

from sward.training.run_folder import environment
from sward_kernels import cpp
from sward_kernels.colours import native as colours
from sward_kernels.prototypes import native as prototypes
from sward_kernels.relation import native as relation
from sward_kernels.standardization import native as standardization
from sward_kernels.windowed import native as windowed_distillation
from sward_kernels.windowed_features import native as windowed_features

OPTIONAL = {
    "torchvision": "training transforms",
    "timm": "MobileNetV3 and DINOv2 networks",
    "segmentation_models_pytorch": "smp's own DeepLabV3+",
    "sam2": "SAM 2.1 and MedSAM2 teachers",
    "matplotlib": "figures",
    "sklearn": "t-SNE",
    "ptflops": "the paper's FLOP column",
    "webdataset": "unlabelled images from tar files",
    "onnx": "export to ONNX",
    "onnxscript": "export to ONNX",
    "onnxruntime": "the check of an ONNX file, and predictions with it",
}


def describe_machine() -> str:
    """Describe versions, devices, the default implementation of each kernel operation, and missing packages."""
    facts = environment()
    lines = [f"python {facts['python']} on {facts['platform']}, threads: {facts['threads']}"]
    lines += [f"{name:<30}{version or 'not installed'}" for name, version in facts["packages"].items()]
    lines += [f"GPU {index}: {name}" for index, name in enumerate(facts["gpus"])] or ["no GPU visible to torch"]
    lines.append("")
    lines += [f"{operation}: {reason}" for operation, reason in _implementations()]
    lines.append(_compilation())
    missing = [f"  {name}: {use}" for name, use in OPTIONAL.items() if importlib.util.find_spec(name) is None]
    if missing:
        lines += ["", "optional packages that are not installed (pip install 'sward[all]'):", *missing]
    return "\n".join(lines)


def _compilation() -> str:
    command = shlex.join([*cpp.compiler(), *cpp.FLAGS])
    if windowed_distillation.LIBRARY.why_not() is not None:
        return f"C++ compiled by: {command}"
    width = windowed_distillation.LIBRARY.functions.vector_width()
    return f"C++ compiled by: {command}\nC++ vectors of {width} floats; libraries in {cpp.cache_folder()}"


def _implementations() -> list[tuple[str, str]]:
    found = []
    for part, library, otherwise, elsewhere in (
        ("MWAD", windowed_distillation.LIBRARY, "eager", "in windows above 16 x 16 and in other dtypes"),
        (
            "MWAD's projections",
            windowed_features.LIBRARY,
            "PyTorch",
            f"above {windowed_features.MOST_CHANNELS} channels, in windows above 16 x 16 and in other dtypes",
        ),
        ("PDR", prototypes.LIBRARY, "eager", "in other dtypes"),
        ("CIRKD", relation.LIBRARY, "eager", f"above {relation.MOST_PIXELS} pixels per image and in float64"),
        ("standardised teacher", standardization.LIBRARY, "PyTorch", "in other dtypes"),
    ):
        reason = library.why_not()
        dtypes = "fp32, bf16 and fp16" if part.startswith("MWAD") else "fp32"
        choice = f"native (C++) in {dtypes}" if reason is None else f"{otherwise} instead of native ({reason})"
        found.append((f"{part}, CPU tensors", f"{choice}; {otherwise} {elsewhere}"))
    reason = colours.LIBRARY.why_not()
    choice = "native (C++)" if reason is None else f"torchvision instead of native ({reason})"
    found.append(("colour jitter, images in 8 bits", f"{choice}; the same bits"))
    if not torch.cuda.is_available():
        return found
    if importlib.util.find_spec("triton") is None:
        return [*found, ("GPU tensors", "eager; the package triton is not installed")]
    return [*found, ("GPU tensors", "triton; eager with one warning for sizes that the kernels do not support")]
