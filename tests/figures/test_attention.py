"""The drawn attention is the one that MWAD compares."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sward.figures.attention import attention_figure, window_attention
from sward.losses import MWADLoss, PDRLoss, SWARDDistillation
from sward_kernels import windowed_distillation

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
        ValueError, match=r"pixel must lie in the image of 24 x 40 pixels \(row, column\), got \(24, 0\)"
    ):
        window_attention(*pair, torch.randn(3, 24, 40), (24, 0))


def test_figure_is_written(pair: tuple[Net, Net, SWARDDistillation], tmp_path: Path) -> None:
    stages = window_attention(*pair, torch.randn(3, 24, 40), (23, 39))
    path = attention_figure(torch.zeros(3, 24, 40, dtype=torch.uint8), stages, tmp_path / "attention.png")
    assert path.stat().st_size > 1000
    assert path.with_suffix(".svg").stat().st_size > 1000
