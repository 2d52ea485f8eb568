"""What decides whether and how sward runs on this machine."""

from __future__ import annotations

import importlib.util

import torch

from sward.tracking import environment
from sward_kernels.prototypes import native as prototypes
from sward_kernels.windowed import native as windowed_distillation

OPTIONAL = {
    "torchvision": "training transforms",
    "timm": "MobileNetV3 and DINOv2 networks",
    "segmentation_models_pytorch": "smp's own DeepLabV3+",
    "sam2": "SAM 2.1 and MedSAM2 teachers",
    "matplotlib": "figures",
    "sklearn": "t-SNE",
    "ptflops": "the paper's FLOP column",
}


def report() -> str:
    """Versions, devices, the implementation each operation of `sward_kernels` takes by default, and what is missing."""
    facts = environment()
    lines = [f"python {facts['python']} on {facts['platform']}, {facts['threads']} threads"]
    lines += [f"{name:<30}{version or 'not installed'}" for name, version in facts["packages"].items()]
    lines += [f"GPU {index}: {name}" for index, name in enumerate(facts["gpus"])] or ["no GPU that torch can use"]
    lines.append("")
    lines += [f"sward_kernels on {device}: {reason}" for device, reason in _implementations()]
    missing = [f"  {name}: {use}" for name, use in OPTIONAL.items() if importlib.util.find_spec(name) is None]
    if missing:
        lines += ["", "not installed, and what needs them (pip install 'sward[all]'):", *missing]
    return "\n".join(lines)


def _implementations() -> list[tuple[str, str]]:
    found = []
    for loss, library, otherwise in (
        ("MWAD", windowed_distillation.LIBRARY, "in windows above 16 x 16"),
        ("PDR", prototypes.LIBRARY, "for normalised features"),
    ):
        reason = library.why_not()
        choice = "native (C++) in fp32" if reason is None else f"eager instead of native ({reason})"
        found.append((f"{loss}, CPU tensors", f"{choice}; eager {otherwise} and in other dtypes"))
    found.append(("CIRKD, CPU tensors", "eager"))
    if not torch.cuda.is_available():
        return found
    if importlib.util.find_spec("triton") is None:
        return [*found, ("GPU tensors", "eager, because the package triton is not installed")]
    return [*found, ("GPU tensors", "triton, and eager with one warning for a size the kernels do not serve")]
