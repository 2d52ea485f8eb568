"""The tables of scores in README.md and docs/results.md, as far as they follow from docs/results/study.csv."""

from __future__ import annotations

import csv
from functools import cache
from math import atan, pi, sqrt
from pathlib import Path
from statistics import fmean, stdev

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

SUMMARY = "## Does it help?"
FIRST = "### Per seed: CVC-ColonDB, random split"
RANDOM = "### Per seed: CVC-ClinicDB, random split"
HOSPITALS = "## Does it carry over to another hospital?"
UNLABELLED = "## Images without masks"
FEW = "## Few masks"
FEW_OWN = "The same runs on ClinicDB's own test sequences, best weights:"
PEERS = "## Is it better than other methods?"
PEERS_CLINICDB = "### On CVC-ClinicDB, random split"
PEERS_ELSEWHERE = "### On another hospital"
PARTS = "## Which parts matter?"
LENGTH = "## Does it save training time?"
STREETS = "## Street scenes: CamVid"


@cache
def study() -> list[dict[str, str]]:
    with (ROOT / "docs/results/study.csv").open() as file:
        return list(csv.DictReader(file))


@cache
def dice(scores: Scores, method: str, processor: str = "Intel Xeon", *, metric: str = "dice") -> dict[int, float]:
    """Return seed -> Dice (CamVid: mIoU) in percent, in order.

    That of a teacher trained on another processor, if it has no other.
    """
    rows = [row for row in study() if (row["preset"], row["test"], row["weights"], row["method"]) == (*scores, method)]
    here = [row for row in rows if row["processor"] == processor]
    chosen = here or rows if method == "teacher" else here
    # CamVid has mIoU alone.
    metric = "mean_iou" if metric == "dice" and scores[0] == CAMVID[0] else metric
    found = {int(row["seed"]): 100 * float(row[metric]) for row in chosen}
    assert len(found) == len(chosen), f"two rows of one seed of {method}"
    return dict(sorted(found.items()))


def gain(scores: Scores, method: str, base: str, seeds: int | None = None, *, metric: str = "dice") -> str:
    """Return the mean difference over the (first) seeds that both have, with its interval, as the pages write it."""
    return compared(dice(scores, method, metric=metric), dice(scores, base, metric=metric), seeds)


def compared(one: dict[int, float], other: dict[int, float], seeds: int | None = None) -> str:
    """Return the mean difference by seed with its interval."""
    difference = paired_t([one[seed] - other[seed] for seed in one if seed in other][:seeds])
    assert difference is not None
    return f"{difference.mean:+.1f} [{difference.low:.1f}, {difference.high:.1f}]"


def mean(scores: Scores, method: str, seeds: int | None = None) -> str:
    return f"{fmean(list(dice(scores, method).values())[:seeds]):.1f}"


def p_value(scores: Scores, method: str) -> float:
    """Two-sided, of the paired t test against the student alone."""
    one, other = dice(scores, method), dice(scores, "none")
    differences = [one[seed] - other[seed] for seed in one if seed in other]
    t = abs(fmean(differences)) / (stdev(differences) / sqrt(len(differences)))
    freedom = len(differences) - 1
    # The distribution function has a closed form for these.
    inside = {2: t / sqrt(2 + t * t), 3: 2 / pi * (atan(t / sqrt(3)) + t * sqrt(3) / (3 + t * t))}[freedom]
    return 1 - inside


def page(name: str = "docs/results.md") -> str:
    """Return the page without bold type and line breaks."""
    return " ".join((ROOT / name).read_text().replace("**", "").split())


def cells(page: str, section: str, label: str) -> list[str]:
    """Return the other cells of the first row with this first cell between this line and the next heading."""
    text = (ROOT / page).read_text().replace("**", "")
    part = text.partition(f"{section}\n")[2]
    lines = part.splitlines()
    end = next((number for number, line in enumerate(lines) if line.startswith("#")), len(lines))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:end] if line.startswith("|")]
    return next(row for row in rows if row[0] == label)[1:]


FIRST_TABLE: list[tuple[str, Scores, str]] = [
    ("CVC-ColonDB, random split", COLONDB, "sward"),
    ("CVC-ClinicDB, random split", CLINICDB, "sward"),
    (
        "trained on ClinicDB by sequence, tested on ColonDB, on which no network was trained",
        *(SEQUENCE_TO_COLONDB, "sward"),
    ),
    (
        "trained on ClinicDB by sequence and 148 frames of ColonDB without masks, tested on ColonDB's other 232",
        *(OTHER_HALF, "sward-unlabelled"),
    ),
    ("trained on ClinicDB at random, tested on ColonDB, on which no network was trained", CLINICDB_TO_COLONDB, "sward"),
    ("CVC-ClinicDB by sequence", SEQUENCE, "sward"),
]
"""Label, scores and the run that is compared with the student alone."""


