"""Aggregation over seeds, and the three formats a table is written in."""

from __future__ import annotations

import csv
import io
import statistics
from pathlib import Path

import pytest

from sward.reproduce.experiments import table2
from sward.reproduce.tables import (
    Column,
    FilledTable,
    Mean,
    average,
    comma_separated,
    escape_latex,
    latex,
    markdown,
    model_costs,
    signs_of_collapse,
    write,
)

TABLE = FilledTable(
    "50 % of A & B",
    (Column("method"), Column("runs", 0), Column("mDice"), Column("paper_mDice")),
    (
        ("S: unext_a | b", 3, Mean(61.123456, 1.5, 3), 90.02),
        ("+ SWARD", 1, Mean(63.0, None, 1), None),
        ("+ FreeKD", 0, None, 91.51),
    ),
    ("A note.",),
)


def test_average_is_the_mean_and_the_sample_standard_deviation() -> None:
    values = [60.0, 64.0, 65.0]
    assert average(values) == Mean(63.0, pytest.approx(7**0.5), 3)  # (9 + 1 + 4) / (3 - 1)
    assert average(values).spread == pytest.approx(statistics.stdev(values))


def test_average_leaves_out_what_is_missing_and_gives_one_run_no_spread() -> None:
    assert average([None, 2.0]) == Mean(2.0, None, 1)
    assert average([None, None]) is None


def test_markdown_has_as_many_cells_in_every_line_and_escapes_bars() -> None:
    lines = markdown(TABLE).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {5}
    assert "| S: unext_a \\| b | 3 | 61.12 ± 1.50 | 90.02 |" in rows
    assert "| + SWARD | 1 | 63.00 | - |" in rows
    assert lines[-1] == "A note."


def test_csv_keeps_every_digit_and_the_number_of_runs() -> None:
    rows = list(csv.DictReader(io.StringIO(comma_separated(TABLE))))
    assert list(rows[0]) == ["method", "runs", "mDice mean", "mDice std", "mDice n", "paper_mDice"]
    assert float(rows[0]["mDice mean"]) == 61.123456
    assert (rows[0]["mDice std"], rows[0]["mDice n"]) == ("1.5", "3")
    assert (rows[1]["mDice std"], rows[1]["mDice n"], rows[1]["paper_mDice"]) == ("", "1", "")
    assert [rows[2][name] for name in ("mDice mean", "mDice std", "mDice n")] == ["", "", ""]


def test_latex_escapes_everything_that_means_something() -> None:
    assert escape_latex("a_b & 50 % of $x$ #1 {y} ~ ^ \\") == (
        "a\\_b \\& 50 \\% of \\$x\\$ \\#1 \\{y\\} \\textasciitilde{} \\textasciicircum{} \\textbackslash{}"
    )
    text = latex(TABLE)
    assert "\\caption{50 \\% of A \\& B}" in text
    assert "S: unext\\_a \\textbar{} b & 3 & 61.12 $\\pm$ 1.50 & 90.02 \\\\" in text
    body = text[text.index("\\midrule") : text.index("\\bottomrule")]
    assert {line.replace("\\&", "").count("&") for line in body.splitlines()[1:] if line} == {3}


def test_write_leaves_three_files(tmp_path: Path) -> None:
    paths = write(TABLE, tmp_path / "new" / "table1-small")
    assert [path.name for path in paths] == ["table1-small.md", "table1-small.csv", "table1-small.tex"]
    assert [path.read_text(encoding="utf-8") for path in paths] == [
        markdown(TABLE),
        comma_separated(TABLE),
        latex(TABLE),
    ]


def test_costs_follow_the_paper_s_counting_rule() -> None:
    pytest.importorskip("ptflops")
    costs = model_costs(table2("small"))["unext"]
    assert (round(costs.params_millions, 2), round(costs.gflops, 2)) == (1.47, 4.63)


def test_signs_of_collapse_are_averaged_over_stages_and_over_the_last_tenth() -> None:
    def record(step: int, first: float, second: float) -> dict[str, object]:
        diagnostics = {
            "stage0/teacher/value_rank": first,
            "stage1/teacher/value_rank": second,
            "stage0/student/value_rank": 99.0,
        }
        terms = {"attention": first, "value": second, "context": 0.0}
        return {"step": step, "diagnostics": diagnostics, **terms}

    records = [record(90, 50.0, 50.0), record(95, 1.0, 3.0), {"step": 100, "validation": {}}, record(100, 5.0, 7.0)]
    signs = signs_of_collapse(records)
    assert signs == {"value_rank": 4.0, "attention": 3.0, "value": 5.0, "context": 0.0}
    assert signs_of_collapse([{"step": 1, "loss": 2.0}]) == {}
