"""`sward doctor`: versions, devices and kernel implementations on this machine."""

from __future__ import annotations

import importlib.util

import torch

from sward.training.run_folder import environment
from sward_kernels.prototypes import native as prototypes
from sward_kernels.standardization import native as standardization
from sward_kernels.windowed import native as windowed_distillation

OPTIONAL = {
    "torchvision": "training transforms",
    "timm": "MobileNetV3 and DINOv2 networks",
    "segmentation_models_pytorch": "smp's own DeepLabV3+",
    "sam2": "SAM 2.1 and MedSAM2 teachers",
    "matplotlib": "figures",
    "sklearn": "t-SNE",
    "ptflops": "the paper's FLOP column",
    "webdataset": "unlabelled images from tar files",
}


def describe_machine() -> str:
    """Describe versions, devices, the default implementation of each kernel operation, and missing packages."""
    facts = environment()
    lines = [f"python {facts['python']} on {facts['platform']}, {facts['threads']} threads"]
    lines += [f"{name:<30}{version or 'not installed'}" for name, version in facts["packages"].items()]
    lines += [f"GPU {index}: {name}" for index, name in enumerate(facts["gpus"])] or ["no GPU visible to torch"]
    lines.append("")
    lines += [f"sward_kernels on {device}: {reason}" for device, reason in _implementations()]
    missing = [f"  {name}: {use}" for name, use in OPTIONAL.items() if importlib.util.find_spec(name) is None]
    if missing:
        lines += ["", "optional packages that are not installed (pip install 'sward[all]'):", *missing]
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
    reason = standardization.LIBRARY.why_not()
    choice = "native (C++) in fp32" if reason is None else f"PyTorch instead of native ({reason})"
    found.append(("standardised teacher, CPU tensors", f"{choice}; PyTorch in other dtypes"))
    found.append(("CIRKD, CPU tensors", "eager"))
    if not torch.cuda.is_available():
        return found
    if importlib.util.find_spec("triton") is None:
        return [*found, ("GPU tensors", "eager; the package triton is not installed")]
    return [*found, ("GPU tensors", "triton; eager with one warning for sizes that the kernels do not support")]
