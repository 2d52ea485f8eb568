"""`sward evaluate --tile`: scores at the images' own resolution."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sward import data
from sward.cli.main import main
from sward.deploy.predictor import load
from sward.metrics import ConfusionMatrix
from tests.support.deployable import make_run, register

pytestmark = pytest.mark.usefixtures("few_images")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    register(monkeypatch)
    make_run(tmp_path / "run")  # evaluated at 64 x 64; scenes have 128 x 128
    return tmp_path / "run"


def score_of(run: Path, tile: tuple[int, int], overlap: int) -> float:
    """The score of what `sward predict --tile` writes."""
    dataset = data.build("scenes", "val", image_size=(64, 64), train=False)
    matrix = ConfusionMatrix(dataset.info.num_classes, dataset.info.ignore_index)
    predictor = load(run)
    for index in range(len(dataset)):
        image, labels, _ = dataset.read(index)
        found: Tensor = torch.from_numpy(predictor.predict(image, tile=tile, overlap=overlap)).long()
        matrix.update(found, labels.long())
    return matrix.mean_iou()


def test_tiles_score_what_predict_writes(run: Path) -> None:
    assert main(["evaluate", str(run)]) == 0
    assert main(["evaluate", str(run), "--tile", "48", "80", "--overlap", "10"]) == 0
    resized = json.loads((run / "evaluation-scenes-val.json").read_text())
    tiled = json.loads((run / "evaluation-scenes-val-tile-48x80-overlap-10.json").read_text())
    assert (tiled["tile"], tiled["overlap"], tiled["images"]) == ([48, 80], 10, 4)
    assert tiled["mean_iou"] == pytest.approx(score_of(run, (48, 80), 10), abs=1e-9)
    assert tiled["mean_iou"] != pytest.approx(resized["mean_iou"], abs=1e-6)


def test_one_tile_for_everything_is_the_whole_image(run: Path) -> None:
    assert main(["evaluate", str(run), "--tile", "500", "500"]) == 0
    whole = json.loads((run / "evaluation-scenes-val-tile-500x500.json").read_text())
    assert whole["overlap"] == 125
    assert whole["mean_iou"] == pytest.approx(score_of(run, (128, 128), 0), abs=1e-9)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--overlap", "4"], "overlap must be given with a tile, got 4 without one"),
        (["--tile", "32", "-1"], "tile must be two positive numbers, got 32 -1"),
        (["--tile", "32", "64", "--overlap", "-3"], "overlap must be at least 0 and below the sides of the tile, 32"),
    ],
)
def test_wrong_tiles(words: list[str], sentence: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), *words]) == 2
    assert sentence in capsys.readouterr().err
    assert not list(run.glob("evaluation-*"))
