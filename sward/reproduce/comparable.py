"""What the runs of a study must have in common before a table sets them side by side: one teacher, one data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sward.config import TrainingConfig
from sward.data.frames import difference, frame_sums
from sward.data.sample import SegmentationDataset
from sward.training import checkpoints
from sward.training.run_folder import RunFolder


class _Known(NamedTuple):
    """The frames of a split on which a run was trained."""

    path: Path
    """Folder of the run."""
    sums: Mapping[str, str]
    """See `sward.data.frames`."""


class Comparable:
    """Refuses runs that were taught by another teacher or trained on other data, which no configuration shows.

    Runs share their data if they name the same data set and split, also where they are of different presets.
    """

    def __init__(self) -> None:
        self._read: dict[tuple[Path, int], Any] = {}
        self._known: dict[tuple[str | None, ...], dict[float, _Known]] = {}

    def check_teacher(self, student: RunFolder, teacher: RunFolder) -> None:
        """Raise a ValueError if a distilled student was taught by another teacher than that of the study."""
        if not teacher.best.exists():
            return
        then = self._once(student.last, lambda: checkpoints.identity(student.last).get("teacher"))
        if then is None:
            return
        now = self._once(teacher.best, lambda: checkpoints.checksum_in(teacher.best))
        if then != now:
            raise ValueError(
                f"{student.path} holds a student of another teacher than that in {teacher.path}; choose another "
                "--output, or remove the student's folder to train it again"
            )

    def check_data(self, config: TrainingConfig, folder: RunFolder) -> None:
        """Raise a ValueError if a run was trained on other files than the first one with its data set and split."""
        frames = self._once(folder.frames, folder.read_frames) if folder.frames.exists() else {}
        for split, sums in frames.items():
            if sums:  # A data set without files, such as a pack, has no checksums.
                known = self._known.setdefault(_key(config, split), {})
                _compare(f"{folder.path} was trained on", config, split, sums, known)
                known.setdefault(config.dataset.labelled_share, _Known(folder.path, sums))

    def check_data_to_come(self, config: TrainingConfig, splits: Mapping[str, SegmentationDataset]) -> None:
        """Raise a ValueError if the next runs would train on other files than those that there are did."""
        for split, dataset in splits.items():
            known = self._known.get(_key(config, split), {})
            if known:
                _compare("the data set now holds", config, split, frame_sums(dataset), known)

    def _once(self, file: Path, read: Callable[[], Any]) -> Any:
        """Return what was read from a file before, unless it has changed: a table asks for a run many times."""
        key = (file, file.stat().st_mtime_ns)
        if key not in self._read:
            self._read[key] = read()
        return self._read[key]


def _key(config: TrainingConfig, split: str) -> tuple[str | None, ...]:
    of_preset = (config.preset,) if split == "unlabelled" else ()
    return (config.dataset.name, config.dataset.split_by, split, *of_preset)


def _compare(
    subject: str, config: TrainingConfig, split: str, sums: Mapping[str, str], known: Mapping[float, _Known]
) -> None:
    """Compare with the first run of each share of masks; those of another have only some training frames in common."""
    for share, first in known.items():
        now, before = sums, first.sums
        if split == "train" and share != config.dataset.labelled_share:
            both = sums.keys() & before.keys()
            now, before = ({name: each[name] for name in both} for each in (sums, before))
        different = difference(before, now) if sums else None
        if different:
            raise ValueError(
                f"{subject} other images or masks than {first.path}: in {split}, {different}; choose another --output, "
                "or the --data of that run"
            )
