"""`sward doctor`: each line against what is there, and the implementations against what runs."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from sward.cli import doctor
from sward.cli.main import main
from sward_kernels import (
    cpp,
    prototype_discrimination,
    relational_kl,
    windowed_distillation,
    windowed_feature_distillation,
)
from tests.support.operators import Operators

CPU = (
    "MWAD, CPU tensors",
    "MWAD's projections, CPU tensors",
    "PDR, CPU tensors",
    "CIRKD, CPU tensors",
    "standardised teacher, CPU tensors",
    "colour jitter, images in 8 bits",
)


def implementations(report: str) -> dict[str, str]:
    """What of `sward_kernels` runs where -> what the report says about it."""
    paragraph = report.split("\n\n")[1].partition("C++ compiled by")[0]
    return dict(line.split(": ", 1) for line in paragraph.splitlines())


def set_gpus(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(names))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: names[index])


def remove_packages(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in packages else find(name))


def runs_native(operation: str, dtype: torch.dtype = torch.float32, **options: Any) -> bool:
    with Operators() as operators:
        if operation == "MWAD":
            maps = torch.randn(2, 1, 6, 20, 20, dtype=dtype)
            windowed_distillation(*maps, options["window"])
        elif operation == "MWAD's projections":
            features = torch.randn(2, 1, options["channels"], 20, 20, dtype=dtype)
            weights = torch.randn(2, 6, options["channels"], dtype=dtype)
            windowed_feature_distillation(*features, *weights, options["window"])
            return "windowed_feature_distillation_native" in operators.returned
        elif operation == "CIRKD":
            relational_kl(*torch.randn(2, 1, 6, 3, dtype=dtype))
        else:
            features = torch.randn(2, 3, 8, 8, dtype=dtype)
            prototype_discrimination(features, torch.zeros(2, 8, 8, dtype=torch.int64), 2, **options)
    return any("native" in name for name in operators.returned)


def test_the_command_prints_versions_and_threads(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"python {sys.version.split()[0]} on ")
    assert lines[0].endswith(f", threads: {torch.get_num_threads()}")
    versions = dict(line.split(maxsplit=1) for line in lines[1:8])
    assert versions["torch"] == metadata.version("torch")
    assert versions["numpy"] == metadata.version("numpy")


@pytest.mark.skipif(
    doctor.windowed_distillation.LIBRARY.why_not() is not None, reason="the C++ does not compile on this machine"
)
def test_where_the_doctor_says_native_native_runs_and_elsewhere_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    set_gpus(monkeypatch)
    said = implementations(doctor.describe_machine())
    assert tuple(said) == CPU
    expected = "native (C++) in fp32, bf16 and fp16; eager in windows above 16 x 16 and in other dtypes"
    assert said["MWAD, CPU tensors"] == expected
    assert runs_native("MWAD", torch.bfloat16, window=16)
    expected = (
        "native (C++) in fp32, bf16 and fp16; PyTorch above 128 channels, in windows above 16 x 16 and in other dtypes"
    )
    assert said["MWAD's projections, CPU tensors"] == expected
    assert runs_native("MWAD's projections", torch.bfloat16, window=16, channels=128)
    assert not runs_native("MWAD's projections", window=17, channels=128)
    assert not runs_native("MWAD's projections", window=16, channels=129)
    assert not runs_native("MWAD's projections", torch.float64, window=16, channels=128)
    assert said["PDR, CPU tensors"] == "native (C++) in fp32; eager in other dtypes"
    assert said["CIRKD, CPU tensors"] == "native (C++) in fp32; eager above 2048 pixels per image and in float64"
    assert runs_native("MWAD", window=16)
    assert not runs_native("MWAD", window=17)
    assert not runs_native("MWAD", torch.float64, window=16)
    assert runs_native("PDR")
    assert runs_native("PDR", normalize=True)
    assert not runs_native("PDR", torch.float64)
    assert runs_native("CIRKD")
    assert not runs_native("CIRKD", torch.float64)


@pytest.mark.skipif(
    doctor.windowed_distillation.LIBRARY.why_not() is not None, reason="the C++ does not compile on this machine"
)
def test_the_doctor_names_compiler_flags_width_and_folder() -> None:
    report = doctor.describe_machine()
    assert f"C++ compiled by: {' '.join(cpp.compiler())} -std=c++17 -O3 -march=native" in report
    width, folder = re.search(r"C\+\+ vectors of (\d+) floats; libraries in (.*)", report).groups()
    assert width in ("4", "8", "16")
    assert list(Path(folder).glob("windowed-*.so"))


def test_without_a_compiler_the_doctor_says_eager_and_why(tmp_path: Path) -> None:
    environment = {**os.environ, "CXX": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "sward", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    said = implementations(done.stdout)
    for name in CPU:
        choice, _ = said[name].split("; ")
        assert choice.startswith(
            ("eager instead of native (", "PyTorch instead of native (", "torchvision instead of ")
        )
        assert "'no-such-compiler'" in choice
        assert "CXX" in choice


def test_gpus_are_listed_and_take_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    set_gpus(monkeypatch, "Card A", "Card B")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, None))
    report = doctor.describe_machine()
    assert "GPU 0: Card A\nGPU 1: Card B\n" in report
    assert "no GPU" not in report
    assert implementations(report)["GPU tensors"].startswith("triton; eager")


def test_without_triton_gpus_take_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    set_gpus(monkeypatch, "Card A")
    remove_packages(monkeypatch, "triton")
    found = implementations(doctor.describe_machine())
    assert found["GPU tensors"] == "eager; the package triton is not installed"


def test_without_a_gpu_the_doctor_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    set_gpus(monkeypatch)
    report = doctor.describe_machine()
    assert "\nno GPU visible to torch\n" in report
    assert "GPU tensors" not in report


def test_what_is_missing_is_named_with_what_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    remove_packages(monkeypatch, "timm", "matplotlib")
    report, _, missing = doctor.describe_machine().partition("pip install 'sward[all]'")
    assert {"timm", "matplotlib"} <= {line.split(":")[0].strip() for line in missing.splitlines()[1:]}
    assert "  timm: MobileNetV3 and DINOv2 networks" in missing.splitlines()
    assert "optional packages that are not installed" in report
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, None))
    assert "what needs them" not in doctor.describe_machine()
