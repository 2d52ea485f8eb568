"""`python -m sward_kernels.report`: what every shipped Triton kernel needs of every target, without a GPU.

Each configuration is compiled ahead of time in a subprocess (Triton decides once a process whether it interprets), and
its registers, spills, stack and shared memory are read from the compiler's output. Times are bounds from the data
sheet's bandwidth, not measurements. Needs `triton.compiler.ASTSource` as Triton 3.8 has it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from sward_kernels.targets import TARGETS, Configuration, Target

OPERATIONS = ("windowed_distillation", "prototypes", "relational_kl")
"""Packages under `sward_kernels` whose `launch.configurations(target)` yields what ships."""

SECONDS_PER_CONFIGURATION = 600

COLUMNS = (
    "op", "pass", "target", "dtype", "precision", "layout", "window_size", "tokens", "dim", "tile", "num_warps",
    "registers", "spill_bytes", "stack_bytes", "shared_bytes", "shared_limit", "occupancy", "tensor_core_instructions",
    "vector_loads", "loads", "compile_seconds", "ideal_bytes", "flops", "unit", "bound_nanoseconds",
)  # fmt: skip
"""Keys of one row. `occupancy` is resident warps over the most possible; `spill_bytes` and `stack_bytes` count a
thread; `vector_loads` are the 128-bit ones among `loads`; `ideal_bytes` and `flops` count a `unit`; `bound_nanoseconds`
is `ideal_bytes` over the data sheet's bandwidth of the whole device: a bound and not a measurement."""

Row = dict[str, Any]


def configurations(operation: str, target: str) -> list[Configuration]:
    """What ships of one operation for one target."""
    launch = importlib.import_module(f"sward_kernels.{operation}.launch")
    return list(launch.configurations(TARGETS[target]))


def report(
    targets: Sequence[str], select: Callable[[Configuration], bool] = lambda _: True, progress: bool = False
) -> list[Row]:
    """One row per configuration and target, compiled by as many processes as there are CPUs.

    Args:
        targets: names of `TARGETS`.
        select: which configurations to compile; all by default.
        progress: whether to count the rows on stderr.

    Raises:
        RuntimeError: if a configuration does not compile, with the compiler's last lines.
    """
    jobs = []
    for target in targets:
        for operation in OPERATIONS:
            wanted = [index for index, shipped in enumerate(configurations(operation, target)) if select(shipped)]
            jobs += [(operation, target, wanted[first : first + 8]) for first in range(0, len(wanted), 8)]
    rows: list[Row] = []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in pool.map(lambda job: _in_subprocess(*job), jobs):
            rows += done
            if progress:
                print(f"{len(rows)} configurations compiled", file=sys.stderr, flush=True)
    return rows


