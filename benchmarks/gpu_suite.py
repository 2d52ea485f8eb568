"""Everything to run first on a GPU: is it right there, and how fast is it? One command, fifteen minutes on an H100.

    python benchmarks/gpu_suite.py                     # all parts, to benchmarks/results/NAME-OF-THE-DEVICE/
    python benchmarks/gpu_suite.py --parts tests bf16  # some of them
    python benchmarks/gpu_suite.py --rehearse          # tiny sizes in Triton's interpreter: no GPU, no times

Each part runs in a process of its own under a time limit, and its rows are kept as they come. Run the command again to
go on: parts that are done are not repeated, and neither are rows that a part has already measured, unless they failed;
delete the folder to start over. `report.md` in the folder holds one table of all rows. The exit status is 1 if anything
failed.

Times are those of the device: while the host prepares a call, the device waits in a kernel that does nothing, and the
clock starts after it, behind a write that flushes the L2 cache. Each time is the median of several calls. Backward is
timed alone, through a retained graph; `eager` computes its gradients in the forward pass. `copy` moves as many bytes as
the operation must read and write at least.
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
from gpu_parts.rows import COLUMNS, REPOSITORY, Suite, has_failed, read_rows
from gpu_parts.timings import compare_tiles, time_compiled, time_dtype, time_others, time_step

RESULTS = Path(__file__).parent / "results"


class Part(NamedTuple):
    run: Callable[[Suite], None]
    seconds: int
    """The time limit. All of them together fit fifteen minutes."""


PARTS = {
    "tests": Part(run_tests, 200),
    "checks": Part(check, 70),
    "bf16": Part(time_dtype("bf16"), 80),
    "fp32": Part(time_dtype("fp32"), 75),
    "tf32": Part(time_dtype("tf32"), 60),
    "fp16": Part(time_dtype("fp16"), 45),
    "tiles": Part(compare_tiles, 80),
    "others": Part(time_others, 50),
    "step": Part(time_step, 90),
    "compiled": Part(time_compiled, 90),
    "counters": Part(count, 45),
}


def run_part(name: str, folder: Path, rehearsal: bool) -> str:
    """Run one part to its end or its limit; return how it ended."""
    if rehearsal:  # in this process: starting eleven would take longer than what they do
        PARTS[name].run(Suite(name, folder, rehearsal))
        return "done"
    process = subprocess.Popen(
        [sys.executable, __file__, "--run", name, "--out", str(folder)], start_new_session=True, cwd=REPOSITORY
    )
    try:
        code = process.wait(timeout=PARTS[name].seconds)
        return "done" if code == 0 else f"failed with status {code}"
    except subprocess.TimeoutExpired:
        return f"stopped after {PARTS[name].seconds} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # a test run has processes of its own
            process.wait()


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
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes in the interpreter, to see that all runs")
    parser.add_argument("--run", choices=PARTS, help=argparse.SUPPRESS)  # one part, in this process
    options = parser.parse_args(arguments)
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
    folder.mkdir(parents=True, exist_ok=True)
    if options.run:
        PARTS[options.run].run(Suite(options.run, folder, rehearsal=False))
        return 0
    state = folder / "parts.json"
    ends: dict[str, str] = json.loads(state.read_text(encoding="utf-8")) if state.exists() else {}
    for name in options.parts:
        if ends.get(name, "").startswith("done") and not any(map(has_failed, read_rows(folder / f"{name}.jsonl"))):
            print(f"{name}: done before")
            continue
        began = time.perf_counter()
        print(f"{name}, at most {PARTS[name].seconds} s", flush=True)
        end = run_part(name, folder, options.rehearse)
        ends[name] = f"{end} ({time.perf_counter() - began:.0f} s)"
        state.write_text(json.dumps(ends, indent=1), encoding="utf-8")
        write_report(folder, device, ends)
    print(f"written: {write_report(folder, device, ends)}")
    rows = [row for name in PARTS for row in read_rows(folder / f"{name}.jsonl")]
    return 1 if any(map(has_failed, rows)) or not all(end.startswith("done") for end in ends.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
