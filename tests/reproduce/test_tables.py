"""Aggregation over seeds, and the three formats a table is written in."""

from __future__ import annotations

import csv
import io
import statistics
from pathlib import Path
from typing import ClassVar

import pytest

from sward.evaluation import Evaluation
from sward.paired import Difference
from sward.reproduce.experiments import TEACHER, EvaluationSet, Run
from sward.reproduce.options import Options
from sward.reproduce.own_tables import length, methods, peers, unlabelled
from sward.reproduce.paper_tables import table2
from sward.reproduce.rendering import (
    Column,
    Comparison,
    FilledTable,
    Mean,
    comma_separated,
    escape_latex,
    latex,
    markdown,
    write,
)
from sward.reproduce.study import Cost, Study
from sward.reproduce.tables import average, fill, model_costs, signs_of_collapse
from sward.training.run_folder import RunFolder

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


COMPARED = FilledTable(
    "",
    (Column("method"), Column("mDice"), Column("mDice - alone (95 %)")),
    (
        ("alone", Mean(50.0, 1.0, 2), None),
        (
            "+ SWARD",
            Mean(60.0, 1.0, 2),
            Comparison(Difference(10.0, -1.5, 21.5, 2), Difference(10.0, 4.0, 16.0, 2)),
        ),
        ("+ CWD", Mean(59.0, 1.0, 2), Comparison(Difference(9.0, 8.0, 10.0, 2), None)),
    ),
    (),
    frozenset({(1, 1)}),
)


def test_a_difference_is_written_with_its_interval_and_what_is_bold_as_such() -> None:
    assert "| + SWARD | **60.00 ± 1.00** | +10.00 (-1.50 to +21.50) |" in markdown(COMPARED)
    assert "+ SWARD & \\textbf{60.00 $\\pm$ 1.00} & +10.00 (-1.50 to +21.50) \\\\" in latex(COMPARED)
    assert markdown(COMPARED).count("**") == 4  # and the caption's
    alone, sward, cwd = csv.DictReader(io.StringIO(comma_separated(COMPARED)))
    names = [f"mDice - alone (95 %) {part}" for part in ("mean", "low", "high", "n", "bootstrap low", "bootstrap high")]
    assert list(alone) == ["method", "mDice mean", "mDice std", "mDice n", *names]
    assert [sward[name] for name in names] == ["10.0", "-1.5", "21.5", "2", "4.0", "16.0"]
    assert [cwd[name] for name in names] == ["9.0", "8.0", "10.0", "2", "", ""]
    assert {alone[name] for name in names} == {""}


class Scored(Study):
    """A study whose runs are finished, with the Dice of three seeds each."""

    DICE: ClassVar[dict[str, list[float]]] = {
        TEACHER: [0.9],
        "none": [0.50, 0.40, 0.45],
        "sward": [0.60, 0.51, 0.54],  # +10, +11, +9: 10 +- 4.303 / sqrt(3)
        "cwd": [0.70, 0.30, 0.66],  # the best on average on the second test, but not surely better
    }

    def cost(self, run: Run, seed: int) -> Cost | None:
        return Cost(steps=1, seconds=1.0, peak_memory=None) if run.name in self.DICE else None

    def evaluation(self, run: Run, seed: int, test: EvaluationSet) -> Evaluation | None:
        if run.name not in self.DICE:
            return None
        dice = self.DICE[run.name][seed] + (0.1 if run.name == "cwd" and test.dataset else 0.0)
        per_image = {"dice": [dice - 0.1, dice + 0.1], "iou": [0.0, 0.0]}
        return Evaluation(2, 0.5, 0.5, {}, dice, 0.0, dice, None if test.dataset else per_image)


def test_only_a_winner_whose_interval_is_above_zero_is_bold(monkeypatch: pytest.MonkeyPatch) -> None:
    filled = fill(methods("clinicdb-small"), Scored(Options("methods", seeds=3)))
    headers = [column.header for column in filled.columns]
    own, unseen = headers.index("CVC-ClinicDB mDice"), headers.index("CVC-ColonDB, unseen mDice")
    rows = {row[0]: (index, row) for index, row in enumerate(filled.rows)}
    index, row = rows["+ SWARD"]
    compared = row[headers.index("CVC-ClinicDB mDice - alone (95 %)")]
    assert compared.by_seed.mean == pytest.approx(10.0)
    assert compared.by_seed.low == pytest.approx(10 - 4.303 / 3**0.5, abs=1e-3)
    assert compared.by_image.mean == pytest.approx(10.0)
    # Two images with equal differences: the bootstrap's spread is that of the seeds.
    assert compared.by_image.low == pytest.approx(9.0, abs=0.4)
    assert row[headers.index("CVC-ColonDB, unseen mDice - alone (95 %)")].by_image is None
    assert rows["teacher"][1][headers.index("CVC-ClinicDB mDice - alone (95 %)")] is None
    assert rows["student alone"][1][headers.index("CVC-ClinicDB mDice - alone (95 %)")] is None
    # On the first test CWD's 55.3 is the highest mean, on the second its 65.3; neither interval is above zero.
    assert rows["+ CWD"][1][own].mean > row[own].mean
    assert rows["+ CWD"][1][unseen].mean > row[unseen].mean
    assert filled.bold == frozenset()
    monkeypatch.setitem(Scored.DICE, "cwd", [0.1, 0.1, 0.1])
    again = fill(methods("clinicdb-small"), Scored(Options("methods", seeds=3)))
    assert again.bold == {(index, own), (index, unseen)}
    assert any(note.startswith("Minus alone") for note in filled.notes)


