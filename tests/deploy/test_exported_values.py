"""Exported files against the network in PyTorch, at sizes that fit no stride.

A file of its own: these are the slowest tests of exports, and files are what pytest-xdist shares out.
"""

from pathlib import Path

import pytest
import torch
from torch import nn

import sward
from sward import models
from sward.deploy import export
from sward.deploy.metadata import Metadata
from sward.deploy.network import DeployedNetwork
from tests.support.exported import metadata, padded_by_hand, photos, randomised

SIZES = [(batch, *size) for size in ((100, 130), (129, 129), (33, 500)) for batch in (1, 3)]

SLOW = ("resunetpp", "smp_mbv3s_deeplabv3plus")
"""Students that only the slow tests export: each takes 15 to 20 s, and the others cover every way to write a file."""


@pytest.fixture
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all files of a test be written from one trace, which takes most of an export's time and serves every format.

    For tests that export one network, with one input, output and size.
    """
    trace = export._traced
    traces: list[torch.export.ExportedProgram] = []

    def first_trace(network: DeployedNetwork, described: Metadata) -> torch.export.ExportedProgram:
        if not traces:
            traces.append(trace(network, described))
        return traces[0]

    monkeypatch.setattr(export, "_traced", first_trace)


def assert_equal_at_any_size(network: nn.Module, *files: Path) -> None:
    predictors = [sward.load(file) for file in files]
    deployed = DeployedNetwork(network)
    for shape in SIZES:
        images = photos(*shape)
        expected = padded_by_hand(network, images)
        assert expected.std() > 1e-3
        for predictor in predictors:
            torch.testing.assert_close(predictor.forward(images), expected, atol=1e-4, rtol=0)
        # What `sward predict` runs on a run.
        torch.testing.assert_close(deployed(images), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name in models.names("student")
        if name != "unext"  # below, in both formats
    ],
)
def test_onnx_file_equals_the_network_at_any_size(name: str, tmp_path: Path) -> None:
    network = randomised(name)
    export.write_network(network, metadata(name), tmp_path / "student.onnx")
    assert_equal_at_any_size(network, tmp_path / "student.onnx")


@pytest.mark.usefixtures("traced_once")
def test_files_of_both_formats_equal_the_network_at_any_size(tmp_path: Path) -> None:
    network = randomised("unext")
    files = [tmp_path / "student.onnx", tmp_path / "student.pt2"]
    for file in files:
        export.write_network(network, metadata(), file)
    assert_equal_at_any_size(network, *files)
    assert sward.load(files[1]).metadata == metadata()


@pytest.mark.usefixtures("traced_once")
def test_hiera_with_a_fixed_size(tmp_path: Path) -> None:
    network = randomised("hiera_demo")
    images = photos(3, 100, 130)
    expected = padded_by_hand(network, images)
    for name in ("teacher.onnx", "teacher.pt2"):
        export.write_network(network, metadata("hiera_demo", fixed_size=(100, 130)), tmp_path / name)
        predictor = sward.load(tmp_path / name)
        torch.testing.assert_close(predictor.forward(images), expected, atol=1e-4, rtol=0)
        with pytest.raises(ValueError, match="images must be 100 x 130 pixels, got 64 x 64"):
            predictor.forward(photos(1, 64, 64))