@pytest.mark.parametrize(("label", "scores", "method"), FIRST_TABLE)
def test_first_table(label: str, scores: Scores, method: str) -> None:
    seeds = len(dice(scores, method))
    found = cells("docs/results.md", SUMMARY, label)
    means = [mean(scores, "none", seeds), mean(scores, method)]
    assert found == [*means, gain(scores, method, "none"), str(seeds), scores[2]]


def test_pooled_dice() -> None:
    gains = [gain(scores, method, "none", metric="pooled_dice") for _, scores, method in FIRST_TABLE]
    assert f"the gains are {', '.join(gains[:-1])} and {gains[-1]}, from the first row to the last" in page()


def test_iou() -> None:
    def found(scores: Scores, method: str = "sward", base: str = "none") -> str:
        return gain(scores, method, base, metric="iou")

    assert f"IoU: {found(CLINICDB)} and {found(CLINICDB_TO_COLONDB)}." in page()
    alone, sward = (dice(SEQUENCE_TO_COLONDB, method) for method in ("none", "sward"))
    gains = [sward[seed] - alone[seed] for seed in alone]
    iou = found(SEQUENCE_TO_COLONDB).removeprefix("+")
    assert f"by {min(gains):.1f} to {max(gains):.1f} points; IoU by {iou}." in page()
    assert f"IoU {found(OTHER_HALF, 'sward-unlabelled', 'sward')} over labelled images only" in page()
    for label, method in (("alone", "none"), ("+ SWARD (recommended recipe)", "sward")):
        mean_iou = fmean(dice(COLONDB, method, metric="iou").values())
        assert cells("docs/results.md", FIRST, label)[4] == f"{mean_iou:.1f}"
    points, _, interval = found(COLONDB).partition(" ")
    assert cells("docs/results.md", FIRST, "difference")[4] == points
    assert cells("docs/results.md", FIRST, "95 % interval, paired t over seeds")[4] == interval


def test_intervals_corrected_for_their_number() -> None:
    def adjusted(others: int) -> list[float]:
        """p-values of the five gains by Holm's method; the others, which show nothing, come last."""
        values = sorted(p_value(scores, method) for _, scores, method in FIRST_TABLE[:5])
        scaled = [(5 + others - rank) * value for rank, value in enumerate(values)]
        return [max(scaled[: rank + 1]) for rank in range(5)]

    six, seven = adjusted(1), adjusted(2)
    assert f"stay below 0.05 among the six ({six[0]:.3f} to {six[-1]:.3f})" in page()
    assert sum(value > 0.05 for value in seven) == 3
    assert f"three of them lie at {seven[2]:.3f} to {seven[-1]:.3f}" in page()


def test_the_table_of_readme() -> None:
    columns = (COLONDB, CLINICDB, SEQUENCE_TO_COLONDB)
    expected = {
        "alone": [mean(scores, "none") for scores in columns],
        "+ SWARD (recommended recipe)": [mean(scores, "sward") for scores in columns],
        "difference, paired by seed [95 % interval]": [gain(scores, "sward", "none") for scores in columns],
        "seeds": [str(len(dice(scores, "sward"))) for scores in columns],
        "teacher: DINOv2 ViT-S/14, frozen, light head, 22.5 M parameters": [
            mean((preset, test, "best"), "teacher") for preset, test, _ in columns
        ],
    }
    assert {label: cells("README.md", "## Does it help?", label) for label in expected} == expected
    text = page("README.md")
    first, second, third = (gain(scores, "sward", "none").split()[0] for scores in columns)
    assert f"{first} and {second} points of Dice for UNeXt on CVC-ColonDB and CVC-ClinicDB" in text
    assert f"and {third} on ColonDB where student and teacher" in text
    assert f"with their best weights, the students of the last column show {gain(SEQUENCE, 'sward', 'none')}" in text
    points, _, interval = gain(CAMVID, "sward", "none").partition(" ")
    assert f"three seeds show {points} points of mIoU {interval}" in text
    assert f"with the best ones the gain is {gain(SEQUENCE_TO_COLONDB_BEST, 'sward', 'none')}" in text
    maskd, cwd = (gain(COLONDB, method, "none").removeprefix("+") for method in ("maskd", "cwd"))
    assert f"MasKD gains {maskd} over the student alone and CWD {cwd};" in text
    there = {method: gain(SEQUENCE_TO_COLONDB, "sward", f"{method}-second-teacher") for method in ("cwd", "maskd")}
    above, _, interval = there["cwd"].partition(" ")
    assert f"SWARD is {above[1:]} points {interval} above CWD, and" in text
    assert f"not shown to be above MasKD, {there['maskd']} (4 seeds)" in text
    assert f"those of MasKD {gain(SEQUENCE, 'maskd-second-teacher', 'none')}" in text
    points, _, interval = gain(OTHER_HALF, "sward-unlabelled", "sward").partition(" ")
    assert f"another {points.removeprefix('+')} points {interval} on its other frames" in text
    points, _, interval = gain(TENTH_OTHER_HALF, "sward", "none").partition(" ")
    more, _, wider = gain(QUARTER_OTHER_HALF, "sward", "none").partition(" ")
    assert f"gains {points.removeprefix('+')} points {interval} on ColonDB, " in text
    assert f"with 107 masks {more.removeprefix('+')} {wider} (3 seeds each)" in text


