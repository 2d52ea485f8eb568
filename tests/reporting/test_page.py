"""The page of `sward report`: what a reader sees, and that a browser shows it without the network."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sward import data, models
from sward.cli.main import main
from sward.config import DatasetConfig, DistillationConfig, OptimizerConfig, TeacherTrainingConfig
from sward.data import DatasetInfo
from sward.evaluation import Evaluation
from sward.figures.contours import PREDICTION, TRUTH, contour_grid
from sward.models.flops import gemm_flops
from sward.reporting.costs import Cost
from sward.reporting.headline import headline
from sward.reporting.runs import by_images, group, read_runs, with_companions
from sward.runs import train_student
from sward.runs.load import config_for_images
from sward.training.run_folder import RunFolder
from tests.support.drawn_figures import DrawnFigure, rgb
from tests.support.folder_data import damage, write_pairs
from tests.support.report_pages import CHECK, Page, browse, find_browser
from tests.support.training_runs import on_folder, use_few_images

pytestmark = pytest.mark.usefixtures("few_images")

TINY = ["--iterations", "2", "--batch", "2", "--dataset.image-size", "64", "64"]

# Runs written by hand

EVIL_CLASS = "<script>alert(1)</script>"
INFO = DatasetInfo("two", ("background", EVIL_CLASS), ((0, 0, 0), (255, 255, 255)))
EVIL = "<b>one & co"


def scores(mean_iou: float, background: float, thing: float | None, dice: float) -> dict[str, Any]:
    return {
        **Evaluation(7, mean_iou, mean_iou + 0.1, {}, dice=dice, iou=dice / 2, pooled_dice=None).to_dict(),
        "class_iou": dict(zip(INFO.classes, (background, thing))),
    }


def write_run(
    path: Path, validation: dict[str, Any] | None, *, lr: float = 1e-3, steps: int = 1200, **changes: Any
) -> Path:
    """A run without weights, with a line of its log at half time and one at the end."""
    run = RunFolder(path)
    path.mkdir(parents=True)
    kind = TeacherTrainingConfig if changes.pop("teacher", False) else DistillationConfig
    nowhere = DatasetConfig(name="camvid", root=path.parent / "nowhere", split_by=changes.pop("split_by", None))
    run.start(kind(dataset=nowhere, optimizer=OptimizerConfig(lr=lr), **changes), INFO)
    if validation is not None:
        for step, loss in ((steps // 2, 9.0), (steps, 0.123456)):
            weighted = {"task": loss, "attention": loss / 4}
            run.log({"step": step, "seconds": step / 4, "loss": loss, "task": loss, "weighted": weighted})
        run.log({"step": steps // 2, "validation": scores(0.01, 0.01, 0.01, 0.01)})
        run.log({"step": steps, "validation": validation})
    return path


def score_on_test(folder: Path, dice: float) -> None:
    stored = {
        **scores(dice, dice, dice, dice),
        "images": 31,
        "checkpoint": "best",
        "dataset": "camvid",
        "split": "test",
    }
    (folder / "evaluation-camvid-test.json").write_text(json.dumps(stored))


def test_a_page_shows_the_configuration_as_it_is_stored(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", None)
    (folder / "split.csv").write_text("frame_id,split\n")
    (run,) = read_runs([folder])
    stored = run.config.dataset
    found = config_for_images(run.folder.path, run.config, tmp_path / "elsewhere").dataset
    assert (found.root, found.split_by) == (tmp_path / "elsewhere", str(folder / "split.csv"))
    assert (stored.root, stored.split_by) == (tmp_path / "nowhere", None)
    assert main(["report", str(folder), "--root", str(tmp_path / "elsewhere")]) == 0
    page = html.unescape((folder / "report.html").read_text(encoding="utf-8"))
    assert (folder / "config.json").read_text(encoding="utf-8").strip() in page
    # A split that does not fit the data is said too, as missing images are.
    assert "Not all images of two can be shown: split_by must be None for camvid, got" in page


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """A teacher, a student alone and one with SWARD, three seeds each, tested; and one with KD, three seeds."""
    write_run(tmp_path / "teacher", scores(0.9, 0.9, 0.9, 0.9), teacher=True, model="hiera_demo")
    score_on_test(tmp_path / "teacher", 0.8)
    for seed in range(3):
        for method, dice in (("none", (0.40, 0.44, 0.42)), ("sward", (0.60, 0.62, 0.64)), ("kd", (0.38, 0.48, 0.46))):
            folder = tmp_path / f"{method}-seed{seed}"
            write_run(folder, scores(0.7, 0.9, 0.5, 0.41), distillation=method, seed=seed)
            score_on_test(folder, dice[seed])
    return tmp_path


def report(*runs: Path) -> Page:
    path = runs[0].parent / "page.html"
    assert main(["report", *map(str, runs), "--output", str(path)]) == 0
    return Page(path)


def first_lines(*runs: Path) -> tuple[str, ...]:
    """The first sentences of a page, without the page."""
    found = headline(group(read_runs(with_companions(runs))), {})
    return (found.first, *found.more)


def test_a_page_compares_the_best_student_with_its_teacher_and_itself_alone(family: Path) -> None:
    page = report(*sorted(family.glob("kd-*")), *sorted(family.glob("sward-*")))
    # 62 / 80; parameters and time need weights.
    assert page.first == "The student keeps 77.5 % of the teacher's Dice."
    # Differences 20, 18 and 22: mean 20, standard deviation 2, t(2) = 4.303.
    half = 4.303 * 2 / 3**0.5
    assert page.more == [
        "unext + SWARD: 62.0 of 80.0 % Dice on 31 images (camvid-test, best weights), "
        "the best of 2 distilled students.",
        f"The teacher adds +20.0 [{20 - half:.1f}, {20 + half:.1f}] points of Dice, 3 seeds, 95 % interval.",
    ]
    assert "Added for comparison: teacher, none-seed0, none-seed1, none-seed2." in page.text

    assert page.sections["Scores"].headings == ["last validation during training", "camvid-test"]
    validated, found = map(page.numbers, page.sections["Scores"].tables)
    assert list(found) == ["teacher hiera_demo", "unext alone", "unext + KD", "unext + SWARD"]
    assert [row["seeds"] for row in found.values()] == ["1", "3", "3", "3"]
    # 42 +- 4.303 * 2 / sqrt(3)
    assert found["unext alone"]["Dice per image %"] == "42.00 [37.0, 47.0]"
    assert found["teacher hiera_demo"]["Dice per image %"] == "80.00"
    assert found["unext + SWARD"]["Dice - alone"] == "+20.00 [15.0, 25.0]*"
    # -2, 4, 4: the mean is 2, the interval [-6.6, 10.6].
    assert found["unext + KD"]["Dice - alone"] == "+2.00 [-6.6, 10.6]"
    assert found["unext alone"]["Dice - alone"] == "-"
    # Equal scores have an interval of width 0 at 0.
    assert validated["unext + SWARD"]["Dice - alone"] == "+0.00 [0.0, 0.0]"
    # Bold is what lies above 0 with its whole interval, and nothing else.
    marked = [cell for table in (validated, found) for row in table.values() for cell in row.values() if "*" in cell]
    assert marked == ["+20.00 [15.0, 25.0]*"]
    assert "7 images, last weights" in page.sections["Scores"].text
    assert "31 images, best weights" in page.sections["Scores"].text

    validated, found = map(page.numbers, page.sections["Results per class"].tables)
    assert list(validated["background"].values()) == ["90.00"] * 4
    assert list(validated[EVIL_CLASS].values()) == ["90.00", "50.00", "50.00", "50.00"]
    assert list(found["background"].values()) == ["80.00", "42.00", "44.00", "62.00"]


def test_a_difference_that_may_be_chance_is_called_that(family: Path) -> None:
    lines = first_lines(*sorted(family.glob("kd-*")))
    assert lines[0] == "The student keeps 55.0 % of the teacher's Dice."
    assert lines[2].startswith("What the teacher adds may be chance, as the interval holds 0: +2.0 [-6.6, 10.6]")
    # Differences -6, 0 and 0: the mean is below 0 and the interval is not, by half a width of 4.303 * 3.46 / sqrt(3).
    for seed, dice in enumerate((0.34, 0.44, 0.42)):
        score_on_test(family / f"sward-seed{seed}", dice)
    assert first_lines(*sorted(family.glob("sward-*")))[2].startswith(
        "What the teacher adds may be chance, as the interval holds 0: -2.0 [-10.6, 6.6]"
    )
    score_on_test(family / "sward-seed0", 0.20)
    score_on_test(family / "sward-seed1", 0.24)
    score_on_test(family / "sward-seed2", 0.22)
    assert first_lines(*sorted(family.glob("sward-*")))[2].startswith("The teacher does harm: -20.0 [-20.0, -20.0]")


def test_costs_stand_in_the_first_line(family: Path) -> None:
    groups = group(read_runs(with_companions([family / "sward-seed0"])))
    costs = {
        "teacher hiera_demo": Cost(22_600_000, 0, 0, 70.0, (224, 224)),
        "unext + SWARD": Cost(1_470_000, 0, 0, 5.25, (128, 128)),
    }
    found = headline(groups, costs)
    assert found.first == (
        "The student keeps 75.0 % of the teacher's Dice with 1/15 of the parameters and 5.2 ms per image on this CPU."
    )
    assert found.more[1].startswith("Time: batches of one image of 128 x 128 pixels, ")
    costs["teacher hiera_demo"] = Cost(735_000, 0, 0, 70.0, (224, 224))
    assert "with 2 times the parameters" in headline(groups, costs).first
    costs["teacher hiera_demo"] = Cost(2_240_000, 0, 0, 70.0, (224, 224))
    assert "with 66 % of the parameters" in headline(groups, costs).first


def test_what_is_missing_is_said(family: Path) -> None:
    shutil.rmtree(family / "teacher")
    lines = first_lines(family / "sward-seed0")
    assert lines[0] == "The student reaches 60.0 % Dice."
    assert "that takes two seeds of both students" in lines[2]
    assert "No run of the teacher is at hand" in lines[3]
    assert first_lines(family / "none-seed1")[-1] == "No distilled run is at hand."
    shutil.rmtree(family / "none-seed0")
    assert "No run of the student alone is at hand" in first_lines(family / "sward-seed0")[-1]


def test_another_students_teacher_is_not_shown(family: Path) -> None:
    """A page of two students, each with its own teacher, and one whose teacher is not there."""
    other = family / "other"
    write_run(other / "teacher", scores(0.9, 0.9, 0.9, 0.9), teacher=True, model="hiera_demo", lr=0.002)
    score_on_test(other / "teacher", 0.96)
    write_run(other / "sward-seed0", scores(0.7, 0.9, 0.5, 0.41), distillation="sward", lr=0.002)
    score_on_test(other / "sward-seed0", 0.72)
    runs = [family / "teacher", family / "sward-seed0", other / "teacher", other / "sward-seed0"]
    assert first_lines(*runs)[0] == "The student keeps 75.0 % of the teacher's Dice."  # 72 / 96
    shutil.rmtree(other / "teacher")
    lines = first_lines(family / "teacher", family / "sward-seed0", other / "sward-seed0")
    assert lines[0] == "The student reaches 72.0 % Dice."
    assert lines[-1].startswith("No run of the teacher is at hand")
    # A student alone has no teacher.
    assert first_lines(family / "teacher", family / "none-seed0")[0] == "The student reaches 40.0 % Dice."


def test_a_student_alone_on_other_images_is_no_baseline(family: Path, tmp_path: Path) -> None:
    """As a split by sequence and one at random, whose scores on `test` are of other images."""
    for seed in range(3):
        for method, dice in (("none", 0.90), ("sward", 0.80)):
            folder = tmp_path / "random" / f"{method}-seed{seed}"
            write_run(folder, scores(0.7, 0.9, 0.5, 0.41), distillation=method, seed=seed, split_by="ratio")
            score_on_test(folder, dice + 0.01 * seed)
    runs = [*sorted(family.glob("sward-*")), *sorted((tmp_path / "random").glob("sward-*"))]
    page = report(*runs)
    titles = [f"two, as in {family.name}/sward-seed0", "two, split by ratio, as in random/sward-seed0"]
    tables = [page.numbers(page.sections[f"Scores: {title}"].tables[1]) for title in titles]
    assert [table["unext + SWARD"]["Dice - alone"] for table in tables] == [
        "+20.00 [15.0, 25.0]*",
        "-10.00 [-10.0, -10.0]",
    ]


def test_a_student_alone_of_another_length_is_no_baseline(family: Path) -> None:
    for seed in range(3):
        folder = family / f"long-seed{seed}"
        write_run(folder, scores(0.7, 0.9, 0.5, 0.41), distillation="sward", seed=seed, iterations=9999, epochs=None)
        score_on_test(folder, 0.7)
    lines = first_lines(*sorted(family.glob("long-*")), *sorted(family.glob("none-*")))
    assert lines[-1].startswith("The students alone on this page were trained otherwise (iterations is 9999, not ")


def test_runs_on_unlike_frames_are_no_seeds_of_one(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"{name}-seed{seed}", None, seed=seed) for seed, name in enumerate("aab")]
    for folder in folders:
        (folder / "frames.json").write_text(json.dumps({"train": {"1": folder.name[0]}, "val": {"2": "same"}}))
    assert [len(each.runs) for each in group(read_runs(folders))] == [2, 1]
    assert len(by_images(read_runs(folders))) == 1  # validated on the same frame


def test_two_runs_of_different_settings(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / EVIL, scores(0.7, 0.9, 0.5, 0.41)), write_run(tmp_path / "b", None, lr=0.002))
    (table,) = page.sections["Training"].tables
    assert [[cell.text for cell in row] for row in table[1:]] == [
        [EVIL, "1,200", "300", "0.250", "0.1235"],
        ["b", "0", "-", "-", "-"],
    ]
    (terms,) = page.sections["Weighted terms of the loss"].tables
    assert page.numbers(terms) == {EVIL: {"task": "0.1235", "attention": "0.0309"}}

    section = page.sections["Configuration"]
    (table,) = section.tables
    assert page.numbers(table) == {"optimizer.lr": {EVIL: "0.001", "b": "0.002"}}
    shown = [json.loads(text) for text in re.findall(r"config\.json(\{.*?\n\})", section.text, re.DOTALL)]
    assert [config["optimizer"]["lr"] for config in shown] == [0.001, 0.002]

    # Names are text.
    assert (page.title, page.heading) == ("sward: 2 runs", "2 runs")
    assert not {"b", "i", "script"} & page.tags
    assert (page.open, page.wrong) == ([], [])
    assert list(page.numbers(page.sections["Results per class"].tables[0])) == list(INFO.classes)
    assert f"{EVIL}/config.json" in page.sections["Configuration"].text
    assert f"{EVIL}/environment.json" in page.sections["Environment"].text


def test_one_run_that_has_logged_nothing(tmp_path: Path) -> None:
    folder = write_run(tmp_path / EVIL, None)
    assert main(["report", str(folder)]) == 0
    page = Page(folder / "report.html")
    assert (page.title, page.heading) == (f"sward: {EVIL}", EVIL)
    assert page.first == "No run has been scored yet."
    for title in ("Scores", "Results per class"):
        assert "No run has been validated yet." in page.sections[title].text
    assert [cell.text for cell in page.sections["Training"].tables[0][1]] == [EVIL, "0", "-", "-", "-"]
    assert "No run has logged a step yet." in page.sections["Training"].text
    assert page.sections["Configuration"].tables == []  # nothing to compare with


def test_runs_of_the_same_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / parent / "run", scores(0.5, 0.5, 0.5, value), lr=value)
        for parent, value in (("a", 0.1), ("b", 0.2))
    ]
    assert main(["report", *map(str, folders)]) == 0
    page = Page(folders[0] / "report.html")
    numbers = page.numbers(page.sections["Scores"].tables[0])
    assert {name: row["Dice per image %"] for name, row in numbers.items()} == {
        "unext + SWARD (a/run)": "10.00",
        "unext + SWARD (b/run)": "20.00",
    }


def test_seeds_of_different_lengths_are_told_apart(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / f"none-seed{seed}", scores(0.5, 0.5, 0.5, dice), seed=seed, iterations=seed + 1)
        for seed, dice in enumerate((0.1, 0.9))
    ]
    numbers = report(*folders).numbers(report(*folders).sections["Scores"].tables[0])
    assert {name: row["Dice per image %"] for name, row in numbers.items()} == {
        "unext + SWARD (none-seed0)": "10.00",
        "unext + SWARD (none-seed1)": "90.00",
    }


# Trained runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A student alone and one with SWARD, two steps each."""
    folder = tmp_path_factory.mktemp("report")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        use_few_images(patch)
        made = [folder / "none", folder / "sward"]
        for path, words in zip(made, (["--distillation", "none"], ["--teacher.untrained"])):
            assert main(["train", "demo", *TINY, *words, "--output", str(path)]) == 0
        assert main(["evaluate", str(made[1])]) == 0
    return made


