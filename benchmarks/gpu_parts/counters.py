"""Part `counters`: what the profilers count."""

from __future__ import annotations

import shutil
import subprocess
import sys

import torch

from gpu_parts.operation import maps_of, results_of
from gpu_parts.rows import DTYPES, REPOSITORY, Row, Stage, Suite

METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes.sum",
    "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_tensor.sum",
    "l1tex__t_bytes.sum",
    "smsp__inst_executed_op_local_ld.sum",
    "l1tex__data_bank_conflicts_pipe_lsu.sum",
)


def count(suite: Suite) -> None:
    """Counters of Nsight Compute where `ncu` is installed and allowed; else the kernels' times from the profiler."""
    stage = suite.sizes.stages[0]
    for dtype in ("bf16", "fp32"):
        suite.attempt(
            lambda dtype=dtype: _profile(suite, stage, dtype),  # type: ignore[misc]
            case=str(stage),
            provider="profiler",
            dtype=dtype,
            layout="channels_last",
        )
    if suite.rehearsal or not shutil.which("ncu"):
        suite.attempt(lambda: {"note": "skipped: ncu is not installed"}, case="Nsight Compute")
        return
    log = suite.folder / "ncu.csv"
    script = (
        "import sys, torch; sys.path.insert(0, 'benchmarks'); from gpu_parts import operation, rows; "
        "stage = rows.PAPER.stages[0]; [operation.results_of(stage, operation.maps_of(stage, t, 'channels_last', "
        "torch.device('cuda')), 'triton') "
        "for t in (torch.bfloat16, torch.float32)]"
    )
    command = ["ncu", "--csv", "--kernel-name", "regex:.*(forward|backward).*kernel", "--metrics", ",".join(METRICS)]

    def run() -> Row:
        with log.open("w", encoding="utf-8") as file:
            status = subprocess.run(
                [*command, sys.executable, "-c", script], cwd=REPOSITORY, stdout=file, stderr=file, check=False
            )
        return {"note": "see ncu.csv" if status.returncode == 0 else "not permitted or failed; see ncu.csv"}

    suite.attempt(run, case="Nsight Compute")


def _profile(suite: Suite, stage: Stage, dtype: str) -> Row:
    maps = maps_of(stage, DTYPES[dtype], "channels_last", suite.device)
    results_of(stage, maps, "triton")
    activities = [torch.profiler.ProfilerActivity.CPU if suite.rehearsal else torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        results_of(stage, maps, "triton")
    kernels = [
        f"{event.key[:40]} {event.device_time_total:.0f} us"
        for event in profile.key_averages()
        if event.device_time_total > 0
    ]
    return {"note": "; ".join(kernels) or "no kernel on a device"}
