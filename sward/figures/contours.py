"""Images with the outlines of labels and predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sward.data import DatasetInfo
from sward.figures.style import plot_library, save_figure

Colour = tuple[float, ...]

TRUTH: Colour = (1.0, 1.0, 1.0)
PREDICTION: Colour = (1.0, 0.35, 0.0)
"""Colours with two classes, where the outlines of labels and prediction share a panel."""

LABELS = "labels"

WIDTH = 1.4


def contour_grid(
    images: Sequence[Tensor],
    columns: Mapping[str, Sequence[Tensor]],
    truth: Sequence[Tensor],
    info: DatasetInfo,
    path: Path,
    *,
    names: Sequence[str],
) -> Path:
    """Draw one row per image: the image with the outlines of its labels, then with those of each column.

    With two classes, the panels of the columns also show the outline of the labels.

    Args:
        images: uint8 RGB `[3, H, W]`.
        columns: title -> one predicted label map `[h, w]` per image.
        truth: one label map per image.
        info: classes and colours.
        path: path of the PNG.
        names: titles of the rows.

    Returns:
        The path of the PNG.
    """
    figure, axes = _grid(len(images), len(columns) + 1, images[0])
    for row, (image, labels) in enumerate(zip(images, truth, strict=True)):
        for axis, maps in zip(axes[row], [None, *columns.values()], strict=True):
            _panel(axis, image, labels, None if maps is None else maps[row], info)
        axes[row, 0].set_ylabel(names[row], fontsize=8)
    for axis, title in zip(axes[0], [LABELS, *columns], strict=True):
        axis.set_title(title, fontsize=9, wrap=True)
    maps_shown = [*truth, *(each for maps in columns.values() for each in maps)]
    _legend(figure, info, maps_shown, has_predictions=bool(columns))
    return save_figure(figure, path, vector=False)


def labelled_images(
    images: Sequence[Tensor], truth: Sequence[Tensor], info: DatasetInfo, path: Path, *, names: Sequence[str]
) -> Path:
    """Draw images side by side with the outlines of their labels; arguments as in `contour_grid`."""
    figure, axes = _grid(1, len(images), images[0])
    for axis, image, labels, name in zip(axes[0], images, truth, names, strict=True):
        _panel(axis, image, labels, None, info)
        axis.set_title(name, fontsize=8)
    _legend(figure, info, truth, has_predictions=False)
    return save_figure(figure, path, vector=False)


def _grid(rows: int, columns: int, image: Tensor) -> tuple[Any, Any]:
    height, width = image.shape[-2:]
    size = (2.4 * columns, 2.4 * rows * height / width + 0.6)
    return plot_library().subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")


def _panel(axis: Any, image: Tensor, labels: Tensor, prediction: Tensor | None, info: DatasetInfo) -> None:
    # The image may have another resolution than its labels.
    extent = (-0.5, labels.shape[-1] - 0.5, labels.shape[-2] - 0.5, -0.5)
    axis.imshow(image.permute(1, 2, 0).cpu().numpy(), extent=extent)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    if info.num_classes == 2:
        _outline(axis, labels == 1, TRUTH)
        if prediction is not None:
            _outline(axis, prediction == 1, PREDICTION)
        return
    for index in _outlined(info):
        _outline(axis, (labels if prediction is None else prediction) == index, _colour(info, index))


def _outlined(info: DatasetInfo) -> range:
    """Return the classes to outline: all but a background."""
    return range(int(info.classes[0] == "background" or info.num_classes == 2), info.num_classes)


def _colour(info: DatasetInfo, index: int) -> Colour:
    return tuple(part / 255 for part in info.palette[index])


def _outline(axis: Any, region: Tensor, colour: Colour) -> None:
    if not region.any():
        return
    height, width = region.shape
    # Padded, so that a region that touches the edge of the image has an outline there too.
    padded = np.pad(region.cpu().numpy(), 1).astype(float)
    across = np.arange(-1, width + 1).clip(-0.4, width - 0.6)
    down = np.arange(-1, height + 1).clip(-0.4, height - 0.6)
    lines = axis.contour(across, down, padded, levels=[0.5], colors=[colour], linewidths=WIDTH)
    lines.set_path_effects(_halo(colour))


def _halo(colour: Colour) -> list[Any]:
    """Return a rim that makes a line of this colour visible on black and on white."""
    from matplotlib import patheffects

    brightness = float(np.dot(colour, (0.299, 0.587, 0.114)))
    return [patheffects.withStroke(linewidth=WIDTH + 2, foreground="black" if brightness > 0.4 else "white")]


def _legend(figure: Any, info: DatasetInfo, maps: Sequence[Tensor], *, has_predictions: bool) -> None:
    if info.num_classes == 2:
        entries = {f"{info.classes[1]}, {LABELS}": TRUTH}
        if has_predictions:
            entries[f"{info.classes[1]}, prediction"] = PREDICTION
    else:
        present = {int(value) for each in maps for value in each.unique().tolist()}
        entries = {info.classes[index]: _colour(info, index) for index in _outlined(info) if index in present}
    if not entries:
        return
    line = plot_library().Line2D
    handles = [line([], [], color=colour, linewidth=WIDTH, path_effects=_halo(colour)) for colour in entries.values()]
    columns = min(len(entries), 6)
    figure.legend(handles, list(entries), loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
