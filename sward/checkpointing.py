"""Saving and loading the state of a run, whole or not at all."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes `state` to `path` so that `path` holds either the old file or the whole new one, never a part.

    Raises:
        OSError: if the disk is full or not writable; what was at `path` before is still there.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """Reads what `save` wrote, on the CPU. Tensors and plain values only; no code is run.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not a checkpoint of this library, or is damaged.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is not a readable checkpoint, it is damaged or not one at all") from error
    if not isinstance(state, dict) or "model" not in state:
        raise ValueError(f"{path} is not a checkpoint of a sward run: it holds no entry 'model'")
    return state


def load_model(model: torch.nn.Module, path: Path) -> None:
    """Loads the network's weights from a run's checkpoint, every key matched.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or belongs to another network or another number of classes.
    """
    state = load(path)
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        detail = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise ValueError(
            f"{path} does not fit {type(model).__name__}, it was saved from another model: {detail}"
        ) from error
