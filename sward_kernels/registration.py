"""Registration of this package's operations as PyTorch operators: schema, implementation and shape function.

The operators are private and not differentiable. Each public function wraps its operators in an `autograd.Function`,
which is what autograd, `torch.compile` and autocast see.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch

_library = torch.library.Library("sward_kernels", "DEF")

Function = TypeVar("Function", bound=Callable[..., Any])


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> torch._ops.OpOverload:
    """Register one operator for all devices and return it, ready to call.

    Args:
        schema: `name(Tensor x, ...) -> ...` in PyTorch's schema language, without a namespace.
        implementation: runs the operator on real tensors of any device; must not return an alias of an input.
        fake: same signature; allocates outputs of the right shapes, strides and dtypes without reading data.
    """
    name = _library.define(schema)
    torch.library.impl(f"sward_kernels::{name}", "CompositeExplicitAutograd", implementation, lib=_library)
    torch.library.register_fake(f"sward_kernels::{name}", fake, lib=_library)
    operator: torch._ops.OpOverload = getattr(torch.ops.sward_kernels, name).default
    return operator


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Switch autocast off for `device`; free where it is off already."""
    enabled = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if enabled else contextlib.nullcontext()


def constant_in_graphs(function: Function) -> Function:
    """Mark a function that `torch.compile` calls while tracing, and whose result it treats as a constant.

    Does what `torch.compiler.assume_constant_result` does, without importing Dynamo.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
