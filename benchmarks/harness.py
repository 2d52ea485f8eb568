"""One way to time, weigh and check several implementations of one operation side by side.

A benchmark script describes each workload as a `Case` and each implementation as a `Provider`; `measure` does the
rest and `Session` prints and saves it. Five rules hold for every number that comes out of here:

* Correctness first. Every provider is compared with the case's float64 oracle before anything is timed. While one
  provider of a case is wrong, no speed-up of that case is printed and the script exits with code 1.
* The device's time. On a GPU, the time that Python takes to launch a call is not in its time.
* One run. Providers are timed in turn, round by round, so that a slow spell of the machine hits all of them.
* Memory as in training. On a CPU freed memory is kept (`sward.training.keep_freed_memory`): no provider pays for pages.
* No invented numbers. Without a GPU the Triton kernels are not timed, and the banner says so.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from result_rows import merge_rows
from sward.training import keep_freed_memory

# Larger than the last-level cache of every GPU in use, so that no provider finds its input cached by the one before.
_CACHE_FLUSH_BYTES = 256 * 2**20
# Seconds; a call whose host needs longer waits for the device, or is bound by the host in any case.
_LONGEST_HOST_TIME = 0.05


@dataclass(frozen=True)
class Provider:
    """One implementation under test.

    `run` does one complete pass (forward and backward, or forward alone) and returns what it computed, by name, for
    the gate: the loss and the gradients. It must not accumulate into `.grad`; use `torch.autograd.grad`.
    """

    name: str
    run: Callable[[], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """One workload: what it is called, what is right, and the least traffic that could compute it.

    `oracle` holds float64 results by the names that providers return. `tolerance` bounds, for each of them, the
    largest absolute error divided by the largest absolute value of the oracle. `ideal_bytes` counts each input read
    and each output written once per pass. `baseline` names the provider that speed-ups are quoted against.
    """

    name: str
    oracle: Mapping[str, Tensor]
    tolerance: float
    ideal_bytes: int
    baseline: str
    mode: str = "forward+backward"


@dataclass(frozen=True)
class Measurement:
    """Times in milliseconds, memory in bytes; `error` is the worst relative error against the oracle."""

    case: str
    mode: str
    provider: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    peak_extra_bytes: int
    ideal_bytes: int
    error: float
    tolerance: float

    @property
    def gate_is_green(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


def worst_error(results: Mapping[str, Tensor], oracle: Mapping[str, Tensor]) -> float:
    """Largest absolute error over largest absolute oracle value, the worst over the names in `oracle`.

    A missing result, a wrong shape or a value that is not finite counts as an infinite error.
    """
    worst = 0.0
    for name, expected in oracle.items():
        actual = results.get(name)
        if actual is None or actual.shape != expected.shape or not bool(torch.isfinite(actual).all()):
            return float("inf")
        scale = expected.abs().max().item() or 1.0
        worst = max(worst, (actual.detach().to(expected) - expected).abs().max().item() / scale)
    return worst


def peak_extra_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes alive at once during `run()` beyond those alive before it, results included.

    On the CPU the profiler's allocator events are added up, which sees every allocation that goes through PyTorch's
    allocator, those of compiled code too, and repeats exactly. On a GPU it is `max_memory_allocated`.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        run()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def device_milliseconds(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Return the median time of `run()` on the device, host time excluded; on a CPU, of the call.

    The first call, which may compile, is not timed.
    """
    run()
    timer = _Timer(device)
    timer(run)
    return statistics.median(timer(run) for _ in range(rounds))


