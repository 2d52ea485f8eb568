"""A damaged image in a training run: its path in one sentence, or the next image in its place."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sward.cli.main import main


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind, shape, high in (("images", (64, 64, 3), 256), ("masks", (64, 64), 2)):
            (tmp_path / "set" / kind / split).mkdir(parents=True)
            for number in range(4):
                pixels = rng.integers(0, high, shape, np.uint8)
                Image.fromarray(pixels).save(tmp_path / "set" / kind / split / f"{number}.png")
    damaged = tmp_path / "set/images/train/1.png"
    damaged.write_bytes(damaged.read_bytes()[:500])
    return tmp_path / "set"


def train(root: Path, *options: str) -> int:
    words = ["train", "demo", "--distillation", "none", "--dataset.name", "folder", "--dataset.root", str(root)]
    sizes = ["--dataset.num-classes", "2", "--dataset.image-size", "64", "64", "--batch", "2", "--iterations", "4"]
    return main([*words, *sizes, *options])


@pytest.mark.parametrize("workers", ["0", "1"])
def test_stop_names_the_file(root: Path, workers: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(root, "--dataset.workers", workers) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(f"sward train: cannot read {root}/images/train/1.png: the file is damaged")
    assert not any("Traceback" in line for line in lines)


def test_skip_trains_on(root: Path) -> None:
    with pytest.warns(UserWarning, match=r"skipped: cannot read .*images/train/1.png") as warned:
        assert train(root, "--on-corrupt", "skip") == 0
    assert sum("skipped" in str(each.message) for each in warned) == 1


def test_missing_mask(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "masks/train/2.png").unlink()
    assert train(root) == 2
    assert f"image {root}/images/train/2.png has no mask; " in capsys.readouterr().err
    shutil.rmtree(root / "masks")
    assert train(root) == 2
    assert f"looked for images and masks in {root}" in capsys.readouterr().err
