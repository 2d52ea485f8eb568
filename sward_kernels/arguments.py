"""Checks of arguments that the operations share. Their messages read `NAME must be CONDITION, got VALUE`."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def require_tensor(name: str, value: Any) -> None:
    """Raise ValueError if an argument is not a tensor."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def are_weights(values: Any, count: int) -> bool:
    """Whether an argument is a list or tuple of `count` finite numbers of at least 0."""
    if not isinstance(values, (tuple, list)) or len(values) != count:
        return False
    return not any(isinstance(weight, (str, Tensor)) or weight is None for weight in values) and all(
        0 <= weight < float("inf") for weight in values
    )


def shown(values: Any) -> str:
    """An argument as an error message shows it: a list as a tuple, a tensor by its type."""
    if isinstance(values, list):
        return str(tuple(values))
    return "a tensor" if isinstance(values, Tensor) else repr(values)