def test_the_other_processor() -> None:
    processors = ("Intel Xeon", "AMD EPYC")
    means = []
    for label, method in (("alone", "none"), ("+ SWARD", "sward")):
        found = dice(COLONDB, method, "AMD EPYC")
        means.append(fmean(found.values()))
        row = [*(f"{score:.1f}" for score in found.values()), f"{means[-1]:.1f}"]
        assert cells("docs/results.md", FIRST, f"on an AMD EPYC: {label}")[:4] == row
    runs = {method: [dice(COLONDB, method, each) for each in processors] for method in ("none", "sward")}
    there = compared(runs["sward"][1], runs["none"][1]).removeprefix("+").replace(" ", " points ", 1)
    assert f"The same three seeds gain {there} on the EPYC" in page()
    both = {method: {seed: fmean(found[seed] for found in pair) for seed in pair[0]} for method, pair in runs.items()}
    average = compared(both["sward"], both["none"]).removeprefix("+")
    assert f"averaged over both machines, {average}." in page()


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
        # With fewer seeds an interval says nothing.
        difference = gain(scores, method, base)
        assert found[4] == (difference if seeds == 3 else f"{difference.split()[0]} (seeds 0 and 1)")


def test_sward_and_cwd_with_unlabelled_images() -> None:
    there, here = (gain(scores, "sward-unlabelled", "cwd-unlabelled") for scores in (OTHER_HALF, SEQUENCE))
    assert f"SWARD - CWD is {there} on the other hospital and {here} on ClinicDB" in page()


def test_a_tenth_of_the_masks_beside_all_of_them() -> None:
    difference = compared(dice(TENTH_OTHER_HALF, "sward"), dice(OTHER_HALF, "none"))
    interval = difference.removeprefix("+").replace(" ", " points ", 1)
    assert f"With a tenth of the masks its students have a mean {interval} above that of the students alone" in page()


@pytest.mark.parametrize(
    ("label", "method"),
    [
        ("alone", "none"),
        ("+ SWARD", "sward"),
        ("+ CWD", "cwd"),
        ("+ CWD, factor 10", "cwd-times-10"),
        ("+ MasKD", "maskd"),
        ("+ CIRKD", "cirkd"),
        ("+ CIRKD, factor 10", "cirkd-times-10"),
        ("+ FreeKD", "freekd"),
        ("+ KD", "kd"),
        ("+ KD, factor 0.01", "kd-times-0.01"),
    ],
)
@pytest.mark.parametrize(
    ("images", "scores"), [("CVC-ClinicDB", CLINICDB), ("CVC-ColonDB, unseen", CLINICDB_TO_COLONDB)]
)
def test_scores_of_peers_on_clinicdb(images: str, scores: Scores, label: str, method: str) -> None:
    values = [f"{score:.1f}" for score in dice(scores, method).values()]
    found = cells("docs/results.md", PEERS_CLINICDB, f"{images}: {label}")
    assert found[:3] == [*values, *[""] * (3 - len(values))]
    compares = len(values) == 3  # With fewer seeds an interval says nothing.
    assert found[3] == (gain(scores, method, "none") if compares and method != "none" else "")
    assert found[4] == (gain(scores, "sward", method) if compares and method != "sward" else "")


