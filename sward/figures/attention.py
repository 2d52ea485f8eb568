"""Attention of a query pixel within its window, in the teacher and in the student (Eq. 8-9)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sward.config import TapConfig
from sward.features import FeatureTaps
from sward.figures.heat import draw_heat
from sward.figures.style import plot_library, save_figure
from sward.losses import SWARDDistillation

QUERY = "cyan"
"""Colour of the query and of the border of its window."""


@dataclass(frozen=True)
class WindowAttention:
    """Attention of one query in one stage of teacher and student."""

    stage: int
    """Index of the stage; 0 is the finest."""
    grid: tuple[int, int]
    """Height and width of the aligned maps."""
    corner: tuple[int, int]
    """Row and column of the window's first pixel on that grid."""
    query: tuple[int, int]
    """Row and column of the query on that grid."""
    teacher: Tensor
    """`[h, w]`, the teacher's attention over the window; its sum is 1 minus the attention on padding."""
    student: Tensor
    """The same for the student."""
    divergence: float
    """KL(teacher || student) of the query over the whole window, padding included (Eq. 11)."""
    side: int
    """Pixels per side of a whole window; one at the edge of the map may be cut."""


def check_pixel(pixel: tuple[int, int], size: tuple[int, int]) -> None:
    """Raise a ValueError if `pixel`, row and column, is outside of an image of `size`, height and width."""
    if not all(0 <= place < side for place, side in zip(pixel, size, strict=True)):
        raise ValueError(
            f"pixel must be a row and column inside the image of {size[0]} x {size[1]} pixels, got {pixel}"
        )


