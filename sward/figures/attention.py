"""Attention of a query pixel within its window, in the teacher and in the student (Eq. 8-9)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sward.config import TapConfig
from sward.features import FeatureTaps
from sward.figures.style import plot_library, save_figure
from sward.losses import SWARDDistillation


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
    if not (0 <= pixel[0] < height and 0 <= pixel[1] < width):
        raise ValueError(f"pixel must be a row and column inside the image of {height} x {width} pixels, got {pixel}")
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
        found.append(WindowAttention(stage, grid, corner, query, maps[0], maps[1], float(divergence)))
    return found


def _log_attention(qkv: Tensor, side: int, corner: tuple[int, int], query: tuple[int, int]) -> Tensor:
    """Log-softmax of one query's scores over its window `[side, side]`; positions outside the map are zero keys."""
    queries, keys, _ = qkv.double().chunk(3, dim=0)
    window = keys[:, corner[0] : corner[0] + side, corner[1] : corner[1] + side]
    window = F.pad(window, (0, side - window.shape[2], 0, side - window.shape[1]))
    scores = torch.einsum("d,dhw->hw", queries[:, query[0], query[1]], window) / math.sqrt(len(queries))
    return scores.flatten().log_softmax(0).unflatten(0, (side, side))


def attention_figure(image: Tensor, stages: Sequence[WindowAttention], path: Path) -> Path:
    """Draw one row per stage: the image with window and query, and the attention of teacher and student.

    Args:
        image: uint8 RGB `[3, H, W]`.
        stages: output of `window_attention`. Each row has one colour scale.
        path: path of the PNG; an SVG is written beside it.

    Returns:
        The path of the PNG.
    """
    plt = plot_library()
    height, width = image.shape[-2:]
    figure, axes = plt.subplots(
        len(stages), 3, figsize=(8.0, 2.6 * len(stages) + 0.2), squeeze=False, layout="constrained"
    )
    for (whole, *sides), stage in zip(axes, stages, strict=True):
        tall, wide = height / stage.grid[0], width / stage.grid[1]
        rows, columns = stage.teacher.shape
        corner = (stage.corner[1] * wide - 0.5, stage.corner[0] * tall - 0.5)
        whole.imshow(image.permute(1, 2, 0).cpu().numpy())
        whole.add_patch(
            plt.Rectangle(corner, columns * wide, rows * tall, fill=False, edgecolor="white", linewidth=2.0)
        )
        centre = ((stage.query[1] + 0.5) * wide - 0.5, (stage.query[0] + 0.5) * tall - 0.5)
        whole.plot(*centre, marker="+", color="cyan", markersize=10, markeredgewidth=2)
        whole.set_ylabel(f"stage {stage.stage + 1}, {stage.grid[0]} x {stage.grid[1]}")
        largest = max(float(stage.teacher.max()), float(stage.student.max()))
        for axis, attention in zip(sides, (stage.teacher, stage.student), strict=True):
            shown = axis.imshow(attention.cpu().numpy(), cmap="viridis", vmin=0, vmax=largest)
            local = (stage.query[1] - stage.corner[1], stage.query[0] - stage.corner[0])
            axis.plot(*local, marker="+", color="red", markersize=10, markeredgewidth=2)
            padding = 1 - float(attention.sum())
            axis.set_xlabel(f"{100 * padding:.0f} % on padding" if padding > 0.005 else "")
        whole.set_xlabel(f"KL(teacher || student) = {stage.divergence:.3f}")
        figure.colorbar(shown, ax=sides, shrink=0.85, pad=0.02, label="attention")
        for axis in (whole, *sides):
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    for axis, title in zip(axes[0], ("window and query", "teacher", "student"), strict=True):
        axis.set_title(title)
    return save_figure(figure, path)
