"""`scenes`: generated images with pixel labels, used by `sward demo` and the tests; needs no download.

Large shapes of four textures lie on a clouded ground: `stripes`, `checks`, `dots` and `rings`. Shapes with random
blocks of the same scale belong to the background. Colours are random and every texture has two of them, so neither
colour nor a patch of a few pixels says the class; the arrangement over several periods does. Shapes hide each other,
and a lighting gradient, soft shadows and noise cover the whole image.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sward.data.sample import DatasetInfo, SegmentationDataset
from sward.data.transforms import EvaluationTransform, flip_training

Floats = NDArray[np.float32]
Labels = NDArray[np.uint8]

INFO = DatasetInfo(
    name="scenes",
    classes=("background", "stripes", "checks", "dots", "rings"),
    palette=((40, 44, 52), (230, 159, 0), (86, 180, 233), (240, 228, 66), (213, 94, 0)),
)
BACKGROUND, STRIPES, CHECKS, DOTS, RINGS = range(5)

SPLITS = {"train": 1024, "val": 128, "test": 128}
SMALLEST_SIDE = 32
PICTURE_SCALE = 4
"""Pixels in figures per pixel that networks see, in each direction."""


class Scenes(SegmentationDataset):
    """Generated scenes; image `index` of a split is the same in every run, worker and epoch.

    Args:
        split: `train`, `val` or `test`; no image occurs in two splits.
        image_size: `(height, width)`, each at least 32. Everything scales with the shorter side.
        train: flip images at random.
        seed: seed of the flips. The images themselves do not depend on it, so runs with different seeds are scored on
            the same images.
        count: number of images; None for 1024 (train) or 128. A larger count adds images and keeps the others.
        series: series of the training images; no image occurs in two series. A teacher can so learn from other scenes
            than its student. The images of `val` and `test` are the same in every series.

    Raises:
        ValueError: the split is unknown, the size below 32, the count below 1 or the series below 0.
    """

    def __init__(
        self,
        split: str,
        image_size: tuple[int, int],
        *,
        train: bool,
        seed: int = 0,
        count: int | None = None,
        series: int = 0,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be train, val or test for scenes, got {split!r}")
        if min(image_size) < SMALLEST_SIDE:
            raise ValueError(f"image_size of scenes must be at least {SMALLEST_SIDE}, got {image_size}")
        if count is not None and count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        if series < 0:
            raise ValueError(f"series must be 0 or more, got {series}")
        super().__init__(INFO, flip_training() if train else EvaluationTransform(), seed)
        self.split = split
        self.image_size = image_size
        self.count = SPLITS[split] if count is None else count
        # Series of `render`: one per split, then one per further series of training images.
        self.series = len(SPLITS) - 1 + series if split == "train" and series else list(SPLITS).index(split)

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> tuple[Tensor, Tensor, str]:
        image, labels = render(self.series, index, *self.image_size)
        return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(labels), f"{self.split}-{index:05d}"

    def picture(self, index: int) -> tuple[Tensor, Tensor]:
        image, labels = render(self.series, index, *self.image_size, scale=PICTURE_SCALE)
        return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(labels)


def render(seed: int, index: int, height: int, width: int, *, scale: int = 1) -> tuple[Labels, Labels]:
    """Draw scene `index` of the series `seed`: image `[height, width, 3]` and labels `[height, width]`, both uint8.

    With `scale`, both sides are that much longer and the scene is the same, with finer noise.
    """
    painter = _Painter(np.random.default_rng(np.random.SeedSequence((seed, index))), height, width, scale)
    return painter.paint()


class _Painter:
    def __init__(self, rng: np.random.Generator, height: int, width: int, scale: int) -> None:
        self.rng = rng
        self.height, self.width, self.scale = height * scale, width * scale, scale
        # Lengths below are in pixels of a 128-pixel image.
        self.unit = min(self.height, self.width) / 128
        self.image = np.empty((self.height, self.width, 3), np.float32)
        self.labels = np.zeros((self.height, self.width), np.uint8)

    def paint(self) -> tuple[Labels, Labels]:
        rng = self.rng
        self.ground()
        kinds = [BACKGROUND, *rng.integers(0, INFO.num_classes, rng.integers(3, 6))]
        for kind in rng.permutation(kinds):
            self.shape(int(kind))
        return self.develop(), self.labels

    def colour(self) -> Floats:
        return self.rng.uniform(0.1, 0.9, 3).astype(np.float32)

    def smooth_noise(self, cells: int) -> Floats:
        """Return `[height, width, 3]` in [-1, 1]: random values on a coarse grid, interpolated linearly."""
        coarse = self.rng.uniform(-1, 1, (cells, cells, 3)).astype(np.float32)
        rows = _between(coarse, self.height)
        return _between(rows.transpose(1, 0, 2), self.width).transpose(1, 0, 2)

    def ground(self) -> None:
        self.image[:] = self.colour()
        self.image += 0.15 * self.smooth_noise(4) + 0.1 * self.smooth_noise(24)

    def shape(self, kind: int) -> None:
        """Draw a filled, wobbly superellipse with the texture of `kind`; that of the background is random blocks."""
        rng = self.rng
        radii = rng.uniform(22, 40, 2) * self.unit
        centre_y, centre_x = rng.uniform(0, self.height), rng.uniform(0, self.width)
        reach = 1.5 * radii.max()
        top, bottom = _clip(centre_y - reach, centre_y + reach, self.height)
        left, right = _clip(centre_x - reach, centre_x + reach, self.width)
        y = np.arange(top, bottom, dtype=np.float32)[:, None] - np.float32(centre_y)
        x = np.arange(left, right, dtype=np.float32)[None] - np.float32(centre_x)

        u, v = _rotate(y, x, rng.uniform(0, math.pi))
        along, across = np.square(u / np.float32(radii[0])), np.square(v / np.float32(radii[1]))
        boxy = rng.random() < 0.5
        distance = np.square(along) + np.square(across) if boxy else along + across
        phase = np.float32(rng.uniform(0, 2 * math.pi))
        wobble = 1 + 0.35 * np.sin(np.float32(rng.integers(2, 6)) * np.arctan2(u, v) + phase)
        inside = distance < wobble

        # With less than 4 pixels per period, a small image would show no texture.
        period = max(4.0 * self.scale, rng.uniform(10, 14) * self.unit)
        u, v = _rotate(y, x, rng.uniform(0, math.pi))
        phase_u, phase_v = rng.uniform(0, 2, 2).astype(np.float32)
        # Two columns and two rows of cells per period.
        u, v = u * np.float32(2 / period) + phase_u, v * np.float32(2 / period) + phase_v
        columns, rows = np.floor(u).astype(np.int32), np.floor(v).astype(np.int32)
        if kind == STRIPES:
            pattern = columns & 1
        elif kind == CHECKS:
            pattern = (columns ^ rows) & 1
        elif kind == DOTS:
            pattern = np.square(u % 2 - 1) + np.square(v % 2 - 1) < 0.6
        elif kind == RINGS:
            pattern = np.floor(np.hypot(y, x) * np.float32(2 / period) + phase_u).astype(np.int32) & 1
        else:
            blocks = rng.integers(0, 2, (64, 64))
            pattern = blocks[columns & 63, rows & 63]
        one = self.colour()
        other = np.clip(one + rng.choice([-1, 1]) * rng.uniform(0.25, 0.5, 3).astype(np.float32), 0, 1)
        self.image[top:bottom, left:right][inside] = np.where(pattern[inside][:, None], one, other)
        self.labels[top:bottom, left:right][inside] = kind

    def develop(self) -> Labels:
        """Apply lighting from one side, shadows, slight blur and noise; return uint8."""
        rng = self.rng
        y = np.linspace(-1, 1, self.height, dtype=np.float32)[:, None]
        x = np.linspace(-1, 1, self.width, dtype=np.float32)[None]
        slope, _ = _rotate(y, x, rng.uniform(0, 2 * math.pi))
        light = 1 + rng.uniform(0.1, 0.4) * slope
        for _ in range(rng.integers(1, 4)):
            centre, size = rng.uniform(-1, 1, 2), rng.uniform(0.15, 0.5)
            light -= rng.uniform(0.1, 0.4) * np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / size**2)
        image = self.image * light[..., None].astype(np.float32)
        image[1:-1] = 0.5 * image[1:-1] + 0.25 * (image[:-2] + image[2:])
        image[:, 1:-1] = 0.5 * image[:, 1:-1] + 0.25 * (image[:, :-2] + image[:, 2:])
        image += np.float32(rng.uniform(0.02, 0.05)) * rng.standard_normal(image.shape, dtype=np.float32)
        return (np.clip(image, 0, 1) * 255).round().astype(np.uint8)


def _clip(low: float, high: float, size: int) -> tuple[int, int]:
    return max(0, math.floor(low)), min(size, math.ceil(high) + 1)


def _between(values: Floats, size: int) -> Floats:
    """Interpolate `size` rows between the rows of `values [N, ...]`, including both ends."""
    place = np.linspace(0, len(values) - 1, size, dtype=np.float32)
    above = np.minimum(place.astype(np.int64), len(values) - 2)
    share = (place - above).reshape(-1, *[1] * (values.ndim - 1))
    return values[above] * (1 - share) + values[above + 1] * share


def _rotate(y: Floats, x: Floats, angle: float) -> tuple[Floats, Floats]:
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    return cos * x + sin * y, cos * y - sin * x
