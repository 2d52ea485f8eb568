"""Colours, overlays, grids of predictions and training curves."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sward.data import DatasetInfo
from sward.figures.curves import training_curves
from sward.figures.predictions import colour_labels, overlay, prediction_grid
from sward.training.run_folder import RunFolder
from tests.support.drawn_figures import DrawnFigure, rgb

INFO = DatasetInfo("two", ("background", "thing", "rest"), ((10, 20, 30), (200, 100, 0), (0, 90, 180)))


def test_labels_take_the_palette_and_ignored_pixels_are_black() -> None:
    pixels = colour_labels(torch.tensor([[0, 1, 255]]), INFO)
    assert pixels.tolist() == [[[10, 20, 30], [200, 100, 0], [0, 0, 0]]]


def test_overlay_mixes_the_foreground_and_leaves_background_and_ignored_pixels() -> None:
    image = torch.full((3, 1, 3), 100, dtype=torch.uint8)
    pixels = overlay(image, torch.tensor([[0, 1, 255]]), INFO, opacity=0.5)
    assert pixels.tolist() == [[[100, 100, 100], [150, 100, 50], [100, 100, 100]]]
    assert pixels.dtype == np.uint8


def test_grid_shows_each_label_map_in_its_cell(tmp_path: Path, drawn_figures: list[DrawnFigure]) -> None:
    images = [torch.full((3, 8, 12), grey, dtype=torch.uint8) for grey in (60, 160)]
    halves = torch.zeros(8, 12, dtype=torch.int64)
    halves[:, 6:] = 1
    ignored = torch.full((8, 12), 255)
    columns = {"truth": [halves, ignored], "student": [torch.ones(4, 6, dtype=torch.int64), halves.flip(1)]}
    path = prediction_grid(images, columns, INFO, tmp_path / "new" / "grid.png", names=["first", "second"])
    (drawn,) = drawn_figures
    assert path == drawn.path == tmp_path / "new" / "grid.png"
    panels = drawn.panels()
    assert [[axis.get_title() for axis in row] for row in panels] == [["image", "truth", "student"], [""] * 3]
    assert [[axis.get_ylabel() for axis in row] for row in panels] == [["first", "", ""], ["second", "", ""]]

    def sides(axis: object, left: float, right: float, y: float) -> tuple[tuple[int, ...], ...]:
        return drawn.colour_at(axis, left, y), drawn.colour_at(axis, right, y)

    background, thing, black = (10, 20, 30), (200, 100, 0), (0, 0, 0)
    assert sides(panels[0][0], 3, 9, 4) == ((60,) * 3,) * 2
    assert sides(panels[1][0], 3, 9, 4) == ((160,) * 3,) * 2
    assert sides(panels[0][1], 3, 9, 4) == (background, thing)
    assert sides(panels[1][1], 3, 9, 4) == (black, black)
    assert sides(panels[0][2], 1, 4, 2) == (thing, thing)
    assert sides(panels[1][2], 3, 9, 4) == (thing, background)
    # Only the classes in the picture: no `rest`, and nothing for ignored pixels.
    assert drawn.legend() == {"background": background, "thing": thing}
    drawn.assert_svg_beside()


def test_the_same_grid_is_the_same_file(tmp_path: Path) -> None:
    images = [torch.randint(0, 255, (3, 8, 12)).to(torch.uint8)]
    columns = {"truth": [torch.ones(8, 12, dtype=torch.int64)]}
    one, two = (prediction_grid(images, columns, INFO, tmp_path / name / "grid.png") for name in ("a", "b"))
    assert one.read_bytes() == two.read_bytes()
    assert one.with_suffix(".svg").read_bytes() == two.with_suffix(".svg").read_bytes()


@pytest.mark.parametrize(("metric", "label"), [("mean_iou", "validation mIoU"), ("dice", "validation Dice")])
def test_curves_hold_the_logged_numbers_of_every_run(
    metric: str, label: str, tmp_path: Path, drawn_figures: list[DrawnFigure]
) -> None:
    logged = {"one": [8.0, 4.0, 2.0], "two": [6.0, 5.0, 4.5]}
    for title, losses in logged.items():
        (tmp_path / title).mkdir()
        for step, loss in enumerate(losses, start=1):
            RunFolder(tmp_path / title).log({"step": step, "task": loss, "loss": 9.0})
            if step != 2:
                scores = {"mean_iou": 0.1 * step, "dice": 0.05 * loss}
                RunFolder(tmp_path / title).log({"step": step, "validation": scores})
    training_curves({title: RunFolder(tmp_path / title) for title in logged}, tmp_path / "curves", metric=metric)
    (drawn,) = drawn_figures
    assert drawn.path == tmp_path / "curves.png"
    ((losses, scores),) = drawn.panels()
    assert (losses.get_xlabel(), losses.get_ylabel(), losses.get_yscale()) == ("step", "task loss", "log")
    assert (scores.get_xlabel(), scores.get_ylabel(), scores.get_yscale()) == ("step", label, "linear")
    for line, score, title in zip(losses.get_lines(), scores.get_lines(), logged, strict=True):
        assert np.array_equal(line.get_xydata(), [*enumerate(logged[title], start=1)])
        expected = [0.1, 0.3] if metric == "mean_iou" else [0.05 * logged[title][0], 0.05 * logged[title][2]]
        np.testing.assert_allclose(score.get_xydata(), [*zip((1, 3), expected)])
        assert line.get_color() == score.get_color()
        # A marker stands on each validation. With mIoU both runs have the same scores, and the second hides the first.
        if metric == "dice":
            assert drawn.colour_at(scores, 3, expected[1]) == rgb(score.get_color())
        # On its curve, halfway between the first two steps of the logarithmic axis.
        middle = (logged[title][0] * logged[title][1]) ** 0.5
        assert drawn.colour_at(losses, 1.5, middle) == rgb(line.get_color())
    assert drawn.legend() == {line.get_label(): rgb(line.get_color()) for line in losses.get_lines()}
    assert list(drawn.legend()) == list(logged)
    assert len(set(drawn.legend().values())) == 2
    drawn.assert_svg_beside()
