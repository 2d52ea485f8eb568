"""Measurements of a run while it trains; between two log steps they never wait for the device."""

from __future__ import annotations

import ctypes
import gc
import operator
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from sward import distributed
from sward.training.step import StepOutput


class NonFiniteLossError(FloatingPointError):
    """The loss of a batch, or a weight after it, is infinite or not a number."""


class Stopwatch:
    """Seconds of training, accumulated over interruptions.

    Attributes:
        seconds: seconds before the last start.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since = time.perf_counter()

    def read(self) -> float:
        return self.seconds + time.perf_counter() - self._since

    def start(self, seconds: float = 0.0) -> None:
        """Start from `seconds`."""
        self.seconds, self._since = seconds, time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time spent in the block."""
        seconds = self.read()
        try:
            yield
        finally:
            self.start(seconds)


class LossWatch:
    """Store the losses since the last check and find the first one that is not finite.

    A check waits for the device, so the trainer checks only when it logs and before it saves: a checkpoint never holds
    weights that come after an unchecked loss.
    """

    def __init__(self) -> None:
        self._recent: list[tuple[int, StepOutput, Sequence[str], dict[str, Tensor]]] = []

    def remember(
        self, step: int, output: StepOutput, names: Sequence[str], inputs: Mapping[str, Tensor] | None = None
    ) -> None:
        """Store the losses of a step without checking them.

        Args:
            step: number of the step.
            output: losses of the step; their graph is not kept.
            names: names of the images in the batch.
            inputs: what the step read, by name, each `[B, ...]` in the order of `names`; whatever of it is not finite
                is named too.
        """
        # A sum is not finite where a summand is not: one small tensor instead of a map of flags.
        sums = {name: maps.detach().flatten(1).sum(1, dtype=torch.float32) for name, maps in (inputs or {}).items()}
        self._recent.append((step, output._replace(loss=output.loss.detach()), names, sums))

    def check(self) -> None:
        """Check every loss since the last call. All processes must call this at the same steps.

        Raises:
            NonFiniteLossError: on every process; names the first bad step, its terms and the images of its batch.
        """
        recent, self._recent = self._recent, []
        finite = torch.stack([output.loss for _, output, *_ in recent]).isfinite().tolist() if recent else []
        bad = next((remembered for remembered, good in zip(recent, finite) if not good), None)
        first = distributed.lowest(sys.maxsize if bad is None else bad[0])
        if first == sys.maxsize:
            return
        found = None
        if bad is not None and bad[0] == first:
            found = (_numbers(bad[1].terms), list(bad[2]), _first_not_finite(bad[3], bad[2]))
        terms, names, cause = next(each for each in distributed.gather(found) if each is not None)
        shown = ", ".join(f"{name} {value:g}" for name, value in terms.items())
        raise NonFiniteLossError(
            f"the loss of step {first} is not finite ({shown}) for the images {', '.join(names)}{cause}; "
            "earlier checkpoints are kept"
            + ("" if cause else "; try a lower --optimizer.lr or --optimizer.clip-norm 1")
        )


class CollapseWatch:
    """Warns once per process when the teacher's projections of a stage have collapsed and stay so.

    A stage has collapsed when one sign of `sward.losses.relation_health` is beyond its limit in `WINDOW` log lines in
    a row; a few bad lines at the start of a run are none. Only the teacher's side counts: the student's follows it.
    """

    WINDOW = 10
    """Log lines in a row; 200 steps at the default `log_every`."""
    LIMITS: ClassVar[dict[str, tuple[str, Callable[[float, float], bool], float]]] = {
        # One direction holds nearly all of the values.
        "value_rank": ("effective rank of the values", operator.le, 1.5),
        # Values are within 8 degrees of each other. Healthy stages have 0.2 to 0.7, and up to 0.97 where small windows
        # lie on a smooth map; learned projections reached 0.995 within 50 steps.
        "value_cosine": ("mean |cosine| of two values", operator.ge, 0.99),
        # Scores spread by 0.06: every key gets the same attention to 6 %. Healthy stages reach 0.998, learned
        # projections of standardised features 0.9998.
        "attention_entropy": ("entropy of the attention", operator.ge, 0.9995),
    }
    """Sign -> what it is, comparison and limit."""

    def __init__(self) -> None:
        self._lines: dict[str, int] = {}
        self._warned = False

    def look(self, diagnostics: Mapping[str, float]) -> None:
        """Note the diagnostics of one log line (`stage0/teacher/value_rank`, ...); they are alike on all processes."""
        for name, value in diagnostics.items():
            stage, _, sign = name.partition("/teacher/")
            if sign not in self.LIMITS:
                continue
            title, beyond, limit = self.LIMITS[sign]
            self._lines[name] = self._lines.get(name, 0) + 1 if beyond(value, limit) else 0
            if self._lines[name] < self.WINDOW or self._warned:
                continue
            self._warned = True
            if distributed.is_main():
                warnings.warn(
                    f"the teacher's projections of {stage} have collapsed: {title} {value:.4g} (limit {limit:g} for "
                    f"{self.WINDOW} log lines), so there is no relation left to distil; "
                    "use --sward.teacher-projections frozen --sward.teacher-normalization standardize",
                    stacklevel=2,
                )


class Throughput:
    """Images per second of training, over all processes.

    Args:
        batch: images per step, with and without labels, over all processes.
        step: steps taken so far.
        seconds: seconds of training so far.
    """

    def __init__(self, batch: int, step: int, seconds: float) -> None:
        self._batch, self._step, self._seconds = batch, step, seconds

    def until(self, step: int, seconds: float) -> float:
        """Return the rate since the last call."""
        rate = self._batch * (step - self._step) / max(seconds - self._seconds, 1e-9)
        self._step, self._seconds = step, seconds
        return rate


def losses_of(output: StepOutput) -> dict[str, Any]:
    """Return the losses of a step for `metrics.jsonl`, averaged over all processes; waits for the device."""
    parts = {"terms": output.terms, "weighted": output.weighted, "diagnostics": output.diagnostics}
    tensors = [output.loss.detach(), *(value for part in parts.values() for value in part.values())]
    values = iter(distributed.mean(torch.stack([tensor.float() for tensor in tensors])).tolist())
    loss = next(values)
    named = {part: {name: next(values) for name in terms} for part, terms in parts.items()}
    record = {"loss": loss, **named["terms"], "weighted": named["weighted"]}
    return record | ({"diagnostics": named["diagnostics"]} if output.diagnostics else {})


def forget_peak_memory(device: torch.device) -> bool:
    """Reset `peak_memory` to the memory in use now; return False if the system does not support it.

    Memory that the allocator cached is released first, so that it does not count.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        # proc(5): writing 5 sets the peak resident size of the process to its current one.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except (OSError, AttributeError):
        return False
    return True


def peak_memory(device: torch.device) -> int | None:
    """Return the peak number of bytes in use: tensors on a GPU, the whole process on a CPU; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: after fork and exec it still counts the parent process.
        sizes = (line.split() for line in status.read_text(encoding="utf-8").splitlines())
        return next((int(words[1]) * 1024 for words in sizes if words[0] == "VmHWM:"), None)
    try:
        import resource
    except ImportError:  # Windows
        return None
    # Linux counts KiB, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _first_not_finite(sums: Mapping[str, Tensor], names: Sequence[str]) -> str:
    """Say which input of a step is not finite first, and for which image; nothing if all are."""
    for where, each in sums.items():
        for name, finite in zip(names, each.isfinite().tolist()):
            if not finite:
                return f", where {where} is not finite for {name}"
    return ""


def _numbers(terms: dict[str, Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in terms.items()}