@torch.no_grad()
def window_attention(
    student: nn.Module,
    teacher: nn.Module,
    loss: SWARDDistillation,
    image: Tensor,
    pixel: tuple[int, int],
    teacher_image: Tensor | None = None,
    *,
    student_taps: TapConfig | None = None,
    teacher_taps: TapConfig | None = None,
) -> list[WindowAttention]:
    """Compute the attention of `pixel` in every stage of a trained MWAD loss, without shift.

    Args:
        student: in eval mode.
        teacher: in eval mode.
        loss: the loss with the projections that were trained with the student.
        image: `[3, H, W]`, normalised.
        pixel: row and column of the query in the image.
        teacher_image: `[3, H', W']`, the same picture as the teacher sees it. Default: `image`.
        student_taps: how the student's layers arrange their output.
        teacher_taps: the same for the teacher.

    Raises:
        ValueError: if the pixel is outside the image.
    """
    height, width = image.shape[-2:]
    check_pixel(pixel, (height, width))
    ours, theirs = ((taps or TapConfig()).arguments() for taps in (student_taps, teacher_taps))
    with (
        FeatureTaps(student, loss.stage_taps, **ours) as own,
        FeatureTaps(teacher, loss.teacher_taps, **theirs) as other,
    ):
        student(image[None])
        teacher(image[None] if teacher_image is None else teacher_image[None])
        student_maps, teacher_maps = own.collect(), other.collect()
    found = []
    for stage, (own_tap, other_tap) in enumerate(zip(loss.stage_taps, loss.teacher_taps, strict=True)):
        qkv_student, qkv_teacher = loss.mwad.project(stage, student_maps[own_tap], teacher_maps[other_tap])
        side = loss.mwad.window_size[stage]
        grid = (qkv_student.shape[-2], qkv_student.shape[-1])
        query = (pixel[0] * grid[0] // height, pixel[1] * grid[1] // width)
        corner = (query[0] // side * side, query[1] // side * side)
        of_student, of_teacher = (_log_attention(qkv[0], side, corner, query) for qkv in (qkv_student, qkv_teacher))
        divergence = (of_teacher.exp() * (of_teacher - of_student)).sum()
        rows, columns = min(side, grid[0] - corner[0]), min(side, grid[1] - corner[1])
        maps = [each[:rows, :columns].exp().float() for each in (of_teacher, of_student)]
        found.append(WindowAttention(stage, grid, corner, query, maps[0], maps[1], float(divergence), side))
    return found


def _log_attention(qkv: Tensor, side: int, corner: tuple[int, int], query: tuple[int, int]) -> Tensor:
    """Log-softmax of one query's scores over its window `[side, side]`; positions outside the map are zero keys."""
    queries, keys, _ = qkv.double().chunk(3, dim=0)
    window = keys[:, corner[0] : corner[0] + side, corner[1] : corner[1] + side]
    window = F.pad(window, (0, side - window.shape[2], 0, side - window.shape[1]))
    scores = torch.einsum("d,dhw->hw", queries[:, query[0], query[1]], window) / math.sqrt(len(queries))
    return scores.flatten().log_softmax(0).unflatten(0, (side, side))


def attention_figure(picture: Tensor, stages: Sequence[WindowAttention], path: Path) -> Path:
    """Draw one row per stage: the picture with windows and query, and what teacher and student attend to in the window.

    Attention is shown relative to uniform attention, over the window's part of the picture.

    Args:
        picture: uint8 RGB `[3, H, W]`, of any size.
        stages: output of `window_attention`. Each row has one colour scale.
        path: path of the PNG; an SVG is written beside it.

    Returns:
        The path of the PNG.
    """
    plt = plot_library()
    figure, axes = plt.subplots(
        len(stages), 3, figsize=(8.0, 2.55 * len(stages) + 0.2), squeeze=False, layout="constrained"
    )
    for (whole, *sides), stage in zip(axes, stages, strict=True):
        _draw_windows(whole, picture, stage)
        whole.set_ylabel(f"stage {stage.stage + 1}: {stage.grid[0]} x {stage.grid[1]}")
        maps = [attention * stage.side**2 for attention in (stage.teacher, stage.student)]
        limits = min(float(each.min()) for each in maps), max(float(each.max()) for each in maps)
        box = _window(picture, stage)
        top, bottom, left, right = box
        for axis, attention in zip(sides, maps, strict=True):
            shown = draw_heat(axis, picture, attention, box, limits)
            _mark_query(axis, picture, stage)
            axis.set(xlim=(left - 0.5, right - 0.5), ylim=(bottom - 0.5, top - 0.5))
            padding = 1 - float(attention.sum()) / stage.side**2
            axis.set_xlabel(f"{100 * padding:.0f} % on padding" if padding > 0.005 else "")
        whole.set_xlabel(f"KL(teacher || student) = {stage.divergence:.3f}")
        figure.colorbar(shown, ax=sides, shrink=0.85, pad=0.02, label="times uniform", format="%.2f")
    for axis, title in zip(axes[0], ("windows and query", "teacher", "student"), strict=True):
        axis.set_title(title)
    return save_figure(figure, path)


def _draw_windows(axis: Any, picture: Tensor, stage: WindowAttention) -> None:
    """Draw the picture with the borders of all windows, the query and the border of its window."""
    height, width = picture.shape[-2:]
    axis.imshow(picture.permute(1, 2, 0).cpu().numpy())
    for row in range(stage.side, stage.grid[0], stage.side):
        axis.axhline(row * height / stage.grid[0] - 0.5, color="white", linewidth=0.8)
    for column in range(stage.side, stage.grid[1], stage.side):
        axis.axvline(column * width / stage.grid[1] - 0.5, color="white", linewidth=0.8)
    top, bottom, left, right = _window(picture, stage)
    corner, width_and_height = (left - 0.5, top - 0.5), (right - left, bottom - top)
    # Above the white lines, and whole where it follows the edge of the picture.
    border = {"edgecolor": QUERY, "linewidth": 2.5, "clip_on": False, "zorder": 3}
    axis.add_patch(plot_library().Rectangle(corner, *width_and_height, fill=False, **border))
    _mark_query(axis, picture, stage)
    axis.set(xticks=[], yticks=[], xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    axis.spines[:].set_visible(False)


def _window(picture: Tensor, stage: WindowAttention) -> tuple[int, int, int, int]:
    """Return top, bottom, left and right of the query's window in pixels of the picture."""
    edges = []
    for axis in (0, 1):
        scale = picture.shape[axis + 1] / stage.grid[axis]
        start, length = stage.corner[axis], stage.teacher.shape[axis]
        edges += [round(start * scale), round((start + length) * scale)]
    return edges[0], edges[1], edges[2], edges[3]


def _mark_query(axis: Any, picture: Tensor, stage: WindowAttention) -> None:
    """Draw a cross at the query's centre, in pixels of the picture."""
    y, x = ((stage.query[way] + 0.5) * picture.shape[way + 1] / stage.grid[way] - 0.5 for way in (0, 1))
    axis.plot(x, y, marker="+", color=QUERY, markersize=10, markeredgewidth=2, zorder=4)