@pytest.fixture(scope="module")
def page(runs: list[Path]) -> Path:
    path = runs[0].with_name("report.html")
    with pytest.MonkeyPatch.context() as patch:
        use_few_images(patch)
        assert main(["report", *map(str, runs), "--output", str(path)]) == 0
    return path


def test_trained_runs_fill_every_section(page: Path, runs: list[Path]) -> None:
    seen = Page(page)
    assert list(seen.sections) == [
        "Scores",
        "Cost",
        "Predictions",
        "Data",
        "Results per class",
        "Training",
        "Weighted terms of the loss",
        "Configuration",
        "Environment",
    ]
    stored = json.loads((runs[1] / "evaluation-scenes-val.json").read_text())
    validated, evaluated = map(seen.numbers, seen.sections["Scores"].tables)
    assert evaluated["unext + SWARD"]["mIoU %"] == f"{100 * stored['mean_iou']:.2f}"
    assert evaluated["unext alone"]["mIoU %"] == "-"
    _, per_class = map(seen.numbers, seen.sections["Results per class"].tables)
    assert list(per_class) == list(data.describe("scenes").classes)
    pictures = {title: section.pictures for title, section in seen.sections.items() if section.pictures}
    assert pictures == {
        "Predictions": ["data:image/png"],
        "Data": ["data:image/png"],
        "Training": ["data:image/svg+xml"],
        "Weighted terms of the loss": ["data:image/svg+xml"],
    }
    terms = seen.numbers(seen.sections["Weighted terms of the loss"].tables[0])
    assert set(terms["sward"]) == {"task", "attention", "value", "context", "separation", "compactness"}
    # The score by which the best student is chosen is the one that both students have.
    assert f"The student reaches {float(validated['unext + SWARD']['mIoU %']):.1f} % mIoU with 1.47 M" in seen.first


