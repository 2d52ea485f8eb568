"""What every launch of a Triton kernel needs: the device, the types, 64-bit offsets and the precision of products."""

from __future__ import annotations

import contextlib
import functools
import subprocess
from collections.abc import Hashable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError
from triton.runtime.errors import InterpreterError

from sward_kernels.gpu.language import product

INTERPRETED = not isinstance(product, triton.JITFunction)
"""Whether kernels run in Triton's interpreter (on CPU tensors); decided when Triton is imported."""

WIDE_FROM = 2**31
"""Elements from which offsets inside one image need 64 bits."""

TRITON_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
"""Triton's name of each dtype that the kernels take."""

LEAST_CAPABILITY = (8, 0)
"""The kernels compile for older GPUs too, but without tensor cores, and spill."""


def require_gpu(tensor: Tensor) -> None:
    """Raise NotImplementedError for a CPU tensor, unless Triton interprets, and for a GPU that is too old."""
    if tensor.is_cuda:
        reason = _unsupported(tensor.device)
        if reason:
            raise NotImplementedError(reason)
    elif not INTERPRETED:
        raise NotImplementedError(
            "implementation='triton' needs tensors on a GPU (or TRITON_INTERPRET=1 before Triton is imported); "
            "use 'eager' on the CPU"
        )


@functools.cache
def _unsupported(device: torch.device) -> str | None:
    if torch.version.hip:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= LEAST_CAPABILITY:
        return None
    least, found = (".".join(map(str, version)) for version in (LEAST_CAPABILITY, capability))
    name = torch.cuda.get_device_name(device)
    return f"implementation='triton' needs compute capability {least} or higher, got {found} ({name}); use 'eager'"


def require_dtype(tensor: Tensor) -> None:
    """Raise NotImplementedError for a dtype that the kernels do not take."""
    if tensor.dtype not in TRITON_TYPES:
        raise NotImplementedError(f"implementation='triton' does not take {tensor.dtype}; use 'eager'")


def device_guard(device: torch.device) -> AbstractContextManager[Any]:
    """Make `device` the current one, as a launch needs it; do nothing where it is, and on the CPU."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)


_NOTHING = contextlib.nullcontext()


def needs_64_bits(maps: Tensor) -> bool:
    """Whether offsets inside one image of `[B, C, H, W]` maps, or of a dense copy of them, exceed 32 bits."""
    reach = sum((size - 1) * abs(stride) for size, stride in zip(maps.shape[1:], maps.stride()[1:]))
    return max(reach, maps.shape[1:].numel()) >= WIDE_FROM


def accumulator(dtype: torch.dtype) -> Any:
    """The Triton type in which kernels sum values of `dtype`."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def product_precision(dtype: torch.dtype, family: str, device: torch.device) -> str:
    """The `input_precision` of `tl.dot` for `dtype`; that of fp32 follows `torch.backends.cuda.matmul`."""
    if dtype != torch.float32:
        return "ieee"
    if torch.backends.cuda.matmul.fp32_precision == "tf32" and (family != "cdna" or has_tf32(device)):
        return "tf32"
    return full_float32_precision(family)


def full_float32_precision(family: str) -> str:
    """The `input_precision` that keeps the digits of fp32: three TF32 products on NVIDIA, fp32 products on AMD."""
    return "ieee" if family == "cdna" else "tf32x3"


@functools.cache
def has_tf32(device: torch.device) -> bool:
    """Whether an AMD GPU multiplies in TF32: of the targets that Triton compiles for, only MI300's gfx942 does."""
    return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0] == "gfx942"


# ------------------------------------------------------------------------------------------------- prepared launches

Made = TypeVar("Made")

_MOST_CALLS = 1024
_caches: list[dict[Hashable, Any]] = []
_failures: dict[tuple[torch.device, Hashable], str] = {}
"""Device and problem -> why its kernels cannot run there. Triton would try to compile them anew at every call."""


