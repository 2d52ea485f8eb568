"""The folder of a run: configuration, metrics and checkpoints. Only rank 0 writes."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from sward import atomic, distributed
from sward.config import DistillationConfig, TeacherTrainingConfig, TrainingConfig
from sward.config_json import differences, from_json, to_json
from sward.data import DatasetInfo
from sward.data.frames import difference
from sward.data.lists import assignment_text
from sward.training.lock import locked

UNWRITABLE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.ENOENT,
    errno.ENAMETOOLONG,
)
"""Errors that mean a wrong folder was given, as opposed to a disk that is full or failing."""


@dataclass(frozen=True)
class KeptData:
    """What a run keeps of its data, and must find again when it is resumed: its scores would mix two data sets."""

    assigned: Mapping[str, str] = field(default_factory=dict)
    """Frame -> split, for a split that was drawn or listed."""
    labels: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Split -> its number of images and the pixels per class."""
    frames: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Split -> frame -> checksums, see `sward.data.frames`."""


class RunFolder:
    """`config.json`, `dataset.json`, `environment.json`, `metrics.jsonl` and `checkpoints/` of one run.

    Args:
        path: the folder; `locked` creates it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.dataset = path / "dataset.json"
        self.metrics = path / "metrics.jsonl"
        self.split = path / "split.csv"
        self.labels = path / "labels.json"
        self.frames = path / "frames.json"
        self.last = path / "checkpoints" / "last.pt"
        self.previous = path / "checkpoints" / "previous.pt"
        self.best = path / "checkpoints" / "best.pt"
        self._tensorboard: _TensorBoard | None = None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder if necessary, and keep other runs out of it until the block ends.

        Raises:
            ValueError: if the folder cannot be written, or another run works in it.
        """
        if distributed.is_main():
            make_folder(self.path)
        with locked(self.path):
            yield

    def check(self, config: TrainingConfig, kept: KeptData) -> None:
        """Raise a ValueError if the folder holds a run that `config` does not resume, or one on other data.

        Call this within `locked`. It writes nothing.
        """
        if not self.holds_checkpoint():
            return
        self._check_same(config)
        self._check_split(kept.assigned)
        self._check_labels(kept.labels)
        self._check_frames(kept.frames)

    def start(self, config: TrainingConfig, info: DatasetInfo, kept: KeptData | None = None) -> None:
        """Describe the run in the folder, in place of what described it before.

        Call this within `locked`, once nothing can refuse the run any more: a refused one leaves the folder as it is.

        Args:
            config: configuration of the run.
            info: classes and colours of its data set, so that the run can be used without the data.
            kept: what a resumed run must find again.
        """
        kept = kept or KeptData()
        if config.tensorboard:
            self._tensorboard = _TensorBoard(self.path / "tensorboard")
        if not distributed.is_main():
            return
        self.last.parent.mkdir(exist_ok=True)
        if not self.holds_checkpoint():
            # Left by a run that died before its first checkpoint: a new run need not have a split or files to replace
            # them with, and its scores would be taken on the other run's split.
            for path in (self.split, self.labels, self.frames):
                path.unlink(missing_ok=True)
        _write_text(self.config, to_json(config))
        _write_text(self.dataset, to_json(info))
        _write_text(self.path / "environment.json", json.dumps(environment(), indent=2))
        if kept.assigned:
            _write_text(self.split, assignment_text(kept.assigned).rstrip("\n"))
        if kept.labels:
            _write_text(self.labels, json.dumps(kept.labels, indent=2))
        if any(kept.frames.values()):
            _write_text(self.frames, json.dumps(kept.frames, indent=1))

    def read_frames(self) -> dict[str, dict[str, str]]:
        """Return the `frames` of `KeptData` that `start` wrote; nothing if the data is not in files."""
        frames: dict[str, dict[str, str]] = read_json(dict, self.frames) if self.frames.exists() else {}
        return frames

    def _check_same(self, config: TrainingConfig) -> None:
        if not (config.resume or distributed.restarted()):
            raise ValueError(f"{self.path} already holds a run; resume it with --resume, or choose another --output")
        stored, _ = self.read()
        for length in ("iterations", "epochs"):
            before, now = getattr(stored, length), getattr(config, length)
            if before is not None and now is not None and now > before:
                setattr(stored, length, now)
        different = differences(stored, config)
        if different:
            raise ValueError(
                f"{self.path} holds a run with another configuration: {different[0]}; "
                "resume it with its own configuration, or choose another --output"
            )

    def _check_split(self, assigned: Mapping[str, str]) -> None:
        if self.split.exists() and self.split.read_text(encoding="utf-8") != assignment_text(assigned):
            raise ValueError(
                f"the frames must be those in {self.split}, with which the run began, got {len(assigned)} frames; "
                "images were added, removed or moved to another split"
            )

    def _check_labels(self, labels: Mapping[str, Mapping[str, int]]) -> None:
        before = read_json(dict, self.labels) if self.labels.exists() else {}
        for split, now in labels.items():
            for name, count in now.items():
                then = before.get(split, {}).get(name, count)
                if then != count:
                    raise ValueError(
                        f"the data must be that with which the run in {self.path} began, {then} {name} in {split}, "
                        f"got {count}; choose another --output"
                    )

    def _check_frames(self, frames: Mapping[str, Mapping[str, str]]) -> None:
        before = self.read_frames()
        for split, sums in frames.items():
            different = difference(before.get(split, sums), sums)
            if different:
                raise ValueError(
                    f"the data must be that with which the run in {self.path} began, got other files in {split}: "
                    f"{different}; choose another --output"
                )

    def weights_sum(self, checkpoint: Literal["best", "last"]) -> str | None:
        """Return a checksum of the file of the best or the last weights; None without the file."""
        path = self.best if checkpoint == "best" else self.last
        if not path.exists():
            return None
        state = path.stat()
        return _file_sum(path, state.st_size, state.st_mtime_ns)

    def holds_scores(self, stored: Mapping[str, Any]) -> bool:
        """Return whether scores that `sward evaluate` stored are those of the weights that the folder holds now.

        Scores whose weights were deleted, or that an earlier version stored without a checksum, are taken for them.
        """
        scored, now = stored.get("weights"), self.weights_sum(stored.get("checkpoint", "best"))
        return scored is None or now is None or scored == now

    def holds_checkpoint(self) -> bool:
        """Return whether there is a run to resume."""
        return self.last.exists() or self.previous.exists()

    def forget_checkpoints(self) -> None:
        """Delete the checkpoints, so that another run can start here.

        Raises:
            ValueError: if the folder cannot be written, or a run works in it.
        """
        with self.locked():
            for path in (self.last, self.previous, self.best):
                path.unlink(missing_ok=True)

    def read(self) -> tuple[TrainingConfig, DatasetInfo]:
        """Read the configuration and the classes that `start` wrote.

        Raises:
            FileNotFoundError: if the folder holds no run.
            ValueError: if the files are damaged.
        """
        if not self.config.exists() or not self.dataset.exists():
            raise FileNotFoundError(f"{self.path} is not a run folder: it has no config.json and dataset.json")
        kind = DistillationConfig if "distillation" in read_json(dict, self.config) else TeacherTrainingConfig
        return read_json(kind, self.config), read_json(DatasetInfo, self.dataset)

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to `metrics.jsonl`, and write its numbers to TensorBoard if enabled."""
        if not distributed.is_main():
            return
        with atomic.naming(self.metrics), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            # Sync before the next checkpoint is written, so that a resumed run has all lines up to its checkpoint.
            os.fsync(file.fileno())
        if self._tensorboard is not None:
            self._tensorboard.add(record)

    def records(self) -> list[dict[str, Any]]:
        """Read the lines of `metrics.jsonl`, oldest first; skips a line that a crash truncated."""
        if not self.metrics.exists():
            return []
        records = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return records

    def drop_records_after(self, step: int) -> None:
        """Drop the lines of steps that a resumed run will repeat."""
        if distributed.is_main():
            kept = [record for record in self.records() if record["step"] <= step]
            _write_text(self.metrics, "\n".join(json.dumps(record) for record in kept))


