"""Colours, overlays and the files that figures leave."""

from pathlib import Path

import numpy as np
import torch

from sward.data import DatasetInfo
from sward.figures.curves import training_curves
from sward.figures.predictions import colour_labels, overlay, prediction_grid
from sward.training.run_folder import RunFolder

INFO = DatasetInfo("two", ("background", "thing"), ((10, 20, 30), (200, 100, 0)))


def test_labels_take_the_palette_and_ignored_pixels_are_black() -> None:
    pixels = colour_labels(torch.tensor([[0, 1, 255]]), INFO)
    assert pixels.tolist() == [[[10, 20, 30], [200, 100, 0], [0, 0, 0]]]


def test_overlay_mixes_the_foreground_and_leaves_background_and_ignored_pixels() -> None:
    image = torch.full((3, 1, 3), 100, dtype=torch.uint8)
    pixels = overlay(image, torch.tensor([[0, 1, 255]]), INFO, opacity=0.5)
    assert pixels.tolist() == [[[100, 100, 100], [150, 100, 50], [100, 100, 100]]]
    assert pixels.dtype == np.uint8


def test_grid_and_curves_are_written_and_repeat(tmp_path: Path) -> None:
    images = [torch.randint(0, 255, (3, 8, 12)).to(torch.uint8) for _ in range(2)]
    columns = {
        "truth": [torch.ones(8, 12, dtype=torch.int64)] * 2,
        "student": [torch.zeros(4, 6, dtype=torch.int64)] * 2,
    }
    grids = [prediction_grid(images, columns, INFO, tmp_path / name / "grid.png") for name in ("a", "b")]
    assert grids[0].read_bytes() == grids[1].read_bytes()
    assert grids[0].with_suffix(".svg").read_bytes() == grids[1].with_suffix(".svg").read_bytes()
    run = RunFolder(tmp_path)
    for step in (1, 2):
        run.log({"step": step, "task": 1.0 / step})
        run.log({"step": step, "validation": {"mean_iou": 0.1 * step}})
    assert training_curves({"run": run}, tmp_path / "curves").stat().st_size > 1000
