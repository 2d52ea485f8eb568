"""Which pixels are compared, and the measures of separability against hand-computed ones."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sward import data
from sward.data import DatasetInfo
from sward.figures.tsne import (
    Separability,
    feature_space_figure,
    fisher_ratio,
    pixel_features,
    sample_pixels,
    separability,
    visible_colours,
)
from tests.support.drawn_figures import DrawnFigure, rgb

INFO = DatasetInfo("three", ("a", "b", "c"), ((0, 0, 0), (255, 255, 255), (200, 0, 0)))


def test_fisher_ratio_by_hand() -> None:
    # Means (1, 0) and (5, 0), overall (3, 0): between 2 * 4 + 2 * 4 = 16; within 4 * 1 = 4.
    features = np.array([[0, 0], [2, 0], [5, 1], [5, -1]], dtype=np.float32)
    assert fisher_ratio(features, np.array([0, 0, 1, 1])) == pytest.approx(4.0)


def test_fisher_ratio_splits_the_total_scatter() -> None:
    generator = np.random.default_rng(0)
    features = generator.normal(size=(60, 7)).astype(np.float32)
    labels = generator.integers(3, size=60)
    total = ((features - features.mean(axis=0)) ** 2).sum()
    within = sum(((features[labels == k] - features[labels == k].mean(axis=0)) ** 2).sum() for k in range(3))
    assert fisher_ratio(features, labels) == pytest.approx((total - within) / within, rel=1e-4)


def test_separability_rises_with_the_distance_of_the_classes_and_ignores_scale() -> None:
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1], 40)
    noise = generator.normal(size=(80, 4)).astype(np.float32)
    near, far = (separability(noise + distance * labels[:, None], labels) for distance in (1, 6))
    assert far.silhouette > near.silhouette
    assert far.fisher > near.fisher
    scaled = separability(3 * (noise + labels[:, None]), labels)
    assert scaled.silhouette == pytest.approx(near.silhouette, abs=1e-4)
    assert scaled.fisher == pytest.approx(near.fisher, rel=1e-4)


def test_pixels_are_drawn_evenly_from_the_classes_and_never_from_ignored_ones() -> None:
    labels = [torch.zeros(8, 8, dtype=torch.int64), torch.full((8, 8), 255)]
    labels[0][0, :3], labels[1][:2] = 1, 2
    chosen = sample_pixels(labels, INFO, per_class=10, seed=0)
    classes = torch.cat([each.flatten()[pixels] for each, pixels in zip(labels, chosen)])
    assert torch.bincount(classes).tolist() == [10, 3, 10]
    assert len(torch.unique(chosen[0])) == len(chosen[0])
    again = sample_pixels(labels, INFO, per_class=10, seed=0)
    other = sample_pixels(labels, INFO, per_class=10, seed=1)
    assert all(torch.equal(one, two) for one, two in zip(chosen, again))
    assert not all(torch.equal(one, two) for one, two in zip(chosen, other))


def test_every_network_is_read_at_the_same_pixels() -> None:
    dataset = data.build("scenes", "val", train=False, image_size=64, count=2)
    fine, coarse = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 4, 2, stride=8)
    one = pixel_features(nn.Sequential(fine), "0", dataset, [0, 1], grid=(16, 16), per_class=5)
    two = pixel_features(nn.Sequential(coarse), "0", dataset, [0, 1], grid=(16, 16), per_class=5)
    assert one[0].shape == (len(one[1]), 2)
    assert two[0].shape == (len(two[1]), 4)
    assert np.array_equal(one[1], two[1])


def test_white_is_replaced_on_white_paper() -> None:
    assert visible_colours(INFO)[1].tolist() != [1, 1, 1]
    assert visible_colours(INFO)[2].tolist() == [200 / 255, 0, 0]


def test_figure_shows_every_pixel_in_the_colour_of_its_class_and_the_measures(
    tmp_path: Path, drawn_figures: list[DrawnFigure]
) -> None:
    """Two of three classes, far apart for the teacher and less so for the student."""
    generator = np.random.default_rng(0)
    labels = np.repeat([1, 2], [10, 14])
    noise = generator.normal(size=(24, 4)).astype(np.float32)
    far = np.array([[30, 0, 0, 0]], np.float32)
    panels = {
        "teacher": (noise + labels[:, None] * far, labels),
        "student": (noise + labels[:, None] * far / 10, labels),
    }
    path, measured = feature_space_figure(panels, INFO, tmp_path / "figure4.png")
    (drawn,) = drawn_figures
    assert path == drawn.path
    assert measured == {title: separability(*panel) for title, panel in panels.items()}

    (teacher, student, silhouette), (fisher,) = drawn.panels()
    assert [axis.get_title() for axis in (teacher, student)] == ["(a) teacher", "(b) student"]
    colours = {1: rgb(visible_colours(INFO)[1]), 2: (200, 0, 0)}
    for axis in (teacher, student):
        (points,) = axis.collections
        assert Counter(map(rgb, points.get_facecolors())) == {colours[1]: 10, colours[2]: 14}
    # A point whose neighbour in the plane has another colour was given the colour of another pixel.
    (points,) = teacher.collections
    distances = np.linalg.norm(points.get_offsets()[:, None] - points.get_offsets()[None], axis=-1)
    nearest = (distances + np.diag([np.inf] * 24)).argmin(axis=1)
    assert np.array_equal(points.get_facecolors(), points.get_facecolors()[nearest])
    assert drawn.colour_at(teacher, *points.get_offsets()[-1]) == rgb(points.get_facecolors()[-1])
    assert drawn.legend() == {"b": colours[1], "c": colours[2]}

    for axis, title, field in ((silhouette, "silhouette", "silhouette"), (fisher, "Fisher ratio", "fisher")):
        values = [getattr(measured[name], field) for name in panels]
        assert axis.get_title() == title
        assert [bar.get_width() for bar in axis.patches] == values
        assert [text.get_text() for text in axis.texts] == [f"{value:.2f}" for value in values]
        assert [label.get_text() for label in axis.get_yticklabels()] == ["teacher", "student"]
        assert axis.yaxis_inverted()  # the first panel is the topmost bar
    assert drawn.colour_at(fisher, measured["teacher"].fisher / 2, 0) == rgb("0.55")
    drawn.assert_svg_beside()


def test_four_networks_stand_two_by_two_and_no_number_is_minus_zero(
    tmp_path: Path, drawn_figures: list[DrawnFigure], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sward.figures.tsne.separability", lambda *_: Separability(-0.001, 0.5))
    panel = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32), np.repeat([1, 2], 6)
    feature_space_figure(dict.fromkeys("abcd", panel), INFO, tmp_path / "figure4.png")
    (first, second, silhouette), (third, fourth, _) = drawn_figures[0].panels()
    assert [axis.get_title()[-1] for axis in (first, second, third, fourth)] == ["a", "b", "c", "d"]
    assert [text.get_text() for text in silhouette.texts] == ["0.00"] * 4
