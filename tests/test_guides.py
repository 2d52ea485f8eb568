"""The code in README and the guides: Python blocks run, and the command line accepts every `sward` command."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from sward.cli import main as command_line
from sward.deploy.proof import export_run
from sward.features import FeatureTaps
from sward.models.unext import UNeXt
from sward.runs import train_student
from tests.support.training_runs import small

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md"))
)
NEED_DATA = {"docs/data.md"}
"""Pages whose Python reads real data sets."""


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)


def network(width: int, num_classes: int) -> nn.Module:
    sides = [3, width, 2 * width, 4 * width]
    stages = [nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in pairwise(sides)]
    return nn.Sequential(*stages, nn.Conv2d(sides[-1], num_classes, 1))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python") and page not in NEED_DATA])
def test_python_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_images: None) -> None:
    monkeypatch.chdir(tmp_path)
    code = blocks(page, "python")
    num_classes = int((re.findall(r"num_classes=(\d+)", "".join(code)) or ["3"])[0])
    names: dict[str, Any] = {
        "torch": torch,
        "student": network(4, num_classes),
        "teacher": network(8, num_classes),
        "loader": [(torch.randn(2, 3, 128, 128), torch.randint(0, num_classes, (2, 128, 128)))],
    }
    if page == "docs/own_trainer.md":
        names["network"] = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0)
        names["images"] = torch.randn(1, 3, 224, 224)
        names["FeatureTaps"] = FeatureTaps
    if page == "docs/deployment.md":
        train_student(small(tmp_path / "run", distillation="none", iterations=1))
        for suffix in (".onnx", ".pt2"):
            export_run(tmp_path / "run", tmp_path / f"student{suffix}", check=0)
        torch.save({"model": UNeXt(2).state_dict(), "step": 1}, "best.pt")
        Image.new("RGB", (80, 60)).save("photo.jpg")
        names["UNeXt"] = UNeXt
    for each in code:
        exec(compile(each, page, "exec"), names)


class ParsedError(Exception):
    """Raised in place of running a command whose options were accepted."""


def commands(page: str) -> list[str]:
    found = []
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = line.split(" #")[0].strip()
            found += [words] if words.startswith("sward ") and "..." not in words else []
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_the_command_line_accepts_every_command(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command_line.main(["init", "clinicdb-unext"]) == 0
    Path("my.yaml").write_text(capsys.readouterr().out)
    parse = command_line._parse

    def parse_only(*arguments: Any, **options: Any) -> None:
        parse(*arguments, **options)
        raise ParsedError

    monkeypatch.setattr(command_line, "_parse", parse_only)
    for command in commands(page):
        words = shlex.split(command.split(">")[0])[1:]
        if words[0] in ("init", "list"):
            assert command_line.main(words) == 0, command
            continue
        try:
            status = command_line.main(words)
        except ParsedError:
            continue
        raise AssertionError(f"{page}: {command}: status {status}, {capsys.readouterr().err}")
