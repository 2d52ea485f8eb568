"""The page of `sward report`: what it holds, and that a browser shows it without the network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sward import data
from sward.cli.main import main

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


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A student alone and one with SWARD, two steps each."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.scenes.SPLITS, "train", 4)
        patch.setitem(data.scenes.SPLITS, "val", 2)
        made = [folder / "none <&>", folder / "sward"]
        for path, words in zip(made, (["--distillation", "none"], ["--teacher.untrained"])):
            assert main(["train", "demo", *TINY, *words, "--output", str(path)]) == 0
        assert main(["evaluate", str(made[1])]) == 0
    return made


@pytest.fixture(scope="module")
def page(runs: list[Path]) -> Path:
    path = runs[0].with_name("report.html")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.scenes.SPLITS, "val", 2)
        assert main(["report", *map(str, runs), "--output", str(path)]) == 0
    return path


class Balance(HTMLParser):
    """Notes tags that are closed in the wrong order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def test_page_holds_every_section_and_the_numbers(page: Path, runs: list[Path]) -> None:
    text = page.read_text(encoding="utf-8")
    for title in ("Scores", "Training", "Curves", "Results per class", "Predictions", "Configuration", "Environment"):
        assert f"<h2>{title}</h2>" in text
    scores = json.loads((runs[1] / "evaluation-scenes-val.json").read_text())
    assert f"{100 * scores['mean_iou']:.2f}</td>" in text
    assert all(name in text for name in data.describe("scenes").classes)
    assert "none &lt;&amp;&gt;" in text
    assert "none <&>" not in text
    parser = Balance()
    parser.feed(text)
    assert (parser.open, parser.wrong) == ([], [])


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
