"""Set-up of matplotlib and saving of figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot_library() -> Any:
    """Import `matplotlib.pyplot` with a backend that only writes files.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("figures need matplotlib: pip install 'sward[figures]'") from error
    matplotlib.use("agg")
    # A fixed salt makes SVG files reproducible.
    matplotlib.rcParams.update({"svg.hashsalt": "sward", "font.size": 9, "axes.spines.top": False})
    matplotlib.rcParams.update({"axes.spines.right": False})
    import matplotlib.pyplot as plt

    return plt


def save_figure(figure: Any, path: Path, *, vector: bool = True) -> Path:
    """Write the figure to `path` as PNG and, unless `vector` is off, beside it as SVG; return the path of the PNG."""
    path = path.with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    if vector:
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    plot_library().close(figure)
    return path
