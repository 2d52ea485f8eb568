"""`benchmarks/test_operations.py` times correct results only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]

ONE_WRONG_IMPLEMENTATION = """
import sward_kernels

exact = sward_kernels.prototype_discrimination

def one_per_mille_off(*arguments, implementation):
    result = exact(*arguments, implementation=implementation)
    return result._replace(loss=result.loss * 1.001) if implementation == "eager" else result

sward_kernels.prototype_discrimination = one_per_mille_off
"""


def test_a_wrong_result_fails_and_is_not_timed(tmp_path: Path) -> None:
    (tmp_path / "one_wrong_implementation.py").write_text(ONE_WRONG_IMPLEMENTATION)
    search_path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    select = "prototype_discrimination and 16x16 and (reference or eager)"
    command = [
        *(sys.executable, "-m", "pytest", "benchmarks", "-p", "one_wrong_implementation", "-k", select),
        *("--benchmark-only", "--benchmark-min-rounds=1", "--benchmark-max-time=0.01"),
        f"--benchmark-json={tmp_path / 'timed.json'}",
    ]
    # pytest-benchmark times nothing in a worker of pytest-xdist, which this test may run in.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    run = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=environment | {"PYTHONPATH": search_path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1, run.stdout + run.stderr
    assert "1 failed, 1 passed" in run.stdout
    assert "relative error must be at most 1e-04" in run.stdout
    timed = json.loads((tmp_path / "timed.json").read_text())["benchmarks"]
    assert [each["param"].rsplit("-", 1)[-1] for each in timed] == ["reference"]
    assert timed[0]["group"].startswith("prototype_discrimination-")
