"""Shipped kernels compile for real targets and fit them. Needs no GPU; compilations run in subprocesses."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from sward_kernels import report
from sward_kernels.resources import Configuration, occupancy
from sward_kernels.simulation import PIPES, PROCESSORS
from sward_kernels.targets import TARGETS
from sward_kernels.windowed.tile_table import tiles_of

KEYS = {
    "op", "pass", "target", "dtype", "window_size", "tokens", "dim", "num_warps", "registers", "spill_bytes",
    "stack_bytes", "shared_bytes", "shared_limit", "occupancy",
}  # fmt: skip


def check(rows: list[report.Row]) -> None:
    for row in rows:
        what = " ".join(str(row[key]) for key in ("op", "pass", "target", "dtype", "window_size", "dim", "layout"))
        assert row.keys() >= KEYS
        # Zero spills is no goal: a spilled register costs a store and some loads that hit a cache, a smaller tile costs
        # every load, barrier and address again. What must hold is that they hit: the stacks of all resident threads
        # fit L2, so device memory need not see them; on a device of equal dies, those of a die fit the L2 of that die.
        target = TARGETS[row["target"]]
        threads = row["occupancy"] * target.max_warps * target.warp_size * target.multiprocessors
        assert threads * row["stack_bytes"] <= target.l2_bytes, what
        assert row["shared_bytes"] <= row["shared_limit"], what
        assert 0 < row["occupancy"] <= 1, what
        if row["op"] != "prototypes" or row["pass"].startswith("statistics"):  # the other passes multiply no tiles
            assert row["tensor_core_instructions"] > 0, what
        if row["layout"] == "channels_last" and has_128_bits_per_thread(row):
            assert row["vector_loads"] > 0, what
        if row["simulated_cycles"] is not None:
            assert row["bound_cycles"] == max(row[f"{pipe}_cycles"] for pipe in PIPES), what
            assert row["simulated_cycles"] >= row["bound_cycles"], what


def has_128_bits_per_thread(row: report.Row) -> bool:
    """Whether a thread's share of a tile of features fills a load; not 16 channels of 16 bits for 256 threads on AMD.

    These load 64 bits at a time, all that a thread has.
    """
    if row["op"] != "windowed_feature_distillation":
        return True
    tokens = int(row["tile"].partition("x")[0])
    return tokens * row["channels"] * 16 >= 128 * row["num_warps"] * TARGETS[row["target"]].warp_size


def paper_default(shipped: Configuration) -> bool:
    """Whether this is the paper's window of 8 with D = 64, as in a training step under autocast."""
    details = {"dtype": "bf16", "window_size": 8, "dim": 64, "layout": "channels_last"}
    return shipped.operation == "windowed_distillation" and details.items() <= shipped.details.items()


def test_the_papers_configuration_fits_every_target() -> None:
    rows = report.report(list(TARGETS), paper_default)
    assert len(rows) == 2 * len(TARGETS)
    check(rows)
    simulated = [row for row in rows if row["simulated_cycles"] is not None]
    assert {row["target"] for row in simulated} == PROCESSORS.keys()
    for row in simulated:  # counted in the machine code: the products that docs/kernels.md names
        assert row["multiplications"] == {"forward": 4, "backward": 16}[row["pass"]] * 64 * 64 * 64


def test_the_kernels_of_features_fit_one_target_of_each_kind() -> None:
    details = {"dtype": "bf16", "window_size": 8, "channels": 32, "layout": "channels_last"}

    def selected(shipped: Configuration) -> bool:
        features = shipped.operation == "windowed_feature_distillation"
        return features and shipped.direction != "backward teacher" and details.items() <= shipped.details.items()

    rows = report.report(["sm_80", "sm_90", "gfx942"], selected)
    assert len(rows) == 6
    check(rows)
    for row in rows:
        if row["simulated_cycles"] is not None:
            # In T x T x C = 64 x 64 x 32, with D = 64. Per side X G (1/2), H X^T (1), X Wv^T (1), A V (2), and Wq^T Wk
            # (1/2, and as much again, for half of the warps repeat it) once in four windows. Backward for one side: dA
            # and dV (2 each), dV Wv and dV^T X (1 each), dH and dS^T H (1 each), dH G^T (1/2), and dG (1/2, twice).
            products = {"forward": 9.5, "backward student": 19.0}[row["pass"]]
            assert row["multiplications"] == products * 64 * 64 * 32


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("target", TARGETS)
def test_every_shipped_configuration_fits(target: str) -> None:
    check(report.report([target]))