class _Timer:
    """Measures one call in milliseconds. On a GPU this is the time of what the call launches, not of launching it.

    A device that waits for the host would measure Python. So it is kept busy while the host prepares: first it flushes
    its cache, then it waits for longer than the host took before, and only then comes the event that starts the clock.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush: Tensor | None = None
        self._cycles_per_second = 0.0
        self._host_seconds: dict[Callable[[], object], float] = {}
        if device.type == "cuda":
            self._flush = torch.empty(_CACHE_FLUSH_BYTES, dtype=torch.int8, device=device)
            self._cycles_per_second = self._measure_clock()

    def _measure_clock(self) -> float:
        """Return the cycles of `torch.cuda._sleep` in a second."""
        cycles = 10_000_000
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(cycles)
        begin.record()
        torch.cuda._sleep(cycles)
        end.record()
        torch.cuda.synchronize(self.device)
        return cycles / begin.elapsed_time(end) * 1e3

    def __call__(self, run: Callable[[], object]) -> float:
        if self._flush is None:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e3
        if run not in self._host_seconds:
            self._host_seconds[run] = self._host_time(run)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        torch.cuda._sleep(int(self._cycles_per_second * (2 * self._host_seconds[run] + 1e-4)))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize(self.device)
        return begin.elapsed_time(end)

    def _host_time(self, run: Callable[[], object]) -> float:
        """Return the seconds until `run` has launched everything; a call that waits for the device takes them all."""
        run()
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        torch.cuda.synchronize(self.device)
        return min(seconds, _LONGEST_HOST_TIME)


def measure(
    case: Case,
    providers: Sequence[Provider],
    device: torch.device,
    *,
    rounds: int = 15,
    max_seconds: float = 30.0,
) -> list[Measurement]:
    """Check, weigh and time every provider of one case.

    The gate's run is also the warm-up (compilation included). At least three rounds are timed; after that no new
    round starts once `max_seconds` have passed.
    """
    errors = {provider.name: worst_error(provider.run(), case.oracle) for provider in providers}
    memory = {provider.name: peak_extra_bytes(provider.run, device) for provider in providers}
    timer = _Timer(device)
    times: dict[str, list[float]] = {provider.name: [] for provider in providers}
    gc.collect()
    gc.disable()
    try:
        started = time.perf_counter()
        for index in range(rounds):
            if index >= 3 and time.perf_counter() - started > max_seconds:
                break
            for provider in providers:
                times[provider.name].append(timer(provider.run))
    finally:
        gc.enable()
    quantiles = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    rows = []
    for provider in providers:
        samples = torch.tensor(times[provider.name], dtype=torch.float64)
        p20, p50, p80 = torch.quantile(samples, quantiles).tolist()
        rows.append(
            Measurement(
                case.name,
                case.mode,
                provider.name,
                p20,
                p50,
                p80,
                memory[provider.name],
                case.ideal_bytes,
                errors[provider.name],
                case.tolerance,
            )
        )
    return rows


def require_positive(parser: argparse.ArgumentParser, options: argparse.Namespace, *names: str) -> None:
    """End with a usage error unless each of these options, or every number of it, is None or more than 0."""
    for name in names:
        given = getattr(options, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and not value > 0:
                parser.error(f"--{name.replace('_', '-')} must be more than 0, got {value}")


def device_of(parser: argparse.ArgumentParser, name: str) -> torch.device:
    """Return the device that `--device` names; end with a usage error if this machine has none."""
    device = None
    with contextlib.suppress(RuntimeError):
        device = torch.device(name)
    if device is None or device.type not in ("cpu", "cuda"):
        parser.error(f"--device must be cpu or cuda, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        parser.error(f"--device {name} needs a GPU that this machine does not have")
    return device


def _versions() -> dict[str, str]:
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "absent"
    return {"torch": torch.__version__, "triton": triton_version, "python": platform.python_version()}


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@dataclass
class Session:
    """Collects the measurements of one script run: banner, tables, CSV file and exit code."""

    benchmark: str
    device: torch.device
    measurements: list[Measurement] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.device.type == "cpu":
            keep_freed_memory()

    @property
    def device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{_processor_name()}, {torch.get_num_threads()} threads"

    def print_banner(self) -> None:
        """One block that says where the numbers below were taken, and what could not be taken."""
        versions = ", ".join(f"{name} {version}" for name, version in _versions().items())
        print(f"{self.benchmark} on {self.device_name} ({versions})")
        if self.device.type != "cuda":
            print("Triton kernels not timed: no GPU. `python -m sward_kernels.report` shows how they compile.")

    def run(
        self,
        case: Case,
        providers: Sequence[Provider],
        *,
        rounds: int = 15,
        max_seconds: float = 30.0,
    ) -> list[Measurement]:
        """`measure` the case, keep the rows and print its table."""
        rows = measure(case, providers, self.device, rounds=rounds, max_seconds=max_seconds)
        self.measurements += rows
        self._print_table(case, rows)
        return rows

    def _print_table(self, case: Case, rows: Sequence[Measurement]) -> None:
        green = all(row.gate_is_green for row in rows)
        baseline = next(row for row in rows if row.provider == case.baseline)
        width = max(len(row.provider) for row in rows)
        width = max(width, len("ideal bytes"))
        print(f"\n{case.name}, {case.mode}")
        print(
            f"{'provider':<{width}}  {'p20 ms':>9}  {'p50 ms':>9}  {'p80 ms':>9}  {'peak MiB':>9}"
            f"  {'GB/s':>7}  {'error':>8}  speed-up over {case.baseline}"
        )
        for row in rows:
            speed_up = f"{baseline.p50_ms / row.p50_ms:.2f}x" if green else "withheld"
            mark = "" if row.gate_is_green else f"  WRONG (tolerance {row.tolerance:.0e})"
            print(
                f"{row.provider:<{width}}  {row.p20_ms:>9.3f}  {row.p50_ms:>9.3f}  {row.p80_ms:>9.3f}"
                f"  {row.peak_extra_bytes / 2**20:>9.1f}  {row.ideal_bytes / row.p50_ms / 1e6:>7.2f}"
                f"  {row.error:>8.1e}  {speed_up}{mark}"
            )
        print(f"{'ideal bytes':<{width}}  {'':>9}  {'':>9}  {'':>9}  {case.ideal_bytes / 2**20:>9.1f}")
        if not green:
            print("A provider disagrees with the float64 oracle: no speed-up is reported for this case.")

    @property
    def exit_code(self) -> int:
        return 0 if all(row.gate_is_green for row in self.measurements) else 1

    def write_csv(self, path: Path) -> None:
        """Write every measurement of this session, one row each, with device, versions and time of writing.

        The file keeps its rows of other cases.
        """
        context = {
            "timestamp": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "benchmark": self.benchmark,
            "device": self.device_name,
            **_versions(),
        }
        rows = [
            {
                **context,
                "case": row.case,
                "mode": row.mode,
                "provider": row.provider,
                "p20_ms": f"{row.p20_ms:.4f}",
                "p50_ms": f"{row.p50_ms:.4f}",
                "p80_ms": f"{row.p80_ms:.4f}",
                "peak_extra_bytes": row.peak_extra_bytes,
                "ideal_bytes": row.ideal_bytes,
                "error": f"{row.error:.3e}",
                "tolerance": f"{row.tolerance:.0e}",
                "gate": "green" if row.gate_is_green else "red",
            }
            for row in self.measurements
        ]
        merge_rows(path, rows, key=("case",))
        print(f"wrote {path}")
