"""Every module can be imported by its dotted name, and no two modules import each other."""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("sward", "sward_kernels")


def _dotted_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    _dotted_name(file): file
    for package in PACKAGES
    for file in sorted((ROOT / package).rglob("*.py"))
    if file.stem != "__main__"
}


@pytest.mark.parametrize("name", FILES)
def test_every_module_is_imported_by_its_dotted_name(name: str) -> None:
    namespace: dict[str, object] = {}
    try:
        # Fails where a package's `__init__` binds something else to the name of one of its modules.
        exec(f"import {name} as module", namespace)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in PACKAGES:
            raise
        pytest.skip(f"{error.name} is not installed")
    assert namespace["module"] is sys.modules[name]
    assert sys.modules[name].__file__ == str(FILES[name])


def _statements_run_by_an_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            continue
        yield statement
        for block in ("body", "orelse", "finalbody"):
            yield from _statements_run_by_an_import(getattr(statement, block, []))
        for handler in getattr(statement, "handlers", []):
            yield from _statements_run_by_an_import(handler.body)


def imports_of(source: str, known: set[str]) -> set[str]:
    """The known modules that importing `source` imports."""
    found = set()
    for statement in _statements_run_by_an_import(ast.parse(source).body):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            assert statement.level == 0, "relative imports are not resolved here"
            for alias in statement.names:
                submodule = f"{statement.module}.{alias.name}"
                found.add(submodule if submodule in known else str(statement.module))
    return found & known


def test_no_modules_import_each_other() -> None:
    graph = {name: imports_of(file.read_text(encoding="utf-8"), set(FILES)) for name, file in FILES.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail("circle of imports: " + " -> ".join(reversed(error.args[1])))


def test_only_what_an_import_runs_counts() -> None:
    source = """
import a.b
from a import c, name
try:
    import d
except ImportError:
    from e import f
if TYPE_CHECKING:
    import g
class Kept:
    import h
def later():
    import i
"""
    known = set("aceghdi") | {"a.b", "a.c", "e.f"}
    assert imports_of(source, known) == {"a", "a.b", "a.c", "d", "e.f", "h"}
