"""Coloured masks, overlays and grids of predictions (Fig. 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sward.data import DatasetInfo
from sward.figures.style import plot_library, save_figure

Pixels = NDArray[np.uint8]
IGNORED_COLOUR = (0, 0, 0)


def colour_labels(labels: Tensor, info: DatasetInfo) -> Pixels:
    """Map class indices `[H, W]` to the data set's palette, uint8 RGB `[H, W, 3]`; ignored pixels become black."""
    table = np.zeros((256, 3), dtype=np.uint8)
    table[: info.num_classes] = info.palette
    table[info.ignore_index] = IGNORED_COLOUR
    return table[labels.cpu().numpy().astype(np.uint8)]


def overlay(image: Tensor, labels: Tensor, info: DatasetInfo, opacity: float = 0.5) -> Pixels:
    """Overlay a uint8 RGB image `[3, H, W]` with the colours of `labels [H, W]`; returns uint8 `[H, W, 3]`.

    Ignored pixels, and class 0 if the data set names it "background", show the image alone.
    """
    pixels = image.permute(1, 2, 0).cpu().numpy().astype(np.float32)
    colours = colour_labels(labels, info).astype(np.float32)
    covered = labels.cpu().numpy() != info.ignore_index
    if info.classes[0] == "background":
        covered &= labels.cpu().numpy() != 0
    mixed = np.where(covered[..., None], (1 - opacity) * pixels + opacity * colours, pixels)
    return mixed.round().astype(np.uint8)


def prediction_grid(
    images: Sequence[Tensor],
    columns: Mapping[str, Sequence[Tensor]],
    info: DatasetInfo,
    path: Path,
    *,
    names: Sequence[str] = (),
) -> Path:
    """Draw one row per image: the image, then one column per entry of `columns` (truth, teacher, ...).

    Args:
        images: uint8 RGB `[3, H, W]`.
        columns: title -> one label map `[h, w]` per image.
        info: classes and colours.
        path: path of the PNG; an SVG is written beside it.
        names: row titles.

    Returns:
        The path of the PNG.
    """
    plt = plot_library()
    rows, width = len(images), len(columns) + 1
    height, breadth = images[0].shape[-2:]
    figure, axes = plt.subplots(
        rows, width, figsize=(2.0 * width, 2.0 * rows * height / breadth + 0.7), squeeze=False, layout="constrained"
    )
    for row, image in enumerate(images):
        axes[row, 0].imshow(image.permute(1, 2, 0).cpu().numpy())
        for column, maps in enumerate(columns.values(), start=1):
            axes[row, column].imshow(colour_labels(maps[row], info), interpolation="nearest")
        if names:
            axes[row, 0].set_ylabel(names[row], fontsize=7)
    for axis, title in zip(axes[0], ["image", *columns], strict=True):
        axis.set_title(title, fontsize=10)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    shown = torch.cat([maps.flatten().cpu() for each in columns.values() for maps in each]).unique().tolist()
    handles = [
        # With an edge, since a class may be white like the page.
        plt.Rectangle((0, 0), 1, 1, facecolor=np.array(info.palette[index]) / 255, edgecolor="0.4")
        for index in shown
        if index < info.num_classes
    ]
    labels = [info.classes[index] for index in shown if index < info.num_classes]
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 7), fontsize=8, frameon=False)
    return save_figure(figure, path)
