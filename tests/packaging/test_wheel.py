"""A wheel built from this tree is complete: it installs into an empty environment and works there."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
SOURCES = (
    "sward",
    "sward_kernels",
    "tests",
    "benchmarks",
    "examples",
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)
PACKAGES = ("sward", "sward_kernels")


def run(*command: str | Path, cwd: Path, environment: dict[str, str] | None = None) -> str:
    finished = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, f"{command}\n{finished.stdout}\n{finished.stderr}"
    return finished.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves files beside its sources, and takes up those it finds there."""
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        else:
            shutil.copy(source, tree / name)
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check", "--quiet")
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", tree / "dist", tree, cwd=tree)
    (built,) = (tree / "dist").glob("*.whl")
    return built


class Installation:
    """A virtual environment with the wheel in it, which borrows torch and the rest from the one that runs the tests."""

    def __init__(self, wheel: Path, folder: Path) -> None:
        venv.create(folder / "environment", with_pip=False)
        self.scripts = folder / "environment" / "bin"
        self.python = self.scripts / "python"
        self.cache = folder / "cache"
        self.away = folder / "away"
        self.away.mkdir()
        options = ("--no-deps", "--no-index", "--disable-pip-version-check", "--quiet")
        run(sys.executable, "-m", "pip", "--python", self.python, "install", *options, wheel, cwd=self.away)
        self.modules = Path(
            self.run(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        )
        # Lines of a .pth file come after the environment's own packages, and .pth files found there are not read: an
        # editable installation of this checkout stays out of sight.
        borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), str(Path(torch.__file__).parents[1])}
        (self.modules / "borrowed.pth").write_text("\n".join(sorted(borrowed)))

    def run(self, *command: str | Path) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment["XDG_CACHE_HOME"] = str(self.cache)
        return run(*command, cwd=self.away, environment=environment)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    return Installation(wheel, tmp_path_factory.mktemp("installation"))


def test_the_wheel_holds_every_file_of_both_packages_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    kinds = ("*.py", "*.cpp", "*.h", "py.typed", "splits/*.csv", "*.j2")
    expected = {
        path.relative_to(REPOSITORY).as_posix()
        for package in PACKAGES
        for kind in kinds
        for path in (REPOSITORY / package).rglob(kind)
    }
    assert {f"{package}/py.typed" for package in PACKAGES} <= expected
    assert {Path(name).suffix for name in expected} == {".py", ".cpp", ".h", ".csv", ".typed", ".j2"}
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_the_metadata_names_version_licence_and_extras(wheel: Path, installed: Installation) -> None:
    archive = zipfile.ZipFile(wheel)
    (path,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(archive.read(path))
    assert metadata["License-Expression"] == "Apache-2.0"
    assert path.replace("METADATA", "licenses/LICENSE") in archive.namelist()
    assert set(metadata.get_all("Provides-Extra", [])) == {
        "models",
        "figures",
        "stream",
        "export",
        "docs",
        "dev",
        "all",
    }
    assert 'sam2==1.1.0; extra == "models"' in metadata.get_all("Requires-Dist", [])
    assert installed.run(installed.scripts / "sward", "--version").strip() == f"sward {metadata['Version']}"


def test_the_installed_doctor_compiles_the_wheels_sources(installed: Installation) -> None:
    origins = "import sward, sward_kernels; print(sward.__file__, sward_kernels.__file__, sep='\\n')"
    for line, package in zip(installed.run(installed.python, "-c", origins).splitlines(), PACKAGES, strict=True):
        assert Path(line) == installed.modules / package / "__init__.py"
    report = installed.run(installed.scripts / "sward", "doctor")
    assert "torch" in report
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        pytest.skip("no C++ compiler")
    operations = {path.parent.name for path in installed.modules.glob("sward_kernels/*/*.cpp")}
    libraries = {path.name.rsplit("-", 1)[0] for path in (installed.cache / "sward_kernels").glob("*.so")}
    assert libraries == operations != set()
