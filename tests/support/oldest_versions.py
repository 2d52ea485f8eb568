"""Print pip constraints that pin every requirement to the oldest version that pyproject.toml allows."""

from __future__ import annotations

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def oldest(requirements: list[str]) -> list[str]:
    """Return `NAME==VERSION` for each `NAME>=VERSION` or `NAME==VERSION`; what has no bound is left out."""
    found = (re.match(r"([A-Za-z0-9_.-]+)(?:\[[^]]*\])?\s*[>=]=\s*([0-9][^;,\s]*)", each) for each in requirements)
    return sorted({f"{match[1]}=={match[2]}" for match in found if match})


if __name__ == "__main__":
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [each for group in project["optional-dependencies"].values() for each in group]
    print("\n".join(oldest([*project["dependencies"], *extras])))
