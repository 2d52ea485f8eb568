"""`python -m sward_kernels.report`: resources of every shipped Triton kernel on every target, without a GPU.

Each configuration is compiled ahead of time in a subprocess (Triton decides once per process whether it interprets),
and its registers, spills, stack and shared memory are read from the compiler's output. Times are bounds from the data
sheet's bandwidth, not measurements; cycles are counted or simulated (`simulation.py`). Rows are stored in Triton's
cache, so an interrupted report resumes. `--output` writes `kernel_resources.csv` with every row, and
`kernel_resources.md` with the worst of each group.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from sward_kernels.resources import Configuration, Row, resources_of
from sward_kernels.simulation import LATENCIES, PIPES
from sward_kernels.targets import TARGETS, Target

OPERATIONS = {
    "windowed_distillation": "windowed.plan",
    "prototypes": "prototypes.plan",
    "relational_kl": "relation.launch",
    "windowed_feature_distillation": "windowed_features.plan",
}
"""Operation -> the module of `sward_kernels` whose `configurations(target)` yields the shipped configurations."""

SECONDS_PER_CONFIGURATION = 600

COLUMNS = (
    "op", "pass", "target", "dtype", "precision", "layout", "window_size", "tokens", "channels", "dim", "tile",
    "num_warps", "registers", "spill_bytes", "stack_bytes", "shared_bytes", "shared_limit", "occupancy",
    "tensor_core_instructions", "vector_loads", "loads", "compile_seconds", "ideal_bytes", "flops", "unit",
    "bound_nanoseconds", "device_memory_cycles", "multiplications", *(f"{pipe}_cycles" for pipe in PIPES), "bound_pipe",
    "bound_cycles", "simulated_cycles",
)  # fmt: skip
"""Keys of one row. `occupancy` is resident warps divided by the most possible; `spill_bytes` and `stack_bytes` are per
thread; `vector_loads` are the 128-bit ones among `loads`; `compile_seconds` is processor time; `ideal_bytes` and
`flops` are per `unit`; `bound_nanoseconds` is `ideal_bytes` divided by the data sheet's bandwidth of the whole device,
a bound and not a measurement. `multiplications` are those on tensor cores. The others after it are cycles of one
multiprocessor per `unit`: what device memory takes at the data sheet's bandwidth, what each pipe takes at its full rate
(`simulation.PIPES`; the largest is `bound_cycles`), and `simulated_cycles` with assumed latencies. They rank tiles, are
None where a kernel is not simulated, and are not times."""


def configurations(operation: str, target: str) -> list[Configuration]:
    """Return the shipped configurations of one operation for one target."""
    module = importlib.import_module(f"sward_kernels.{OPERATIONS[operation]}")
    return list(module.configurations(TARGETS[target]))


def report(
    targets: Sequence[str], select: Callable[[Configuration], bool] = lambda _: True, progress: bool = False
) -> list[Row]:
    """Compile the shipped configurations in one process per CPU, and return one row per configuration and target.

    Args:
        targets: names of `TARGETS`.
        select: which configurations to compile; all by default.
        progress: whether to print the count of compiled rows to stderr.

    Raises:
        RuntimeError: if a configuration does not compile, with the last line of the compiler's output.
    """
    processes = os.cpu_count() or 1
    wanted = {
        (operation, target): [
            index for index, shipped in enumerate(configurations(operation, target)) if select(shipped)
        ]
        for target in targets
        for operation in OPERATIONS
    }
    total = sum(map(len, wanted.values()))
    # Long jobs waste little time on starting processes; several per process let all end at about the same time.
    length = max(8, total // (4 * processes))
    jobs = [
        (*which, indices[first : first + length])
        for which, indices in wanted.items()
        for first in range(0, len(indices), length)
    ]
    count = itertools.count(1)

    def rows_of(job: tuple[str, str, Sequence[int]]) -> list[Row]:
        rows = []
        for row in _in_subprocess(*job):
            rows.append(row)
            if progress:
                print(f"{next(count)} of {total} configurations compiled", file=sys.stderr, flush=True)
        return rows

    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        return [row for rows in pool.map(rows_of, jobs) for row in rows]


def _in_subprocess(operation: str, target: str, indices: Sequence[int]) -> Iterator[Row]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = str(Path(__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "sward_kernels.report", "--compile", operation, target, *map(str, indices)]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        assert process.stdout is not None
        with process:
            yield from (json.loads(line) for line in process.stdout if line.startswith("{"))
        if process.returncode:
            errors.seek(0)
            reason = (errors.read().strip().splitlines() or [f"exit code {process.returncode}"])[-1]
            raise RuntimeError(f"compiling {operation} for {target} failed: {reason}")


# -------------------------------------------------------------------------------------------------- in the subprocess


def _compile_and_print(operation: str, target: str, indices: Iterable[int]) -> None:
    def give_up(*_: object) -> None:
        raise TimeoutError(f"no result in {SECONDS_PER_CONFIGURATION} s")

    signal.signal(signal.SIGALRM, give_up)
    shipped = configurations(operation, target)
    for index in indices:
        signal.alarm(SECONDS_PER_CONFIGURATION)
        print(json.dumps(_row(shipped[index], TARGETS[target])), flush=True)
        signal.alarm(0)


def _row(configuration: Configuration, target: Target) -> Row:
    resources = resources_of(configuration, target)
    row = dict.fromkeys(COLUMNS) | configuration.details | resources
    return row | {
        "op": configuration.operation,
        "pass": configuration.direction,
        "target": target.name,
        "num_warps": configuration.num_warps,
        "shared_limit": target.shared_limit,
        "ideal_bytes": configuration.ideal_bytes,
        "flops": configuration.flops,
        "unit": configuration.unit,
        "bound_nanoseconds": round(configuration.ideal_bytes / target.bandwidth * 1e9, 3),
        "device_memory_cycles": round(
            configuration.ideal_bytes / target.bandwidth * target.clock * target.multiprocessors
        ),
    }


# ---------------------------------------------------------------------------------------------------- the command line


def summary(rows: Sequence[Row]) -> list[Row]:
    """Return one row per operation, type, layout and target, with the worst of its configurations."""
    keys = ("op", "dtype", "precision", "layout", "target")
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [
        dict(zip(keys, group))
        | {
            "rows": len(own),
            "most_stack_bytes": max(row["stack_bytes"] for row in own),
            "most_shared_bytes": max(row["shared_bytes"] for row in own),
            "shared_limit": own[0]["shared_limit"],
            "least_tensor_core_instructions": min(row["tensor_core_instructions"] for row in own),
            "least_vector_loads": min(row["vector_loads"] for row in own),
        }
        for group, own in groups.items()
    ]


def _table(rows: Sequence[Row], *, markdown: bool = False) -> str:
    names = list(rows[0])
    cells = [names, *[["-" if row[name] is None else str(row[name]) for name in names] for row in rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    separator = " | " if markdown else "  "
    lines = [separator.join(cell.rjust(width) for cell, width in zip(line, widths)) for line in cells]
    if markdown:
        lines.insert(1, "|".join("-" * (width + 1) + ":" for width in widths))
        lines = [f"|{line}|" if index == 1 else f"| {line} |" for index, line in enumerate(lines)]
    return "\n".join(lines)


NOTE = (
    "bound_nanoseconds is ideal_bytes over the data sheet's bandwidth ("
    + ", ".join(f"{target.name}: {target.device} {target.bandwidth / 1e12:g} TB/s" for target in TARGETS.values())
    + "): a bound, not a measurement. simulated_cycles assume latencies that no GPU has confirmed ("
    + ", ".join(f"{what}: {cycles}" for what, cycles in LATENCIES.items())
    + "): they rank tiles, and are not times. Nothing here ran on a GPU."
)


def write(rows: Sequence[Row], folder: Path) -> tuple[Path, Path]:
    """Write `kernel_resources.csv`, a row per configuration, and `kernel_resources.md`, the summary; return both."""
    import triton

    folder.mkdir(parents=True, exist_ok=True)
    every, worst = folder / "kernel_resources.csv", folder / "kernel_resources.md"
    with every.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    introduction = (
        "# What the shipped Triton kernels need of each target\n\n"
        f"Written by `python -m sward_kernels.report --output` (Triton {triton.__version__}), which compiled all\n"
        f"{len(rows)} configurations without a GPU: the worst of each group; every one is a row of `{every.name}`.\n"
        "Stack bytes are per thread, and hold what does not fit the registers."
    )
    worst.write_text(f"{introduction}\n\n{_table(summary(rows), markdown=True)}\n\n{NOTE}\n", encoding="utf-8")
    return every, worst


def main(arguments: Sequence[str] | None = None) -> None:
    if arguments is None:
        arguments = sys.argv[1:]
    if arguments[:1] == ["--compile"]:
        _compile_and_print(arguments[1], arguments[2], map(int, arguments[3:]))
        return
    parser = argparse.ArgumentParser(prog="python -m sward_kernels.report", description=__doc__)
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS), help="GPU targets; default: all")
    parser.add_argument("--output", type=Path, help="folder for the two files; default: print all rows and the summary")
    options = parser.parse_args(arguments)
    rows = report(options.target, progress=True)
    if options.output:
        for path in write(rows, options.output):
            print(f"written: {path}")
    else:
        print(f"{_table(rows)}\n\n{_table(summary(rows))}\n\n{NOTE}")


if __name__ == "__main__":
    main()
