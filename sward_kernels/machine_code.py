"""Decode the machine code of a kernel compiled for an NVIDIA GPU: instructions, control codes, loops. Needs no GPU.

Reads what `nvdisasm`, which Triton ships, prints for a cubin. The meaning of the control codes (stall count and
scoreboards, in bits 105 to 125 of an instruction) is not documented by NVIDIA; it is known from disassembled code.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

NO_SCOREBOARD = 7
"""The number in a control code that stands for no scoreboard."""

_LABEL = re.compile(r"\s*(\.L_[\w$]+):")
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?);\s*/\* 0x([0-9a-f]+) \*/")
_SECOND_HALF = re.compile(r"\s*/\* 0x([0-9a-f]+) \*/")
_GUARD = re.compile(r"^@!?U?P\w+\s+")
_BRANCH_TARGET = re.compile(r"`\((\.L_[\w$]+)\)")
_TENSOR_TILE = re.compile(r"(?:HGMMA\.(\d+)x(\d+)x(\d+))|(?:[HD]MMA\.(\d+))")
_TILES_OF_A_WARP = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "1684": 16 * 8 * 4, "884": 8 * 8 * 4}


@dataclass(frozen=True)
class Instruction:
    """One instruction and its control code."""

    text: str
    """Text without the guard, e.g. `FFMA R1, R2, R3, R4`."""
    guarded: bool
    """Whether a predicate decides whether it runs."""
    stall: int
    """Cycles before the warp may issue its next instruction."""
    sets: int
    """Scoreboard that is released once the result is there, or `NO_SCOREBOARD`."""
    reads: int
    """Scoreboard that is released once the operands have been read, or `NO_SCOREBOARD`."""
    waits: tuple[int, ...]
    """Scoreboards that must be released before it issues."""
    target: str | None
    """Label that a branch goes to."""

    @cached_property
    def name(self) -> str:
        """Operation with its modifiers, e.g. `LDG.E.128`."""
        return self.text.split()[0]

    @cached_property
    def operation(self) -> str:
        """Operation without modifiers, e.g. `LDG`."""
        return self.name.split(".")[0]

    @cached_property
    def bits(self) -> int:
        """Bits per lane that a load or store moves."""
        match = re.search(r"\.(?:[US])?(8|16|64|128)\b", self.name)
        return int(match[1]) if match else 32

    @cached_property
    def multiplications(self) -> float:
        """Multiplications of a tensor-core instruction per warp; 0 for others. Four warps share an `HGMMA`."""
        match = _TENSOR_TILE.search(self.name)
        if not match:
            return 0
        if match[4]:
            return _TILES_OF_A_WARP.get(match[4], 0)
        return int(match[1]) * int(match[2]) * int(match[3]) / 4


@dataclass(frozen=True)
class MachineCode:
    """The instructions of one kernel."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    """Label -> index of the instruction that follows it."""

    def loops(self) -> list[tuple[int, int]]:
        """Indices of the first and the last instruction of every loop: a branch backwards, and where it goes."""
        found = set()
        for index, instruction in enumerate(self.instructions):
            start = self._goes_to(instruction)
            if start is not None and start < index:
                found.add((start, index))
        return sorted(found)

    def executed(self, steps: int) -> list[int]:
        """Indices of the instructions that a warp issues, in order, if every loop runs `steps` times.

        Guarded branches forward, which skip work that is not there, count as not taken. An unconditional branch
        backwards ends a loop that is left by a branch inside it.
        """
        starts = {end: start for start, end in self.loops()}
        remaining: dict[int, int] = {}
        order = []
        index = 0
        while index < len(self.instructions):
            instruction = self.instructions[index]
            order.append(index)
            if instruction.operation == "EXIT" and not instruction.guarded:
                break
            if index in starts:
                remaining.setdefault(index, steps - 1)
                if remaining[index] > 0:
                    remaining[index] -= 1
                    index = starts[index]
                    continue
                del remaining[index]
                if not self._conditional(instruction):
                    index = self._exit_of(starts[index], index)
                    continue
            elif instruction.target and instruction.operation == "BRA" and not self._conditional(instruction):
                index = self.labels[instruction.target]
                continue
            index += 1
        return order

    def _goes_to(self, instruction: Instruction) -> int | None:
        if instruction.operation not in ("BRA", "UBRA") or instruction.target is None:
            return None
        return self.labels.get(instruction.target)

    def _exit_of(self, start: int, end: int) -> int:
        # A loop may also be left by a guarded call, whose target follows the loop and does not return.
        targets = [instruction.target for instruction in self.instructions[start:end]]
        outside = [self.labels[target] for target in targets if target and self.labels[target] > end]
        if not outside:
            raise ValueError(f"no branch leaves the loop of instructions {start} to {end}")
        return outside[-1]

    @staticmethod
    def _conditional(instruction: Instruction) -> bool:
        # A uniform branch has its predicate among its operands: `BRA.U UP0, ...`, `BRA P1, ...`.
        operands = instruction.text.split("`")[0].split()[1:]
        return instruction.guarded or any(re.match(r"!?U?P\d", operand) for operand in operands)


def decode(disassembly: str) -> MachineCode:
    """Decode what `nvdisasm -c -hex` prints."""
    halves: list[tuple[str, int]] = []
    labels: dict[str, int] = {}
    for line in disassembly.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(halves)
        elif first := _INSTRUCTION.match(line):
            halves.append((first[2].strip(), 0))
        elif (second := _SECOND_HALF.match(line)) and halves and halves[-1][1] == 0:
            halves[-1] = (halves[-1][0], int(second[1], 16))
    return MachineCode(tuple(_instruction(text, high) for text, high in halves), labels)


def _instruction(text: str, high: int) -> Instruction:
    control = high >> 41 & 0x1FFFFF
    target = _BRANCH_TARGET.search(text)
    return Instruction(
        text=_GUARD.sub("", text),
        guarded=text.startswith("@"),
        stall=control & 15,
        sets=control >> 5 & 7,
        reads=control >> 8 & 7,
        waits=tuple(board for board in range(6) if control >> 11 >> board & 1),
        target=target[1] if target else None,
    )


def total_multiplications(code: MachineCode, order: Sequence[int], num_warps: int) -> float:
    """Multiplications on tensor cores of a program whose warps issue the instructions `order`."""
    return num_warps * sum(code.instructions[index].multiplications for index in order)
