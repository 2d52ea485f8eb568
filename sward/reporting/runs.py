"""Read run folders, find the runs that belong together, and group those that differ only in their seed."""

from __future__ import annotations

import dataclasses
import functools
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sward.config import DistillationConfig, TrainingConfig
from sward.config_json import differences
from sward.data import DatasetInfo
from sward.data.files import unique_ends
from sward.methods import METHOD_TITLES
from sward.runs.teachers import has_teacher_run, teacher_run
from sward.training import checkpoints
from sward.training.run_folder import RunFolder, read_json

Role = Literal["teacher", "alone", "distilled"]
"""`"alone"`: a student without distillation."""

ROLES: tuple[Role, ...] = ("teacher", "alone", "distilled")

VALIDATION = "last validation during training"


@dataclass(frozen=True)
class ReportedRun:
    """The contents of a run folder."""

    title: str
    """Shortest unique end of its path."""
    folder: RunFolder
    """The folder."""
    config: TrainingConfig
    """Its configuration."""
    info: DatasetInfo
    """Its classes."""
    evaluations: dict[str, dict[str, Any]]
    """`VALIDATION` and the names of `evaluation-*.json` -> scores."""

    @functools.cached_property
    def frames(self) -> dict[str, dict[str, str]]:
        """Split -> frame -> checksums; nothing if the run does not know them. A report compares it with many others."""
        return self.folder.read_frames()

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        """Checksums of its teacher and masks among others; see `sward.training.checkpoints.identity`."""
        return checkpoints.identity(self.folder.last)

    @property
    def role(self) -> Role:
        """What the run is in a comparison."""
        if not isinstance(self.config, DistillationConfig):
            return "teacher"
        return "alone" if self.config.distillation == "none" else "distilled"


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed."""

    title: str
    """Network and method."""
    runs: tuple[ReportedRun, ...]
    """At least one."""

    @property
    def role(self) -> Role:
        """What the runs are in a comparison."""
        return self.runs[0].role

    @property
    def config(self) -> TrainingConfig:
        """Configuration of the first run."""
        return self.runs[0].config


def read_runs(paths: Sequence[Path]) -> list[ReportedRun]:
    """Read run folders.

    Raises:
        ValueError: if two paths are the same folder, or a file is damaged.
        FileNotFoundError: if a folder is not a run folder.
    """
    runs = [_read(path, title) for path, title in zip(paths, _titles(paths), strict=True)]
    _leave_out_scores_of_other_images(runs)
    return runs


def _leave_out_scores_of_other_images(runs: Sequence[ReportedRun]) -> None:
    """Keep scores of one folder and split only where they are on the images of the newest of them, and warn."""
    newest: dict[tuple[str | None, ...], tuple[float, str | None, ReportedRun]] = {}
    for name, stored, run in _stored_scores(runs):
        written = (run.folder.path / f"evaluation-{name}.json").stat().st_mtime
        place = (name, stored.get("root"), _split(run))
        if stored.get("frames") is not None and (place not in newest or written > newest[place][0]):
            newest[place] = (written, stored["frames"], run)
    for name, stored, run in _stored_scores(runs):
        _, frames, other = newest.get((name, stored.get("root"), _split(run)), (0.0, None, run))
        if stored.get("frames") not in (None, frames):
            warnings.warn(
                f"the scores {name} of {run.title} are left out: they are on other images or masks than those of "
                f"{other.title}, which are newer; score it again with 'sward evaluate'",
                stacklevel=3,
            )
            del run.evaluations[name]


def _stored_scores(runs: Sequence[ReportedRun]) -> list[tuple[str, dict[str, Any], ReportedRun]]:
    return [(name, stored, run) for run in runs for name, stored in run.evaluations.items() if name != VALIDATION]


def _read(path: Path, title: str) -> ReportedRun:
    folder = RunFolder(path)
    config, info = folder.read()
    evaluations = {}
    for file in sorted(path.glob("evaluation-*.json")):
        stored = read_json(dict, file)
        if not folder.holds_scores(stored):
            warnings.warn(
                f"{file} is left out: the run was trained on since; score it again with 'sward evaluate'", stacklevel=3
            )
            continue
        evaluations[file.stem.removeprefix("evaluation-")] = stored
    validated = [record for record in folder.records() if "validation" in record]
    if validated:
        evaluations = {VALIDATION: validated[-1]["validation"], **evaluations}
    return ReportedRun(title, folder, config, info, evaluations)


def _titles(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that are unique."""
    titles = unique_ends([path.resolve() for path in paths])
    if len(set(titles)) < len(titles):
        raise ValueError(f"paths must be distinct run folders, got {', '.join(map(str, paths))}")
    return titles


