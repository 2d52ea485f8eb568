"""What calls would compile on a GPU: launches up to the driver, which does nothing; needs no GPU and no compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def compilations(calls: str) -> list[int]:
    """Run `calls`, Python that appends `len(compiled)` to `counts` after calls of its choice, and return `counts`.

    It runs in a process of its own, since the mock takes the place of Triton's driver and of its interpreter.
    """
    source = "\n".join(
        ["import json, mocked_gpu", "compiled, counts = mocked_gpu.install(), []", calls, "print(json.dumps(counts))"]
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY / "benchmarks"), str(REPOSITORY)])}
    finished = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, env=environment, timeout=300
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    counts: list[int] = json.loads(finished.stdout)
    return counts
