"""`scenes`: generated images with pixel labels, used by `sward demo` and the tests; needs no download.

Objects of four classes lie on a textured ground, and each class has a look-alike that belongs to the background. Colour
and local patches do not distinguish the two; texture over several periods or arrangement over a distance does:

| class | looks like | its background look-alike |
|---|---|---|
| `stripes` | large shape, parallel stripes | the same shape with random blocks of the same scale |
| `checks` | large shape, regular checkerboard | the same |
| `wire` | curve 2 pixels thin, across the image | scratch of the same profile, a tenth as long |
| `beads` | small discs in a row of 5 to 8 | the same discs, scattered |

Objects overlap and have random colours; a lighting gradient, soft shadows and noise cover the whole image.
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
    classes=("background", "stripes", "checks", "wire", "beads"),
    palette=((40, 44, 52), (230, 159, 0), (86, 180, 233), (240, 228, 66), (213, 94, 0)),
)
BACKGROUND, STRIPES, CHECKS, WIRE, BEADS = range(5)

SPLITS = {"train": 1024, "val": 128, "test": 128}
SMALLEST_SIDE = 32


class Scenes(SegmentationDataset):
    """Generated scenes; image `index` of a split is the same in every run, worker and epoch.

    Args:
        split: `train`, `val` or `test`; no image occurs in two splits.
        image_size: `(height, width)`, each at least 32. Everything scales with the shorter side.
        train: flip images at random.
        seed: seed of the flips. The images themselves do not depend on it, so runs with different seeds are scored on
            the same images.
        count: number of images; None for 1024 (train) or 128. A larger count adds images and keeps the others.

    Raises:
        ValueError: the split is unknown, the size below 32 or the count below 1.
    """

    def __init__(
        self, split: str, image_size: tuple[int, int], *, train: bool, seed: int = 0, count: int | None = None
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be train, val or test for scenes, got {split!r}")
        if min(image_size) < SMALLEST_SIDE:
            raise ValueError(f"image_size of scenes must be at least {SMALLEST_SIDE}, got {image_size}")
        if count is not None and count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        super().__init__(INFO, flip_training() if train else EvaluationTransform(), seed)
        self.split = split
        self.image_size = image_size
        self.count = SPLITS[split] if count is None else count

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> tuple[Tensor, Tensor, str]:
        image, labels = render(list(SPLITS).index(self.split), index, *self.image_size)
        return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(labels), f"{self.split}-{index:05d}"


def render(seed: int, index: int, height: int, width: int) -> tuple[Labels, Labels]:
    """Draw scene `index` of the series `seed`: image `[height, width, 3]` and labels `[height, width]`, both uint8."""
    painter = _Painter(np.random.default_rng(np.random.SeedSequence((seed, index))), height, width)
    return painter.paint()


class _Painter:
    def __init__(self, rng: np.random.Generator, height: int, width: int) -> None:
        self.rng = rng
        self.height, self.width = height, width
        # Lengths below are in pixels of a 128-pixel image.
        self.unit = min(height, width) / 128
        self.image = np.empty((height, width, 3), np.float32)
        self.labels = np.zeros((height, width), np.uint8)
        self.beads: list[tuple[float, float]] = []

    def paint(self) -> tuple[Labels, Labels]:
        rng = self.rng
        self.ground()
        kinds = [STRIPES, CHECKS, BACKGROUND, BACKGROUND, *rng.integers(0, 3, rng.integers(1, 4))]
        for kind in rng.permutation(kinds):
            self.shape(int(kind))
        small = [self.wire] * rng.integers(1, 4) + [self.scratch] * rng.integers(3, 8)
        small += [self.row_of_beads] * rng.integers(1, 4) + [self.lone_bead] * rng.integers(4, 10)
        for place in rng.permutation(len(small)):
            small[place]()
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
        """Draw a filled, wobbly superellipse with stripes, checks or (background) random blocks of the same scale."""
        rng = self.rng
        radii = rng.uniform(14, 30, 2) * self.unit
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
        period = max(4.0, rng.uniform(5, 8) * self.unit)
        u, v = _rotate(y, x, rng.uniform(0, math.pi))
        phase_u, phase_v = rng.uniform(0, 2, 2).astype(np.float32)
        columns = np.floor(u * np.float32(2 / period) + phase_u).astype(np.int32)
        rows = np.floor(v * np.float32(2 / period) + phase_v).astype(np.int32)
        if kind == STRIPES:
            pattern = columns & 1
        elif kind == CHECKS:
            pattern = (columns ^ rows) & 1
        else:
            blocks = rng.integers(0, 2, (64, 64))
            pattern = blocks[columns & 63, rows & 63]
        one = self.colour()
        other = np.clip(one + rng.choice([-1, 1]) * rng.uniform(0.15, 0.4, 3).astype(np.float32), 0, 1)
        self.image[top:bottom, left:right][inside] = np.where(pattern[inside][:, None], one, other)
        self.labels[top:bottom, left:right][inside] = kind

    def wire(self) -> None:
        """Draw a sagging curve from one side of the image to the opposite side."""
        rng = self.rng
        if rng.random() < 0.5:
            ends = [[rng.uniform(0, self.height), 0], [rng.uniform(0, self.height), self.width]]
        else:
            ends = [[0, rng.uniform(0, self.width)], [self.height, rng.uniform(0, self.width)]]
        self.curve(np.array(ends), rng.uniform(-0.4, 0.4), WIRE)

    def scratch(self) -> None:
        start = self.rng.uniform(0, 1, 2) * (self.height, self.width)
        angle, length = self.rng.uniform(0, 2 * math.pi), self.rng.uniform(8, 16) * self.unit
        end = start + length * np.array([math.sin(angle), math.cos(angle)])
        self.curve(np.stack([start, end]), self.rng.uniform(-0.4, 0.4), BACKGROUND)

    def curve(self, ends: NDArray[np.float64], sag: float, kind: int) -> None:
        """Draw a thin parabola between two points; its depth is `sag` times their distance."""
        chord = ends[1] - ends[0]
        middle = ends.mean(0) + sag * np.array([-chord[1], chord[0]])
        t = np.linspace(0, 1, 2 + int(2 * np.abs(chord).sum()))[:, None]
        points = (1 - t) ** 2 * ends[0] + 2 * t * (1 - t) * middle + t**2 * ends[1]
        radius = max(0.7, self.rng.uniform(0.6, 1.2) * self.unit)
        self.stamp(points, radius, kind)

    def row_of_beads(self) -> None:
        rng = self.rng
        count, spacing = rng.integers(5, 9), rng.uniform(8, 11) * self.unit
        angle, bend = rng.uniform(0, 2 * math.pi), rng.uniform(-0.25, 0.25)
        angles = angle + bend * np.arange(count)
        steps = spacing * np.stack([np.sin(angles), np.cos(angles)], axis=1)
        points = rng.uniform(0.15, 0.85, 2) * (self.height, self.width) + np.cumsum(steps, 0)
        self.beads += [(y, x) for y, x in points]
        self.stamp(points, self.bead_radius(), BEADS)

    def lone_bead(self) -> None:
        """Draw a bead far from all others, or none if a few random positions fail."""
        for _ in range(8):
            y, x = self.rng.uniform(0, 1, 2) * (self.height, self.width)
            if all(math.hypot(y - other[0], x - other[1]) > 18 * self.unit for other in self.beads):
                self.beads.append((y, x))
                self.stamp(np.array([[y, x]]), self.bead_radius(), BACKGROUND)
                return

    def bead_radius(self) -> float:
        return max(1.3, self.rng.uniform(2, 3.2) * self.unit)

    def stamp(self, points: NDArray[np.float64], radius: float, kind: int) -> None:
        """Draw discs of one colour around `points [N, 2]` (y, x)."""
        reach = math.ceil(radius)
        span = np.arange(-reach, reach + 1)
        offsets = np.stack([span.repeat(span.size), np.tile(span, span.size)], axis=1)
        cells = np.round(points).astype(np.int64)[:, None] + offsets
        close = ((cells - points[:, None]) ** 2).sum(-1) <= radius**2
        y, x = cells[close].T
        visible = (y >= 0) & (y < self.height) & (x >= 0) & (x < self.width)
        y, x = y[visible], x[visible]
        self.image[y, x] = self.colour()
        self.labels[y, x] = kind

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
