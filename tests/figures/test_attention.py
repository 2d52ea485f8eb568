"""The drawn attention is the one that MWAD compares."""

from __future__ import annotations

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


def test_figure_shows_window_query_and_both_sides_on_one_scale(
    tmp_path: Path, drawn_figures: list[DrawnFigure]
) -> None:
    """Two stages of an image of 24 x 40: a whole window, and one of which a quarter lies on the map."""
    whole = torch.full((4, 4), 0.05)
    whole[2, 1] = 0.25
    stages = [
        WindowAttention(0, (6, 10), (0, 4), (1, 6), whole, torch.full((4, 4), 1 / 16), 0.1234),
        WindowAttention(1, (3, 5), (2, 4), (2, 4), torch.tensor([[0.6]]), torch.tensor([[0.3]]), 2.0),
    ]
    path = attention_figure(torch.zeros(3, 24, 40, dtype=torch.uint8), stages, tmp_path / "attention.png")
    (drawn,) = drawn_figures
    assert path == drawn.path
    panels = drawn.panels()
    assert [axis.get_title() for axis in panels[0]] == ["window and query", "teacher", "student"]
    assert [[axis.get_ylabel() for axis in row] for row in panels] == [
        ["stage 1, 6 x 10", "", ""],
        ["stage 2, 3 x 5", "", ""],
    ]
    assert [[axis.get_xlabel() for axis in row] for row in panels] == [
        ["KL(teacher || student) = 0.123", "", ""],
        ["KL(teacher || student) = 2.000", "40 % on padding", "70 % on padding"],
    ]

    # In pixels of the image, of which the first stage has 4 per row and column and the second 8.
    windows = [axis.patches[0].get_bbox().bounds for axis, *_ in panels]
    assert windows == [(15.5, -0.5, 16, 16), (31.5, 15.5, 8, 8)]
    queries = [axis.get_lines()[0].get_xydata().tolist() for axis, *_ in panels]
    assert queries == [[[25.5, 5.5]], [[35.5, 19.5]]]
    assert drawn.colour_at(panels[0][0], 20, 10) == (0, 0, 0)
    assert drawn.colour_at(panels[0][0], 15.5, 10) == (255, 255, 255)
    assert drawn.colour_at(panels[0][0], *queries[0][0]) == (0, 255, 255)

    lowest, highest = (68, 1, 84), (253, 231, 36)  # the ends of viridis
    (_, teacher, student), (_, small_teacher, small_student) = panels
    for axis, shown in ((teacher, stages[0].teacher), (student, stages[0].student)):
        np.testing.assert_array_equal(axis.get_images()[0].get_array(), shown)
        assert axis.get_images()[0].get_clim() == (0, 0.25)
        assert axis.get_lines()[0].get_xydata().tolist() == [[2, 1]]
        assert drawn.colour_at(axis, 2, 1) == (255, 0, 0)
    assert drawn.colour_at(teacher, 1, 2) == highest
    assert drawn.colour_at(teacher, 3, 3) not in (lowest, highest)
    assert drawn.colour_at(small_teacher, 0.35, 0.35) == highest
    assert drawn.colour_at(small_student, 0.35, 0.35) not in (lowest, highest)
    assert [bar.get_ylabel() for bar in drawn.colour_bars()] == ["attention", "attention"]
    drawn.assert_svg_beside()
