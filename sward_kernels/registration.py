"""Registration of this package's operations as PyTorch operators: schema, implementation and shape function.

The operators are private and not differentiable. Each public function wraps its operators in an `autograd.Function`,
which is what autograd, `torch.compile` and autocast see.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

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


def first_derivative_only(backward: Function) -> Function:
    """Decorate `backward` of an `autograd.Function` whose result is not differentiable.

    Raises a RuntimeError where a graph of it is asked for (`create_graph=True`). torch's `once_differentiable` does so
    only where the graph of a second derivative leads through the incoming gradient; else the result is silently taken
    for a constant. Autocast is off inside, as in the forward pass.
    """
    traced = once_differentiable(backward)  # which torch.compile knows

    @functools.wraps(backward)
    def run(context: Any, *upstream: Tensor | None) -> Any:
        if torch.compiler.is_compiling():
            return traced(context, *upstream)
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph must be False: this operation of sward_kernels is differentiable once; use "
                "implementation='reference' for more"
            )
        device = next((each.device for each in upstream if each is not None), torch.device("cpu"))
        with without_autocast(device):
            return backward(context, *upstream)

    return run  # type: ignore[return-value]


def has_tangent(tensor: Tensor) -> bool:
    """Return whether a tensor carries a forward-mode derivative; False in code that is being compiled."""
    return not torch.compiler.is_compiling() and forward_ad.unpack_dual(tensor).tangent is not None


def refuse_forward_mode(*tensors: Tensor) -> None:
    """Raise a NotImplementedError for tensors with a tangent, which an operator would drop."""
    if any(map(has_tangent, tensors)):
        raise NotImplementedError("forward-mode derivatives need implementation='reference'")


def constant_in_graphs(function: Function) -> Function:
    """Mark a function that `torch.compile` calls while tracing, and whose result it treats as a constant.

    Does what `torch.compiler.assume_constant_result` does, without importing Dynamo.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
