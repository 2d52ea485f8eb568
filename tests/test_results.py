"""The tables of scores in README.md and docs/results.md, as far as they follow from docs/results/study.csv."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path
from statistics import fmean

import pytest

from sward.paired import paired_t

ROOT = Path(__file__).resolve().parents[1]

Scores = tuple[str, str, str]
"""Preset, test images and weights, as in study.csv."""

COLONDB: Scores = ("colondb-small", "cvc_colondb, test split of ratio", "best")
CLINICDB: Scores = ("clinicdb-random-small", "cvc_clinicdb, test split of ratio", "best")
CLINICDB_TO_COLONDB: Scores = ("clinicdb-random-small", "cvc_colondb, all", "last")
SEQUENCE: Scores = ("clinicdb-small", "cvc_clinicdb, test split of sequence", "best")
SEQUENCE_LAST: Scores = ("clinicdb-small", "cvc_clinicdb, test split of sequence", "last")
SEQUENCE_TO_COLONDB: Scores = ("clinicdb-small", "cvc_colondb, all", "last")
SEQUENCE_TO_COLONDB_BEST: Scores = ("clinicdb-small", "cvc_colondb, all", "best")
TENTH: Scores = ("clinicdb-small-10", "cvc_clinicdb, test split of sequence", "best")
TENTH_OTHER_HALF: Scores = ("clinicdb-small-10", "cvc_colondb, test split of parity", "last")
QUARTER: Scores = ("clinicdb-small-25", "cvc_clinicdb, test split of sequence", "best")
QUARTER_OTHER_HALF: Scores = ("clinicdb-small-25", "cvc_colondb, test split of parity", "last")
CAMVID: Scores = ("camvid-small", "camvid, val split", "last")
OTHER_HALF: Scores = ("clinicdb-small", "cvc_colondb, test split of parity", "last")

SUMMARY = "# Results"
FIRST = "## Does it help? CVC-ColonDB, random split, UNeXt"
RANDOM = "## CVC-ClinicDB, random split"
HOSPITALS = "## Other hospitals: trained on CVC-ClinicDB by sequence"
UNLABELLED = "### Images without masks"
FEW = "### Few masks"
FEW_OWN = "The same runs on ClinicDB's own test sequences, best weights:"
PEERS = "### Peers and ingredients"
STREETS = "## Street scenes: CamVid"


@cache
def study() -> list[dict[str, str]]:
    with (ROOT / "docs/results/study.csv").open() as file:
        return list(csv.DictReader(file))


@cache
def dice(scores: Scores, method: str, processor: str = "Intel Xeon") -> dict[int, float]:
    """Return seed -> Dice (CamVid: mIoU) in percent, in order.

    That of a teacher trained on another processor, if it has no other.
    """
    rows = [row for row in study() if (row["preset"], row["test"], row["weights"], row["method"]) == (*scores, method)]
    here = [row for row in rows if row["processor"] == processor]
    chosen = here or rows if method == "teacher" else here
    found = {int(row["seed"]): 100 * float(row["dice"] or row["mean_iou"]) for row in chosen}
    assert len(found) == len(chosen), f"two rows of one seed of {method}"
    return dict(sorted(found.items()))


def gain(scores: Scores, method: str, base: str, seeds: int | None = None) -> str:
    """Return the mean difference over the (first) seeds that both have, with its interval, as the pages write it."""
    one, other = dice(scores, method), dice(scores, base)
    difference = paired_t([one[seed] - other[seed] for seed in one if seed in other][:seeds])
    assert difference is not None
    return f"{difference.mean:+.1f} [{difference.low:.1f}, {difference.high:.1f}]"


def mean(scores: Scores, method: str, seeds: int | None = None) -> str:
    return f"{fmean(list(dice(scores, method).values())[:seeds]):.1f}"


def cells(page: str, section: str, label: str) -> list[str]:
    """Return the other cells of the first row with this first cell between this line and the next heading."""
    text = (ROOT / page).read_text().replace("**", "")
    part = text.partition(f"{section}\n")[2]
    lines = part.splitlines()
    end = next((number for number, line in enumerate(lines) if line.startswith("#")), len(lines))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:end] if line.startswith("|")]
    return next(row for row in rows if row[0] == label)[1:]


@pytest.mark.parametrize(
    ("label", "scores", "method", "base"),
    [
        ("CVC-ColonDB, random split", COLONDB, "sward", "none"),
        ("CVC-ClinicDB, random split", CLINICDB, "sward", "none"),
        (
            "trained on ClinicDB by sequence, tested on ColonDB, which no network saw",
            *(SEQUENCE_TO_COLONDB, "sward", "none"),
        ),
        (
            "trained on ClinicDB by sequence and 148 frames of ColonDB without masks, tested on ColonDB's other 232",
            *(OTHER_HALF, "sward-unlabelled", "none"),
        ),
        (
            "trained on ClinicDB at random, tested on ColonDB, which no network saw",
            *(CLINICDB_TO_COLONDB, "sward", "none"),
        ),
        ("CVC-ClinicDB by sequence", SEQUENCE, "sward", "none"),
    ],
)
def test_first_table(label: str, scores: Scores, method: str, base: str) -> None:
    seeds = len(dice(scores, method))
    found = cells("docs/results.md", SUMMARY, label)
    assert found == [mean(scores, base, seeds), mean(scores, method), gain(scores, method, base), str(seeds)]


def test_the_table_of_readme() -> None:
    columns = (COLONDB, CLINICDB, SEQUENCE_TO_COLONDB)
    expected = {
        "alone": [mean(scores, "none") for scores in columns],
        "+ SWARD (recommended recipe)": [mean(scores, "sward") for scores in columns],
        "difference, paired by seed [95 % interval]": [gain(scores, "sward", "none") for scores in columns],
        "seeds": [str(len(dice(scores, "sward"))) for scores in columns],
        "teacher: DINOv2 ViT-S/14, frozen, light head, 22.6 M parameters": [
            mean((preset, test, "best"), "teacher") for preset, test, _ in columns
        ],
    }
    assert {label: cells("README.md", "## Does it help?", label) for label in expected} == expected
    text = " ".join((ROOT / "README.md").read_text().replace("**", "").split())
    first, second, third = (gain(scores, "sward", "none").split()[0] for scores in columns)
    assert f"{first} and {second} points of Dice for UNeXt on CVC-ColonDB and CVC-ClinicDB" in text
    assert f"and {third} on ColonDB where student and teacher" in text
    assert f"test sequences the students of the last column show {gain(SEQUENCE, 'sward', 'none')}" in text
    points, _, interval = gain(CAMVID, "sward", "none").partition(" ")
    assert f"three seeds show {points} points of mIoU {interval}" in text
    points, _, interval = gain(OTHER_HALF, "sward-unlabelled", "sward").partition(" ")
    assert f"another {points.removeprefix('+')} points {interval} on its other frames" in text
    points, _, interval = gain(TENTH_OTHER_HALF, "sward", "none").partition(" ")
    more, _, wider = gain(QUARTER_OTHER_HALF, "sward", "none").partition(" ")
    assert f"gains {points.removeprefix('+')} points {interval} on ColonDB, " in text
    assert f"with 107 masks {more.removeprefix('+')} {wider} (3 seeds each)" in text


def test_the_other_processor() -> None:
    means = []
    for label, method in (("alone", "none"), ("+ SWARD", "sward")):
        found = dice(COLONDB, method, "AMD EPYC")
        means.append(fmean(found.values()))
        row = [*(f"{score:.1f}" for score in found.values()), f"{means[-1]:.1f}"]
        assert cells("docs/results.md", FIRST, f"on an AMD EPYC: {label}")[:4] == row
    text = " ".join((ROOT / "docs/results.md").read_text().split())
    assert f"The same three seeds gain {means[1] - means[0]:.1f} points" in text


ALONE_AND_SWARD = [
    *(
        (FIRST, "", COLONDB),
        (RANDOM, "CVC-ClinicDB: ", CLINICDB),
        (RANDOM, "CVC-ColonDB, unseen: ", CLINICDB_TO_COLONDB),
    ),
    (HOSPITALS, "CVC-ColonDB, unseen, last weights: ", SEQUENCE_TO_COLONDB),
    (HOSPITALS, "CVC-ColonDB, unseen, best weights: ", SEQUENCE_TO_COLONDB_BEST),
    (HOSPITALS, "CVC-ClinicDB, best weights: ", SEQUENCE),
    (HOSPITALS, "CVC-ClinicDB, last weights: ", SEQUENCE_LAST),
    (FEW, "10 % of the masks: ", TENTH_OTHER_HALF),
    (FEW, "25 % of the masks: ", QUARTER_OTHER_HALF),
    (FEW, "100 % of the masks: ", OTHER_HALF),
    (FEW_OWN, "10 % of the masks: ", TENTH),
    (FEW_OWN, "25 % of the masks: ", QUARTER),
    (FEW_OWN, "100 % of the masks: ", SEQUENCE),
]


@pytest.mark.parametrize(("section", "prefix", "scores"), ALONE_AND_SWARD)
def test_scores_per_seed_alone_and_with_sward(section: str, prefix: str, scores: Scores) -> None:
    seeds = 3 if section in (FEW, FEW_OWN) else 4
    sward = "+ SWARD (recommended recipe)" if section == FIRST else "+ SWARD"
    for label, method in (("alone", "none"), (sward, "sward")):
        values = [f"{score:.1f}" for score in dice(scores, method).values()][:seeds]
        found = cells("docs/results.md", section, prefix + label)
        assert found[: len(values) + 1] == [*values, mean(scores, method, seeds)]
    if section != FIRST:
        assert found[len(values) + 1] == gain(scores, "sward", "none", seeds)


@pytest.mark.parametrize(
    ("scores", "heading", "label", "method", "base"),
    [
        *(
            (scores, heading, label, method, base)
            for scores, heading, default in (
                (OTHER_HALF, UNLABELLED, " (the default)"),
                (SEQUENCE, "On ClinicDB's own test sequences, best weights:", ""),
            )
            for label, method, base in (
                ("alone", "none", None),
                ("+ SWARD, labelled images only", "sward", None),
                (f"+ SWARD, 2 unlabelled images per step too{default}", "sward-unlabelled", "sward"),
                ("+ CWD, labelled images only", "cwd", None),
                ("+ CWD, 2 unlabelled images per step too", "cwd-unlabelled", "cwd"),
            )
        ),
        (OTHER_HALF, UNLABELLED, "+ SWARD, 8 per step", "sward-unlabelled-batch-8", "sward"),
    ],
)
def test_scores_with_unlabelled_images(scores: Scores, heading: str, label: str, method: str, base: str | None) -> None:
    seeds = min(3, len(dice(scores, method)))
    values = [f"{score:.1f}" for score in dice(scores, method).values()][:seeds]
    found = cells("docs/results.md", heading, label)
    assert found[:4] == [*values, *[""] * (3 - seeds), mean(scores, method, seeds)]
    if base is not None:
        assert found[4].removesuffix(" (seeds 0 and 1)") == gain(scores, method, base)


def test_sward_and_cwd_with_unlabelled_images() -> None:
    text = " ".join((ROOT / "docs/results.md").read_text().split())
    there, here = (gain(scores, "sward-unlabelled", "cwd-unlabelled") for scores in (OTHER_HALF, SEQUENCE))
    assert f"SWARD to CWD {there} on the other hospital and {here} on ClinicDB" in text


@pytest.mark.parametrize(
    ("label", "method"),
    [
        ("alone", "none"),
        ("+ SWARD", "sward"),
        ("+ SWARD, windows of 4 pixels on the deepest map, which has 4x4", "sward-window-8-8-8-4"),
        ("+ SWARD, teacher features as they are", "sward-features-none"),
        ("+ SWARD, with PDR", "sward-pdr"),
        ("+ MasKD", "maskd"),
        ("+ CWD", "cwd"),
        ("+ CIRKD", "cirkd"),
        ("+ FreeKD", "freekd"),
        ("+ KD", "kd"),
    ],
)
def test_scores_of_peers_and_ingredients(label: str, method: str) -> None:
    values = [f"{score:.1f}" for score in dice(COLONDB, method).values()]
    found = cells("docs/results.md", PEERS, label)
    assert found[:3] == [*values, *[""] * (3 - len(values))]
    # With fewer seeds an interval says nothing.
    assert found[3] == (gain(COLONDB, "sward", method) if len(values) == 3 and method != "sward" else "")
    if method == "sward-features-none":
        text = " ".join((ROOT / "docs/results.md").read_text().split())
        assert f"without standardising, SWARD gains {gain(COLONDB, method, 'none').removeprefix('+')}." in text


@pytest.mark.parametrize(
    ("label", "method"),
    [
        ("alone, 60 epochs (5,460 steps)", "none"),
        ("+ SWARD, 60 epochs", "sward"),
        ("alone, 120 epochs", "none-twice"),
    ],
)
def test_scores_of_street_scenes(label: str, method: str) -> None:
    values = [f"{score:.1f}" for score in dice(CAMVID, method).values()]
    found = cells("docs/results.md", STREETS, label)
    assert found[:3] == [*values, *[""] * (3 - len(values))]
    assert found[3] == (mean(CAMVID, method) if len(values) == 3 else "")
    assert found[4] == (gain(CAMVID, "sward", "none") if method == "sward" and len(values) == 3 else "")
    assert (
        f"has {dice(('camvid-small', 'camvid, val split', 'best'), 'teacher')[0]:.1f} %"
        in ((ROOT / "docs/results.md").read_text().partition(STREETS)[2])
    )


def test_what_is_said_of_street_scenes() -> None:
    points, _, interval = gain(CAMVID, "sward", "none").partition(" ")
    text = " ".join((ROOT / "docs/results.md").read_text().split())
    assert f"gains nothing, [{points} points of mIoU](#street-scenes-camvid) {interval} over 3 seeds" in text
    assert f"SWARD gains nothing here: {points} points {interval}" in text
    alone, distilled = dice(CAMVID, "none"), dice(CAMVID, "sward")
    per_seed = [f"{distilled[seed] - alone[seed]:+.1f}" for seed in sorted(alone)]
    assert f"in three seeds {per_seed[0]}, {per_seed[1]} and {per_seed[2]}." in text
    teacher = dice(("camvid-small", "camvid, val split", "best"), "teacher")[0]
    assert f"the teacher is {teacher - fmean(alone.values()):.1f} points above the student" in text


def test_maskd_and_cwd_beside_the_student_alone() -> None:
    text = " ".join((ROOT / "docs/results.md").read_text().split())
    maskd, cwd = (gain(COLONDB, method, "none").removeprefix("+") for method in ("maskd", "cwd"))
    points = maskd.replace(" ", " points ", 1)
    assert f"level with SWARD here**, {gain(COLONDB, 'sward', 'maskd')}. It gains {points} over the student" in text
    assert f"over the student alone, CWD {cwd}." in text


FACTORS = (
    "The factor of each method's loss, seed 0, Dice on validation images (on test images); 1 is the recipe's own, or "
    "the published weight:"
)
TERMS = "The terms of MWAD and PDR, as in the paper's Table 3, with the recommended recipe:"
SHIFTS = "Shifts of the windows, as in the paper's Table 4:"


@pytest.mark.parametrize(
    ("heading", "label", "method", "above"),
    [
        (TERMS, "alone", "none", None),
        (TERMS, "+ MWAD (attention)", "sward-attention", "none"),
        (TERMS, "+ MWAD (attention, value)", "sward-attention-value", "sward-attention"),
        (TERMS, "+ MWAD (attention, value, context)", "sward", "sward-attention-value"),
        (TERMS, "+ MWAD + PDR, weight 0.1", "sward-pdr", "sward"),
        (SHIFTS, "alone", "none", "sward"),
        (SHIFTS, "no shift", "sward-shift-none", "sward"),
        (SHIFTS, "deterministic shift", "sward-shift-deterministic", "sward"),
        (SHIFTS, "stochastic shift", "sward", None),
    ],
)
def test_scores_of_terms_and_shifts(heading: str, label: str, method: str, above: str | None) -> None:
    values = [f"{score:.1f}" for score in dice(COLONDB, method).values()]
    assert len(values) == 3
    pair = (method, above) if heading == TERMS else (above, method)
    difference = "" if above is None else gain(COLONDB, *pair)
    to_alone = "" if method == "none" else gain(COLONDB, method, "none")
    assert cells("docs/results.md", heading, label) == [*values, mean(COLONDB, method), difference, to_alone]


@pytest.mark.parametrize("label", ["SWARD", "MasKD", "CWD", "CIRKD", "FreeKD", "KD"])
def test_factors_of_losses(label: str) -> None:
    method, factors = label.lower(), ("0.01", "0.1", "1", "10")
    names = {method if factor == "1" else f"{method}-times-{factor}": factor for factor in factors}
    found = {
        names[row["method"]]: (100 * float(row["validation"]), 100 * float(row["dice"]))
        for row in study()
        if row["preset"] == "colondb-small" and row["seed"] == "0" and row["validation"] and row["method"] in names
    }
    scores = ["{:.1f} ({:.1f})".format(*found[factor]) if factor in found else "" for factor in factors]
    chosen = max(found, key=lambda factor: found[factor][0]) if len(found) == len(factors) else ""
    assert cells("docs/results.md", FACTORS, label) == [*scores, chosen]


def test_what_terms_and_shifts_show() -> None:
    text = " ".join((ROOT / "docs/results.md").read_text().split())

    def found(method: str, base: str, word: str = " points") -> str:
        return gain(COLONDB, method, base).removeprefix("+").replace(" ", f"{word} ", 1)

    assert f"Attention gives {found('sward-attention', 'none')} and the values another " in text
    assert f"the values another {found('sward-attention-value', 'sward-attention', '')}: the first two" in text
    assert f"is not shown ({gain(COLONDB, 'sward', 'sward-attention-value')}), and PDR" in text
    assert f"PDR does not help here ({gain(COLONDB, 'sward-pdr', 'sward')})" in text
    assert f"the deterministic shift gains {found('sward-shift-deterministic', 'sward-shift-none')} over none" in text
    assert f"as in the paper, is not shown ({gain(COLONDB, 'sward', 'sward-shift-deterministic')})" in text


@pytest.mark.parametrize(
    ("label", "scores"),
    [
        ("CVC-ColonDB, unseen, last weights: + CWD", SEQUENCE_TO_COLONDB),
        ("CVC-ClinicDB, best weights: + CWD", SEQUENCE),
    ],
)
def test_scores_of_cwd_by_sequence(label: str, scores: Scores) -> None:
    values = [f"{score:.1f}" for score in dice(scores, "cwd").values()]
    differences = [gain(scores, "cwd", "none"), gain(scores, "sward", "cwd")]
    assert cells("docs/results.md", PEERS, label)[:6] == [*values, mean(scores, "cwd"), *differences]
