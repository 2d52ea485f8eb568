"""The colour changes of `torchvision.transforms.v2.functional` in C++ (`native.cpp`): 8-bit RGB, the same bits."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from sward_kernels import cpp

LIBRARY = cpp.Library(
    "colours", Path(__file__).with_name("native.cpp"), flags=("-ffp-contract=off", "-fno-trapping-math")
)


class _Image(ctypes.Structure):
    """`Image` of native.cpp."""

    _fields_ = (("pixels", ctypes.c_void_p), ("count", ctypes.c_int64))


def serves(image: Tensor) -> bool:
    """Whether these functions take such an image here: contiguous `[3, H, W]` uint8."""
    return (
        image.dtype == torch.uint8
        and image.is_cpu
        and image.dim() == 3
        and len(image) == 3
        and image.numel() > 0
        and image.is_contiguous()
        # Without vector instructions PyTorch rounds between a product and a sum.
        and torch.backends.cpu.get_cpu_capability() != "DEFAULT"
        and LIBRARY.why_not() is None
    )


def adjust_brightness_(image: Tensor, factor: float) -> None:
    """Multiply the image by `factor`, in place."""
    LIBRARY.functions.brighten(ctypes.byref(_describe(image)), ctypes.c_float(factor))


def adjust_contrast_(image: Tensor, factor: float) -> None:
    """Blend the image with its mean grey, in place."""
    greys = torch.empty(image.shape[1:], dtype=torch.float32)
    described = ctypes.byref(_describe(image))
    LIBRARY.functions.greys(described, ctypes.c_void_p(greys.data_ptr()))
    # PyTorch's own sum, whose order of summation decides the last bit.
    mean = greys[None].mean(dim=(-3, -2, -1)).item()
    LIBRARY.functions.contrast(described, *map(ctypes.c_float, (mean, factor, 1.0 - factor)))


def adjust_saturation_(image: Tensor, factor: float) -> None:
    """Blend every pixel with its own grey, in place."""
    LIBRARY.functions.saturate(ctypes.byref(_describe(image)), ctypes.c_float(factor), ctypes.c_float(1.0 - factor))


def adjust_hue_(image: Tensor, factor: float) -> None:
    """Turn the hue by `factor` of a full circle, from -0.5 to 0.5, in place."""
    LIBRARY.functions.turn_hue(ctypes.byref(_describe(image)), ctypes.c_float(factor))


def _describe(image: Tensor) -> _Image:
    return _Image(image.data_ptr(), image[0].numel())
