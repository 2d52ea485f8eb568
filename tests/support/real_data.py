"""Finds the real images that never enter the repository, or skips the test that needs them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def real_data_root(folder: str) -> Path:
    """The folder that holds `folder` (`cvc_clinicdb`, `cvc_colondb`, `camvid`): `SWARD_DATA`, else `../shared/data`."""
    root = Path(os.environ.get("SWARD_DATA") or REPOSITORY.parent / "shared" / "data")
    if not (root / folder).is_dir():
        pytest.skip(
            f"no real images: {root / folder} does not exist (set SWARD_DATA to the folder that holds {folder})"
        )
    return root
