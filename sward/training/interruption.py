"""Ctrl-C and SIGTERM as a wish to stop: the trainer finishes its step and saves a checkpoint first."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from sward import distributed


class TrainingInterrupted(KeyboardInterrupt):
    """A run was ended by a signal, after a checkpoint. The message says how to go on.

    Args:
        cause: the signal.
        step: steps taken.
        steps: of the whole run.
        run: its folder.

    Attributes:
        exit_code: by convention 128 plus the signal's number: 130 after Ctrl-C, 143 after SIGTERM.
    """

    def __init__(self, cause: signal.Signals, step: int, steps: int, run: Path) -> None:
        super().__init__(
            f"stopped by {cause.name} after step {step} of {steps}, with a checkpoint in {run}; "
            "continue with the same command; 'sward train' and 'train-teacher' need --resume with it"
        )
        self.exit_code = 128 + cause


class Interruption:
    """Catches SIGINT and SIGTERM while it is entered, and only remembers them.

    A second signal of the same kind ends the process at once, as if nobody caught it. Under `torchrun` it does not:
    a Ctrl-C in the terminal reaches every process twice there, from the terminal and from `torchrun`.

    Outside the main thread Python allows no handlers; nothing is caught then.
    """

    def __init__(self) -> None:
        self._caught = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self) -> signal.Signals | None:
        """The signal that any process has caught, or None. All processes call this at the same steps."""
        caught = -distributed.lowest(-self._caught)
        return signal.Signals(caught) if caught else None

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._caught = number
        if "TORCHELASTIC_RUN_ID" in os.environ:
            return
        before = self._before[number]
        if before == signal.SIG_IGN:  # as a shell leaves it for what it starts in the background
            before = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, before)
