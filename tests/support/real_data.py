"""Finds the real images that never enter the repository, or skips the test that needs them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def real_data_root(folder: str) -> Path:
    """Return `SWARD_DATA`, the folder that holds `folder` (`cvc_clinicdb`, `cvc_colondb` or `camvid`)."""
    root = os.environ.get("SWARD_DATA")
    if not root or not (Path(root) / folder).is_dir():
        pytest.skip(f"no real images: SWARD_DATA must name the folder that holds {folder}, got {root}")
    return Path(root)
