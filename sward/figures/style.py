"""What every figure shares: the plotting library, made ready for files, and how a figure is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot_library() -> Any:
    """`matplotlib.pyplot` on a file-only backend, imported when the first figure is drawn.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("figures need matplotlib: pip install 'sward[figures]'") from error
    matplotlib.use("agg")
    # A fixed salt makes the same figure the same file.
    matplotlib.rcParams.update({"svg.hashsalt": "sward", "font.size": 9, "axes.spines.top": False})
    matplotlib.rcParams.update({"axes.spines.right": False})
    import matplotlib.pyplot as plt

    return plt


def save_figure(figure: Any, path: Path) -> Path:
    """Writes `path` as PNG and, beside it, the same figure as SVG; returns the PNG's path."""
    path = path.with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    plot_library().close(figure)
    return path
