"""The drawn attention is the one that MWAD compares."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sward.figures.attention import WindowAttention, attention_figure, window_attention
from sward.losses import MWADLoss, PDRLoss, SWARDDistillation
from sward_kernels import windowed_distillation
from tests.support.drawn_figures import DrawnFigure

SIDE = 4


class Net(nn.Module):
    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stage = nn.Conv2d(3, channels, stride, stride=stride)

    def forward(self, images: Tensor) -> Tensor:
        return self.stage(images)


@pytest.fixture
def pair() -> tuple[Net, Net, SWARDDistillation]:
    mwad = MWADLoss([5], [7], window_size=SIDE, embed_dim=6)
    loss = SWARDDistillation(mwad, PDRLoss(2), student_taps=["stage"], teacher_taps=["stage"])
    return Net(5, 4), Net(7, 4), loss


def test_mean_divergence_over_all_pixels_is_the_attention_term(pair: tuple[Net, Net, SWARDDistillation]) -> None:
    student, teacher, loss = pair
    # 24 x 40 pixels are 6 x 10 on the grid: neither is a multiple of the window.
    image = torch.randn(3, 24, 40)
    divergences = [
        window_attention(student, teacher, loss, image, (row, column))[0].divergence
        for row in range(0, 24, 4)
        for column in range(0, 40, 4)
    ]
    student_map, teacher_map = student(image[None]), teacher(image[None])
    qkv_student, qkv_teacher = loss.mwad.project(0, student_map, teacher_map)
    expected = windowed_distillation(qkv_student, qkv_teacher, SIDE, implementation="reference").attention
    assert sum(divergences) / len(divergences) == pytest.approx(expected.item(), rel=1e-4)


def test_the_teacher_may_look_at_a_larger_picture(pair: tuple[Net, Net, SWARDDistillation]) -> None:
    image = torch.randn(3, 24, 40)
    larger = image.repeat_interleave(2, 1).repeat_interleave(2, 2)
    same, other = (window_attention(*pair, image, (2, 2), seen)[0] for seen in (image, larger))
    assert same.divergence == window_attention(*pair, image, (2, 2))[0].divergence
    assert other.grid == (6, 10)
    assert torch.equal(other.student, same.student)
    assert not torch.equal(other.teacher, same.teacher)


def test_attention_sums_to_one_inside_and_to_less_where_the_window_is_padded(
    pair: tuple[Net, Net, SWARDDistillation],
) -> None:
    image = torch.randn(3, 24, 40)
    (inside,) = window_attention(*pair, image, (2, 2))
    assert (inside.grid, inside.corner, inside.query) == ((6, 10), (0, 0), (0, 0))
    assert inside.teacher.shape == (4, 4)
    assert inside.teacher.sum().item() == pytest.approx(1)
    (edge,) = window_attention(*pair, image, (23, 39))
    assert (edge.corner, edge.query) == ((4, 8), (5, 9))
    assert edge.student.shape == (2, 2)
    assert 0 < edge.student.sum().item() < 1


def test_a_pixel_outside_is_refused(pair: tuple[Net, Net, SWARDDistillation]) -> None:
    with pytest.raises(
        ValueError, match=r"pixel must be a row and column inside the image of 24 x 40 pixels, got \(24, 0\)"
    ):
        window_attention(*pair, torch.randn(3, 24, 40), (24, 0))


@pytest.fixture
def stages() -> list[WindowAttention]:
    """Two stages: a whole window of 4 x 4, and one of 2 x 2 of which a quarter lies on the map."""
    whole = torch.full((4, 4), 0.05)
    whole[2, 1] = 0.25
    return [
        WindowAttention(0, (6, 10), (0, 4), (1, 6), whole, torch.full((4, 4), 1 / 16), 0.1234, side=4),
        WindowAttention(1, (3, 5), (2, 4), (2, 4), torch.tensor([[0.6]]), torch.tensor([[0.3]]), 2.0, side=2),
    ]


def test_figure_shows_windows_query_and_both_sides_on_one_scale(
    stages: list[WindowAttention], tmp_path: Path, drawn_figures: list[DrawnFigure]
) -> None:
    path = attention_figure(torch.zeros(3, 24, 40, dtype=torch.uint8), stages, tmp_path / "attention.png")
    (drawn,) = drawn_figures
    assert path == drawn.path
    panels = drawn.panels()
    assert [axis.get_title() for axis in panels[0]] == ["windows and query", "teacher", "student"]
    assert [[axis.get_ylabel() for axis in row] for row in panels] == [
        ["stage 1: 6 x 10", "", ""],
        ["stage 2: 3 x 5", "", ""],
    ]
    assert [[axis.get_xlabel() for axis in row] for row in panels] == [
        ["KL(teacher || student) = 0.123", "", ""],
        ["KL(teacher || student) = 2.000", "40 % on padding", "70 % on padding"],
    ]

    # In pixels of the image, of which the first stage has 4 per row and column and the second 8.
    windows = [axis.patches[0].get_bbox().bounds for axis, *_ in panels]
    assert windows == [(15.5, -0.5, 16, 16), (31.5, 15.5, 8, 8)]
    cyan = (0, 255, 255)
    for row, (x, y) in zip(panels, [(25.5, 5.5), (35.5, 19.5)], strict=True):
        for axis in row:
            (query,) = (line for line in axis.get_lines() if line.get_marker() == "+")
            assert query.get_xydata().tolist() == [[x, y]]
            assert drawn.colour_at(axis, x, y) == cyan
    assert drawn.colour_at(panels[0][0], 20, 10) == (0, 0, 0)
    assert drawn.colour_at(panels[0][0], 15.5, 10) == cyan  # the border of the query's window
    assert min(drawn.colour_at(panels[0][0], 31.5, 20)) > 100  # another window's border, a thin white line

    for row, stage in zip(panels, stages, strict=True):
        for axis, attention in zip(row[1:], (stage.teacher, stage.student), strict=True):
            heat = axis.get_images()[1]
            assert heat.get_clim() == pytest.approx((0.8, 4) if stage.stage == 0 else (1.2, 2.4))
            # Times uniform attention: the sums over the map are those of the attention.
            expected = float(attention.sum()) * stage.side**2 / attention.numel()
            assert heat.get_array().mean() == pytest.approx(expected)
    assert [bar.get_ylabel() for bar in drawn.colour_bars()] == ["times uniform", "times uniform"]
    drawn.assert_svg_beside()


@pytest.mark.parametrize("scale", [1, 3])
def test_attention_lies_on_the_pixels_of_the_picture_that_it_belongs_to(
    scale: int, stages: list[WindowAttention], tmp_path: Path, drawn_figures: list[DrawnFigure]
) -> None:
    """The centroid of attention on one position is the middle of that position in a picture of any size."""
    one = torch.zeros(4, 4)
    one[2, 1] = 1.0
    only = dataclasses.replace(stages[0], teacher=one)
    attention_figure(torch.zeros(3, 24 * scale, 40 * scale, dtype=torch.uint8), [only], tmp_path / "one.png")
    (axis,) = (axis for axis in drawn_figures[0].figure.axes if axis.get_title() == "teacher")
    heat = axis.get_images()[1]
    weights = np.asarray(heat.get_array())
    left, right, bottom, top = heat.get_extent()
    ys, xs = (
        np.linspace(low, high, 2 * count + 1)[1::2]
        for low, high, count in ((top, bottom, weights.shape[0]), (left, right, weights.shape[1]))
    )
    centroid = (weights.sum(axis=0) @ xs / weights.sum(), weights.sum(axis=1) @ ys / weights.sum())
    # Row 0 + 2, column 4 + 1 of the grid, whose positions are 4 pixels of the image wide.
    assert centroid == pytest.approx(((5 + 0.5) * 4 * scale - 0.5, (2 + 0.5) * 4 * scale - 0.5), abs=1e-4 * scale)
    # The panel shows the window's part of the picture, and the brightest of its pixels is there too.
    assert (*axis.get_xlim(), *axis.get_ylim()) == (left, right, bottom, top)
    x, y = centroid
    beside = [drawn_figures[0].colour_at(axis, x + step, y)[0] for step in (-3 * scale, 3 * scale)]
    assert drawn_figures[0].colour_at(axis, x, y)[0] > max(beside) + 50
