"""Save and load the state of a run; writes are atomic."""

from __future__ import annotations

import contextlib
import io
import warnings
import zipfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sward import atomic
from sward.losses.masks import state_fingerprint, teacher_fingerprint


def save(path: Path, state: dict[str, Any], *, keep: Path | None = None) -> None:
    """Write `state` (tensors and plain values only) atomically; see `atomic.write`.

    Raises:
        OSError: if the disk is full or not writable; the old file stays in place.
    """
    # Via a buffer: when torch writes to a full disk itself, it raises a RuntimeError about positions in its archive.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    atomic.write(path, buffer.getbuffer(), keep=keep)


def checksum(network: nn.Module) -> str:
    """Return the 16 hexadecimal digits by which the checkpoint of a run names its teacher or trunk."""
    return teacher_fingerprint(network)[:16]


def checksum_in(path: Path) -> str:
    """Return the `checksum` of the network whose weights `path` holds, without building it; raises as `load` does."""
    return state_fingerprint(load(path)["model"])[:16]


def load(path: Path) -> dict[str, Any]:
    """Load what `save` wrote to the CPU and verify its checksums; runs no code from the file.

    Raises:
        FileNotFoundError: if the file does not exist.
        OSError: if the file cannot be read.
        ValueError: if the file is damaged or not a checkpoint of this library.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    content = io.BytesIO(path.read_bytes())
    try:
        # torch does not verify the checksums that it writes.
        with zipfile.ZipFile(content) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"wrong checksum of {damaged}")
        content.seek(0)
        state = torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # a changed byte can make the two readers raise anything
        raise ValueError(f"{path} is damaged or not a checkpoint") from error
    if not isinstance(state, dict) or "model" not in state:
        raise ValueError(f"{path} is not a checkpoint of a sward run: it has no entry 'model'")
    return state


def progress(path: Path) -> tuple[int, float] | None:
    """Return the steps and the best score of the last checkpoint of a run, without reading its weights.

    None if it does not say, because it is missing, damaged or not of this library.
    """
    state = _peek(path)
    try:
        return int(state["step"]), float(state["best_score"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def identity(path: Path) -> dict[str, str]:
    """Return the checksums by which the last checkpoint of a run names its data, teacher and masks, as `TrainingState`
    has them, without reading its weights.

    Empty if it does not say, because it is missing, damaged or not of this library.
    """
    found = _peek(path).get("identity")
    return found if isinstance(found, dict) else {}


def _peek(path: Path) -> dict[str, Any]:
    """Return what a checkpoint holds without reading its tensors; empty if it is missing, damaged or no dictionary."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # a changed byte can make the reader raise anything
        return {}
    return state if isinstance(state, dict) else {}


def load_newest(paths: Sequence[Path], learned: Collection[str] = ()) -> dict[str, Any] | None:
    """Load the first of `paths` that exists and is intact; None if no file exists.

    Damaged files are skipped with a warning and renamed, so that later saves do not keep them as a backup.

    Args:
        paths: the newest first.
        learned: names of the network's tensors that must be finite.

    Raises:
        ValueError: if all existing files are damaged.
    """
    from sward.models.checkpoints import check_finite

    damaged: list[Path] = []
    reasons: list[str] = []
    for path in paths:
        try:
            state = load(path)
            if isinstance(state["model"], dict):  # what is none, `load_state_dict` refuses
                check_finite({name: state["model"].get(name) for name in learned}, path)
        except FileNotFoundError:
            continue
        except ValueError as error:
            damaged.append(path)
            reasons.append(str(error))
            continue
        for old in damaged:
            with contextlib.suppress(FileNotFoundError):  # another process of the run renamed it first
                old.rename(old.with_name(f"{old.name}.damaged"))
        if reasons:
            warnings.warn(f"{'; '.join(reasons)}; resuming from the previous checkpoint, {path}", stacklevel=2)
        return state
    if reasons:
        raise ValueError(f"{'; '.join(reasons)}; there is no earlier checkpoint to resume from")
    return None


def load_model(model: torch.nn.Module, path: Path) -> None:
    """Load the network's weights from a checkpoint of a run; all keys must match.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is damaged, holds weights that are not finite, or was saved from another network or with
            another number of classes.
    """
    from sward.models.checkpoints import check_finite

    state = load(path)
    try:
        model.load_state_dict(state["model"])
    except (RuntimeError, TypeError, AttributeError) as error:
        detail = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise ValueError(
            f"{path} does not fit {type(model).__name__}; it was saved from another model: {detail}"
        ) from error
    check_finite({name: state["model"][name] for name in learned_names(model)}, path)


def learned_names(model: torch.nn.Module) -> list[str]:
    """Return the names of parameters and statistics; other buffers, such as masks of attention, may hold infinity."""
    parameters = {name for name, _ in model.named_parameters()}
    return [name for name in model.state_dict() if name in parameters or "running_" in name]
