"""Grad-CAM for segmentation (Fig. 1): which parts of a feature map support a class.

Selvaraju et al., "Grad-CAM", ICCV 2017; for segmentation the class score is summed over pixels (Vinogradova et al.,
"Towards Interpretable Semantic Segmentation via Gradient-Weighted Class Activation Mapping", AAAI 2020).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sward.alignment import resize
from sward.features import FeatureTaps
from sward.figures.heat import draw_heat
from sward.figures.style import plot_library, save_figure
from sward.losses.pairs import class_logits


def grad_cam(network: nn.Module, layer: str, image: Tensor, target: int, pixels: Tensor | None = None) -> Tensor:
    """Compute `relu(sum_c mean_xy(dS / dA_c) A_c)` at `layer`, where S is the class score summed over pixels.

    Args:
        network: `[B, 3, H, W]` -> logits `[B, K, h, w]`; switched to eval mode. One logit counts as two,
            see `sward.losses.pairs.class_logits`.
        layer: layer whose maps A are weighted.
        image: `[3, H, W]`, normalised.
        target: class index.
        pixels: bool `[h, w]`, the pixels whose scores are summed. Default: those predicted as `target`, or all if
            there are none.

    Returns:
        `[H, W]` fp32 from 0 to 1, upsampled bilinearly; all 0 if nothing at that layer supports the class.

    Raises:
        ValueError: if the layer does not exist, its maps are no NCHW tensor that the logits depend on, or the network
            has no such class.
    """
    network.eval()
    with torch.enable_grad(), FeatureTaps(network, [layer]) as taps:
        # The input requires a gradient so that frozen networks record a graph too.
        logits = class_logits(network(image[None].detach().requires_grad_()))
        (maps,) = taps.collect().values()
        classes = logits.shape[1]
        if not 0 <= target < classes:
            raise ValueError(f"target must be one of the network's classes 0 to {classes - 1}, got {target}")
        if pixels is None:
            predicted = logits[0].argmax(0) == target
            pixels = predicted if predicted.any() else torch.ones_like(predicted)
        (gradient,) = torch.autograd.grad(logits[0, target][pixels].sum(), maps, allow_unused=True)
    if gradient is None:
        raise ValueError(
            f"layer must return maps [B, C, h, w] that the logits depend on, got {layer!r}, whose output is tokens, "
            "channels last or not used"
        )
    weights = gradient.mean(dim=(-2, -1), keepdim=True)
    activation = (weights * maps.detach()).sum(dim=1, keepdim=True).relu().float()
    activation = resize(activation, (image.shape[-2], image.shape[-1]))[0, 0]
    return activation / activation.max().clamp(min=torch.finfo(activation.dtype).tiny)


@dataclass(frozen=True)
class ActivationRow:
    """One row of the figure."""

    title: str
    """Title of the row: data set and class."""
    image: Tensor
    """Uint8 RGB `[3, H, W]`."""
    truth: Tensor
    """Bool `[H, W]`, the ground truth of the class; its outline is drawn."""
    maps: Mapping[str, Tensor]
    """Column title -> output of `grad_cam` for that network, of any size."""


def activation_inside(activation: Tensor, truth: Tensor) -> float:
    """Return the fraction of an activation map that lies on the class; nan for a map that is 0 everywhere.

    Args:
        activation: output of `grad_cam`, of any size.
        truth: bool `[H, W]`.
    """
    values = resize(activation[None, None].double(), (truth.shape[-2], truth.shape[-1]))[0, 0]
    total = values.sum()
    return float(values[truth].sum() / total) if total > 0 else float("nan")


def activation_figure(rows: Sequence[ActivationRow], path: Path) -> Path:
    """Draw each image and one heat map per network over it (Fig. 1), with the ground truth outlined in white.

    Below each map stands `activation_inside`, and below the image the share of the class, which a map that is equal
    everywhere would have.

    Returns:
        The path of the PNG; an SVG is written beside it.
    """
    plt = plot_library()
    titles = ["image", *rows[0].maps]
    heights = [row.image.shape[-2] / row.image.shape[-1] for row in rows]
    figure, axes = plt.subplots(
        len(rows),
        len(titles),
        figsize=(2.0 * len(titles) + 1.0, 2.0 * sum(heights) + 0.25 * len(rows) + 0.35),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    shown = None
    for line, row in zip(axes, rows, strict=True):
        height, width = row.image.shape[-2:]
        line[0].imshow(row.image.permute(1, 2, 0).cpu().numpy())
        line[0].set_ylabel(row.title)
        line[0].set_xlabel(f"{100 * float(row.truth.float().mean()):.0f} % of the image")
        for axis, heat in zip(line[1:], row.maps.values(), strict=True):
            shown = draw_heat(axis, row.image, heat, (0, height, 0, width), (0.0, 1.0))
            inside = activation_inside(heat, row.truth)
            axis.set_xlabel("no activation" if math.isnan(inside) else f"{100 * inside:.0f} % inside")
        for axis in line:
            if row.truth.any():
                axis.contour(row.truth.cpu().numpy(), levels=[0.5], colors="white", linewidths=1.0)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
    figure.colorbar(shown, ax=axes, shrink=0.6, pad=0.01, label="activation relative to the map's maximum")
    return save_figure(figure, path)
