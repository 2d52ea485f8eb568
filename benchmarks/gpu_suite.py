"""Everything to run first on a GPU: is it right there, and how fast is it? One command, fifteen minutes on an H100.

    python benchmarks/gpu_suite.py                     # all parts, to benchmarks/results/NAME-OF-THE-DEVICE/
    python benchmarks/gpu_suite.py --parts tests bf16  # some of them
    python benchmarks/gpu_suite.py --seconds 570       # as far as it comes in this time; the same command goes on
    python benchmarks/gpu_suite.py --rehearse          # tiny sizes in Triton's interpreter: no GPU, no times

Each part runs in a process of its own under a time limit, and its rows are kept as they come. Run the command again to
go on: parts that are done are not repeated, and neither are rows that a part has already measured, unless they failed;
delete the folder to start over. `report.md` in the folder holds one table of all rows. The exit status is 1 if anything
failed or is left.

Times are those of the device: while the host prepares a call, the device waits in a kernel that does nothing, and the
clock starts after it, behind a write that flushes the L2 cache. Each time is the median of several calls. Only part
`step` times what a training loop waits for, with the host and in few rounds; its notes say so. Backward is timed alone,
through a retained graph; `eager` computes its gradients in the forward pass. `copy` moves as many bytes as the
operation must read and write at least; `sdpa` moves more, and has no GB/s.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_parts.correctness import check, run_tests
from gpu_parts.counters import count
from gpu_parts.rows import COLUMNS, REPOSITORY, Row, Suite, has_failed, read_rows
from gpu_parts.timings import compare_tiles, time_compiled, time_dtype, time_others, time_step

RESULTS = Path(__file__).parent / "results"


class Part(NamedTuple):
    run: Callable[[Suite], None]
    seconds: int
    """The time limit. All of them together fit fifteen minutes."""


PARTS = {  # what says most first
    "checks": Part(check, 70),
    "bf16": Part(time_dtype("bf16"), 80),
    "tests": Part(run_tests, 180),
    "fp32": Part(time_dtype("fp32"), 75),
    "tf32": Part(time_dtype("tf32"), 55),
    "fp16": Part(time_dtype("fp16"), 45),
    "tiles": Part(compare_tiles, 120),
    "others": Part(time_others, 50),
    "step": Part(time_step, 80),
    "compiled": Part(time_compiled, 100),
    "counters": Part(count, 45),
}


def run_part(name: str, folder: Path, rehearsal: bool, seconds: float) -> str:
    """Run one part to its end or its limit; return how it ended.

    A part that an error ends, after which the device would refuse everything, starts again behind the row that failed.
    """
    if rehearsal:  # in this process: starting eleven would take longer than what they do
        PARTS[name].run(Suite(name, folder, rehearsal))
        code = 0
    else:
        command = [sys.executable, __file__, "--run", name, "--out", str(folder)]
        limit = time.monotonic() + seconds
        before: list[Row] = []
        while True:
            try:
                code = _run_process(command, limit - time.monotonic())
            except subprocess.TimeoutExpired:
                return f"stopped after {seconds:.0f} s"
            after = read_rows(folder / f"{name}.jsonl")
            if code == 0 or after == before:
                break
            before = after
            command = [*command, "--keep-failed"]
    if code != 0:
        return f"failed with status {code}"
    return "done" if read_rows(folder / f"{name}.jsonl") else "failed: it left no row"


def _run_process(command: list[str], seconds: float) -> int:
    """Return the exit status of a command; however this ends, nothing of the command goes on."""
    # The signal of an outer time limit must not leave a process behind that keeps the GPU.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    process = subprocess.Popen(command, start_new_session=True, cwd=REPOSITORY)
    try:
        return process.wait(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # a test run has processes of its own
            process.wait()
        signal.signal(signal.SIGTERM, before)


def is_done(end: str | None, rows: list[Row]) -> bool:
    """Whether a part that ended so, with these rows, need not run again."""
    return (end or "").startswith("done") and rows != [] and not any(map(has_failed, rows))


def write_report(folder: Path, device: str, ends: dict[str, str]) -> Path:
    """Write the table of all rows of all parts."""
    lines = [
        f"# {device}",
        "",
        f"torch {torch.__version__}, {datetime.date.today().isoformat()}. Made by `python benchmarks/gpu_suite.py`, "
        "which says what the columns mean.",
        "",
        *(f"- {name}: {end}" for name, end in ends.items()),
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    for name in PARTS:
        for row in read_rows(folder / f"{name}.jsonl"):
            cells = [_cell(column, row.get(column, "")) for column in COLUMNS]
            lines.append("| " + " | ".join(cells) + " |")
    path = folder / "report.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _cell(column: str, value: Any) -> str:
    if isinstance(value, float):
        value = f"{value:.1e}" if column == "error" else f"{value:.4f}" if column == "ms" else f"{value:.1f}"
    return str(value).replace("|", "/")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all, in this order")
    parser.add_argument("--out", type=Path, help="folder of the results; default: the device's, in benchmarks/results")
    parser.add_argument("--seconds", type=float, help="stop after this time; the same command goes on")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes in the interpreter, to see that all runs")
    parser.add_argument("--run", choices=PARTS, help=argparse.SUPPRESS)  # one part, in this process
    parser.add_argument("--keep-failed", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    began = time.monotonic()
    if options.seconds is not None and not options.seconds > 0:
        parser.error(f"--seconds must be more than 0, got {options.seconds:g}")
    if options.rehearse:
        if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
            parser.error("--rehearse needs TRITON_INTERPRET=1 before Triton is imported")
        os.environ["TRITON_INTERPRET"] = "1"
        sys.path.append(str(REPOSITORY))
        import tests.support.interpreter  # noqa: F401  (makes it fast)
    elif not torch.cuda.is_available():
        parser.error("the suite needs a GPU; --rehearse runs it without one, in Triton's interpreter")
    device = "rehearsal without a GPU" if options.rehearse else torch.cuda.get_device_name()
    folder = options.out or RESULTS / re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-")
    folder = folder.resolve()  # the parts run in the repository
    folder.mkdir(parents=True, exist_ok=True)
    if options.run:
        PARTS[options.run].run(Suite(options.run, folder, rehearsal=False, keep_failed=options.keep_failed))
        return 0
    state = folder / "parts.json"
    ends: dict[str, str] = json.loads(state.read_text(encoding="utf-8")) if state.exists() else {}
    for name in options.parts:
        if is_done(ends.get(name), read_rows(folder / f"{name}.jsonl")):
            print(f"{name}: done before")
            continue
        begun = time.monotonic()
        limit = float(PARTS[name].seconds)
        if options.seconds is not None:
            limit = min(limit, options.seconds - (begun - began))
        if limit <= 0:
            print(f"stopped before {name}, after {options.seconds:g} s; run the same command again")
            break
        print(f"{name}, at most {limit:.0f} s", flush=True)
        end = run_part(name, folder, options.rehearse, limit)
        ends[name] = f"{end} ({time.monotonic() - begun:.0f} s)"
        state.write_text(json.dumps(ends, indent=1), encoding="utf-8")
        write_report(folder, device, ends)
    print(f"written: {write_report(folder, device, ends)}")
    wanted = [name for name in PARTS if name in options.parts or name in ends]
    return 0 if all(is_done(ends.get(name), read_rows(folder / f"{name}.jsonl")) for name in wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
