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


def resources_of(configuration: Configuration, target: Target) -> Row:
    """Return the columns of the report that come from the compiler.

    Rows are stored in Triton's cache (`TRITON_CACHE_DIR`) under a hash of everything that decides them. An interrupted
    report therefore resumes, and `compile_seconds`, which is processor time, remains that of the compilation.
    """
    import triton

    source, backend, options = _source(configuration, target)
    decisive = (source.hash(), backend, options, triton.__version__, Path(__file__).read_text(encoding="utf-8"))
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
    kept.parent.mkdir(parents=True, exist_ok=True)
    unfinished = kept.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(row), encoding="utf-8")
    unfinished.replace(kept)
    return row


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
        if stack:  # spills need a stack, but a stack need not be spills: ask the assembler
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
