"""A run against another, paired by seed: the mean difference of their scores and its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

STUDENT_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""97.5 % quantiles of Student's t for 1 to 30 degrees of freedom."""

RESAMPLES = 10_000
CHUNK = 500
"""Resamples that are in memory at a time."""


@dataclass(frozen=True)
class Difference:
    """Mean difference of two runs over the seeds that both have, with its 95 % interval."""

    mean: float
    low: float
    high: float
    count: int
    """Number of seeds."""

    @property
    def is_gain(self) -> bool:
        """Whether the whole interval is above 0."""
        return self.low > 0


def paired_t(differences: Sequence[float]) -> Difference | None:
    """Mean of one difference per seed, with the interval of a paired t test; None for fewer than two seeds.

    The test images are the same for all seeds and count as given: the interval says how the mean would vary with other
    seeds. Beyond 31 seeds it takes the quantile of 31, which is slightly too wide.
    """
    count = len(differences)
    if count < 2:
        return None
    mean = math.fsum(differences) / count
    variance = math.fsum((each - mean) ** 2 for each in differences) / (count - 1)
    half = STUDENT_T[min(count - 1, len(STUDENT_T)) - 1] * math.sqrt(variance / count)
    return Difference(mean, mean - half, mean + half, count)


def paired_bootstrap(differences: ArrayLike, *, seed: int = 0) -> Difference | None:
    """Mean of one difference per seed and image, with a bootstrap interval over both; None for fewer than two seeds.

    Seeds and images are resampled independently, with replacement, `RESAMPLES` times (the images are the same for all
    seeds); the interval holds the middle 95 % of the means. It covers other test images too, but with two or three
    seeds it takes their spread for smaller than it is: report it beside `paired_t`.

    Args:
        differences: `[seeds, images]`; nan where an image has no score.
        seed: of the resampling.
    """
    table = np.asarray(differences, dtype=np.float64)
    seeds, images = table.shape
    if seeds < 2:
        return None
    generator = np.random.default_rng(seed)
    of_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES)
    scored = np.isfinite(table)
    values = np.where(scored, table, 0.0)
    totals, counts = np.empty(RESAMPLES), np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, CHUNK):
        chunk = slice(start, start + CHUNK)
        # The same draws as at once, which would take 8 bytes per resample and image several times over.
        of_images = generator.multinomial(images, np.full(images, 1 / images), size=len(of_seeds[chunk]))
        totals[chunk] = ((of_seeds[chunk] @ values) * of_images).sum(axis=1)
        counts[chunk] = ((of_seeds[chunk] @ scored) * of_images).sum(axis=1)
    low, high = np.quantile(totals[counts > 0] / counts[counts > 0], (0.025, 0.975))
    return Difference(float(np.nanmean(table)), float(low), float(high), seeds)
