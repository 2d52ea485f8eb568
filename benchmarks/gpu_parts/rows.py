"""Sizes of the parts, and the rows that they measure, which are on disk as soon as they exist."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from harness import device_milliseconds

REPOSITORY = Path(__file__).parents[2]
COLUMNS = ("part", "case", "provider", "pass", "dtype", "layout", "ms", "GB/s", "error", "note")
Row = dict[str, Any]


class Stage(NamedTuple):
    """Maps of one stage of MWAD."""

    batch: int
    height: int
    width: int
    dim: int = 64
    window_size: int = 8

    @property
    def pixels(self) -> int:
        return self.batch * self.height * self.width

    def __str__(self) -> str:
        return f"B={self.batch} D={self.dim} {self.height}x{self.width} M={self.window_size}"


class Sizes(NamedTuple):
    """What the parts run on."""

    stages: tuple[Stage, ...]
    """The stages of the paper's presets; the first is the headline."""
    features: tuple[tuple[Stage, int], ...]
    """Stages that are compared from features, and the channels of these."""
    wide: Stage
    """A map of more than 2**31 elements."""
    prototypes: tuple[tuple[int, int, int, int, int], ...]
    """Batch, channels, height, width and classes."""
    relation: tuple[int, int, int]
    """Images, pixels and channels."""
    preset: str
    step: tuple[tuple[int, int], int] | None
    """Image size and batch of the training step; None for the preset's own."""
    rounds: int


PAPER = Sizes(
    stages=(
        # Cityscapes, crops of 512x1024: the four levels of SAM 2.1. Polyps, 512x512: those of MedSAM2.
        *(Stage(16, side, 2 * side) for side in (128, 64, 32, 16)),
        *(Stage(8, side, side) for side in (128, 64, 32, 16)),
    ),
    # The first stages of MobileNetV3, UNeXt and ResUNet++.
    features=((Stage(16, 128, 256), 16), (Stage(16, 128, 256), 32), (Stage(16, 128, 256), 64)),
    wide=Stage(1, 3376, 3376),
    prototypes=((16, 576, 32, 64, 19), (8, 256, 16, 16, 2), (8, 256, 64, 64, 2)),
    relation=(4, 2048, 256),
    preset="cityscapes-mbv3",
    step=None,
    rounds=11,
)
TINY = Sizes(
    stages=(Stage(1, 4, 4, 16, 4), Stage(1, 5, 3, 16, 4)),
    features=((Stage(1, 4, 4, 16, 4), 8),),
    wide=Stage(1, 8, 4, 16, 4),
    prototypes=((1, 8, 4, 4, 3),),
    relation=(1, 20, 8),
    preset="demo",
    step=((64, 64), 1),
    rounds=1,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
TOLERANCE = {"bf16": 5e-2, "fp16": 1e-2, "fp32": 1e-3, "tf32": 1e-2}
"""Largest error of a loss or gradient, divided by its largest value, against eager in fp32."""
LAYOUTS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}


class Suite:
    """The rows of one part, which are on disk as soon as they exist.

    Rows that failed before are dropped and so tried again, unless `keep_failed`.
    """

    def __init__(self, part: str, folder: Path, rehearsal: bool, keep_failed: bool = False) -> None:
        self.part, self.folder, self.rehearsal = part, folder, rehearsal
        self.sizes = TINY if rehearsal else PAPER
        self.device = torch.device("cpu" if rehearsal else "cuda")
        self._path = folder / f"{part}.jsonl"
        rows = [row for row in read_rows(self._path) if keep_failed or not has_failed(row)]
        self._path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        self._known = {_place(row) for row in rows}

    def has(self, **place: str) -> bool:
        """Whether a row of this place exists already."""
        return _place({"part": self.part, **place}) in self._known

    def add(self, **row: Any) -> None:
        row = {"part": self.part, **row}
        self._known.add(_place(row))
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print("  ".join(f"{value}" for value in row.values()), flush=True)

    def attempt(self, run: Callable[[], Row], **place: str) -> None:
        """Add the row that `run` measures at a place, unless it is there; an error becomes the row's note.

        An error that the device keeps, as an illegal memory access, is raised after that: every later call of this
        process would fail, so the part must end and start anew.
        """
        if self.has(**place):
            return
        try:
            row = run()
        except Exception as error:
            if self.rehearsal:
                raise
            first_line = (str(error).strip().splitlines() or [""])[0]
            self.add(**place, note=f"FAILED: {type(error).__name__}: {first_line[:200]}")
            if not _device_answers():
                raise
            return
        self.add(**place, **row)

    def milliseconds(self, run: Callable[[], object]) -> float:
        if self.rehearsal:  # one call of the interpreter is long enough
            began = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - began)
        return device_milliseconds(run, self.device, self.sizes.rounds)


def _device_answers() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def read_rows(path: Path) -> list[Row]:
    """Return the complete rows of a file; the last may have been cut off by the time limit."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def has_failed(row: Row) -> bool:
    """Whether a row is that of an error or a wrong result."""
    return "FAILED" in str(row.get("note", ""))


def _place(row: Row) -> tuple[str, ...]:
    return tuple(str(row.get(name, "")) for name in COLUMNS[:6])