def test_a_row_is_compared_with_the_run_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(Scored.DICE, "sward-unlabelled", [0.70, 0.60, 0.66])  # +10, +9, +12 over sward
    filled = fill(unlabelled(), Scored(Options("unlabelled", seeds=3)))
    headers = [column.header for column in filled.columns]
    column = headers.index("CVC-ClinicDB mDice - labelled images only (95 %)")
    rows = {row[0]: row for row in filled.rows}
    found = rows["+ SWARD, unlabelled too"][column].by_seed
    assert found.mean == pytest.approx(31 / 3)
    assert found.low == pytest.approx(31 / 3 - 4.303 * (7 / 3) ** 0.5 / 3**0.5, abs=1e-3)
    assert all(row[column] is None for title, row in rows.items() if title != "+ SWARD, unlabelled too")
    assert any(note.startswith("Minus labelled images only") for note in filled.notes)


def test_twice_the_steps_are_compared_with_twice_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(Scored.DICE, "none-twice", [0.57, 0.50, 0.50])
    monkeypatch.setitem(Scored.DICE, "sward-twice", [0.61, 0.52, 0.55])
    filled = fill(length("clinicdb-small"), Scored(Options("length", seeds=3)))
    headers = [column.header for column in filled.columns]
    alone, twice = (
        headers.index(f"CVC-ClinicDB mDice - {other} (95 %)") for other in ("alone", "student alone, twice as long")
    )
    rows = {row[0]: row for row in filled.rows}
    assert rows["+ SWARD, twice as long"][alone].by_seed.mean == pytest.approx(11 / 3)  # +4, +2, +5; 11 over once
    assert rows["student alone, twice as long"][alone] is None
    assert rows["+ SWARD"][alone].by_seed.mean == pytest.approx(10)
    assert rows["+ SWARD"][twice].by_seed.mean == pytest.approx(8 / 3)  # +3, +1, +4


class Validated(Scored):
    """A study whose runs also have validation scores."""

    SCORES: ClassVar[dict[str, list[float]]] = {
        "cwd": [0.30, 0.50],
        "cwd-times-0.01": [0.40, 0.45],
        "cwd-times-0.1": [0.62, 0.55],  # the best of all, and not at its last validation
        "cwd-times-10": [0.10, 0.20],
        **{f"kd{end}": [0.4] for end in ("", "-times-0.01", "-times-0.1", "-times-10")},
        "sward": [0.6],  # its other factors are not finished
    }

    def cost(self, run: Run, seed: int) -> Cost | None:
        return Cost(steps=1, seconds=1.0, peak_memory=None) if run.name in self.SCORES and seed == 0 else None

    def folder(self, run: Run, seed: int) -> RunFolder:
        folder = super().folder(run, seed)
        scores = [{"step": step, "validation": {"dice": dice}} for step, dice in enumerate(self.SCORES[run.name])]
        scores.append({"step": len(scores), "validation": {"dice": None}})  # no image could be scored
        folder.records = lambda: [{"step": 0, "loss": 1.0}, *scores]
        return folder


def test_the_factor_with_the_best_validation_score_is_chosen_and_unfinished_choices_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Study, "masks_file", lambda *_: Path("masks.pt"))
    monkeypatch.setitem(Validated.SCORES, TEACHER, [0.9])
    study = Validated(Options("peers", seeds=2))
    table = study.choose(peers("colondb-small"))
    rows = {row.title: row.runs[0] for row in table.rows}
    assert rows["+ CWD, chosen factor 0.1"].name == "cwd-times-0.1"
    assert len(study.seeds(rows["+ CWD, chosen factor 0.1"])) == 2
    assert rows["+ KD, chosen factor 1"] == rows["+ KD"]  # of equal scores the published weight
    assert "+ SWARD" in rows
    assert not any(title.startswith("+ SWARD, chosen") for title in rows)


def test_a_factor_chosen_on_the_scored_images_is_called_that() -> None:
    notes = {
        preset: fill(peers(preset), Scored(Options("peers", seeds=2))).notes for preset in ("demo", "colondb-small")
    }
    said = {preset: any("favours their rows" in note for note in notes[preset]) for preset in notes}
    assert said == {"demo": True, "colondb-small": False}


def test_one_seed_has_no_column_of_differences() -> None:
    filled = fill(methods("clinicdb-small"), Scored(Options("methods", seeds=1)))
    assert not any("alone" in column.header for column in filled.columns)
    assert not filled.bold


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