def test_what_two_seeds_of_peers_on_clinicdb_gain() -> None:
    def gains(scores: Scores) -> str:
        alone = dice(scores, "none")
        first = {method: [dice(scores, method)[seed] - alone[seed] for seed in (0, 1)] for method in names}
        return ", ".join(f"{names[method]} {one:.1f} and {other:.1f}" for method, (one, other) in first.items())

    names = {"cwd": "CWD", "maskd": "MasKD", "cirkd": "CIRKD", "freekd": "FreeKD", "kd": "KD", "sward": "SWARD"}
    here = gains(CLINICDB).replace("CWD", "CWD gains", 1).replace(", MasKD", " points on ClinicDB, MasKD", 1)
    assert f"With seeds 0 and 1 {here}; on ColonDB {gains(CLINICDB_TO_COLONDB)}." in page()


def test_what_ten_times_the_weight_does_on_clinicdb() -> None:
    def change(scores: Scores, method: str) -> tuple[str, str]:
        more, once = dice(scores, f"{method}-times-10"), dice(scores, method)
        first, second = (abs(more[seed] - once[seed]) for seed in (0, 1))
        assert all((more[seed] > once[seed]) == (scores == CLINICDB_TO_COLONDB) for seed in (0, 1))
        return f"{first:.1f}", f"{second:.1f}"

    (cwd, cirkd), (cwd_there, cirkd_there) = (
        [" and ".join(change(scores, method)) for method in ("cwd", "cirkd")]
        for scores in (CLINICDB, CLINICDB_TO_COLONDB)
    )
    assert f"costs CWD {cwd} points on ClinicDB and adds {cwd_there} on ColonDB" in page()
    assert f"it costs CIRKD {cirkd} and adds {cirkd_there}." in page()


@pytest.mark.parametrize(("scores", "best"), [(CLINICDB, "sward"), (CLINICDB_TO_COLONDB, "maskd")])
def test_the_highest_score_on_clinicdb(scores: Scores, best: str) -> None:
    """Of the distilled students; with seeds 0 and 1, which all of them have."""
    methods = {row["method"] for row in study() if row["preset"] == scores[0]} - {"none", "teacher"}
    for seed in (0, 1):
        assert max(methods, key=lambda method: dice(scores, method)[seed]) == best


@pytest.mark.parametrize(
    ("heading", "label", "method"),
    [
        (PEERS, "alone", "none"),
        (PEERS, "+ SWARD", "sward"),
        (PEERS, "+ MasKD", "maskd"),
        (PEERS, "+ CWD", "cwd"),
        (PEERS, "+ CWD, factor 10", "cwd-times-10"),
        (PEERS, "+ CIRKD", "cirkd"),
        (PEERS, "+ CIRKD, factor 10", "cirkd-times-10"),
        (PEERS, "+ FreeKD", "freekd"),
        (PEERS, "+ KD", "kd"),
        (PEERS, "+ KD, factor 0.01", "kd-times-0.01"),
        (PARTS, "+ SWARD", "sward"),
        (PARTS, "+ SWARD, windows of 4 pixels on the deepest map, which has 4x4", "sward-window-8-8-8-4"),
        (PARTS, "+ SWARD, teacher features as they are", "sward-features-none"),
        (PARTS, "+ SWARD, with PDR", "sward-pdr"),
        (PARTS, "+ SWARD, with PDR on features as they are, not normalised", "sward-pdr-as-they-are"),
        (PARTS, "+ SWARD, teacher at 128x128, 9x9 tokens (recipe: 224x224, 16x16)", "sward-teacher-128"),
        (PARTS, "+ SWARD, teacher at 448x448, 32x32 tokens", "sward-teacher-448"),
        (PARTS, "+ SWARD, learned teacher projections", "sward-projections-learned"),
        (PARTS, "+ SWARD, context summed over channels", "sward-context-sum"),
        (LENGTH, "alone, 60 epochs", "none"),
        (LENGTH, "alone, 120 epochs", "none-twice"),
        (LENGTH, "+ SWARD, 60 epochs", "sward"),
    ],
)
def test_scores_of_peers_parts_and_lengths(heading: str, label: str, method: str) -> None:
    values = [f"{score:.1f}" for score in dice(COLONDB, method).values()]
    found = cells("docs/results.md", heading, label)
    assert found[:3] == [*values, *[""] * (3 - len(values))]
    # With fewer seeds an interval says nothing.
    assert found[3] == (gain(COLONDB, "sward", method) if len(values) == 3 and method != "sward" else "")