Content = TypeVar("Content")


def read_json(kind: type[Content], path: Path) -> Content:
    """Read a dictionary or a dataclass from a JSON file.

    Raises:
        ValueError: if the file does not hold one; the message names it.
    """
    try:
        return from_json(kind, path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


@functools.lru_cache
def _file_sum(path: Path, size: int, modified: int) -> str:
    """Return a checksum of a file, read once while its size and time of change stay."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _write_text(path: Path, text: str) -> None:
    atomic.write(path, f"{text}\n".encode() if text else b"")


def make_folder(path: Path) -> None:
    """Create the output folder of a command if necessary, and check that it is writable.

    Raises:
        ValueError: if it is not.
        OSError: if the disk is full or fails.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise ValueError(f"cannot write to {path} ({error.strerror}); choose another --output") from error


def check_cache_folder(path: Path, option: str) -> None:
    """Raise a ValueError if the folder of a cache cannot be made or written; makes nothing yet."""
    there = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"{option} must be a folder that can be written, got {path}; {there} cannot")


def require_tensorboard() -> None:
    """Raise a ModuleNotFoundError that names the package if TensorBoard's files cannot be written."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError(
            "--tensorboard needs the package tensorboard; install it with 'pip install tensorboard'"
        ) from error


class _TensorBoard:
    """Write the numbers of `metrics.jsonl` as TensorBoard events; nested names are joined by slashes."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder, self._open = folder, SummaryWriter
        self._writer: SummaryWriter | None = None

    def add(self, record: Mapping[str, Any]) -> None:
        if self._writer is None:
            # Opened here because only now the first step is known. `purge_step` discards events of this and later steps
            # from before an interruption.
            self._writer = self._open(self._folder, purge_step=record["step"])
        for name, value in _numbers(record):
            self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()


def _numbers(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name != "step":
            yield f"{prefix}{name}", value


def environment() -> dict[str, Any]:
    """Collect the versions and devices that a run needs to be reproducible."""
    packages = ("torch", "triton", "torchvision", "timm", "segmentation-models-pytorch", "sam2", "numpy", "sward")
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "threads": torch.get_num_threads(),
        "processes": distributed.world_size(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "command": sys.argv,
    }
