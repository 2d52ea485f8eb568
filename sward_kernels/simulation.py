"""Rank compiled kernels without a GPU: instructions per pipe, the bound of the busiest pipe, and simulated cycles.

The bound counts what a multiprocessor must at least issue. The simulation steps warps through the kernel's machine
code, in order, with its stall counts and scoreboards, and the latencies of `LATENCIES`, which are ASSUMED, not
measured: no GPU has confirmed a single one. Use it to rank tile shapes against each other, 30 % apart at least; a
number of it is never a time.
"""

from __future__ import annotations

import collections
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sward_kernels.machine_code import NO_SCOREBOARD, Instruction, MachineCode

LATENCIES = {
    "first load from device memory": 650,
    "load from cache": 40,
    "load from shared memory": 30,
    "shuffle": 24,
    "exponential and other special functions": 22,
    "tensor-core result (mma)": 33,
    "tensor-core drain (wgmma)": 30,
    "store": 12,
    "barrier": 18,
    "fence": 12,
    "start of the next program": 200,
    "anything else": 20,
}
"""Assumed cycles from issue to result."""


@dataclass(frozen=True)
class Processor:
    """What one multiprocessor issues; its four schedulers share the warps, and each has its own arithmetic pipes."""

    fma_cycles: int
    """Cycles that an fp32 instruction of one warp takes of the FMA pipe."""
    tensor_multiplications: int
    """Multiplications of 16-bit numbers per cycle and scheduler; TF32 has half of them."""


PROCESSORS = {
    "sm_80": Processor(fma_cycles=2, tensor_multiplications=256),
    "sm_90": Processor(fma_cycles=1, tensor_multiplications=512),
}
"""Targets whose machine code the simulation knows."""

PIPES = ("issue", "fma", "alu", "special", "tensor", "memory")
"""`issue`: instructions per scheduler; `fma`, `alu`, `special` (exponentials, conversions), `tensor`: pipes of a
scheduler; `memory`: the pipe of a multiprocessor for shared memory, global memory and shuffles."""

_FMA = {"FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2", "HADD2", "HMUL2", "HFMA2"}
_ALU = {
    "IADD3", "IADD", "LEA", "LOP3", "SHF", "ISETP", "SEL", "IMNMX", "VIADD", "PRMT", "PLOP3", "P2R", "R2P", "IABS",
    "VIMNMX", "SGXT", "BMSK", "VIADDMNMX", "IDP", "I2FP", "ISCADD", "FSEL", "FMNMX", "FSETP", "FSET", "FCHK", "FMNMX3",
    "MOV", "CS2R", "F2FP",
}  # fmt: skip
_SPECIAL = {"MUFU", "I2F", "F2I", "F2F", "FLO", "POPC"}
_LOADS_NEARBY = {"LDS", "LDSM", "LDL"}
_STORES = {"STS", "STSM", "STG", "STL"}
_MATRICES = {"LDSM", "STSM"}


