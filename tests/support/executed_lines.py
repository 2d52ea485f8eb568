"""Counts the lines of Python that run: work that does not depend on how busy the machine is."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import Any


@contextmanager
def at_each_line(act: Callable[[], None], *modules: ModuleType) -> Iterator[None]:
    """Call `act` before each line of `modules` that this thread runs."""
    files = {module.__file__ for module in modules}

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            act()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def count_lines(work: Callable[[], object], *modules: ModuleType) -> int:
    """Return how many lines of `modules` run in `work`; a line in a loop counts each time."""
    count = 0

    def add() -> None:
        nonlocal count
        count += 1

    with at_each_line(add, *modules):
        work()
    return count


@contextmanager
def killed_at_line(number: int, *modules: ModuleType) -> Iterator[None]:
    """Send this process SIGKILL before the line of `modules` that is the `number`-th to run, from 0."""
    lines = itertools.count()

    def kill() -> None:
        if next(lines) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    with at_each_line(kill, *modules):
        yield
