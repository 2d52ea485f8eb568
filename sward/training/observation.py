"""What a run says about itself while it trains, without waiting for the device between two log steps."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sward import distributed
from sward.training.step import StepOutput


class NonFiniteLossError(FloatingPointError):
    """The loss of a batch is infinite or not a number."""


class Stopwatch:
    """Seconds of training, added up over interruptions.

    Attributes:
        seconds: those before this watch was started.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since = time.perf_counter()

    def read(self) -> float:
        return self.seconds + time.perf_counter() - self._since

    def start(self, seconds: float = 0.0) -> None:
        """Goes on from `seconds`."""
        self.seconds, self._since = seconds, time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out what happens inside."""
        seconds = self.read()
        yield
        self.start(seconds)


class LossWatch:
    """Remembers the losses since the last look and finds the first one that is not finite.

    Looking costs a wait for the device, so the trainer looks when it logs and before it saves anything: a checkpoint
    never holds weights behind a loss that nobody looked at.
    """

    def __init__(self) -> None:
        self._recent: list[tuple[int, StepOutput, Sequence[str]]] = []

    def remember(self, step: int, output: StepOutput, names: Sequence[str]) -> None:
        """Takes note of a step, without a look.

        Args:
            step: its number.
            output: its losses; their graph is not kept.
            names: of the images of the batch.
        """
        self._recent.append((step, output._replace(loss=output.loss.detach()), names))

    def check(self) -> None:
        """Looks at every loss since the last call. All processes call this at the same steps.

        Raises:
            NonFiniteLossError: with the first bad step, its terms and the images of its batch, on every process.
        """
        recent, self._recent = self._recent, []
        finite = torch.stack([output.loss for _, output, _ in recent]).isfinite().tolist() if recent else []
        bad = next((remembered for remembered, good in zip(recent, finite) if not good), None)
        first = distributed.lowest(sys.maxsize if bad is None else bad[0])
        if first == sys.maxsize:
            return
        found = None if bad is None or bad[0] != first else (_numbers(bad[1].terms), list(bad[2]))
        terms, names = next(each for each in distributed.gather(found) if each is not None)
        shown = ", ".join(f"{name} {value:g}" for name, value in terms.items())
        raise NonFiniteLossError(
            f"the loss of step {first} is not finite ({shown}) for the images {', '.join(names)}; "
            "the checkpoints written before are kept"
        )


class Throughput:
    """Images per second of training, all processes together.

    Args:
        batch: images of one step on all processes.
        step: steps taken before.
        seconds: of training that they took.
    """

    def __init__(self, batch: int, step: int, seconds: float) -> None:
        self._batch, self._step, self._seconds = batch, step, seconds

    def until(self, step: int, seconds: float) -> float:
        """The rate since the last call."""
        rate = self._batch * (step - self._step) / max(seconds - self._seconds, 1e-9)
        self._step, self._seconds = step, seconds
        return rate


def losses_of(output: StepOutput) -> dict[str, Any]:
    """The numbers of a step as they go into `metrics.jsonl`, averaged over all processes; waits for the device."""
    parts = {"terms": output.terms, "weighted": output.weighted, "diagnostics": output.diagnostics}
    tensors = [output.loss.detach(), *(value for part in parts.values() for value in part.values())]
    values = iter(distributed.mean(torch.stack([tensor.float() for tensor in tensors])).tolist())
    loss = next(values)
    named = {part: {name: next(values) for name in terms} for part, terms in parts.items()}
    record = {"loss": loss, **named["terms"], "weighted": named["weighted"]}
    return record | ({"diagnostics": named["diagnostics"]} if output.diagnostics else {})


def forget_peak_memory(device: torch.device) -> bool:
    """Starts `peak_memory` anew from what is in use now; False where the system cannot.

    What earlier work left with the allocator is handed back first, so that it does not count.
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
    """Most bytes in use so far: tensors on a GPU, the whole process on a CPU; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: after fork and exec it still counts the process that this one was started from.
        sizes = (line.split() for line in status.read_text(encoding="utf-8").splitlines())
        return next((int(words[1]) * 1024 for words in sizes if words[0] == "VmHWM:"), None)
    try:
        import resource
    except ImportError:  # Windows
        return None
    # Linux counts KiB, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _numbers(terms: dict[str, Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in terms.items()}