def with_companions(paths: Sequence[Path]) -> list[Path]:
    """Return the paths, and beside them the teachers and the students alone that their runs are compared with.

    A teacher is found under `teacher.run` or as the folder `teacher` beside the run, a student alone as the folder
    `none-seedN` beside it, with the same network and seed.
    """
    found = {path.resolve(): path for path in paths}
    for path in paths:
        config, info = RunFolder(path).read()
        if not isinstance(config, DistillationConfig) or config.distillation == "none":
            continue
        alone = [path.resolve().parent / f"none-seed{config.seed}"]
        teacher = _first(_teacher_folders(path, config), info, taught=path)
        for companion in (teacher, _first(alone, info, config.model)):
            if companion is not None:
                found.setdefault(companion.resolve(), companion)
    return list(found.values())


def teacher_of(run: ReportedRun) -> ReportedRun | None:
    """Return the run of the teacher that taught a distilled run, in the folder that it names or beside it; else None.

    Warns of a teacher there whose weights are others than when it taught the run.
    """
    folder = teacher_folder(run)
    return None if folder is None else _read(folder, folder.name)


def teacher_folder(run: ReportedRun) -> Path | None:
    """Return the folder of `teacher_of`, without reading its scores."""
    if run.role != "distilled" or not isinstance(run.config, DistillationConfig):
        return None
    return _first(_teacher_folders(run.folder.path, run.config), run.info, taught=run.folder.path)


def _teacher_folders(path: Path, config: DistillationConfig) -> list[Path]:
    if not has_teacher_run(config.teacher):
        return []
    # Where `sward train` looks without --teacher.run, and beside the run, as runs that were moved together lie.
    usual = config.teacher.run or teacher_run(config.preset)
    return [usual, path.resolve().parent / "teacher"]


def _first(
    wanted: Iterable[Path], info: DatasetInfo, model: str | None = None, *, taught: Path | None = None
) -> Path | None:
    """Return the first folder of a run on these classes, of this network, that is the teacher of the run `taught`."""
    for path in wanted:
        try:
            config, other = RunFolder(path).read()
            if other != info or model not in (None, config.model):
                continue
            if taught is None or _has_taught(path, taught):
                return path
        except (FileNotFoundError, ValueError):
            continue
        warnings.warn(
            f"the teacher in {path} is left out: it has other weights than when it taught {taught}", stacklevel=2
        )
    return None


def _has_taught(teacher: Path, student: Path) -> bool:
    """Whether the teacher has the weights that the student's checkpoint names, or that names none."""
    then = checkpoints.identity(RunFolder(student).last).get("teacher")
    best = RunFolder(teacher).best
    return then is None or then == _checksum_in(best, best.stat().st_mtime_ns)


@functools.lru_cache
def _checksum_in(path: Path, changed: int) -> str:
    """Return the checksum of the weights in a checkpoint, which is read again only if it has changed."""
    return checkpoints.checksum_in(path)


def same_but_seed(path: Path) -> list[ReportedRun]:
    """Return the run in `path` and those beside it that differ from it only in their seed, one run per seed."""
    (own,) = read_runs([path])
    beside = sorted(each.parent for each in path.resolve().parent.glob("*/config.json"))
    runs = [own]
    for each in beside:
        if each == path.resolve():
            continue
        try:
            # The configuration first: logs may be long.
            other = ReportedRun(each.name, RunFolder(each), *RunFolder(each).read(), {})
            # A copy of a run has its seed.
            if other.config.seed not in {run.config.seed for run in runs} and _belong_together(own, other):
                runs.append(_read(each, each.name))
        except (OSError, ValueError):
            continue  # Another program's folder, or a run of another version.
    for other in runs[1:]:
        for name, stored in list(other.evaluations.items()):
            frames = own.evaluations.get(name, {}).get("frames")
            if None not in (frames, stored.get("frames")) and stored["frames"] != frames:
                del other.evaluations[name]  # They are on other test images.
    return sorted(runs, key=_seed)


