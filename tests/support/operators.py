"""Which of this project's operators run."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Operators(TorchDispatchMode):
    """Collects this project's operators that run inside the `with`."""

    def __init__(self) -> None:
        super().__init__()
        self.returned: dict[str, Any] = {}
        """By name, without the namespace: what each returned last."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.namespace == "sward_kernels":
            self.returned[function.name().removeprefix("sward_kernels::")] = result
        return result
