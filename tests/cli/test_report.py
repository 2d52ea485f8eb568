"""The page of `sward report`: what a reader sees, and that a browser shows it without the network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sward import data
from sward.cli.main import main
from sward.config import DistillationConfig, OptimizerConfig
from sward.data import DatasetInfo
from sward.evaluation import Evaluation
from sward.training.run_folder import RunFolder
from tests.support.drawn_figures import DrawnFigure
from tests.support.training_runs import use_few_images

TINY = ["--iterations", "2", "--batch", "2", "--dataset.image-size", "64", "64"]
CHECK = """
<script>
window.addEventListener("load", () => {
  const images = [...document.images];
  document.body.setAttribute("data-images", images.length);
  document.body.setAttribute("data-broken", images.filter(image => !image.complete || !image.naturalWidth).length);
  document.body.setAttribute("data-requests", performance.getEntriesByType("resource")
    .filter(entry => !entry.name.startsWith("data:")).length);
  document.body.setAttribute("data-overflow", document.documentElement.scrollWidth > window.innerWidth);
});
</script>
"""


class Cell(NamedTuple):
    text: str
    classes: tuple[str, ...] = ()


class Section:
    """What stands between one `<h2>` and the next."""

    def __init__(self) -> None:
        self.text = ""
        self.headings: list[str] = []
        self.tables: list[list[list[Cell]]] = []
        self.pictures: list[str] = []
        """Of each image, the type in its data URI."""


class Page(HTMLParser):
    """A page as its reader sees it: sections by title, in order, with their tables row by row."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        """Tags that were closed in the wrong order."""
        self.tags: set[str] = set()
        self.style = self.title = self.heading = ""
        self.sections: dict[str, Section] = {}
        self._section = Section()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.tags.add(tag)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        if tag == "h2":
            self._section = Section()
        elif tag == "h3":
            self._section.headings.append("")
        elif tag == "table":
            self._section.tables.append([])
        elif tag == "tr":
            self._section.tables[-1].append([])
        elif tag in ("td", "th"):
            self._section.tables[-1][-1].append(Cell("", tuple(values.get("class", "").split())))
        elif tag == "img":
            self._section.pictures.append(values["src"].split(";")[0])

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, text: str) -> None:
        tag = self.open[-1] if self.open else ""
        if tag == "style":
            self.style += text
        elif tag == "title":
            self.title += text
        elif tag == "h1":
            self.heading += text
        elif tag == "h2":
            self.sections[text] = self._section
        elif tag == "h3":
            self._section.headings[-1] += text
        elif tag in ("td", "th"):
            row = self._section.tables[-1][-1]
            row[-1] = row[-1]._replace(text=row[-1].text + text)
        self._section.text += text

    def emphasised(self, cell: Cell) -> bool:
        """Whether the style sheet sets the cell in bold."""
        bold = re.findall(r"td\.(\w+) \{[^}]*font-weight: 600", self.style)
        return bool(set(bold) & set(cell.classes))

    def numbers(self, table: list[list[Cell]]) -> dict[str, dict[str, str]]:
        """First column -> header -> text, with an asterisk for what stands out."""
        names = [cell.text for cell in table[0][1:]]
        marked = [[cell.text + "*" * self.emphasised(cell) for cell in row] for row in table[1:]]
        return {row[0]: dict(zip(names, row[1:], strict=True)) for row in marked}


# Runs written by hand

INFO = DatasetInfo("two", ("background", "<i>thing & co"), ((0, 0, 0), (255, 255, 255)))
EVIL = "<b>one & co"


def scores(mean_iou: float, background: float, thing: float | None, dice: float) -> dict[str, Any]:
    return {
        **Evaluation(7, mean_iou, mean_iou + 0.1, {}, dice=dice, iou=dice / 2, pooled_dice=None).to_dict(),
        "class_iou": dict(zip(INFO.classes, (background, thing))),
    }


def write_run(path: Path, validation: dict[str, Any] | None, lr: float = 1e-3, steps: int = 1200) -> Path:
    """A run without weights, with a line of its log at half time and one at the end."""
    run = RunFolder(path)
    run.start(DistillationConfig(optimizer=OptimizerConfig(lr=lr)), INFO)
    if validation is not None:
        for step, loss in ((steps // 2, 9.0), (steps, 0.123456)):
            run.log({"step": step, "seconds": step / 4, "loss": loss, "task": loss})
        run.log({"step": steps // 2, "validation": scores(0.01, 0.01, 0.01, 0.01)})
        run.log({"step": steps, "validation": validation})
    return path


@pytest.fixture
def written(tmp_path: Path) -> Page:
    """The page of three runs: the first two have the same mIoU, only the first has been tested."""
    first = write_run(tmp_path / EVIL, scores(0.7, 0.9, 0.5, 0.41))
    second = write_run(tmp_path / "two", scores(0.7, 0.8, 0.6, 0.43), lr=0.002)
    third = write_run(tmp_path / "three", scores(0.123456, 0.7, None, 0.42), steps=80)
    tested = {**scores(0.5, 0.25, 0.75, 0.6), "images": 31, "checkpoint": "best"}
    (first / "evaluation-two-test.json").write_text(json.dumps(tested))
    assert main(["report", *map(str, (first, second, third)), "--output", str(tmp_path / "page.html")]) == 0
    return Page(tmp_path / "page.html")


def test_scores_stand_in_their_cells_and_only_what_is_strictly_best_stands_out(written: Page) -> None:
    section = written.sections["Scores"]
    assert section.headings == ["last validation during training", "two-test"]
    validated, tested = map(written.numbers, section.tables)
    # The tie in mIoU and mAcc marks nobody, and no run has a pooled Dice.
    assert validated == {
        EVIL: {"mIoU %": "70.00", "mAcc %": "80.00", "Dice per image %": "41.00", "IoU per image %": "20.50"},
        "two": {"mIoU %": "70.00", "mAcc %": "80.00", "Dice per image %": "43.00*", "IoU per image %": "21.50*"},
        "three": {"mIoU %": "12.35", "mAcc %": "22.35", "Dice per image %": "42.00", "IoU per image %": "21.00"},
    }
    assert tested[EVIL]["mIoU %"] == "50.00"
    assert set(tested["two"].values()) == set(tested["three"].values()) == {"-"}
    assert "7 images, last weights" in section.text
    assert "31 images, best weights" in section.text


def test_classes_stand_in_rows_and_the_best_run_of_each_stands_out(written: Page) -> None:
    validated, tested = map(written.numbers, written.sections["Results per class"].tables)
    background, thing = INFO.classes
    assert validated == {
        background: {EVIL: "90.00*", "two": "80.00", "three": "70.00"},
        thing: {EVIL: "50.00", "two": "60.00*", "three": "-"},
    }
    assert tested == {background: {EVIL: "25.00"}, thing: {EVIL: "75.00"}}


def test_training_takes_the_last_line_of_each_log(written: Page) -> None:
    (table,) = written.sections["Training"].tables
    assert [[cell.text for cell in row] for row in table[1:]] == [
        [EVIL, "1,200", "300", "0.250", "0.1235"],
        ["two", "1,200", "300", "0.250", "0.1235"],
        ["three", "80", "20", "0.250", "0.1235"],
    ]


def test_configuration_names_what_differs_and_shows_each_file(written: Page) -> None:
    section = written.sections["Configuration"]
    (table,) = section.tables
    assert written.numbers(table) == {"optimizer.lr": {EVIL: "0.001", "two": "0.002", "three": "0.001"}}
    shown = [json.loads(text) for text in re.findall(r"config\.json(\{.*?\n\})", section.text, re.DOTALL)]
    assert [config["optimizer"]["lr"] for config in shown] == [0.001, 0.002, 0.001]


def test_names_are_text_and_the_page_is_well_formed(written: Page) -> None:
    assert (written.title, written.heading) == ("sward: 3 runs", "3 runs")
    assert not {"b", "i"} & written.tags
    assert (written.open, written.wrong) == ([], [])
    assert f"{EVIL}/config.json" in written.sections["Configuration"].text
    assert f"{EVIL}/environment.json" in written.sections["Environment"].text
    assert "two: no run has saved weights yet." in written.sections["Predictions"].text


def test_one_run_that_has_logged_nothing(tmp_path: Path) -> None:
    folder = write_run(tmp_path / EVIL, None)
    assert main(["report", str(folder)]) == 0
    page = Page(folder / "report.html")
    assert (page.title, page.heading) == (f"sward: {EVIL}", EVIL)
    for title in ("Scores", "Results per class"):
        assert "No run has been validated yet." in page.sections[title].text
    assert [cell.text for cell in page.sections["Training"].tables[0][1]] == [EVIL, "0", "-", "-", "-"]
    assert "No run has logged a step yet." in page.sections["Curves"].text
    assert page.sections["Configuration"].tables == []  # nothing to compare with


def test_runs_of_the_same_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / parent / "run", scores(0.5, 0.5, 0.5, value)) for parent, value in (("a", 0.1), ("b", 0.2))
    ]
    assert main(["report", *map(str, folders)]) == 0
    page = Page(folders[0] / "report.html")
    numbers = page.numbers(page.sections["Scores"].tables[0])
    assert {name: row["Dice per image %"] for name, row in numbers.items()} == {"a/run": "10.00", "b/run": "20.00*"}


# Trained runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A student alone and one with SWARD, two steps each."""
    folder = tmp_path_factory.mktemp("report")
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
        "Training",
        "Curves",
        "Results per class",
        "Predictions",
        "Configuration",
        "Environment",
    ]
    stored = json.loads((runs[1] / "evaluation-scenes-val.json").read_text())
    _, evaluated = map(seen.numbers, seen.sections["Scores"].tables)
    assert evaluated["sward"]["mIoU %"] == f"{100 * stored['mean_iou']:.2f}"
    assert evaluated["none"]["mIoU %"] == "-"
    _, per_class = map(seen.numbers, seen.sections["Results per class"].tables)
    assert list(per_class) == list(data.describe("scenes").classes)
    assert [seen.sections[title].pictures for title in ("Curves", "Predictions")] == [
        ["data:image/svg+xml"],
        ["data:image/png"],
    ]


