"""Every command of `sward reproduce` at the small scale on the real images, cut to a few steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from sward.cli.main import main
from tests.support.real_data import real_data_root

pytestmark = pytest.mark.slow

TABLES = {
    "table1": "table1-small",
    "table2": "table2-small",
    "table3": "table3-small",
    "table4": "table4-small",
    "methods": "methods-clinicdb-small",
    "questions": "questions-clinicdb-small",
}
FIGURES = {
    "figure1": ["figure1-small"],
    "figure3": ["figure3-camvid-small", "figure3-cvc_clinicdb-small", "figure3-cvc_colondb-unseen-small"],
    "figure4": ["figure4-small"],
    "attention": ["attention-clinicdb-small"],
}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all commands: they share their runs, as a user's do."""
    return tmp_path_factory.mktemp("study")


def run(what: str, output: Path) -> int:
    root = real_data_root("cvc_clinicdb")
    words = ["--scale", "small", "--seeds", "1", "--iterations", "2", "--untrained-trunk"]
    return main(["reproduce", what, *words, "--data", str(root), "--output", str(output)])


@pytest.mark.parametrize("what", TABLES)
def test_table(what: str, output: Path) -> None:
    assert run(what, output) == 0
    lines = (output / f"{TABLES[what]}.csv").read_text(encoding="utf-8").splitlines()
    assert len(lines) > 3
    counts = lines[0].split(",").index("runs")
    assert {line.split(",")[counts] for line in lines[1:] if '"' not in line} == {"1"}
    assert (output / f"{TABLES[what]}.md").stat().st_size > 500
    assert (output / f"{TABLES[what]}.tex").stat().st_size > 500


@pytest.mark.parametrize("what", FIGURES)
def test_figure(what: str, output: Path) -> None:
    assert run(what, output) == 0
    for name in FIGURES[what]:
        for suffix in ("png", "svg"):
            assert (output / f"{name}.{suffix}").stat().st_size > 5000
