"""Graceful shutdown: on Ctrl-C or SIGTERM the trainer finishes its step and saves a checkpoint before it stops."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from sward import distributed


class TrainingInterrupted(KeyboardInterrupt):
    """A signal stopped the run after it saved a checkpoint. The message says how to resume.

    Args:
        cause: the signal.
        step: steps taken.
        steps: steps of the whole run.
        run: folder of the run.

    Attributes:
        exit_code: by convention 128 plus the signal's number: 130 after Ctrl-C, 143 after SIGTERM.
    """

    def __init__(self, cause: signal.Signals, step: int, steps: int, run: Path) -> None:
        super().__init__(
            f"stopped by {cause.name} after step {step} of {steps}, with a checkpoint in {run}; "
            "resume with the same command; 'sward train' and 'train-teacher' also need --resume"
        )
        self.exit_code = 128 + cause


class Interruption:
    """Context manager that records SIGINT and SIGTERM instead of letting them end the process.

    A second signal of the same kind has its usual effect. Under `torchrun` it is ignored, because there a Ctrl-C in the
    terminal reaches every process twice: from the terminal and from `torchrun`.

    Outside the main thread Python allows no signal handlers, so nothing is caught.
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
        """Return the signal that any process caught, or None. All processes must call this at the same steps."""
        caught = -distributed.lowest(-self._caught)
        return signal.Signals(caught) if caught else None

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._caught = number
        if "TORCHELASTIC_RUN_ID" in os.environ:
            return
        before = self._before[number]
        if before == signal.SIG_IGN:  # the default of background jobs in a shell
            before = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, before)
