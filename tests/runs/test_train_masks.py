"""`sward train-masks`: what it refuses before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor, nn

from sward import methods
from sward.cli.main import main
from sward.config import TapConfig
from sward.layers import LayerChoice
from sward.tensor_layouts import Format

pytestmark = pytest.mark.usefixtures("few_images")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "64"], "batch must be at most 18, the number of training images, got 64"),
        (["--batch", "0"], "batch must be at least 1, got 0"),
        (["--steps", "-1"], "steps must be at least 1, got -1"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--seed", "-1"], "seed must be at least 0, got -1"),
        (["--dataset.workers", "-1"], "dataset.workers must be at least 0, got -1"),
        (["--teacher.image-size", "0", "32"], "teacher.image_size must be at least 1, got 0"),
        (["--teacher.precision", "bf16"], "teacher.precision must be 'fp32' where masks are learned, got 'bf16'"),
        (["--teacher.cache", "features"], "teacher.cache must be None where masks are learned, got 'features'"),
        (["--teacher.masks", "masks.pt"], "teacher.masks must be None where masks are learned, got 'masks.pt'"),
        (
            ["--teacher.normalization", "standardize"],
            "teacher.normalization must be 'none' where masks are learned, got 'standardize'",
        ),
        (["--method", "freekd", "--teacher.taps.format", "nhwc"], "format must be 'nchw' or 'auto' for layer"),
    ],
)
def test_settings_that_cannot_work_or_do_nothing_are_refused_by_name(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "masks" / "tokens.pt"
    words = ["--teacher.untrained", "--dataset.image-size", "32", "32", "--output", str(output)]
    one_step = [] if "--steps" in options else ["--steps", "1"]
    assert main(["train-masks", "demo", *words, *one_step, *options]) == 2
    assert capsys.readouterr().err.startswith(f"sward train-masks: {message}")
    assert not output.parent.exists()


@pytest.mark.parametrize(("name", "message"), [("", "a file, got the folder"), ("masks.pt", "a new file, got")])
def test_nothing_is_replaced(name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "masks.pt").write_bytes(b"learned before")
    words = ["--teacher.untrained", "--steps", "1", "--output", str(tmp_path / name)]
    assert main(["train-masks", "demo", *words]) == 2
    assert f"output must be {message} {tmp_path / name}" in capsys.readouterr().err
    assert (tmp_path / "masks.pt").read_bytes() == b"learned before"


class _Block(nn.Module):
    """A layer whose 16 channels equal its grid, and come where `order` puts them."""

    def __init__(self, order: tuple[int, ...], within: type) -> None:
        super().__init__()
        self.order, self.within, self.layer = order, within, nn.Conv2d(3, 16, 4, stride=4)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor]:
        maps = self.layer(images).permute(self.order)
        return (maps,) if self.within is tuple else maps


class _Teacher(nn.Module):
    def __init__(self, order: tuple[int, ...] = (0, 1, 2, 3), within: type = Tensor) -> None:
        super().__init__()
        self.block, self.head = _Block(order, within), nn.Conv2d(16, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.block(images)
        back = [self.block.order.index(axis) for axis in range(4)]
        return self.head((maps[0] if isinstance(maps, tuple) else maps).permute(back))


LAST = (0, 2, 3, 1)


@pytest.mark.parametrize(
    ("teacher", "format", "found"),
    [
        (_Teacher(LAST), "auto", r"shape \(1, 16, 16, 16\) in another order"),
        (_Teacher(LAST), "nhwc", r"shape \(1, 16, 16, 16\) in another order"),
        (_Teacher(within=tuple), "auto", "tuple"),
    ],
)
def test_prompts_are_not_learned_on_the_wrong_axis(teacher: nn.Module, format: Format, found: str) -> None:
    layers = LayerChoice(("block",), "block", "block")
    with pytest.raises(ValueError, match=rf"layer 'block' must return maps \[B, C, h, w\] for freekd, got {found};"):
        methods.new_masks("freekd", teacher, layers, (64, 64), TapConfig(format))
    assert methods.new_masks("freekd", _Teacher(), layers, (64, 64)).channels == 16
    assert methods.new_masks("maskd", teacher, layers, (64, 64), TapConfig(format)).channels == 3
