"""What the runs of a study must have in common before a table sets them side by side: one teacher, one data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sward.data.frames import difference, frame_sums
from sward.data.sample import SegmentationDataset
from sward.runs.load import load_run
from sward.training import checkpoints
from sward.training.run_folder import RunFolder


class Comparable:
    """Refuses runs that were taught by another teacher or trained on other data, which no configuration shows."""

    def __init__(self) -> None:
        self._read: dict[tuple[Path, int], Any] = {}
        self._data: dict[str, tuple[Path, Mapping[str, Mapping[str, str]]]] = {}

    def check_teacher(self, student: RunFolder, teacher: RunFolder) -> None:
        """Raise a ValueError if a distilled student was taught by another teacher than that of the study."""
        if not teacher.best.exists():
            return
        then = self._once(student.last, lambda: checkpoints.load(student.last).get("identity", {}).get("teacher"))
        if then is None:
            return
        now = self._once(teacher.best, lambda: checkpoints.checksum(load_run(teacher.path, "best")[2]))
        if then != now:
            raise ValueError(
                f"{student.path} holds a student of another teacher than that in {teacher.path}; choose another "
                "--output, or remove the student's folder to train it again"
            )

    def check_data(self, preset: str, folder: RunFolder) -> None:
        """Raise a ValueError if a run was trained on other files than the first one of its preset."""
        if folder.frames.exists():
            frames = self._once(folder.frames, folder.read_frames)
            first, known = self._data.setdefault(preset, (folder.path, frames))
            _compare(f"{folder.path} was trained on", frames, first, known)

    def check_data_to_come(self, preset: str, train: SegmentationDataset, validation: SegmentationDataset) -> None:
        """Raise a ValueError if the next runs of a preset would train on other files than those there are did."""
        if preset in self._data:
            frames = {"train": frame_sums(train), "val": frame_sums(validation)}
            _compare("the data set now holds", frames, *self._data[preset])

    def _once(self, file: Path, read: Callable[[], Any]) -> Any:
        """Return what was read from a file before, unless it has changed: a table asks for a run many times."""
        key = (file, file.stat().st_mtime_ns)
        if key not in self._read:
            self._read[key] = read()
        return self._read[key]


def _compare(
    subject: str, frames: Mapping[str, Mapping[str, str]], first: Path, known: Mapping[str, Mapping[str, str]]
) -> None:
    for split in ("train", "val"):
        now, before = frames.get(split), known.get(split)
        # A data set without files, such as a pack, has no checksums.
        different = difference(before, now) if now and before else None
        if different:
            raise ValueError(
                f"{subject} other images or masks than {first}: in {split}, {different}; choose another --output, or "
                "the --data of that run"
            )
