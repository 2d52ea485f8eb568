"""Fill memory that is allocated but not written with NaN, so that tests detect it in results."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

POISONED_PACKAGE = "sward_kernels"
_INTEGER_POISON = 77


@pytest.fixture
def poison_empty_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `torch.empty` and similar functions return NaN (integers: 77) if the caller is in `sward_kernels`."""
    importlib.import_module("torch._dynamo")  # lists torch's functions once, and must find the real ones
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (Tensor, "new_empty"),
        (Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.split(".")[0] == POISONED_PACKAGE and tensor.numel():
            with torch.inference_mode(tensor.is_inference()):
                tensor.fill_(float("nan") if tensor.dtype.is_floating_point else _INTEGER_POISON)
        return tensor

    return poisoned
