"""A run folder with a network that exports in a moment, for tests of everything around the network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sward import data
from sward.config import DatasetConfig, TeacherTrainingConfig
from sward.models import registry
from sward.training import checkpoints
from sward.training.run_folder import RunFolder


class Pixelwise(nn.Module):
    """Logits of a pixel and its neighbours, by one 3x3 convolution."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.classifier = nn.Conv2d(3, num_classes, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(images)


def register(patch: pytest.MonkeyPatch, network: type[nn.Module] = Pixelwise) -> None:
    """Make `sward.models.build("pixelwise", ...)` build such a network until the patch is undone."""
    description = replace(registry.describe("unext"), name="pixelwise", stages=())
    patch.setitem(registry._DESCRIPTIONS, "pixelwise", description)
    patch.setitem(registry._BUILDERS, "pixelwise", network)


def make_run(folder: Path, image_size: tuple[int, int] = (64, 64), network: type[nn.Module] = Pixelwise) -> Any:
    """Write a run of `pixelwise` on scenes, as a training run leaves it, and return its network."""
    config = TeacherTrainingConfig(
        preset="demo", model="pixelwise", dataset=DatasetConfig(image_size=image_size), output=folder
    )
    info = data.describe("scenes")
    run = RunFolder(folder)
    folder.mkdir(parents=True)
    run.start(config, info)
    built: Any = network(info.num_classes).eval()
    nn.init.normal_(built.classifier.weight, generator=torch.Generator().manual_seed(3))
    checkpoints.save(run.best, {"model": built.state_dict(), "step": 4})
    return built