def test_shipped_configurations_cover_what_the_tables_promise() -> None:
    for target in TARGETS:
        shipped = [c.details for c in report.configurations("windowed_distillation", target)]
        for tokens in (16, 49, 64, 144, 196, 256):
            for dim in (16, 32, 64, 128):
                for dtype in ("bf16", "fp16", *(["fp32"] if dim <= 64 else [])):
                    assert any((d["tokens"], d["dim"], d["dtype"]) == (tokens, dim, dtype) for d in shipped)


@pytest.mark.parametrize("family", ["ampere", "ada", "hopper", "cdna"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_both_passes_round_fp32_scores_alike(family: str, channels_last: bool) -> None:
    for tokens in (25, 49, 64, 144, 1024):
        for dim in (8, 16, 24, 32, 64, 128, 256):
            forward, backward = (
                tiles_of(family, direction, torch.float32, tokens, dim, channels_last).channels
                for direction in ("forward", "backward")
            )
            assert forward == backward, (tokens, dim)


@pytest.mark.parametrize(
    ("num_warps", "registers", "shared", "expected"),
    [
        (4, 128, 0, 4 * 4 / 64),  # 65536 registers hold 512 threads of 128
        (4, 255, 0, 2 * 4 / 64),  # 255 are given out as 256
        (4, 32, 40000, 4 * 4 / 64),  # 167936 bytes hold four programs of 40000 + 1024
        (1, 16, 0, 32 / 64),  # never more than 32 programs
    ],
)
def test_occupancy_of_an_a100(num_warps: int, registers: int, shared: int, expected: float) -> None:
    assert occupancy(TARGETS["sm_80"], num_warps, registers, shared) == expected


def test_what_the_command_prints_and_writes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    row: dict[str, Any] = dict.fromkeys(report.COLUMNS, 1) | {"op": "windowed_distillation", "window_size": None}
    monkeypatch.setattr(report, "report", lambda targets, **_: [row | {"target": target} for target in targets])
    report.main([])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["op", "pass"]
    assert "not a measurement" in lines[-1]
    report.main(["--target", "sm_90", "--output", str(tmp_path / "new")])
    with (tmp_path / "new/kernel_resources.csv").open(encoding="utf-8") as file:
        (written,) = csv.DictReader(file)
    assert written == {name: "" if value is None else str(value) for name, value in (row | {"target": "sm_90"}).items()}
    text = (tmp_path / "new/kernel_resources.md").read_text(encoding="utf-8")
    assert "all\n1 configurations without a GPU" in text
    assert "\n|--" in text
    assert "not a measurement" in text


def test_summary_shows_the_worst_of_a_group() -> None:
    row: dict[str, Any] = dict.fromkeys(report.COLUMNS, 0) | {"op": "prototypes", "target": "sm_80", "shared_limit": 9}
    rows = [
        row | {"shared_bytes": 7, "tensor_core_instructions": 4, "vector_loads": 5},
        row | {"shared_bytes": 3, "tensor_core_instructions": 2, "vector_loads": 6, "stack_bytes": 8},
        row | {"target": "sm_90"},
    ]
    first, second = report.summary(rows)
    assert (first["target"], first["rows"], second["target"], second["rows"]) == ("sm_80", 2, "sm_90", 1)
    assert (first["most_stack_bytes"], first["most_shared_bytes"]) == (8, 7)
    assert (first["least_tensor_core_instructions"], first["least_vector_loads"]) == (2, 5)


def test_a_failed_compilation_is_reported_with_its_reason() -> None:
    with pytest.raises(RuntimeError, match=r"compiling windowed_distillation for sm_80 failed: .*IndexError"):
        list(report._in_subprocess("windowed_distillation", "sm_80", [100000]))
