"""Decoding of machine code and the simulation that ranks kernels, on code written by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from sward_kernels.machine_code import NO_SCOREBOARD, MachineCode, decode, total_multiplications
from sward_kernels.simulation import LATENCIES, PROCESSORS, load_latencies, pipe_cycles, simulate

HOPPER = PROCESSORS["sm_90"]
AMPERE = PROCESSORS["sm_80"]
START = LATENCIES["start of the next program"]


def line(
    text: str, stall: int = 1, sets: int = NO_SCOREBOARD, reads: int = NO_SCOREBOARD, waits: Sequence[int] = ()
) -> str:
    """One instruction as `nvdisasm -c -hex` prints it: two lines, the second with the control code."""
    control = stall | sets << 5 | reads << 8 | sum(1 << board for board in waits) << 11
    return f"        /*0010*/  {text} ;  /* 0x0000000000017a02 */\n    /* 0x{control << 41:016x} */"


def code(*lines: str) -> MachineCode:
    return decode("\n".join(text if text.startswith(".L") else line(text) for text in lines))


def test_an_instruction_is_decoded_with_its_control_code() -> None:
    (load,) = decode(line("@!P0 LDG.E.128 R4, desc[UR4][R2.64]", 5, sets=2, reads=1, waits=(0, 5))).instructions
    assert (load.name, load.operation, load.guarded, load.bits) == ("LDG.E.128", "LDG", True, 128)
    assert (load.stall, load.sets, load.reads, load.waits) == (5, 2, 1, (0, 5))
    assert [decode(line(text)).instructions[0].bits for text in ("LDG.E.U16 R1, [R2]", "LDG.E R1, [R2]")] == [16, 32]


@pytest.mark.parametrize(
    ("text", "multiplications"),
    [
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", 16 * 8 * 16),
        ("HMMA.1688.F32.TF32 R4, R8, R12, R4", 16 * 8 * 8),
        ("HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], R24", 64 * 32 * 16 / 4),
        ("FFMA R1, R2, R3, R4", 0),
    ],
)
def test_multiplications_of_a_warp(text: str, multiplications: float) -> None:
    kernel = code(text)
    assert kernel.instructions[0].multiplications == multiplications
    assert total_multiplications(kernel, [0, 0, 0], 4) == 12 * multiplications


def test_loops_run_as_often_as_asked() -> None:
    bottom_test = code("MOV R1, R2", ".L_x_0:", "FADD R1, R1, R2", "@P0 BRA `(.L_x_0)", "EXIT", "NOP")
    assert bottom_test.loops() == [(1, 2)]
    assert bottom_test.executed(3) == [0, 1, 2, 1, 2, 1, 2, 3]
    assert bottom_test.executed(1) == [0, 1, 2, 3]
    nested = code(".L_x_0:", ".L_x_1:", "FADD R1, R1, R2", "BRA.U UP0, `(.L_x_1)", "@P1 BRA `(.L_x_0)", "EXIT")
    assert nested.executed(2) == [0, 1, 0, 1, 2, 0, 1, 0, 1, 2, 3]


@pytest.mark.parametrize("way_out", ["@P0 BRA `(.L_x_1)", "@!P0 CALL.REL.NOINC `(.L_x_1)"])
def test_a_loop_may_be_left_from_its_middle(way_out: str) -> None:
    kernel = code(".L_x_0:", "FADD R1, R1, R2", way_out, "BRA `(.L_x_0)", "NOP", ".L_x_1:", "EXIT")
    assert kernel.executed(2) == [0, 1, 2, 0, 1, 2, 4]
    with pytest.raises(ValueError, match="no branch leaves the loop of instructions 0 to 1"):
        code(".L_x_0:", "FADD R1, R1, R2", "BRA `(.L_x_0)", "EXIT").executed(2)


def test_branches_forward() -> None:
    kernel = code("@P0 BRA `(.L_x_0)", "BRA `(.L_x_0)", "NOP", ".L_x_0:", "@P0 EXIT", "EXIT", "NOP")
    assert kernel.executed(9) == [0, 1, 3, 4]  # a guarded branch is not taken, an unconditional one is


def test_cycles_of_each_pipe() -> None:
    kernel = code(
        "FFMA R1, R2, R3, R4", "IMAD R1, R2, R3, R4", "LOP3.LUT R1, R2, R3, R4", "MUFU.EX2 R1, R2",
        "HMMA.16816.F32.BF16 R4, R8, R12, R4", "HMMA.1688.F32.TF32 R4, R8, R12, R4",
        "LDS.128 R4, [R2]", "LDSM.16.M88.4 R4, [R2]", "STG.E.64 [R2], R4", "SHFL.BFLY R1, R2", "NOP",
    )  # fmt: skip
    order = range(11)
    assert pipe_cycles(kernel, order, 4, HOPPER) == {
        "issue": 11, "fma": 1 + 2, "alu": 2, "special": 8, "tensor": 2048 / 512 + 1024 / 256,
        "memory": 4 * (4 + 4 + 2 + 1),
    }  # fmt: skip
    eight_warps = pipe_cycles(kernel, order, 8, AMPERE)
    assert (eight_warps["fma"], eight_warps["tensor"], eight_warps["issue"]) == (2 * (2 + 2), 2 * (8 + 8), 22)


def test_only_the_first_bytes_come_from_device_memory() -> None:
    kernel = code("LDG.E.128 R4, [R2]", "FFMA R1, R2, R3, R4", "LDG.E.U16 R4, [R2]")
    order = [0, 1, 2, 0, 2]
    first, cached = LATENCIES["first load from device memory"], LATENCIES["load from cache"]
    warp = 32 * 2
    assert load_latencies(kernel, order, 2, 16 * warp) == {0: first, 2: cached, 3: cached, 4: cached}
    assert load_latencies(kernel, order, 2, 16 * warp + 1) == {0: first, 2: first, 3: cached, 4: cached}


def per_program(lines: Sequence[str], num_warps: int = 1, programs: int = 1, processor: object = HOPPER) -> float:
    kernel = decode("\n".join(lines))
    order = kernel.executed(1)
    return simulate(kernel, order, num_warps, programs, processor, lambda _: 650)  # type: ignore[arg-type]


def test_one_warp_waits_for_stalls_and_results() -> None:
    stalls = [line("MOV R1, R2", stall=5), line("MOV R1, R2", stall=7), line("EXIT")]
    assert per_program(stalls) == 5 + 7 + START
    waits = [line("LDG.E R1, [R2]", sets=0), line("FADD R1, R1, R2", waits=(0,)), line("EXIT", stall=1)]
    assert per_program(waits) == 650 + 1 + START


def test_more_programs_hide_latency_until_a_pipe_is_full() -> None:
    waits = [line("LDG.E R1, [R2]", sets=0), line("FADD R1, R1, R2", waits=(0,)), line("EXIT")]
    one, two = per_program(waits), per_program(waits, programs=2)
    assert two == pytest.approx(one / 2, rel=0.1)
    exponentials = [line("MUFU.EX2 R1, R2")] * 100 + [line("EXIT")]
    busy = per_program(exponentials, num_warps=4, programs=4)
    # Each scheduler has one warp of each program; they take turns, end together and wait for the next four together.
    assert busy == pytest.approx(100 * 8 + START / 4, rel=0.01)


def test_a_barrier_holds_back_every_warp() -> None:
    # Two loads of one warp queue up behind the other's only in the memory pipe; all leave the barrier together.
    together = [line("LDG.E R1, [R2]", sets=0), line("BAR.SYNC 0x0", waits=(0,)), line("EXIT")]
    apart = [line("LDG.E R1, [R2]", sets=0), line("NOP", waits=(0,)), line("EXIT")]
    extra = per_program(together, num_warps=4) - per_program(apart, num_warps=4)
    assert LATENCIES["barrier"] <= extra <= LATENCIES["barrier"] + 8


def test_the_drain_of_a_warpgroup_product_is_waited_for() -> None:
    product = line("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24")
    waiting = [product, line("WARPGROUP.DEPBAR.LE gsb0, 0x0"), line("EXIT")]
    free = [product, line("NOP"), line("EXIT")]
    tensor = 64 * 64 * 16 / 4 / 512
    assert per_program(waiting) - per_program(free) == tensor + LATENCIES["tensor-core drain (wgmma)"] - 1


def test_tf32_products_take_twice_as_long() -> None:
    def repeated(kind: str) -> float:
        return per_program([line(f"HMMA.1688.F32.{kind} R4, R8, R12, R4")] * 200 + [line("EXIT")], num_warps=4)

    assert repeated("TF32") - START == pytest.approx(2 * (repeated("BF16") - START), rel=0.02)
