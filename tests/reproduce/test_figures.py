"""The figures of `sward reproduce` on generated scenes: which networks and images they show."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sward import data, models, presets
from sward.cli.main import main
from sward.figures.predictions import colour_labels
from sward.reproduce import figures
from tests.support.drawn_figures import DrawnFigure

pytestmark = pytest.mark.usefixtures("few_images")


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all figures: they share their runs, as a user's do."""
    return tmp_path_factory.mktemp("study")


@pytest.mark.parametrize(
    ("what", "name", "titles"),
    [
        ("figure1", "figure1-demo", [["image", "teacher", "student alone", "student + SWARD"]]),
        (
            "figure3",
            "figure3-scenes-demo",
            [
                ["image", "truth", "teacher", "student alone", "student + FreeKD", "student + SWARD"],
                [""] * 6,
                [""] * 6,
            ],
        ),
        (
            "figure4",
            "figure4-demo",
            [
                ["(a) teacher", "(b) student alone", "silhouette"],
                ["(c) student + MWAD", "(d) student + MWAD + PDR", "Fisher ratio"],
            ],
        ),
        ("attention", "attention-demo", [["windows and query", "teacher", "student"], *[[""] * 3] * 3]),
    ],
)
def test_panels(
    what: str,
    name: str,
    titles: list[list[str]],
    output: Path,
    drawn_figures: list[DrawnFigure],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sward.reproduce.figures.FEATURE_PIXELS", 5)  # t-SNE of many points takes long
    words = ["--preset", "demo", "--seeds", "1", "--iterations", "2", "--output", str(output)]
    assert main(["reproduce", what, *words]) == 0
    (drawn,) = drawn_figures
    assert drawn.path == output / f"{name}.png"
    assert [[axis.get_title() for axis in row] for row in drawn.panels()] == titles
    drawn.assert_svg_beside()
    if what == "figure1":
        assert drawn.panels()[0][0].get_ylabel() == "scenes, stripes"
    if what == "figure3":
        dataset = data.build("scenes", "val", image_size=presets.get("demo").student.dataset.image_size, train=False)
        for row, index in zip(drawn.panels(), (0, 1, 2)):
            image, labels = dataset.picture(index)
            assert image.shape[-1] == 4 * dataset[index].image.shape[-1]
            np.testing.assert_array_equal(row[0].get_images()[0].get_array(), image.permute(1, 2, 0))
            np.testing.assert_array_equal(row[1].get_images()[0].get_array(), colour_labels(labels, dataset.info))
    if what == "figure4":
        measured = json.loads((output / "figure4-demo.json").read_text())
        assert list(measured) == ["teacher", "student alone", "student + MWAD", "student + MWAD + PDR"]


def test_a_study_that_was_moved_still_shows_attention(
    output: Path, tmp_path: Path, drawn_figures: list[DrawnFigure]
) -> None:
    words = ["reproduce", "attention", "--preset", "demo", "--iterations", "2"]
    assert main([*words, "--output", str(output)]) == 0
    moved = output.rename(tmp_path / "moved")
    try:
        assert main([*words, "--output", str(moved)]) == 0
    finally:
        moved.rename(output)
    assert [each.path.parent for each in drawn_figures] == [output, moved]


def test_a_figure_without_one_of_its_runs_is_refused_before_any_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--preset", "demo", "--iterations", "2", "--only", "none", "--output", str(tmp_path / "runs")]
    assert main(["reproduce", "figure1", *words]) == 2
    assert capsys.readouterr().err == (
        "sward reproduce: only must leave out finished runs where a figure shows them, got none without teacher, "
        "sward-seed0\n"
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["figure1", "--target", "cars"],
            "target must be a class of scenes, got 'cars'; its classes are background, stripes, checks, dots, rings",
        ),
        (
            ["attention", "--pixel", "64", "0"],
            "pixel must be a row and column inside the image of 64 x 64 pixels, got (64, 0)",
        ),
    ],
)
def test_a_class_or_pixel_that_does_not_exist_is_refused_before_any_training(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", *words, "--preset", "demo", "--output", str(tmp_path / "runs")]) == 2
    assert capsys.readouterr().err == f"sward reproduce: {sentence}\n"
    assert not (tmp_path / "runs").exists()


def test_the_default_query_is_in_the_midst_of_the_class_and_off_the_border_of_the_image() -> None:
    region = torch.zeros(9, 12, dtype=torch.bool)
    region[0, 0] = True
    region[2:7, 5:10] = True
    assert figures._innermost(region) == (4, 7)
    # A region that touches the border is deepest away from it.
    region[:] = False
    region[:5, :5] = True
    assert figures._innermost(region) == (2, 2)
    assert figures._innermost(torch.zeros(9, 12, dtype=torch.bool)) == (4, 6)


def test_networks_that_are_not_registered_have_a_penultimate_layer_too() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)
    )
    config = presets.get("demo").student
    assert figures.TrainedNetwork("package.module:function", network, config).penultimate == "3"
    assert figures.TrainedNetwork("unext", network, config).penultimate == models.describe("unext").penultimate_layer