def test_what_is_said_of_parts_and_lengths() -> None:
    without = gain(COLONDB, "sward-features-none", "none").removeprefix("+")
    assert f"Without standardising, the rest of the recipe still gains {without}." in page()
    points, _, interval = gain(COLONDB, "sward", "sward-features-none").partition(" ")
    assert (
        f"channels gives {points[1:]} of the {gain(COLONDB, 'sward', 'none').split()[0][1:]} points {interval}"
        in page()
    )
    twice, sward = (dice(COLONDB, method) for method in ("none-twice", "sward"))
    assert f"costs {sward[0] - dice(COLONDB, 'sward-context-sum')[0]:.1f} points in the one seed tried" in page()
    raw, normalised = (sward[0] - dice(COLONDB, method)[0] for method in ("sward-pdr-as-they-are", "sward-pdr"))
    assert f"costs {raw:.1f} points in the one seed tried, on normalised ones {normalised:.1f} with that" in page()
    more = gain(COLONDB, "none-twice", "none").removeprefix("+").replace(" ", " points ", 1)
    above = gain(COLONDB, "sward", "none-twice").removeprefix("+")
    assert f"They give the student alone {more};" in page()
    assert f"epochs is another {above} above that, with every seed" in page()
    assert min(sward[seed] - score for seed, score in twice.items()) > 0
    assert f"SWARD is {above.replace(' ', ' points ', 1)} above the student alone with twice" in page("README.md")


