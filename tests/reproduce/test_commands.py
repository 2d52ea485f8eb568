"""Every command of `sward reproduce` at the small scale on the real images, cut to a few steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from sward.cli.main import main
from sward.reproduce.rendering import escape_latex
from tests.support.drawn_figures import DrawnFigure
from tests.support.real_data import real_data_root

pytestmark = pytest.mark.slow

TABLES = {
    "table1": "table1-small",
    "table2": "table2-small",
    "table3": "table3-small",
    "table4": "table4-small",
    "methods": "methods-clinicdb-small",
    "questions": "questions-clinicdb-small",
    "unlabelled": "unlabelled",
    "masks": "masks",
}
FIGURES = {
    "figure1": ["figure1-small"],
    "figure3": ["figure3-camvid-small", "figure3-cvc_clinicdb-small", "figure3-cvc_colondb-unseen-small"],
    "figure4": ["figure4-small"],
    "attention": ["attention-clinicdb-small"],
}
PANELS = {
    "figure1": [["image", "teacher", "student alone", "student + SWARD"], [""] * 4],
    "figure3": [
        ["image", "truth", "teacher", "student alone", "student + FreeKD", "student + SWARD"],
        [""] * 6,
        [""] * 6,
    ],
    "figure4": [
        ["(a) teacher", "(b) student alone", "silhouette"],
        ["(c) student + MWAD", "(d) student + MWAD + PDR", "Fisher ratio"],
    ],
    "attention": [["windows and query", "teacher", "student"], *[[""] * 3] * 3],
}
"""Titles of the panels, row by row."""


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
    cells = [line.split(",")[0] for line in lines[1:] if '"' not in line]
    markdown = (output / f"{TABLES[what]}.md").read_text(encoding="utf-8")
    latex = (output / f"{TABLES[what]}.tex").read_text(encoding="utf-8")
    assert all(f"| {cell} |" in markdown and f"{escape_latex(cell)} &" in latex for cell in cells)


@pytest.mark.parametrize("what", FIGURES)
def test_figure(what: str, output: Path, drawn_figures: list[DrawnFigure]) -> None:
    assert run(what, output) == 0
    assert [drawn.path for drawn in drawn_figures] == [output / f"{name}.png" for name in FIGURES[what]]
    for drawn in drawn_figures:
        assert [[axis.get_title() for axis in row] for row in drawn.panels()] == PANELS[what]
        drawn.assert_svg_beside()
