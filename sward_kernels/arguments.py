"""Checks of arguments that the operations share. Their messages read `NAME must be CONDITION, got VALUE`."""

from __future__ import annotations

from numbers import Real
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
    return all(isinstance(weight, Real) and 0 <= float(weight) < float("inf") for weight in values)


def require_weight(name: str, value: Any) -> None:
    """Raise ValueError if an argument is not a finite number of at least 0."""
    if not are_weights((value,), 1):
        raise ValueError(f"{name} must be a finite number of at least 0, got {shown(value)}")


def require_positive(name: str, value: Any) -> None:
    """Raise ValueError if an argument is not a finite number above 0."""
    if not are_weights((value,), 1) or value == 0:
        raise ValueError(f"{name} must be a positive finite number, got {shown(value)}")


def require_count(name: str, value: Any) -> None:
    """Raise ValueError if an argument is not an int of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {shown(value)}")


def shown(values: Any) -> str:
    """An argument as an error message shows it: a list as a tuple, a tensor by its type."""
    if isinstance(values, list):
        return str(tuple(values))
    return "a tensor" if isinstance(values, Tensor) else repr(values)
