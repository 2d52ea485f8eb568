"""Pages and files of the documentation site that live outside `docs/` (a hook of mkdocs)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
FILES = ("examples/**/*.py", "benchmarks/results/*.png", "CITATION.cff", "LICENSE")


def on_files(files: Files, config: Any) -> Files:
    """Add README and the others as pages, and what pages link to as files."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
        for other, target in PAGES.items():
            text = text.replace(f"]({other}", f"]({target}")
        files.append(File.generated(config, page, content=text))
    for pattern in FILES:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path), inclusion=InclusionLevel.INCLUDED))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links that leave `docs/` to the copies of these files in the site."""
    return markdown.replace("](../examples/", "](examples/").replace("](../benchmarks/", "](benchmarks/")