class CallCache(dict[Hashable, Made]):
    """What calls of the same shapes, strides, dtypes and options share, under everything that decides it."""

    def __init__(self) -> None:
        super().__init__()
        _caches.append(self)

    def keep(self, key: Hashable, made: Made) -> Made:
        """Store and return what was made for `key`; a network of ever new sizes does not fill the memory."""
        if len(self) >= _MOST_CALLS:
            self.clear()
        self[key] = made
        return made


def forget_calls() -> None:
    """Empty every `CallCache` and forget which kernels failed to compile."""
    for cache in _caches:
        cache.clear()
    _failures.clear()


class PreparedLaunch:
    """A launch whose grid, constants and sizes are known; tensors, and integers that vary, follow when it runs."""

    def __init__(
        self, problem: Hashable, kernel: Any, programs: int, num_warps: int, known: dict[str, Any], **options: Any
    ) -> None:
        """Prepare a launch of `programs` programs.

        Args:
            problem: everything that decides whether the kernels of a call compile (sizes that are compiled in, dtypes,
                layouts, options). If one of them does not, no kernel of an equal problem is tried on that device again:
                a forward kernel is of no use without its backward kernel.
            kernel: the `@triton.jit` function.
            programs: size of the grid.
            num_warps: warps per program.
            known: arguments by name; a name that the kernel does not have is ignored.
            options: further options of Triton's compiler, e.g. `maxnreg`.
        """
        self.problem = problem
        self.kernel = kernel
        self.programs = programs
        self._arguments = [known.get(name) for name in kernel.arg_names]
        self._places = {name: place for place, name in enumerate(kernel.arg_names)}
        self._options = {"num_warps": num_warps, "num_stages": 1, **options}
        self._compiled: dict[Hashable, Any] = {}

    def __call__(self, device: torch.device, arguments: dict[str, Any]) -> None:
        """Launch on `device` with the remaining `arguments`, by name: tensors, None, and ints that are not specialised.

        Raises:
            NotImplementedError: if Triton cannot compile the kernel, or the device cannot hold it.
        """
        if _failures and (device, self.problem) in _failures:
            raise NotImplementedError(_failures[device, self.problem])
        values = self._arguments.copy()
        variant: list[Hashable] = []
        for name, value in arguments.items():
            values[self._places[name]] = value
            if isinstance(value, Tensor):
                variant += (value.dtype, value.data_ptr() % 16)
        # Triton works out anew at every call what it would compile, from all arguments. Here only the types and the
        # alignment of tensors can change that.
        compiled = self._compiled.get(tuple(variant))
        try:
            with device_guard(device):
                if compiled is None:
                    compiled = self.kernel[(self.programs,)](*values, **self._options)
                    if compiled is not None:  # None in the interpreter
                        self._compiled[tuple(variant)] = compiled
                else:
                    compiled[(self.programs, 1, 1)](*values)
        except (TritonError, RuntimeError, OSError, subprocess.SubprocessError) as error:
            if isinstance(error, InterpreterError) or _is_of_the_device(error):
                raise
            name = getattr(self.kernel, "__name__", "kernel")
            reason = f"implementation='triton' cannot compile or load {name} here ({_summary(error)}); use 'eager'"
            _failures[device, self.problem] = reason
            raise NotImplementedError(reason) from error


def _is_of_the_device(error: Exception) -> bool:
    """Whether a RuntimeError comes from the device, perhaps from earlier work, and not from the compiler."""
    return isinstance(error, RuntimeError) and (
        type(error) is not RuntimeError or str(error).startswith("Triton Error [")
    )


def _summary(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A compilation error begins with an excerpt of the kernel; what is wrong comes last.
    line = (lines[-1] if type(error).__name__ == "CompilationError" else lines[0]) if lines else ""
    return f"{type(error).__name__}: {line[:200]}" if line else type(error).__name__
