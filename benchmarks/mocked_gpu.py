"""Stand in for a GPU: launches run up to the driver, which does nothing. Call `install` before the kernels load.

CPU tensors take the place of GPU tensors. What a launch costs the host, and what makes Triton compile again, can then
be seen on any machine; results are not computed.
"""

from __future__ import annotations

import os
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel has no launch

import torch
import triton
from triton.backends.compiler import GPUTarget

from sward_kernels import labels, targets
from sward_kernels.gpu import launching
from sward_kernels.windowed_features import api as windowed_features


class _Driver:
    """What a launch asks of Triton's driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


class _Kernel:
    """A compiled kernel that does nothing."""

    function = 0
    packed_metadata = None

    def launch_metadata(self, *_: object) -> object: ...

    def run(self, *_: object) -> None: ...

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        """A launcher that asks the driver for the stream, as Triton's does."""

        def launch(*arguments: object) -> None:
            active = triton.runtime.driver.active
            stream = active.get_current_stream(active.get_current_device())
            self.run(*grid, stream, self.function, self.packed_metadata, self.launch_metadata(), None, None, *arguments)

        return launch


def install() -> list[str]:
    """Replace the driver, the compiler and the checks that look for a GPU; return the list of kernels compiled so far.

    The list grows by the name of a kernel whenever Triton would compile it.
    """
    compiled: list[str] = []

    def compile_nothing(kernel: Any, key: str, *_: object) -> _Kernel:
        compiled.append(kernel.fn.__name__)
        kernel.device_caches[0][0][key] = _Kernel()
        made: _Kernel = kernel.device_caches[0][0][key]
        return made

    triton.runtime.driver.set_active(_Driver())
    triton.runtime.jit.JITFunction._do_compile = compile_nothing
    launching.require_gpu = lambda tensor: None
    for module in (targets, windowed_features):
        module.family_of = lambda _: "hopper"  # type: ignore[attr-defined]
    labels.class_indices = lambda given, *_: given  # on a GPU labels are not checked
    torch.set_num_threads(1)
    return compiled
