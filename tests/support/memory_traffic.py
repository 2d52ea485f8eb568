"""Memory traffic of Triton kernels, counted in the interpreter."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from torch import Tensor
from triton.runtime import interpreter


class Traffic:
    """Count the loads and stores of every element, per argument and program; any other address is an error."""

    def __init__(self, launch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        """Count from now on what the launches of the module `launch` do."""
        self.launches: list[dict[str, dict[int, np.ndarray]]] = []  # "load student" -> program -> times, by element
        self._arguments: dict[str, Tensor] = {}
        builder = self._builder = interpreter.interpreter_builder
        load, store = builder.create_masked_load, builder.create_masked_store

        def counted_load(pointers: Any, mask: Any, *rest: Any) -> Any:
            self._count("load", pointers.data, mask.data)
            return load(pointers, mask, *rest)

        def counted_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._count("store", pointers.data, mask.data)
            return store(pointers, value, mask, *rest)

        monkeypatch.setattr(builder, "create_masked_load", counted_load)
        monkeypatch.setattr(builder, "create_masked_store", counted_store)
        run_launch = launch._launch

        def recorded(prepared: Any, arguments: dict[str, Any]) -> None:
            self._arguments = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
            self.launches.append({})
            run_launch(prepared, arguments)

        monkeypatch.setattr(launch, "_launch", recorded)

    def _count(self, kind: str, addresses: np.ndarray, mask: np.ndarray) -> None:
        addresses, mask = np.broadcast_arrays(addresses, mask)
        remaining = addresses[mask.astype(bool)].astype(np.int64)  # a mask may be of integers
        for name, tensor in self._arguments.items():
            first, reach = tensor.data_ptr(), _reach(tensor)
            here = (remaining >= first) & (remaining < first + reach * tensor.element_size())
            if here.any():
                elements = (remaining[here] - first) // tensor.element_size()
                programs = self.launches[-1].setdefault(f"{kind} {name}", {})
                counts = programs.setdefault(self._builder.grid_idx[0], np.zeros(reach, dtype=np.int64))
                counts += np.bincount(elements, minlength=reach)
            remaining = remaining[~here]
        assert remaining.size == 0, f"{kind} outside of every argument"

    def times(self, index: int, name: str) -> np.ndarray:
        """How often launch `index` loaded or stored each element of an argument, over all programs."""
        return np.sum(list(self.launches[index][name].values()), axis=0)

    def stored(self) -> dict[str, np.ndarray]:
        """The arguments that were written, and how often each element was, over all launches."""
        written: dict[str, np.ndarray] = {}
        for index, launched in enumerate(self.launches):
            for name in launched:
                if name.startswith("store"):
                    written[name] = written.get(name, 0) + self.times(index, name)
        return written


def _reach(tensor: Tensor) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) if tensor.numel() else 0
