"""Heat maps over pictures, as Grad-CAM and attention are shown."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sward.alignment import resize

COLOURS = "inferno"


def draw_heat(
    axis: Any, picture: Tensor, values: Tensor, box: tuple[int, int, int, int], limits: tuple[float, float]
) -> Any:
    """Draw `picture` in grey and `values` over a part of it, upsampled smoothly; high values hide more of the picture.

    Args:
        axis: axes of matplotlib, whose data coordinates become pixels of the picture.
        picture: uint8 RGB `[3, H, W]`.
        values: `[h, w]`.
        box: top, bottom, left and right of the part that the values cover, in pixels of the picture.
        limits: values that get the lowest and the highest colour.

    Returns:
        The heat map, for a colour bar.
    """
    grey = picture.float().mean(dim=0).cpu().numpy()
    axis.imshow(grey, cmap="gray", vmin=0, vmax=255)
    top, bottom, left, right = box
    upsampled = resize(values[None, None].float(), (bottom - top, right - left))[0, 0].cpu().numpy()
    low, high = limits
    strength = np.clip((upsampled - low) / max(high - low, torch.finfo(torch.float32).tiny), 0, 1)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    return axis.imshow(
        upsampled,
        cmap=COLOURS,
        vmin=low,
        vmax=high,
        alpha=0.25 + 0.6 * strength,
        extent=(left - 0.5, right - 0.5, bottom - 0.5, top - 0.5),
    )