def group(runs: Sequence[ReportedRun]) -> list[Group]:
    """Group runs that differ only in their seed; teachers first, then students alone, then distilled ones."""
    members: list[list[ReportedRun]] = []
    for run in runs:
        for each in members:
            seeds = {member.config.seed for member in each}
            if _belong_together(each[0], run) and run.config.seed not in seeds:
                each.append(run)
                break
        else:
            members.append([run])
    members.sort(key=lambda each: ROLES.index(each[0].role))
    titles = [_group_title(each[0]) for each in members]
    # What tells groups of one title apart: the folder without the seed, or else the folder.
    for name in (_without_seed, str):
        counts = Counter(titles)
        titles = [
            title if counts[title] == 1 else f"{_group_title(each[0])} ({name(each[0].title)})"
            for title, each in zip(titles, members)
        ]
    return [Group(title, tuple(sorted(each, key=_seed))) for title, each in zip(titles, members)]


def by_images(runs: Sequence[ReportedRun]) -> dict[str, list[ReportedRun]]:
    """Return the runs whose scores can be compared, on the same images of the same classes, under a title for each."""
    members: list[list[ReportedRun]] = []
    for run in runs:
        for each in members:
            if each[0].info == run.info and _same_frames(each[0], run, ("val",)):
                each.append(run)
                break
        else:
            members.append([run])
    names = Counter(each[0].info.name for each in members)
    titles = (
        each[0].info.name if names[each[0].info.name] == 1 else f"{each[0].info.name}, {_images_of(each[0])}"
        for each in members
    )
    return dict(zip(titles, members, strict=True))


def _images_of(run: ReportedRun) -> str:
    split = run.config.dataset.split_by
    return f"as in {run.title}" if split is None else f"split by {split}, as in {run.title}"


def differences_beside_method(distilled: ReportedRun, alone: ReportedRun) -> list[str]:
    """Describe what a distilled student and one alone differ in, besides distillation; nothing if they compare."""
    one, other = distilled.config, alone.config
    if not isinstance(one, DistillationConfig) or not isinstance(other, DistillationConfig):
        raise TypeError("distilled and alone must be runs of students")
    method = {name: getattr(other, name) for name in METHOD_FIELDS}
    found = _differences(dataclasses.replace(distilled, config=dataclasses.replace(one, **method)), alone)
    if not found and not _same_frames(distilled, alone, ("train", "val")):
        found = ["the images differ"]
    return found


METHOD_FIELDS = [
    each.name
    for each in dataclasses.fields(DistillationConfig)
    if each.name not in {inherited.name for inherited in dataclasses.fields(TrainingConfig)}
]
"""Fields of `DistillationConfig` that a student alone does not use."""


def _belong_together(one: ReportedRun, other: ReportedRun) -> bool:
    if type(one.config) is not type(other.config) or one.info != other.info:
        return False
    return (
        not _differences(one, other)
        and _same_frames(one, other, ("train", "val", "unlabelled"))
        and _taught_by(one) == _taught_by(other)
    )


def _differences(one: ReportedRun, other: ReportedRun) -> list[str]:
    """Describe what the configurations of two runs differ in, besides the seed and where a split is stored."""
    first, second = (
        dataclasses.replace(run.config, seed=0, dataset=dataclasses.replace(run.config.dataset, split_by=None))
        for run in (one, other)
    )
    return differences(first, second)


def _same_frames(one: ReportedRun, other: ReportedRun, splits: Iterable[str]) -> bool:
    """Whether two runs have the same frames in these splits: by checksums where both have them, else by the split."""
    if one.frames and other.frames:
        return all(one.frames.get(split) == other.frames.get(split) for split in splits)
    return _split(one) == _split(other)


def _taught_by(run: ReportedRun) -> tuple[Path | str | None, ...]:
    """Return the teacher and the masks of a distilled student: the checksums in its checkpoint, else their folders."""
    config = run.config
    if not isinstance(config, DistillationConfig) or config.distillation == "none":
        return ()
    folders = {"teacher": config.teacher.run, "masks": config.teacher.masks}
    return tuple(run.identity.get(name, path and path.resolve()) for name, path in folders.items())


def _split(run: ReportedRun) -> str | None:
    if run.folder.split.exists():
        return run.folder.split.read_text(encoding="utf-8")
    return run.config.dataset.split_by


def _seed(run: ReportedRun) -> int:
    return run.config.seed


def _group_title(run: ReportedRun) -> str:
    config = run.config
    if not isinstance(config, DistillationConfig):
        return f"teacher {config.model}"
    if config.distillation == "none":
        return f"{config.model} alone"
    return f"{config.model} {METHOD_TITLES.get(config.distillation, '+ ' + config.distillation)}"


def _without_seed(title: str) -> str:
    return re.sub(r"-seed\d+$", "", title)
