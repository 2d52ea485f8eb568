"""Resources of one compiled kernel: registers, spills, stack, shared memory, instructions. Needs no GPU.

Relies on `triton.compiler.ASTSource` as in Triton 3.8, and on a process in which Triton compiles (no TRITON_INTERPRET).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sward_kernels.machine_code import decode, total_multiplications
from sward_kernels.simulation import PROCESSORS, load_latencies, pipe_cycles, simulate
from sward_kernels.targets import Target

Row = dict[str, Any]


@dataclass(frozen=True)
class Configuration:
    """One shipped kernel: everything that decides what Triton compiles."""

    operation: str
    """The report's `op`, e.g. `"windowed_distillation"`."""
    direction: str
    """The report's `pass`, e.g. `"backward"`."""
    kernel: Any
    """The `@triton.jit` function."""
    types: dict[str, str]
    """Triton's type of every argument that is not a constexpr, e.g. `{"student": "*bf16", "height": "i32"}`. Pointers
    are assumed to be aligned to 16 bytes, as PyTorch allocates them."""
    constants: dict[str, Any]
    """The constexpr arguments."""
    num_warps: int
    """Warps per program."""
    maxnreg: int | None = None
    """Triton's option of that name, the most registers per thread; None leaves the choice to the assembler."""
    details: dict[str, Any] = field(default_factory=dict)
    """Columns of the report that identify the row: `dtype`, `window_size`, `tokens`, `dim` and others."""
    ideal_bytes: int = 0
    """Device-memory traffic per `unit` that no implementation can avoid."""
    flops: int = 0
    """Arithmetic operations per `unit`."""
    unit: str = "window"
    """What `ideal_bytes` and `flops` are counted for."""
    loop_steps: int | None = None
    """How often every loop of the kernel runs; None where they differ, and the kernel is not simulated."""
    units_per_program: int = 1
    """How many of `unit` one program computes."""
    input_bytes: int = 0
    """Bytes that one program reads from device memory: what it loads beyond them comes from cache."""


def resources_of(configuration: Configuration, target: Target) -> Row:
    """Return the columns of the report that come from the compiler.

    Rows are stored in Triton's cache (`TRITON_CACHE_DIR`) under a hash of everything that decides them. An interrupted
    report therefore resumes, and `compile_seconds`, which is processor time, remains that of the compilation.
    """
    import triton

    source, backend, options = _source(configuration, target)
    counted = (configuration.loop_steps, configuration.units_per_program, configuration.input_bytes, target)
    rules = [(Path(__file__).parent / name).read_text(encoding="utf-8") for name in _DECISIVE_FILES]
    decisive = (source.hash(), backend, options, counted, triton.__version__, rules)
    name = hashlib.sha256(repr(decisive).encode()).hexdigest()
    kept = Path(triton.knobs.cache.dir) / f"resources-{name}.json"
    if kept.exists():
        row: Row = json.loads(kept.read_text(encoding="utf-8"))
        return row
    began = sum(os.times()[:4])  # processor time of this process and the assembler: independent of the machine's load
    compiled = triton.compile(source, target=backend, options=options)
    seconds = sum(os.times()[:4]) - began
    row = _nvidia_resources(compiled) if target.backend == "cuda" else _amd_resources(compiled)
    row |= {"shared_bytes": compiled.metadata.shared, "compile_seconds": round(seconds, 2)}
    row["occupancy"] = round(occupancy(target, configuration.num_warps, row["registers"], row["shared_bytes"]), 3)
    if configuration.loop_steps and target.name in PROCESSORS:
        row |= _ranking(compiled.asm["cubin"], configuration, target, row["occupancy"])
    kept.parent.mkdir(parents=True, exist_ok=True)
    unfinished = kept.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(row), encoding="utf-8")
    unfinished.replace(kept)
    return row


_DECISIVE_FILES = ("resources.py", "machine_code.py", "simulation.py")
"""Files that decide a row besides its kernel."""


def _ranking(cubin: bytes, configuration: Configuration, target: Target, occupancy: float) -> Row:
    """The columns of the report that rank one kernel against another, per unit; none of them is a time."""
    processor, num_warps, units = PROCESSORS[target.name], configuration.num_warps, configuration.units_per_program
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(_nvidia_tools() / "nvdisasm"), "-c", "-hex", str(path)]
        code = decode(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert configuration.loop_steps is not None
    order = code.executed(configuration.loop_steps)
    cycles = pipe_cycles(code, order, num_warps, processor)
    busiest = max(cycles, key=cycles.__getitem__)
    latencies = load_latencies(code, order, num_warps, configuration.input_bytes)
    programs = max(1, round(occupancy * target.max_warps / num_warps))
    simulated = simulate(code, order, num_warps, programs, processor, latencies.__getitem__)
    return {
        **{f"{pipe}_cycles": round(used / units) for pipe, used in cycles.items()},
        "multiplications": round(total_multiplications(code, order, num_warps) / units),
        "bound_pipe": busiest,
        "bound_cycles": round(cycles[busiest] / units),
        "simulated_cycles": round(simulated / units),
    }


def occupancy(target: Target, num_warps: int, registers: int, shared_bytes: int) -> float:
    """Return the resident warps of a multiprocessor, limited by registers and shared memory, over its maximum."""
    granularity = target.register_granularity
    registers = (max(registers, 1) + granularity - 1) // granularity * granularity
    reserved = 1024 if target.backend == "cuda" else 0  # the driver's share of shared memory per program
    programs = min(
        target.max_programs,
        target.max_warps // num_warps,
        target.registers // (registers * target.warp_size * num_warps),
        target.shared_per_multiprocessor // max(shared_bytes + reserved, 1),
    )
    return programs * num_warps / target.max_warps


def _source(configuration: Configuration, target: Target) -> tuple[Any, Any, dict[str, int]]:
    """What Triton would compile for a launch on the target."""
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
    return source, GPUTarget(target.backend, target.arch, target.warp_size), options


def _nvidia_tools() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def _nvidia_resources(compiled: Any) -> Row:
    tools = _nvidia_tools()
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
        if stack:  # spills need a stack, but a stack need not be spills: ask the assembler
            source = Path(folder) / "kernel.ptx"
            source.write_text(ptx)
            architecture = re.search(r"\.target ([^\s,]+)", ptx)[1]  # type: ignore[index]
            ptxas = tools / ("ptxas-blackwell" if int(re.findall(r"\d+", architecture)[0]) >= 100 else "ptxas")
            command = [str(ptxas), "-v", "--regAllocOptLevel=2", f"--gpu-name={architecture}", str(source)]
            log = subprocess.run([*command, "-o", os.devnull], capture_output=True, text=True, check=True).stderr
            spill = max(map(int, re.findall(r"(\d+) bytes spill stores", log)), default=0)
    loads = re.findall(r"\bld\.global\S*", ptx)
    return {
        "registers": registers,
        "spill_bytes": spill,
        "stack_bytes": stack,
        "tensor_core_instructions": len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)", ptx)),
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
