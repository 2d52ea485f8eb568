"""Saving and loading the state of a run, whole or not at all."""

from __future__ import annotations

import contextlib
import io
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sward import atomic


def save(path: Path, state: dict[str, Any], *, keep: Path | None = None) -> None:
    """Write `state`, whole or not at all (`atomic.write`); tensors and plain values only.

    Raises:
        OSError: if the disk is full or not writable; what was at `path` before is still there.
    """
    # Not straight into the file: torch turns a full disk into a RuntimeError about positions in its archive.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    atomic.write(path, buffer.getbuffer(), keep=keep)


def load(path: Path) -> dict[str, Any]:
    """Reads what `save` wrote, on the CPU, and checks its checksums. No code is run.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if it cannot be read.
        ValueError: if the file is not a checkpoint of this library, or is damaged.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    content = io.BytesIO(path.read_bytes())
    try:
        # torch does not look at the checksums it writes.
        with zipfile.ZipFile(content) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"wrong checksum of {damaged}")
        content.seek(0)
        state = torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # a changed byte can make the two readers raise anything
        raise ValueError(f"{path} is not a readable checkpoint, it is damaged or not one at all") from error
    if not isinstance(state, dict) or "model" not in state:
        raise ValueError(f"{path} is not a checkpoint of a sward run: it holds no entry 'model'")
    return state


def load_newest(paths: Sequence[Path]) -> dict[str, Any] | None:
    """The first of `paths` that exists and is whole; None if none exists.

    Damaged files before it are passed over with a warning, and renamed so that no later write takes them for good.

    Raises:
        ValueError: if there are files, but all of them are damaged.
    """
    damaged: list[Path] = []
    reasons: list[str] = []
    for path in paths:
        try:
            state = load(path)
        except FileNotFoundError:
            continue
        except ValueError as error:
            damaged.append(path)
            reasons.append(str(error))
            continue
        for old in damaged:
            with contextlib.suppress(FileNotFoundError):  # another process of the run was first
                old.rename(old.with_name(f"{old.name}.damaged"))
        if reasons:
            warnings.warn(f"{'; '.join(reasons)}; going on from the checkpoint before it, {path}", stacklevel=2)
        return state
    if reasons:
        raise ValueError(f"{'; '.join(reasons)}; there is no earlier checkpoint to go on from")
    return None


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
