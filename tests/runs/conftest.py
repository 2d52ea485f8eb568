"""A finished run on a folder of images."""

from __future__ import annotations

from pathlib import Path

import pytest

from sward.runs import train_student
from tests.support.folder_data import write_pairs
from tests.support.training_runs import on_folder


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    write_pairs(tmp_path / "data")
    train_student(on_folder(tmp_path / "data", tmp_path / "run"))
    return tmp_path