@pytest.mark.parametrize(
    ("label", "method"),
    [
        ("alone, 60 epochs (5,460 steps)", "none"),
        ("+ SWARD, 60 epochs", "sward"),
        ("+ CWD, 60 epochs", "cwd"),
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
    assert f"no gain is shown](#street-scenes-camvid): {points} points of mIoU {interval} over 3 seeds" in page()
    alone, distilled = dice(CAMVID, "none"), dice(CAMVID, "sward")
    per_seed = [f"{distilled[seed] - alone[seed]:+.1f}" for seed in sorted(alone)]
    assert (
        f"No gain is shown: {points} points {interval}, in three seeds {per_seed[0]}, {per_seed[1]} and {per_seed[2]};"
        in page()
    )
    teacher = dice(("camvid-small", "camvid, val split", "best"), "teacher")[0]
    assert f"The teacher is {teacher - fmean(alone.values()):.1f} points above the student" in page()


def test_maskd_and_cwd_beside_the_student_alone() -> None:
    maskd, cwd = (gain(COLONDB, method, "none").removeprefix("+") for method in ("maskd", "cwd"))
    assert f"MasKD gains {maskd.replace(' ', ' points ', 1)} over the student alone, CWD {cwd};" in page()
    assert f"CWD has a mean of {mean(COLONDB, 'cwd-times-10')}, SWARD {mean(COLONDB, 'sward')}." in page()


FACTORS = "### The factor of each method's loss"
TERMS = "### The terms of MWAD and PDR, as in the paper's Table 3"
SHIFTS = "### Shifts of the windows, as in the paper's Table 4"


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


def validated() -> dict[str, tuple[float, float]]:
    """Return Dice of seed 0 on validation and test images of ColonDB, in percent, of every method that has both."""
    rows = [row for row in study() if row["preset"] == "colondb-small" and row["seed"] == "0" and row["validation"]]
    return {row["method"]: (100 * float(row["validation"]), 100 * float(row["dice"])) for row in rows}


@pytest.mark.parametrize("label", ["SWARD", "MasKD", "CWD", "CIRKD", "FreeKD", "KD"])
def test_factors_of_losses(label: str) -> None:
    method, factors = label.lower(), ("0.01", "0.1", "1", "10")
    names = {method if factor == "1" else f"{method}-times-{factor}": factor for factor in factors}
    found = {names[name]: scores for name, scores in validated().items() if name in names}
    scores = ["{:.1f} ({:.1f})".format(*found[factor]) if factor in found else "" for factor in factors]
    chosen = max(found, key=lambda factor: found[factor][0]) if len(found) == len(factors) else ""
    assert cells("docs/results.md", FACTORS, label) == [*scores, chosen]


def test_no_factor_lifts_kd_above_the_student_alone() -> None:
    found = validated()
    validation, test = found["none"]
    assert f"the student alone ({validation:.1f} on validation, {test:.1f} on test images)" in page()
    kd = [found[name] for name in found if name.partition("-")[0] == "kd"]
    assert len(kd) == 4
    assert max(score for score, _ in kd) < validation
    assert max(score for _, score in kd) < test


def test_what_ten_times_the_weight_does_to_cirkd() -> None:
    def differences(metric: str) -> list[float]:
        more, once = (dice(COLONDB, method, metric=metric) for method in ("cirkd-times-10", "cirkd"))
        return [more[seed] - once[seed] for seed in (0, 1)]

    (more, and_more), (less, and_less) = differences("validation"), differences("dice")
    assert (
        f"by {more:.2f} and {and_more:.2f} points with seeds 0 and 1, which on test images are then {-less:.1f} and "
        f"{-and_less:.1f} points lower" in page()
    )


def test_what_terms_and_shifts_show() -> None:
    def found(method: str, base: str, word: str = " points") -> str:
        return gain(COLONDB, method, base).removeprefix("+").replace(" ", f"{word} ", 1)

    assert f"Attention gives {found('sward-attention', 'none')} and the values another " in page()
    assert f"the values another {found('sward-attention-value', 'sward-attention', '')}: the first two" in page()
    assert f"is not shown ({gain(COLONDB, 'sward', 'sward-attention-value')}), and PDR" in page()
    assert f"PDR does not help here ({gain(COLONDB, 'sward-pdr', 'sward')})" in page()
    deterministic = found("sward-shift-deterministic", "sward-shift-none")
    stochastic = found("sward", "sward-shift-none", "")
    assert f"The deterministic shift is {deterministic} above none, the stochastic one {stochastic};" in page()
    assert f"between the two nothing is shown ({gain(COLONDB, 'sward', 'sward-shift-deterministic')})" in page()


@pytest.mark.parametrize(
    ("place", "scores"),
    [("CVC-ColonDB, unseen, last weights: ", SEQUENCE_TO_COLONDB), ("CVC-ClinicDB, best weights: ", SEQUENCE)],
)
@pytest.mark.parametrize(
    ("label", "method"),
    [
        ("+ CWD", "cwd"),
        ("+ CWD, second teacher", "cwd-second-teacher"),
        ("+ MasKD, second teacher", "maskd-second-teacher"),
    ],
)
def test_scores_of_peers_by_sequence(place: str, scores: Scores, label: str, method: str) -> None:
    found = dice(scores, method)
    values = [f"{found[seed]:.1f}" if seed in found else "" for seed in range(4)]
    differences = [gain(scores, method, "none"), gain(scores, "sward", method)]
    assert cells("docs/results.md", PEERS_ELSEWHERE, place + label) == [*values, mean(scores, method), *differences]


def test_what_is_said_of_peers_by_sequence() -> None:
    cwd, maskd = "cwd-second-teacher", "maskd-second-teacher"
    points, _, interval = gain(SEQUENCE_TO_COLONDB, "sward", cwd).partition(" ")
    assert f"SWARD is above CWD by {points[1:]} points {interval}, with every seed" in page()
    sward, other = dice(SEQUENCE_TO_COLONDB, "sward"), dice(SEQUENCE_TO_COLONDB, maskd)
    by = [sward[seed] - other[seed] for seed in range(4)]
    assert f"by {min(by):.1f} to {max(by):.1f} points" in page()
    assert f"is not shown: {gain(SEQUENCE_TO_COLONDB, 'sward', maskd)}" in page()
    points, _, interval = gain(SEQUENCE, maskd, "none").partition(" ")
    assert f"it gains {points[1:]} points {interval} over the student alone" in page()
    assert f"SWARD - MasKD is {gain(SEQUENCE, 'sward', maskd)}" in page()
    own, elsewhere = (
        max(abs(dice(scores, "cwd")[seed] - dice(scores, cwd)[seed]) for seed in range(3))
        for scores in (SEQUENCE, SEQUENCE_TO_COLONDB)
    )
    assert f"by up to {own:.1f} points on the own hospital, and by {elsewhere:.1f} at most on the other" in page()
    first, second = (dice(scores, "teacher-second")[0] for scores in (SEQUENCE, SEQUENCE_TO_COLONDB_BEST))
    assert f"({first:.1f} % on ClinicDB and {second:.1f} % on ColonDB" in page()
    odd = [gain(OTHER_HALF, "sward", method) for method in (cwd, maskd, "cwd")]
    assert "SWARD - CWD is {} and SWARD - MasKD {} (second teacher), SWARD - CWD {} with".format(*odd) in page()