def _in_subprocess(operation: str, target: str, indices: Sequence[int]) -> list[Row]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "sward_kernels.report", "--compile", operation, target, *map(str, indices)]
    with tempfile.TemporaryDirectory() as cache:
        environment.setdefault("TRITON_CACHE_DIR", cache)
        root = str(Path(__file__).parents[1])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
        finished = subprocess.run(command, capture_output=True, text=True, env=environment)
    if finished.returncode:
        raise RuntimeError(f"compiling {operation} for {target} failed: {finished.stderr.strip().splitlines()[-1]}")
    return [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{")]


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
    began = time.perf_counter()
    compiled = compile_ahead(configuration, target)
    seconds = time.perf_counter() - began
    resources = _nvidia_resources(compiled) if target.backend == "cuda" else _amd_resources(compiled)
    shared = compiled.metadata.shared
    row = dict.fromkeys(COLUMNS) | configuration.details | resources
    return row | {
        "op": configuration.operation,
        "pass": configuration.direction,
        "target": target.name,
        "num_warps": configuration.num_warps,
        "shared_bytes": shared,
        "shared_limit": target.shared_limit,
        "occupancy": round(occupancy(target, configuration.num_warps, resources["registers"], shared), 3),
        "compile_seconds": round(seconds, 2),
        "ideal_bytes": configuration.ideal_bytes,
        "flops": configuration.flops,
        "unit": configuration.unit,
        "bound_nanoseconds": round(configuration.ideal_bytes / target.bandwidth * 1e9, 3),
    }


def compile_ahead(configuration: Configuration, target: Target) -> Any:
    """Triton's compiled kernel, as a launch on the target would make it. Not for a process that interprets."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = configuration.kernel.arg_names
    source = ASTSource(
        fn=configuration.kernel,
        signature={name: configuration.types.get(name, "constexpr") for name in names},
        constexprs=configuration.constants,
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(names)
            if configuration.types.get(name, "").startswith("*")
        },
    )
    options = {"num_warps": configuration.num_warps, "num_stages": 1}
    if configuration.maxnreg:
        options["maxnreg"] = configuration.maxnreg
    return triton.compile(source, target=GPUTarget(target.backend, target.arch, target.warp_size), options=options)


def _nvidia_resources(compiled: Any) -> Row:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
        ).stdout
        stack = int(re.search(r"STACK:(\d+)", usage)[1])  # type: ignore[index]
        registers = int(re.search(r"REG:(\d+)", usage)[1])  # type: ignore[index]
        spill = 0
        if stack:  # without a stack nothing is spilled; with one, the assembler says how much of it is
            source = Path(folder) / "kernel.ptx"
            source.write_text(ptx)
            architecture = re.search(r"\.target ([^\s,]+)", ptx)[1]  # type: ignore[index]
            command = [str(tools / "ptxas"), "-v", "--regAllocOptLevel=2", f"--gpu-name={architecture}", str(source)]
            log = subprocess.run([*command, "-o", os.devnull], capture_output=True, text=True, check=True).stderr
            spill = max(map(int, re.findall(r"(\d+) bytes spill stores", log)), default=0)
    loads = re.findall(r"\bld\.global\S*", ptx)
    return {
        "registers": registers,
        "spill_bytes": spill,
        "stack_bytes": stack,
        "tensor_core_instructions": len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async)", ptx)),
        "vector_loads": sum("v4.b32" in load or "v2.b64" in load for load in loads),
        "loads": len(loads),
    }


def _amd_resources(compiled: Any) -> Row:
    assembly = compiled.asm["amdgcn"]

    def metadata(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", assembly)[1])  # type: ignore[index]

    loads = re.findall(r"\b(?:global|buffer)_load_\S+", assembly)
    return {
        "registers": metadata("vgpr_count"),
        "spill_bytes": 4 * metadata("vgpr_spill_count"),
        "stack_bytes": metadata("private_segment_fixed_size"),
        "tensor_core_instructions": len(re.findall(r"\bv_mfma", assembly)),
        "vector_loads": sum("dwordx4" in load for load in loads),
        "loads": len(loads),
    }


def occupancy(target: Target, num_warps: int, registers: int, shared_bytes: int) -> float:
    """Resident warps of a multiprocessor over the most it can hold, as registers and shared memory allow."""
    granularity = target.register_granularity
    registers = (max(registers, 1) + granularity - 1) // granularity * granularity
    reserved = 1024 if target.backend == "cuda" else 0  # the driver's share of shared memory, a program
    programs = min(
        target.max_programs,
        target.max_warps // num_warps,
        target.registers // (registers * target.warp_size * num_warps),
        target.shared_per_multiprocessor // max(shared_bytes + reserved, 1),
    )
    return programs * num_warps / target.max_warps


# ---------------------------------------------------------------------------------------------------- the command line


def _table(rows: Sequence[Row], separator: str, rule: bool) -> str:
    cells = [list(COLUMNS), *[["-" if row[name] is None else str(row[name]) for name in COLUMNS] for row in rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [separator.join(cell.rjust(width) for cell, width in zip(line, widths)) for line in cells]
    if rule:
        lines.insert(1, "|".join("-" * (width + 1) + ":" for width in widths))
        lines = [f"|{line}|" if index == 1 else f"| {line} |" for index, line in enumerate(lines)]
    return "\n".join(lines)


NOTE = (
    "bound_nanoseconds is ideal_bytes over the data sheet's bandwidth (" + ", ".join(
        f"{target.name}: {target.device} {target.bandwidth / 1e12:g} TB/s" for target in TARGETS.values()
    ) + "): a bound, not a measurement. Nothing here ran on a GPU."
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    if arguments is None:
        arguments = sys.argv[1:]
    if arguments[:1] == ["--compile"]:
        _compile_and_print(arguments[1], arguments[2], map(int, arguments[3:]))
        return
    parser = argparse.ArgumentParser(prog="python -m sward_kernels.report", description=__doc__)
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS), help="GPU targets")
    parser.add_argument("--format", choices=("table", "json", "markdown"), default="table")
    options = parser.parse_args(arguments)
    rows = report(options.target, progress=True)
    if options.format == "json":
        print(json.dumps(rows, indent=1))
    else:
        print(_table(rows, *((" | ", True) if options.format == "markdown" else ("  ", False))))
        print(f"\n{NOTE}")


if __name__ == "__main__":
    main()
