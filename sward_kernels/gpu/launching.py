"""What every launch of a Triton kernel needs: the device, the types, 64-bit offsets and the precision of products."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sward_kernels.gpu.language import product

INTERPRETED = not isinstance(product, triton.JITFunction)
"""Whether kernels run in Triton's interpreter (on CPU tensors); decided when Triton is imported."""

WIDE_FROM = 2**31
"""Elements from which offsets inside one image need 64 bits."""

TRITON_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
"""Triton's name of each dtype that the kernels take."""


def require_gpu(tensor: Tensor) -> None:
    """Raise NotImplementedError for a CPU tensor, unless Triton interprets."""
    if tensor.device.type == "cpu" and not INTERPRETED:
        raise NotImplementedError(
            "implementation='triton' needs tensors on a GPU (or TRITON_INTERPRET=1 before Triton is imported); "
            "use 'eager' on the CPU"
        )


def require_dtype(tensor: Tensor) -> None:
    """Raise NotImplementedError for a dtype that the kernels do not take."""
    if tensor.dtype not in TRITON_TYPES:
        raise NotImplementedError(f"implementation='triton' does not take {tensor.dtype}; use 'eager'")


def device_guard(device: torch.device) -> AbstractContextManager[Any]:
    """Make `device` the current one, as a launch needs it; do nothing on the CPU."""
    return torch.cuda.device(device.index if device.type == "cuda" else -1)


def needs_64_bits(maps: Tensor) -> bool:
    """Whether offsets inside one image of `[B, C, H, W]` maps, or of a dense copy of them, exceed 32 bits."""
    reach = sum((size - 1) * abs(stride) for size, stride in zip(maps.shape[1:], maps.stride()[1:]))
    return max(reach, maps.shape[1:].numel()) >= WIDE_FROM


def accumulator(dtype: torch.dtype) -> Any:
    """The Triton type in which kernels sum values of `dtype`."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def product_precision(dtype: torch.dtype, family: str) -> str:
    """The `input_precision` of `tl.dot` for `dtype`; that of fp32 follows `torch.backends.cuda.matmul`."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else full_float32_precision(family)


def full_float32_precision(family: str) -> str:
    """The `input_precision` that keeps the digits of fp32: three TF32 products on NVIDIA, fp32 products on AMD."""
    return "ieee" if family == "cdna" else "tf32x3"
