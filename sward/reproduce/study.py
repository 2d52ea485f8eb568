"""Train the runs of a table in order; skips finished runs and resumes interrupted ones."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sward import atomic, data, presets
from sward.config import (
    MASK_METHODS,
    DistillationConfig,
    MaskMethod,
    MaskTrainingConfig,
    TeacherTrainingConfig,
)
from sward.config_json import differences, to_json
from sward.data import DatasetNotFoundError
from sward.data.files import PairedFiles
from sward.evaluation import Evaluation
from sward.reporting.card import write_card
from sward.reproduce.comparable import Comparable
from sward.reproduce.experiments import TEACHER, EvaluationSet, Frames, Run, Table, teacher_of
from sward.reproduce.options import Options
from sward.runs import (
    evaluate_run,
    evaluation_file,
    frames_of,
    train_masks,
    train_student,
    train_teacher,
)
from sward.runs.load import build_datasets, build_split, choose_device
from sward.training.observation import forget_peak_memory, peak_memory
from sward.training.progress import Progress
from sward.training.run_folder import RunFolder, read_json

State = Literal["finished", "started", "new"]

TRUNK_FILES = {
    "sam2_hiera_large_deeplabv3plus": "sam2.1_hiera_large.pt",
    "medsam2_hiera_tiny_resunetpp": "MedSAM2_latest.pt",
    "vit_small_dinov2": "vit_small_dinov2.pt",
}
"""File name of each teacher's pretrained trunk, as published (docs/reproduce.md)."""


@dataclass(frozen=True)
class Cost:
    """Measured cost of a finished run."""

    steps: int
    """Optimiser steps."""
    seconds: float
    """Time in the training loop, validation excluded."""
    peak_memory: int | None
    """Bytes of the device's allocator on a GPU, or of resident process memory on a CPU; None if unknown."""


