"""The scores in docs/results.md and README.md are those of docs/results/study.csv."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path

import pytest

from sward.paired import paired_t

ROOT = Path(__file__).resolve().parents[1]

COLONDB = ("colondb-small", "cvc_colondb, test split of ratio", "best")
CLINICDB = ("clinicdb-random-small", "cvc_clinicdb, test split of ratio", "best")
CLINICDB_TO_COLONDB = ("clinicdb-random-small", "cvc_colondb, all", "last")
SEQUENCE = ("clinicdb-small", "cvc_clinicdb, test split of sequence", "best")
SEQUENCE_LAST = ("clinicdb-small", "cvc_clinicdb, test split of sequence", "last")
SEQUENCE_TO_COLONDB = ("clinicdb-small", "cvc_colondb, all", "last")
SEQUENCE_TO_COLONDB_BEST = ("clinicdb-small", "cvc_colondb, all", "best")
UNLABELLED = ("clinicdb-small", "cvc_colondb, test split of parity", "last")

Set = tuple[str, str, str]


@cache
def dice(where: Set, method: str) -> dict[int, float]:
    """Return seed -> Dice in percent; of a seed with several rows, those of the processor of the first."""
    found: dict[int, float] = {}
    with (ROOT / "docs/results/study.csv").open() as file:
        for row in csv.DictReader(file):
            if (row["preset"], row["test"], row["weights"], row["method"]) == (*where, method):
                found.setdefault(int(row["seed"]), 100 * float(row["dice"]))
    return found


def page(name: str) -> str:
    return " ".join((ROOT / name).read_text().split())


@pytest.mark.parametrize(
    ("where", "method", "base", "pages"),
    [
        (COLONDB, "sward", "none", ("docs/results.md", "README.md")),
        (CLINICDB, "sward", "none", ("docs/results.md", "README.md")),
        (CLINICDB_TO_COLONDB, "sward", "none", ("docs/results.md",)),
        (SEQUENCE_TO_COLONDB, "sward", "none", ("docs/results.md", "README.md")),
        (SEQUENCE_TO_COLONDB_BEST, "sward", "none", ("docs/results.md",)),
        (SEQUENCE, "sward", "none", ("docs/results.md", "README.md")),
        (SEQUENCE_LAST, "sward", "none", ("docs/results.md",)),
        (SEQUENCE, "sward-unlabelled", "sward", ("docs/results.md",)),
        (SEQUENCE_TO_COLONDB, "cwd", "none", ("docs/results.md",)),
        (SEQUENCE_TO_COLONDB, "sward", "cwd", ("docs/results.md",)),
        (SEQUENCE, "cwd", "none", ("docs/results.md",)),
        (SEQUENCE, "sward", "cwd", ("docs/results.md",)),
        (UNLABELLED, "sward-unlabelled", "sward", ("docs/results.md", "README.md")),
        (UNLABELLED, "sward-unlabelled", "none", ("docs/results.md",)),
        (UNLABELLED, "sward-unlabelled-batch-8", "sward", ("docs/results.md",)),
    ],
)
def test_differences_are_those_of_the_study(where: Set, method: str, base: str, pages: tuple[str, ...]) -> None:
    first, second = dice(where, base), dice(where, method)
    difference = paired_t([second[seed] - first[seed] for seed in sorted(first.keys() & second.keys())])
    assert difference is not None
    interval = f"[{difference.low:.1f}, {difference.high:.1f}]"
    for name in pages:
        text = page(name)
        assert f"{difference.mean:+.1f} {interval}" in text or f"{difference.mean:.1f} points" in text
        assert interval in text


@pytest.mark.parametrize(
    ("where", "method"),
    [
        *((where, method) for where in (COLONDB, CLINICDB, CLINICDB_TO_COLONDB) for method in ("none", "sward")),
        *((where, method) for where in (SEQUENCE, SEQUENCE_LAST) for method in ("none", "sward")),
        *((where, method) for where in (SEQUENCE_TO_COLONDB, SEQUENCE_TO_COLONDB_BEST) for method in ("none", "sward")),
        *((where, "cwd") for where in (SEQUENCE, SEQUENCE_TO_COLONDB)),
        *((UNLABELLED, method) for method in ("sward-unlabelled", "sward-unlabelled-batch-8")),
        *((COLONDB, method) for method in ("cwd", "kd", "cirkd", "sward-features-none", "sward-window-8-8-8-4")),
    ],
)
def test_scores_per_seed_are_those_of_the_study(where: Set, method: str) -> None:
    scores = dice(where, method)
    assert sorted(scores) == list(range(len(scores)))
    assert f"| {' | '.join(f'{score:.1f}' for score in scores.values())} |" in page("docs/results.md")