def test_costs_are_those_of_the_network(page: Path) -> None:
    seen = Page(page)
    costs = seen.numbers(seen.sections["Cost"].tables[0])["unext + SWARD"]
    network = models.build("unext", 5)
    assert costs["image"] == "64 x 64"
    assert costs["parameters (M)"] == f"{sum(each.numel() for each in network.parameters()) / 1e6:.2f}"
    stored = sum(each.numel() * each.element_size() for each in network.state_dict().values())
    assert costs["weights (MB)"] == f"{stored / 1e6:.1f}"
    assert costs["GFLOPs per image"] == f"{gemm_flops(network.eval(), (64, 64)) / 1e9:.2f}"
    assert float(costs["ms per image"]) > 0
    assert f" and {costs['ms per image']} ms per image on this CPU." in seen.first


def test_the_data_card_counts_images_and_classes(page: Path) -> None:
    seen = Page(page)
    card = seen.numbers(seen.sections["Data"].tables[0])
    assert (card["train"]["images"], card["val"]["images"]) == ("18", "4")
    labels = torch.stack([each.labels for each in data.build("scenes", "val", image_size=(64, 64), train=False)][:4])
    for index, name in enumerate(data.describe("scenes").classes):
        share = (labels == index).double().mean().item()
        assert card["val"][f"{name}, % of pixels"] == f"{100 * share:.2f}"