class Study:
    """The runs of an output folder: `OUTPUT/PRESET/NAME-seedN`, and for teachers `OUTPUT/PRESET/teacher`.

    Args:
        options: options of `sward reproduce`.

    Raises:
        ValueError: if options contradict each other.
    """

    def __init__(self, options: Options) -> None:
        options.check()
        self.options = options
        self._comparable = Comparable()
        self._frames: dict[tuple[str, EvaluationSet], str | None] = {}

    def folder(self, run: Run, seed: int) -> RunFolder:
        """Return the folder of the run."""
        name = TEACHER if run.name == TEACHER else f"{run.name}-seed{seed}"
        return RunFolder(self.options.output / run.preset / name)

    def config(self, run: Run, seed: int) -> DistillationConfig | TeacherTrainingConfig:
        """Return the complete configuration of a run.

        Raises:
            ValueError: if the run overrides a field that does not exist.
        """
        preset = presets.get(run.preset)
        config: DistillationConfig | TeacherTrainingConfig
        config = preset.teacher if run.name == TEACHER else preset.student
        config.seed = 0 if run.name == TEACHER else seed
        config.output = self.folder(run, seed).path
        config.dataset.root = self._root_of(config.dataset.name)
        config.device = self.options.device
        if self.options.iterations is not None:
            config.iterations, config.epochs = self.options.iterations, None
        if isinstance(config, TeacherTrainingConfig):
            trunk = TRUNK_FILES.get(config.model)
            if trunk is not None and not self.options.untrained_trunk:
                config.trunk_checkpoint = self.options.checkpoints / trunk
            elif trunk is not None:
                config.model_weights = "random"
            if config.dataset.views is not None:
                config.cache = self._features(run)
            return config
        if self.options.epochs is not None:
            config.iterations, config.epochs = None, self.options.epochs
        if run.twice:
            config.iterations, config.epochs = (each and 2 * each for each in (config.iterations, config.epochs))
        if self.options.precision is not None:
            config.precision = self.options.precision
        config.distillation = run.distillation
        teacher = teacher_of(run.preset)
        config.teacher.run = self.folder(teacher, 0).path
        if run.distillation in MASK_METHODS:
            config.teacher.masks = self.masks_file(run)
        if run.unlabelled is not None:
            config.unlabelled = (str(self.unlabelled_list(run, run.unlabelled)),)
        for name, value in run.overrides.items():
            _set(config, name, value)
        if config.dataset.views is not None:
            config.teacher.cache = self._features(run)
        return config

    def _root_of(self, dataset: str) -> Path | None:
        """Return the folder of the data sets for a configuration; generated scenes have none."""
        return None if dataset == "scenes" else self.options.data

    def masks_file(self, run: Run) -> Path:
        """Return the file of MasKD's tokens or FreeKD's prompts on the teacher of `run`."""
        return self.folder(teacher_of(run.preset), 0).path.with_name(f"{run.distillation}.pt")

    def unlabelled_list(self, run: Run, frames: Frames) -> Path:
        """Return the file that lists the unlabelled images of `run`; `train` writes it."""
        name = "-".join(filter(None, ("unlabelled", frames.dataset, frames.split_by, frames.split)))
        return self.options.output / run.preset / f"{name}.txt"

    def masks_config(self, run: Run, method: MaskMethod) -> MaskTrainingConfig:
        """Return the configuration for learning the masks of `run`."""
        teacher = teacher_of(run.preset)
        config = presets.get(teacher.preset).masks
        config.method = method
        config.dataset.root = self._root_of(config.dataset.name)
        config.teacher.run = self.folder(teacher, 0).path
        if self.options.iterations is not None:
            config.steps = self.options.iterations
        config.device = self.options.device
        config.output = self.masks_file(run)
        return config

    def state(self, run: Run, seed: int) -> State:
        """Return the state of the run.

        Raises:
            ValueError: if its folder holds a run with another configuration, of another teacher than there is now, or
                on other data than the first run there is; the message names the difference.
        """
        folder = self.folder(run, seed)
        if not folder.last.exists():
            return "new"
        config = self.config(run, seed)
        different = differences(folder.read()[0], config)
        if different:
            raise ValueError(
                f"{folder.path} holds a run with another configuration: {different[0]}; "
                "choose another --output, or remove that folder to train it again"
            )
        if run.distillation != "none" and run.name != TEACHER:
            self._comparable.check_teacher(folder, self.folder(teacher_of(run.preset), 0))
        self._comparable.check_data(config, folder)
        return "finished" if (folder.path / "cost.json").exists() else "started"

    def seeds(self, run: Run) -> range:
        """Return the seeds of a run: one for a teacher or a trial, `--seeds` for a student."""
        return range(1 if run.name == TEACHER or run.trial else self.options.seeds)

    def schedule(self, runs: Iterable[Run]) -> list[tuple[Run, int]]:
        """Return every run with every seed, in order: teachers, then all runs of seed 0, of seed 1, ...

        Raises:
            ValueError: if `--only` names an unknown run.
        """
        runs = list(runs)
        known = {run.name for run in runs}
        for name in self.options.only:
            if name not in known:
                raise ValueError(
                    f"only must name runs of {self.options.what}, got {name!r}; they are {', '.join(sorted(known))}"
                )
        wanted = [run for run in runs if not self.options.only or run.name in self.options.only]
        if any(run.distillation != "none" for run in wanted):
            # A distilled student needs its teacher.
            wanted = [run for run in runs if run in wanted or run.name == TEACHER]
        return [(run, seed) for seed in range(self.options.seeds) for run in wanted if seed in self.seeds(run)]

    def check(self, runs: Iterable[Run], tests: Iterable[EvaluationSet]) -> list[str]:
        """Check that everything a table or figure needs exists; return one sentence per column that stays empty.

        Args:
            runs: all its runs, including those that `--only` excludes.
            tests: the splits on which they are scored.

        Raises:
            ValueError, FileNotFoundError: if a folder holds another run, `--data` other data than the runs there are
                were trained on, or data or a pretrained trunk is missing.
        """
        choose_device(self.options.device)
        runs, tests = list(runs), list(tests)
        for run in runs:
            for seed in self.seeds(run):
                self.state(run, seed)
        to_come = {run.preset for run, seed in self.schedule(runs) if self.state(run, seed) != "finished"}
        seen: set[str] = set()
        notes = []
        for run, seed in self.schedule(runs):
            state, config = self.state(run, seed), self.config(run, seed)
            config.check()
            trunk = config.trunk_checkpoint if isinstance(config, TeacherTrainingConfig) else None
            if trunk is not None and state != "finished" and not trunk.exists():
                raise FileNotFoundError(
                    f"there is no pretrained trunk at {trunk}; get it as docs/reproduce.md describes, name its folder "
                    "with --checkpoints, or try the commands with --untrained-trunk"
                )
            if run.preset not in seen:
                seen.add(run.preset)
                train_set, validation_set = build_datasets(config)
                config.steps(len(train_set))
                if run.preset in to_come:
                    self._comparable.check_data_to_come(config, {"train": train_set, "val": validation_set})
                for test in tests:
                    if test.dataset is None:
                        continue
                    config.dataset.name, config.dataset.split_by = test.dataset, test.split_by
                    try:
                        build_split(config, test.split, train=False)
                    except DatasetNotFoundError as error:
                        if not test.optional:
                            raise
                        notes.append(f"{test.title} is empty: {error}")
            if run.unlabelled is not None:
                self._unlabelled_images(run.unlabelled)
        return list(dict.fromkeys(notes))

    def run_all(self, schedule: list[tuple[Run, int]]) -> Iterator[tuple[Run, int]]:
        """Train the unfinished runs one after the other, and yield each run when it is done."""
        with Progress(self.options.what, len(schedule), seconds=0) as progress:
            for run, seed in schedule:
                progress.note(f"{run.preset}/{self.folder(run, seed).path.name}")
                if self.state(run, seed) != "finished":
                    self.train(run, seed)
                progress.advance()
                yield run, seed

    def train(self, run: Run, seed: int) -> None:
        """Train or resume one run, after learning the masks that it needs."""
        config = self.config(run, seed)
        folder = self.folder(run, seed)
        if isinstance(config, DistillationConfig) and config.distillation in MASK_METHODS:
            self._learn_masks(run)
        if run.unlabelled is not None:
            self._list_unlabelled(run, run.unlabelled)
        config.resume = folder.last.exists()
        device = choose_device(config.device)
        is_fresh = forget_peak_memory(device)
        if isinstance(config, TeacherTrainingConfig):
            result = train_teacher(config)
        else:
            result = train_student(config)
        memory = peak_memory(device) if is_fresh else None
        cost = Cost(steps=folder.records()[-1]["step"], seconds=result.seconds, peak_memory=memory)
        text = json.dumps(dataclasses.asdict(cost), indent=2)
        atomic.write(folder.path / "cost.json", f"{text}\n".encode())
        write_card(folder.path)

    def choose(self, table: Table) -> Table:
        """Return the table with the best choice per row that has some; without rows whose choices are unfinished."""
        rows = []
        for row in table.rows:
            scores = [self.validation_score(run, 0) for run in row.choices]
            if None in scores:
                continue
            if scores:
                best = max(zip(scores, row.choices, strict=True), key=lambda each: each[0] or 0.0)[1]
                factor = best.overrides.get("distillation_factor", 1.0)
                run = dataclasses.replace(best, trial=False)
                row = dataclasses.replace(row, title=f"{row.title} {factor:g}", runs=(run,) * len(row.runs))
            rows.append(row)
        return dataclasses.replace(table, rows=tuple(rows))

    def validation_score(self, run: Run, seed: int) -> float | None:
        """Return the best validation score of the run; None before it is finished."""
        if self.cost(run, seed) is None:
            return None
        metric = self.config(run, seed).metric
        scores = [record["validation"][metric] for record in self.folder(run, seed).records() if "validation" in record]
        return max((score for score in scores if score is not None), default=0.0)

    def cost(self, run: Run, seed: int) -> Cost | None:
        """Return the cost of the run; None before it is finished."""
        path = self.folder(run, seed).path / "cost.json"
        return read_json(Cost, path) if path.exists() else None

    def evaluation(self, run: Run, seed: int, test: EvaluationSet) -> Evaluation | None:
        """Return the scores of a run, computed once; None before it is finished or if the test images are missing."""
        if self.cost(run, seed) is None:
            return None
        folder, checkpoint = self.folder(run, seed), test.checkpoint(run)
        file_of = functools.partial(
            evaluation_file, folder.path, test.dataset, test.split, root=self.options.data, split_by=test.split_by
        )
        # Earlier versions wrote the scores of all weights to the file of the best ones.
        for file in (file_of(checkpoint=checkpoint), file_of()):
            stored = read_json(dict, file) if file.exists() else {}
            if (
                stored.get("checkpoint") == checkpoint
                and folder.holds_scores(stored)
                and self._holds_frames(run, seed, test, stored)
            ):
                return Evaluation.from_dict(stored)
        try:
            return evaluate_run(
                folder.path,
                split=test.split,
                dataset=test.dataset,
                split_by=test.split_by,
                root=self.options.data,
                checkpoint=checkpoint,
                device=self.options.device,
            )
        except DatasetNotFoundError:
            if not test.optional:
                raise
            return None

    def _holds_frames(self, run: Run, seed: int, test: EvaluationSet, stored: dict[str, Any]) -> bool:
        """Return whether stored scores are those of the test images that there are now.

        Scores whose images are gone, or that an earlier version stored without their checksum, are taken for them.
        """
        key = (run.preset, test)
        if key not in self._frames:
            try:
                self._frames[key] = frames_of(
                    self.folder(run, seed).path,
                    split=test.split,
                    dataset=test.dataset,
                    split_by=test.split_by,
                    root=self.options.data,
                )
            except FileNotFoundError:
                self._frames[key] = None
        now, scored = self._frames[key], stored.get("frames")
        return now is None or scored is None or now == scored

    def _unlabelled_images(self, frames: Frames) -> list[Path]:
        found = data.build(
            frames.dataset, frames.split, train=False, root=self.options.data, split_by=frames.split_by, packed="none"
        )
        assert isinstance(found, PairedFiles)
        return [pair.image.absolute() for pair in found.pairs]

    def _list_unlabelled(self, run: Run, frames: Frames) -> None:
        path = self.unlabelled_list(run, frames)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(path, "".join(f"{image}\n" for image in self._unlabelled_images(frames)).encode())

    def _learn_masks(self, run: Run) -> None:
        method: MaskMethod = "maskd" if run.distillation == "maskd" else "freekd"
        config = self.masks_config(run, method)
        path = self.masks_file(run)
        record = path.with_suffix(".json")
        if path.exists() and record.exists():
            different = differences(read_json(MaskTrainingConfig, record), config)
            if different:
                raise ValueError(
                    f"{path} holds masks learned with another configuration: {different[0]}; "
                    "choose another --output, or remove that file to learn them again"
                )
            return
        path.unlink(missing_ok=True)  # Of a call that was interrupted before it wrote the record.
        train_masks(config)
        atomic.write(record, f"{to_json(config)}\n".encode())

    def _features(self, run: Run) -> Path:
        """Where the maps of the teacher's frozen trunk are kept; one cache serves the teacher and every method."""
        return self.folder(teacher_of(run.preset), 0).path.with_name("features")


def _set(config: Any, name: str, value: Any) -> None:
    *path, last = name.split(".")
    for part in path:
        config = getattr(config, part)
    if not hasattr(config, last):
        raise ValueError(f"overrides must be fields of {type(config).__name__}, got {name!r}")
    setattr(config, last, value)
