"""Differences paired by seed, and their intervals."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

from sward import paired
from sward.paired import paired_bootstrap, paired_t


def test_paired_t_by_hand() -> None:
    found = paired_t([12.0, 15.0, 18.0])
    assert found is not None
    assert (found.mean, found.count) == (15.0, 3)
    # s = 3, so the standard error is sqrt(3); Student's t for 2 degrees of freedom is 4.303.
    assert (found.low, found.high) == pytest.approx((15 - 4.303 * 3**0.5, 15 + 4.303 * 3**0.5))
    assert found.is_gain
    assert not paired_t([-1.0, 15.0, 18.0]).is_gain
    assert paired_t([12.0]) is None
    assert paired_t([]) is None


def test_quantiles_are_those_of_student_s_t() -> None:
    stats = pytest.importorskip("scipy.stats")
    assert list(paired.STUDENT_T) == pytest.approx(stats.t.ppf(0.975, range(1, 31)).tolist(), abs=6e-4)
    # More seeds than the table has: not narrower than it should be.
    wide = paired_t([0.0, 1.0] * 40)
    assert wide.high - wide.mean == pytest.approx(2.042 * statistics.stdev([0.0, 1.0] * 40) / 80**0.5)


def test_the_bootstrap_covers_seeds_and_images() -> None:
    generator = np.random.default_rng(0)
    images = generator.normal(5.0, 10.0, size=400)
    # All seeds alike: what is left is the standard error over images, 10 / sqrt(400).
    found = paired_bootstrap([images, images, images])
    assert found.mean == pytest.approx(images.mean())
    half = 1.96 * images.std() / 20
    assert (found.low, found.high) == pytest.approx((images.mean() - half, images.mean() + half), abs=0.1)
    # Seeds that differ widen it; with two, all of the first or all of the second are a quarter of the resamples each.
    spread = paired_bootstrap([images - 50, images + 50])
    assert spread.low < found.mean - 48
    assert spread.high > found.mean + 48
    assert paired_bootstrap([images]) is None


def test_the_bootstrap_leaves_out_images_without_a_score() -> None:
    found = paired_bootstrap([[1.0, np.nan, 3.0], [1.0, np.nan, 3.0]])
    assert found.mean == 2.0
    assert (found.low, found.high) == (1.0, 3.0)
