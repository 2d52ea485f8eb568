"""Looks at the figures that code under test saves: their parts, and the pixels of the file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image


@dataclass(frozen=True)
class DrawnFigure:
    """A figure as matplotlib held it when it was saved as PNG."""

    figure: Any
    path: Path

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """RGB `[H, W, 3]` of the PNG."""
        with Image.open(self.path) as image:
            return np.asarray(image.convert("RGB"))

    def panels(self) -> list[list[Any]]:
        """The axes of the grid, row by row; colour bars are not among them."""
        placed = [axis for axis in self.figure.axes if axis.get_label() != "<colorbar>"]
        rows: dict[int, list[Any]] = {}
        for axis in sorted(placed, key=lambda axis: axis.get_subplotspec().num1):
            rows.setdefault(axis.get_subplotspec().rowspan.start, []).append(axis)
        return list(rows.values())

    def colour_bars(self) -> list[Any]:
        return [axis for axis in self.figure.axes if axis.get_label() == "<colorbar>"]

    def colour_at(self, axis: Any, x: float, y: float) -> tuple[int, ...]:
        """The colour in the PNG of the point that has these data coordinates in `axis`."""
        right, up = self.figure.transFigure.inverted().transform(axis.transData.transform((x, y)))
        pixels = self.pixels
        return tuple(pixels[int((1 - up) * pixels.shape[0]), int(right * pixels.shape[1])].tolist())

    def legend(self) -> dict[str, tuple[int, ...]]:
        """Name -> colour of each entry of the figure's only legend, in order."""
        legends = [*self.figure.legends, *(axis.get_legend() for axis in self.figure.axes if axis.get_legend())]
        (legend,) = legends
        return {
            text.get_text(): rgb(handle.get_facecolor() if hasattr(handle, "get_facecolor") else handle.get_color())
            for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True)
        }

    def assert_svg_beside(self) -> None:
        """The SVG is well formed and shows images in as many panels as the figure does."""
        root = ElementTree.parse(self.path.with_suffix(".svg")).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        images = sum(bool(axis.get_images()) for axis in self.figure.axes)
        assert len(root.findall(".//{http://www.w3.org/2000/svg}image")) >= images


def rgb(colour: Any) -> tuple[int, ...]:
    """Any colour of matplotlib as three integers up to 255."""
    from matplotlib.colors import to_rgb

    return tuple(round(255 * part) for part in to_rgb(colour))


@pytest.fixture
def drawn_figures(monkeypatch: pytest.MonkeyPatch) -> list[DrawnFigure]:
    """Every figure that the test saves as PNG, in order."""
    from matplotlib.figure import Figure

    drawn: list[DrawnFigure] = []
    save = Figure.savefig

    def savefig(figure: Figure, path: Path, **options: Any) -> None:
        save(figure, path, **options)
        if Path(path).suffix == ".png":
            drawn.append(DrawnFigure(figure, Path(path)))

    monkeypatch.setattr(Figure, "savefig", savefig)
    return drawn
