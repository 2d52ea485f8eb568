"""Reads a page of `sward report` as its reader sees it, and opens it in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
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
        self.style = self.title = self.heading = self.first = self.paragraph = ""
        self.more: list[str] = []
        self.sections: dict[str, Section] = {}
        self._section = Section()
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.tags.add(tag)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        if tag == "p":
            self.paragraph = values.get("class", "")
        elif tag == "h2":
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
        elif tag == "p" and self.paragraph == "first":
            self.first += text
        elif tag == "p" and self.paragraph == "more":
            self.more.append(text)
        elif {"td", "th"} & set(self.open):
            row = self._section.tables[-1][-1]
            row[-1] = row[-1]._replace(text=row[-1].text + " " * (tag == "small") + text)
        self._section.text += text
        self.text += text

    def emphasised(self, cell: Cell) -> bool:
        """Whether the style sheet sets the cell in bold."""
        bold = re.findall(r"td\.(\w+) \{[^}]*font-weight: 600", self.style)
        return bool(set(bold) & set(cell.classes))

    def numbers(self, table: list[list[Cell]]) -> dict[str, dict[str, str]]:
        """First column -> header -> text, with an asterisk for what stands out."""
        names = [cell.text for cell in table[0][1:]]
        marked = [[cell.text + "*" * self.emphasised(cell) for cell in row] for row in table[1:]]
        return {row[0]: dict(zip(names, row[1:], strict=True)) for row in marked}


def find_browser() -> str | None:
    """Return the path of Chromium; None if there is none."""
    return next((path for name in CHROMIUM if (path := shutil.which(name))), None)


def browse(browser: str, page: Path, folder: Path, *options: str) -> str:
    """Open a page in headless Chromium with a new profile in `folder` and return what it printed."""
    command = [browser, *QUIET, f"--user-data-dir={folder}", "--window-size=1280,900", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout
