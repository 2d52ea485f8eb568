"""The folder of a run and what the user sees while it works."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import torch

from sward.config import DistillationConfig, TeacherTrainingConfig, TrainingConfig, from_json, to_json
from sward.data import DatasetInfo


class RunFolder:
    """`config.json`, `dataset.json`, `environment.json`, `metrics.jsonl`, `checkpoints/` and `figures/` of one run.

    Args:
        path: the folder. It is made on `start`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.dataset = path / "dataset.json"
        self.metrics = path / "metrics.jsonl"
        self.last = path / "checkpoints" / "last.pt"
        self.best = path / "checkpoints" / "best.pt"
        self.figures = path / "figures"

    def start(self, config: TrainingConfig, info: DatasetInfo) -> None:
        """Makes the folder, or goes on in it.

        Args:
            config: of the run.
            info: classes and colours of its data set, so that the run can be used without the data.

        Raises:
            ValueError: if it holds a run already and `config.resume` is not set.
        """
        if self.last.exists() and not config.resume:
            raise ValueError(f"{self.path} already holds a run; continue it with --resume, or choose another --output")
        for folder in (self.last.parent, self.figures):
            folder.mkdir(parents=True, exist_ok=True)
        if not config.resume:
            self.metrics.unlink(missing_ok=True)
        self.config.write_text(to_json(config) + "\n", encoding="utf-8")
        self.dataset.write_text(to_json(info) + "\n", encoding="utf-8")
        (self.path / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n", encoding="utf-8")

    def read(self) -> tuple[TrainingConfig, DatasetInfo]:
        """The configuration and the classes that `start` wrote.

        Raises:
            FileNotFoundError: if the folder holds no run.
            ValueError: if the files are damaged.
        """
        if not self.config.exists() or not self.dataset.exists():
            raise FileNotFoundError(f"{self.path} is not a run folder: it holds no config.json and dataset.json")
        text = self.config.read_text(encoding="utf-8")
        kind = DistillationConfig if '"distillation"' in text else TeacherTrainingConfig
        return from_json(kind, text), from_json(DatasetInfo, self.dataset.read_text(encoding="utf-8"))

    def log(self, record: Mapping[str, Any]) -> None:
        """Appends one line to `metrics.jsonl`."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`, oldest first; a line cut short by a crash is left out."""
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
        """Forgets lines of steps that a resumed run will take again."""
        kept = [record for record in self.records() if record["step"] <= step]
        self.metrics.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")


def environment() -> dict[str, Any]:
    """Versions and devices that decide whether a run can be repeated."""
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
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "command": sys.argv,
    }


class Progress:
    """A rich progress bar on a terminal, a plain line every `seconds` elsewhere.

    One inside another shares its display: the bar of a run stands below the bar of the study it is part of.

    Args:
        title: what is being done.
        total: steps in all.
        start: steps done before.
        seconds: pause between plain lines.
    """

    _shared: ClassVar[Any] = None

    def __init__(self, title: str, total: int, *, start: int = 0, seconds: float = 15.0) -> None:
        self.title, self.total, self.done = title, total, start
        self._seconds = seconds
        self._printed = time.monotonic()
        self._bar: Any = Progress._shared
        self._is_outermost = self._bar is None
        if self._bar is None and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
        if self._bar is not None:
            self._task = self._bar.add_task(title, total=total, completed=start, note="")

    def advance(self) -> None:
        """One step is done."""
        self.done += 1
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)

    def note(self, text: str) -> None:
        """Shows `text` beside the bar, or as a line if the last one is old enough."""
        if self._bar is not None:
            self._bar.update(self._task, note=text)
        elif time.monotonic() - self._printed >= self._seconds or self.done == self.total:
            self._printed = time.monotonic()
            print(f"{self.title}: {self.done}/{self.total} {text}", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        if self._bar is not None and self._is_outermost:
            self._bar.start()
            Progress._shared = self._bar
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is None:
            return
        if self._is_outermost:
            Progress._shared = None
            self._bar.stop()
        else:
            self._bar.remove_task(self._task)
