"""Progress of long-running work: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, ClassVar

from sward import distributed


class Progress:
    """A rich progress bar on a terminal, a plain line every `seconds` elsewhere.

    Nested instances share one display: the bar of a run appears below the bar of its study.

    Args:
        title: name of the work.
        total: total number of steps.
        start: steps done before.
        seconds: minimum time between plain lines.
    """

    _shared: ClassVar[Any] = None

    def __init__(self, title: str, total: int, *, start: int = 0, seconds: float = 15.0) -> None:
        self.title, self.total, self.done = title, total, start
        self._seconds = seconds
        self._printed = time.monotonic()
        self._shown = distributed.is_main()
        self._bar: Any = Progress._shared
        self._is_outermost = self._bar is None
        if self._bar is None and sys.stderr.isatty() and self._shown:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=Console(stderr=True),
            )
        if self._bar is not None:
            self._task = self._bar.add_task(title, total=total, completed=start, note="")

    def advance(self) -> None:
        """Count one more step as done."""
        self.done += 1
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)

    def note(self, text: str) -> None:
        """Show `text` beside the bar, or print it as a line if the last line is old enough."""
        if self._bar is not None:
            self._bar.update(self._task, note=text)
        elif self._shown and (time.monotonic() - self._printed >= self._seconds or self.done == self.total):
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
