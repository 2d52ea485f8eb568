"""The code in README and the guides: Python blocks run, and the command line accepts every `sward` command."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from sward.cli import main as command_line
from sward.deploy.proof import export_run
from sward.features import FeatureTaps
from sward.losses import SegmentationCrossEntropy
from sward.models.unext import UNeXt
from sward.runs import train_student
from tests.support.training_runs import small

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md"))
)
NOT_RUN = {"docs/data.md": "reads real data sets", "docs/methods/maskd.md": "takes 10,000 steps"}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)


class Headed(nn.Module):
    """A network with a layer `head.fuse`."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.stages = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1))
        self.head = nn.Module()
        self.head.fuse = nn.Conv2d(8, width, 3, 2, 1)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.classifier(self.head.fuse(self.stages(images)))
        return F.interpolate(logits, size=images.shape[-2:], mode="bilinear")


def prepared(page: str, num_classes: int) -> dict[str, Any]:
    """Return the names that the blocks of a page take as given, and write the files that they read."""
    names: dict[str, Any] = {
        "torch": torch,
        "student": Headed(256, num_classes),
        "teacher": Headed(512, num_classes),
        "task": SegmentationCrossEntropy(),
        "loader": [(torch.randn(2, 3, 64, 64), torch.randint(0, num_classes, (2, 64, 64)))],
    }
    if page == "docs/own_trainer.md":
        swin = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, img_size=64)
        names |= {"network": swin, "FeatureTaps": FeatureTaps}
    if page == "docs/prototypes.md":
        features = torch.randn(2, 16, 8, 8, requires_grad=True)
        names |= {"features": features, "labels": torch.randint(0, num_classes, (2, 8, 8))}
    if page == "docs/deployment.md":
        train_student(small(Path("run"), distillation="none", iterations=1))
        for suffix in (".onnx", ".pt2"):
            export_run(Path("run"), Path(f"student{suffix}"), check=0)
        torch.save({"model": UNeXt(2).state_dict(), "step": 1}, "best.pt")
        Image.new("RGB", (80, 60)).save("photo.jpg")
        names["UNeXt"] = UNeXt
    return names


SLOW = {"docs/deployment.md"}
WITH_PYTHON = [
    pytest.param(page, marks=pytest.mark.slow if page in SLOW else ())
    for page in PAGES
    if blocks(page, "python") and page not in NOT_RUN
]


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_images: None) -> None:
    monkeypatch.chdir(tmp_path)
    code = blocks(page, "python")
    num_classes = int((re.findall(r"num_classes=(\d+)", "".join(code)) or ["3"])[0])
    names = prepared(page, num_classes)
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
