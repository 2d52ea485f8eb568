"""Draws `windowed_distillation_kernels.png`: python docs/images/windowed_distillation_kernels.py"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

READ, CHIP, WRITTEN = "#dce8f6", "#fdeed3", "#dcefd9"


def box(axes: Axes, left: float, bottom: float, width: float, height: float, text: str, color: str) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (left, bottom),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=color,
            edgecolor="#444444",
        )
    )
    axes.text(left + width / 2, bottom + height / 2, text, ha="center", va="center", fontsize=9.5, linespacing=1.5)


def arrow(axes: Axes, x: float, y: float, to_x: float, to_y: float, text: str = "", at: float = 0.5) -> None:
    style = {"arrowstyle": "-|>", "color": "#333333", "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (to_x, to_y), (x, y), arrowprops=style)
    if text:
        axes.text(
            x + 0.12, y + at * (to_y - y), text, ha="left", va="center", fontsize=8.5, color="#333333", linespacing=1.4
        )


def panel(axes: Axes, title: str) -> None:
    axes.set(xlim=(0, 12), ylim=(0, 10.2))
    axes.axis("off")
    axes.set_title(title, fontsize=12)
    axes.add_patch(Rectangle((0.1, 1.75), 11.8, 6.35, fill=False, linestyle="--", edgecolor="#b8860b", linewidth=1.3))
    axes.text(11.75, 1.85, "on chip", ha="right", va="bottom", fontsize=9, style="italic", color="#b8860b")


def forward(axes: Axes) -> None:
    panel(axes, "Forward: one program, one group of windows")
    box(axes, 0.4, 9.0, 5.4, 1.0, "teacher map [B, 3D, H, W]\nQ, K, V read once", READ)
    box(axes, 6.2, 9.0, 5.4, 1.0, "student map [B, 3D, H, W]\nQ, K, V read once", READ)
    arrow(axes, 3.1, 9.0, 3.1, 7.8, "Q, K: roll, padding, partition are index arithmetic", 0.4)
    arrow(axes, 10.1, 9.0, 10.1, 7.8, "V", 0.4)
    box(axes, 0.4, 6.8, 7.6, 1.0, r"$S = Q K^\top / \sqrt{D}$ of both sides, in chunks of D", CHIP)
    box(axes, 8.6, 6.8, 3.0, 1.0, r"$V_t$, $V_s$" + "\nin chunks of D", CHIP)
    arrow(axes, 4.2, 6.8, 4.2, 6.0)
    box(axes, 0.4, 5.0, 7.6, 1.0, r"$\log A = S - \mathrm{logsumexp}$: T x T, never stored", CHIP)
    arrow(axes, 1.0, 5.0, 1.0, 1.3)
    arrow(axes, 3.4, 5.0, 3.4, 3.9)
    arrow(axes, 6.6, 5.0, 6.6, 3.9)
    arrow(axes, 8.9, 6.8, 7.6, 3.9)
    arrow(axes, 10.4, 6.8, 10.4, 3.9)
    box(axes, 1.7, 2.7, 3.2, 1.2, "attention\n" + r"$\sum A_t (\log A_t - \log A_s)$", CHIP)
    box(axes, 5.2, 2.7, 3.2, 1.2, "context\n" + r"$|A_s V_s - A_t V_t|^2$", CHIP)
    box(axes, 8.7, 2.7, 2.9, 1.2, "value\n" + r"$1 - \cos(V_s, V_t)$", CHIP)
    for x in (3.9, 6.8, 10.1):
        arrow(axes, x, 2.7, x, 1.3)
    box(axes, 0.4, 0.2, 2.6, 1.1, "2 floats per token,\nif a gradient follows", WRITTEN)
    box(axes, 3.4, 0.2, 8.2, 1.1, "4 sums a program, added up in a fixed order", WRITTEN)


def backward(axes: Axes) -> None:
    panel(axes, "Backward: the same program, one side after the other")
    box(axes, 0.4, 9.0, 5.6, 1.0, "Q, K, V of both sides: once from\nmemory, twice more from cache", READ)
    box(axes, 6.4, 9.0, 2.4, 1.0, "2 floats\na token", READ)
    box(axes, 9.2, 9.0, 2.4, 1.0, "upstream\ngradient", READ)
    arrow(axes, 3.2, 9.0, 3.2, 7.8)
    arrow(axes, 7.6, 9.0, 7.6, 7.8)
    box(axes, 0.4, 6.8, 8.4, 1.0, r"$\log A = S - \mathrm{logsumexp}$ of both sides, recomputed", CHIP)
    arrow(axes, 2.9, 6.8, 2.9, 6.0)
    box(
        axes, 0.4, 3.9, 5.2, 2.1,
        "for each chunk of D\n" + r"$dZ = 2w\,(Z_{own} - Z_{other})$" + "\n"
        + r"$dA \;\mathrm{+}= dZ\,V^\top$" + "\n" + r"$dV = A^\top dZ + d\,\mathrm{value}$", CHIP,
    )  # fmt: skip
    arrow(axes, 5.6, 4.95, 6.2, 4.95)
    box(
        axes, 6.2, 4.2, 5.4, 1.5,
        r"$dS = A \circ (dA - \langle A, dA \rangle)$" + "\n"
        + r"teacher: $dA$ starts at $w \log(A_t / A_s)$" + "\n" + r"student: $+\,w\,(A_s - A_t)$", CHIP,
    )  # fmt: skip
    arrow(axes, 8.9, 4.2, 8.9, 3.7)
    box(axes, 6.2, 2.5, 5.4, 1.2, "for each chunk of D\n" + r"$dQ = dS\,K$,   $dK = dS^\top Q$", CHIP)
    arrow(axes, 10.4, 9.0, 10.4, 7.8)
    box(axes, 9.2, 6.8, 2.4, 1.0, "scale (fp32) =\nupstream / n", CHIP)
    arrow(axes, 2.9, 3.9, 2.9, 1.3, "x scale", 0.4)
    arrow(axes, 8.9, 2.5, 8.9, 1.3, r"x scale / $\sqrt{D}$", 0.3)
    box(axes, 0.4, 0.2, 5.2, 1.1, "dV\neach element stored once", WRITTEN)
    box(axes, 6.2, 0.2, 5.4, 1.1, "dQ, dK\neach element stored once", WRITTEN)


def main() -> None:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(14, 6.4))
    forward(left)
    backward(right)
    figure.text(
        0.5, 0.02, "blue: read from device memory    yellow: registers and shared memory    green: written", ha="center"
    )
    figure.subplots_adjust(left=0.01, right=0.99, top=0.93, bottom=0.06, wspace=0.03)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=100)


if __name__ == "__main__":
    main()