@pytest.mark.usefixtures("few_images")
def test_the_pictures_show_every_run(runs: list[Path], tmp_path: Path, drawn_figures: list[DrawnFigure]) -> None:
    assert main(["report", *map(str, runs), "--output", str(tmp_path / "page.html")]) == 0
    curves, predictions = drawn_figures
    assert list(curves.legend()) == ["none", "sward"]
    panels = predictions.panels()
    assert [axis.get_title() for axis in panels[0]] == ["image", "ground truth", "none", "sward"]
    assert len(panels) == 4


def test_page_names_nothing_outside_itself(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', text)
    assert sources
    assert all(source.startswith("data:image/") for source in sources)
    assert "<script" not in text
    assert "@import" not in text
    assert "url(" not in text


def test_a_browser_shows_it_offline(page: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on this machine: the report is not opened in a browser")
    checked = page.with_name("checked.html")
    checked.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{CHECK}</body>"), encoding="utf-8")
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000"]
    command += ["--window-size=1280,900", "--dump-dom", checked.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    found = dict(re.findall(r'data-(images|broken|requests|overflow)="(\w+)"', done.stdout))
    assert found == {"images": "2", "broken": "0", "requests": "0", "overflow": "false"}


def test_a_run_without_its_images_still_has_a_page(runs: list[Path], tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(runs[0], moved)
    config = json.loads((moved / "config.json").read_text())
    config["dataset"] |= {"name": "camvid", "root": "nowhere"}
    (moved / "config.json").write_text(json.dumps(config))
    assert main(["report", str(moved)]) == 0
    assert "No predictions on scenes: CamVid not found" in (moved / "report.html").read_text(encoding="utf-8")


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "nowhere is not a run folder" in capsys.readouterr().err
    assert main(["report"]) == 2
    assert "paths must name at least one run folder, got none" in capsys.readouterr().err
