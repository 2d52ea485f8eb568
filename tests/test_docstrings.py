"""The examples in the docstrings of the names that people use."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import sward
import sward_kernels
from sward import alignment, data, features, losses, metrics, models, runs
from tests.support.training_runs import small

PUBLIC = [
    sward.Distiller,
    sward.load,
    losses.SWARDLoss,
    losses.MWADLoss,
    losses.PDRLoss,
    alignment.Standardization,
    features.FeatureTaps,
    models.build,
    data.build,
    metrics.ConfusionMatrix,
    sward_kernels.windowed_distillation,
    sward_kernels.windowed_feature_distillation,
]


@pytest.mark.parametrize("public", PUBLIC, ids=lambda public: public.__name__)
def test_examples_print_what_they_say(
    public: Any, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {}
    if public is sward.load:
        request.getfixturevalue("few_images")
        run = tmp_path / "run"
        runs.train_student(small(run, distillation="none", iterations=1))
        names = {"run": run, "photo": Image.new("RGB", (100, 70))}
    (example,) = (found for found in doctest.DocTestFinder(recurse=False).find(public, globs=names))
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    result = runner.run(example)
    assert result.attempted > 0
    assert result.failed == 0, capsys.readouterr().out