def pipe_of(instruction: Instruction, processor: Processor) -> tuple[str | None, float]:
    """The pipe that an instruction of one warp occupies, and for how many cycles; None for none."""
    operation = instruction.operation
    if instruction.multiplications:
        rate = processor.tensor_multiplications / (2 if "TF32" in instruction.name else 1)
        return "tensor", instruction.multiplications / rate
    if operation in _FMA:
        return "fma", processor.fma_cycles
    if operation == "IMAD":
        return "fma", 2
    if operation in _ALU:
        return "alu", 2
    if operation in _SPECIAL:
        return "special", 8
    if operation in _MATRICES:
        last = instruction.name.split(".")[-1]
        return "memory", int(last) if last.isdigit() and int(last) < 8 else 4
    if operation == "LDG" or operation in _LOADS_NEARBY or operation in _STORES:
        return "memory", max(1, instruction.bits // 32)
    if operation in ("SHFL", "BAR"):
        return "memory", 1
    return None, 0


def latency_of(instruction: Instruction, load: int) -> int:
    """Assumed cycles from the issue of an instruction to its result; `load` is that of a load from global memory."""
    operation = instruction.operation
    if operation == "LDG":
        return load
    if operation == "LDL":  # a spilled register
        return LATENCIES["load from cache"]
    if operation in _LOADS_NEARBY or operation in ("LDC", "ULDC"):
        return LATENCIES["load from shared memory"]
    if operation == "SHFL" or operation in ("S2R", "S2UR"):
        return LATENCIES["shuffle"]
    if operation in _SPECIAL:
        return LATENCIES["exponential and other special functions"]
    if operation in _STORES:
        return LATENCIES["store"]
    if operation in ("HMMA", "DMMA"):
        return LATENCIES["tensor-core result (mma)"]
    return LATENCIES["anything else"]


def pipe_cycles(code: MachineCode, order: Sequence[int], num_warps: int, processor: Processor) -> dict[str, float]:
    """Cycles of every pipe of `PIPES` that one program takes of a multiprocessor."""
    totals = dict.fromkeys(PIPES, 0.0)
    for index in order:
        pipe, cycles = pipe_of(code.instructions[index], processor)
        if pipe:
            totals[pipe] += cycles
    per_scheduler = num_warps / 4
    totals = {pipe: cycles * (num_warps if pipe == "memory" else per_scheduler) for pipe, cycles in totals.items()}
    return totals | {"issue": len(order) * per_scheduler}


def load_latencies(code: MachineCode, order: Sequence[int], num_warps: int, input_bytes: int) -> dict[int, int]:
    """Position in `order` -> assumed latency of the load there.

    A program's loads come from device memory until it has loaded as many bytes as its inputs have, then from cache:
    every kernel here loads each element once before it loads any again.
    """
    latencies = {}
    loaded = 0
    for position, index in enumerate(order):
        instruction = code.instructions[index]
        if instruction.operation == "LDG":
            first = loaded < input_bytes
            latencies[position] = LATENCIES["first load from device memory" if first else "load from cache"]
            loaded += instruction.bits // 8 * 32 * num_warps
    return latencies


class _Warp:
    def __init__(self, number: int, num_warps: int) -> None:
        self.program = number // num_warps
        self.scheduler = number % 4
        self.ready = self.program * 37.0  # programs do not start in step
        self.boards = [0.0] * 8
        self.position = 0
        self.rounds = 0
        self.drained = 0.0
        self.stored = 0.0


def simulate(
    code: MachineCode,
    order: Sequence[int],
    num_warps: int,
    programs: int,
    processor: Processor,
    load_latency: Callable[[int], int],
    rounds: int = 6,
) -> float:
    """Simulated cycles per program of one multiprocessor in steady state.

    Args:
        code: the kernel.
        order: what each warp issues (`MachineCode.executed`).
        num_warps: warps per program.
        programs: programs that are resident at the same time.
        processor: the multiprocessor.
        load_latency: position in `order` of a load from global memory -> its latency.
        rounds: programs that each resident one is followed by; the first third is not counted.
    """
    steps = [_Step(code.instructions[index], position, processor, load_latency) for position, index in enumerate(order)]
    warps = [_Warp(number, num_warps) for number in range(num_warps * programs)]
    free: dict[tuple[int, str], float] = collections.defaultdict(float)
    issued = [0.0] * 4
    waiting: dict[int, list[tuple[int, float]]] = {program: [] for program in range(programs)}
    finished: list[float] = []
    unfinished = [[num_warps] * rounds for _ in range(programs)]
    queue = [(warp.ready, number) for number, warp in enumerate(warps)]
    heapq.heapify(queue)
    while queue:
        now, number = heapq.heappop(queue)
        warp = warps[number]
        step = steps[warp.position]
        start = max(now, warp.ready, issued[warp.scheduler])
        for board in step.waits:
            start = max(start, warp.boards[board])
        if step.drains:
            start = max(start, warp.drained)
        if step.fences:
            start = max(start, warp.stored)
        place = (-1 if step.pipe == "memory" else warp.scheduler, step.pipe or "")
        if step.pipe:  # the memory pipe has a queue
            start = max(start, free[place] - (16 if step.pipe == "memory" else 0))
        if start > now + 1e-9:
            heapq.heappush(queue, (start, number))
            continue
        issued[warp.scheduler] = start + 1
        begins = start
        if step.pipe:
            begins = max(start, free[place])
            free[place] = begins + step.cycles
        if step.accumulates:
            warp.drained = max(warp.drained, begins + step.cycles + LATENCIES["tensor-core drain (wgmma)"])
        if step.stores:
            warp.stored = max(warp.stored, begins + LATENCIES["store"])
        if step.sets != NO_SCOREBOARD:
            warp.boards[step.sets] = max(warp.boards[step.sets], begins + step.latency)
        if step.reads != NO_SCOREBOARD:
            warp.boards[step.reads] = max(warp.boards[step.reads], begins + LATENCIES["store"])
        then = start + (LATENCIES["fence"] if step.fences else step.stall)
        warp.position += 1
        if warp.position == len(steps):
            left = unfinished[warp.program]
            left[warp.rounds] -= 1
            if left[warp.rounds] == 0:
                finished.append(start)
            warp.rounds += 1
            if warp.rounds == rounds:
                continue
            warp.position = 0
            warp.boards = [0.0] * 8
            then = start + LATENCIES["start of the next program"]
        warp.ready = then
        if step.barrier and num_warps > 1:
            arrived = waiting[warp.program]
            arrived.append((number, then))
            if len(arrived) == num_warps:
                together = max(time for _, time in arrived) + LATENCIES["barrier"]
                for other, _ in arrived:
                    warps[other].ready = together
                    heapq.heappush(queue, (together, other))
                arrived.clear()
            continue
        heapq.heappush(queue, (then, number))
    finished.sort()
    skipped = len(finished) // 3
    if skipped == 0:
        return finished[-1] / len(finished)
    return (finished[-1] - finished[skipped - 1]) / (len(finished) - skipped)


class _Step:
    """What the simulation needs of one executed instruction."""

    def __init__(
        self, instruction: Instruction, position: int, processor: Processor, load_latency: Callable[[int], int]
    ) -> None:
        operation = instruction.operation
        self.pipe, self.cycles = pipe_of(instruction, processor)
        self.waits = instruction.waits
        self.sets, self.reads = instruction.sets, instruction.reads
        self.stall = max(1, instruction.stall)
        self.latency = latency_of(instruction, load_latency(position) if operation == "LDG" else 0)
        self.accumulates = operation == "HGMMA"
        self.drains = operation == "WARPGROUP" and "DEPBAR" in instruction.name
        self.fences = operation in ("MEMBAR", "FENCE")
        self.stores = operation in _STORES
        self.barrier = operation == "BAR"