def test_predictions_go_from_worst_to_best(runs: list[Path], tmp_path: Path, drawn_figures: list[DrawnFigure]) -> None:
    assert main(["report", *map(str, runs), "--output", str(tmp_path / "page.html")]) == 0
    curves, terms, examples, predictions = drawn_figures
    assert list(curves.legend()) == ["none", "sward"]
    assert [axis.get_title() for axis in terms.panels()[0]] == ["unext + SWARD"]
    assert len(examples.panels()[0]) == 4
    panels = predictions.panels()
    assert [axis.get_title() for axis in panels[0]] == ["labels", "unext alone", "unext + SWARD"]
    titles, shares = zip(*(row[0].get_ylabel().split(": ") for row in panels))
    assert titles == ("worst", "lower quartile", "median", "best")  # of four images
    values = [int(share.removesuffix(" %")) for share in shares]
    assert values == sorted(values)


@pytest.mark.parametrize("background", [0, 255])
def test_outlines_and_their_legend_are_visible_on_black_and_white(
    background: int, tmp_path: Path, drawn_figures: list[DrawnFigure]
) -> None:
    image = torch.full((3, 40, 60), background, dtype=torch.uint8)
    truth, predicted = torch.zeros(40, 60, dtype=torch.long), torch.zeros(40, 60, dtype=torch.long)
    truth[10:30, 5:20] = 1
    predicted[10:30, 35:50] = 1
    contour_grid([image], {"student": [predicted]}, [truth], INFO, tmp_path / "grid.png", names=["one"])
    (drawn,) = drawn_figures
    left, right = drawn.panels()[0]
    # Region borders lie half a pixel outside of the first pixel inside.
    assert drawn.colour_at(left, 4.5, 20) == rgb(TRUTH)
    assert drawn.colour_at(right, 4.5, 20) == rgb(TRUTH)
    assert drawn.colour_at(right, 34.5, 20) == rgb(PREDICTION)
    assert drawn.colour_at(left, 34.5, 20) == (background,) * 3
    around = {drawn.colour_at(left, 4.5 + step / 20, 20) for step in range(-30, 30)}
    assert {(0, 0, 0), (255, 255, 255)} <= around  # the white line has a black rim
    assert list(drawn.legend()) == [f"{EVIL_CLASS}, labels", f"{EVIL_CLASS}, prediction"]
    # The white line of the legend has a rim: two rows of more dark pixels than any letter has.
    strip = drawn.pixels[-drawn.pixels.shape[0] // 6 :].max(-1) < 100
    runs = [max(map(len, "".join("x" if dark else " " for dark in row).split()), default=0) for row in strip]
    assert sum(length > 20 for length in runs) >= 2


def test_page_names_nothing_outside_itself(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', text)
    assert len(sources) == 4
    assert all(source.startswith("data:image/") for source in sources)
    assert "<script" not in text
    assert "@import" not in text
    assert "url(" not in text


@pytest.fixture
def browser() -> str:
    found = find_browser()
    if found is None:
        assert not os.environ.get("SWARD_NEEDS_BROWSER"), "SWARD_NEEDS_BROWSER is set, and there is no Chromium"
        pytest.skip("no chromium on this machine: the report is not opened in a browser")
    return found


def test_a_browser_shows_it_offline(page: Path, browser: str, tmp_path: Path) -> None:
    checked = tmp_path / "checked.html"
    checked.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{CHECK}</body>"), encoding="utf-8")
    seen = browse(browser, checked, tmp_path / "profile", "--virtual-time-budget=5000", "--dump-dom")
    found = dict(re.findall(r'data-(images|broken|requests|overflow)="(\w+)"', seen))
    assert found == {"images": "4", "broken": "0", "requests": "0", "overflow": "false"}


@pytest.mark.parametrize(("scheme", "bright"), [("0", False), ("1", True)])
def test_a_browser_shows_it_in_dark_and_light(
    scheme: str, bright: bool, page: Path, browser: str, tmp_path: Path
) -> None:
    shot = tmp_path / "shot.png"
    options = (f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={shot}")
    browse(browser, page, tmp_path / "profile", *options)
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("L")).astype(int)
    # Left of the text is the page alone; the first lines are letters on it.
    paper, lines = pixels[:, :10], pixels[30:200, 70:1200]
    assert np.ptp(paper) == 0
    assert (paper.mean() > 200) == bright
    assert np.abs(lines - paper[0, 0]).max() > 150


def test_a_run_without_its_images_still_has_a_page(runs: list[Path], tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(runs[0], moved)
    config = json.loads((moved / "config.json").read_text())
    config["dataset"] |= {"name": "camvid", "root": "nowhere"}
    (moved / "config.json").write_text(json.dumps(config))
    counted = {"train": {"masks": 12, **{f"pixels of {name}": 20 for name in data.describe("scenes").classes}}}
    (moved / "labels.json").write_text(json.dumps(counted))
    page = report(moved)
    for title in ("Predictions", "Data"):
        assert "Not all images of scenes can be shown: CamVid not found" in page.sections[title].text
    # What the run itself wrote about its masks is still there.
    (row,) = page.numbers(page.sections["Data"].tables[0]).values()
    assert row["images"] == "12"
    assert row["background, % of pixels"] == "20.00"


def test_the_data_card_counts_the_masks_that_a_run_had(tmp_path: Path) -> None:
    config = on_folder(write_pairs(tmp_path / "set", train=8), tmp_path / "run")
    config.dataset.labelled_share = 0.25
    train_student(config)
    page = report(tmp_path / "run")
    assert [row["images"] for row in page.numbers(page.sections["Data"].tables[0]).values()] == ["2", "2"]


def test_a_folder_without_a_test_split_or_with_a_damaged_image_has_a_page(tmp_path: Path) -> None:
    root = write_pairs(tmp_path / "set")
    train_student(on_folder(root, tmp_path / "run"))
    page = report(tmp_path / "run")
    shown = page.sections["Data"]
    assert [row["images"] for row in page.numbers(shown.tables[0]).values()] == ["4", "2"]
    assert "can be shown" not in shown.text + page.sections["Predictions"].text
    damage(root / "masks/val/val1.png")
    page = report(tmp_path / "run")
    for title in ("Predictions", "Data"):
        assert "Not all images of folder can be shown: cannot read" in page.sections[title].text
    assert [row["images"] for row in page.numbers(page.sections["Data"].tables[0]).values()] == ["4", "2"]


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "nowhere is not a run folder" in capsys.readouterr().err
    assert main(["report"]) == 2
    assert "paths must name at least one run folder, got none" in capsys.readouterr().err
    folder = write_run(tmp_path / "run", None)
    assert main(["report", str(folder), str(folder)]) == 2
    assert "paths must be distinct run folders" in capsys.readouterr().err
    (folder / "evaluation-camvid-test.json").write_text("{")
    assert main(["report", str(folder)]) == 2
    assert "evaluation-camvid-test.json is damaged: " in capsys.readouterr().err
