"""Memory of predicting one large photo in tiles, in a process of its own."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.deployable import make_run, register

LARGEST_MIB = 1200
"""Largest resident size of `sward predict --tile 512 512` on 4000 x 3000 pixels, Python and torch included."""

# Registers the network again: it is a process of its own.
PREDICT = """
import sys
from pathlib import Path
import pytest
import torch
from sward.cli.main import main
from sward.training.observation import peak_memory
from tests.support.deployable import register
torch.set_num_threads(1)
register(pytest.MonkeyPatch())
assert main(["predict", *sys.argv[1:], "--tile", "512", "512"]) == 0
print(peak_memory(torch.device("cpu")))
"""


@pytest.mark.slow
def test_a_photo_of_12_million_pixels_needs_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)
    make_run(tmp_path / "run")
    rows, columns = np.mgrid[:3000, :4000]
    photo = np.stack([rows % 256, columns % 256, (rows + columns) % 256], axis=-1).astype(np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png", compress_level=1)
    words = [sys.executable, "-c", PREDICT, str(tmp_path / "run"), str(tmp_path / "photo.png")]
    done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=500)
    assert int(done.stdout.split()[-1]) / 2**20 < LARGEST_MIB
    with Image.open(tmp_path / "run" / "predictions" / "photo-mask.png") as mask:
        assert mask.size == (4000, 3000)
        assert len(np.unique(np.asarray(mask))) > 1
