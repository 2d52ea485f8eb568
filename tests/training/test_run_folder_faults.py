"""A run folder that is in use, full or damaged."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sward.cli.main import main
from sward.config import DatasetConfig, DistillationConfig, TeacherTrainingConfig
from sward.data import DatasetInfo
from sward.runs import train_student
from sward.training.lock import locked
from sward.training.run_folder import RunFolder
from tests.support.training_runs import checkpoint, small, start

pytestmark = pytest.mark.usefixtures("few_images")
TRAIN = ["train", "demo", "--distillation", "none", "--dataset.image-size", "32", "32", "--batch", "2"]


def test_a_second_run_in_a_folder_is_refused_until_the_first_one_dies(tmp_path: Path) -> None:
    scenes = DatasetConfig(name="scenes", image_size=(32, 32), workers=2)
    options = dict(dataset=scenes, distillation="none", checkpoint_every=1)
    first = start(small(tmp_path / "run", iterations=100_000, **options))
    try:
        while not RunFolder(tmp_path / "run").holds_checkpoint():
            assert first.is_alive()
            time.sleep(0.01)
        with pytest.raises(ValueError, match=f"must not be in use by another run, got process {first.pid} on "):
            train_student(small(tmp_path / "run", iterations=100_000, resume=True, **options))
        with pytest.raises(ValueError, match="must not be in use"):
            RunFolder(tmp_path / "run").forget_checkpoints()
        os.kill(first.pid, signal.SIGSTOP)  # Slow, not dead.
        with pytest.raises(ValueError, match="must not be in use"), RunFolder(tmp_path / "run").locked():
            pass
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.join()
    # At once, although loader processes of the dead run may live on for seconds.
    with RunFolder(tmp_path / "run").locked():
        pass
    assert not (tmp_path / "run" / "run.lock").exists()


def test_one_process_cannot_run_twice_in_a_folder(tmp_path: Path) -> None:
    with locked(tmp_path):
        with pytest.raises(ValueError, match="got one in this process"), locked(tmp_path / "." / ""):
            pass
    with locked(tmp_path):
        pass


def test_a_teacher_may_live_in_a_folder_called_distillation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    size = ["--dataset.image-size", "32", "32", "--batch", "2", "--iterations", "1", "--train-trunk"]
    assert main(["train-teacher", "demo", *size, "--output", "distillation"]) == 0
    assert isinstance(RunFolder(Path("distillation")).read()[0], TeacherTrainingConfig)


def test_a_new_run_forgets_the_split_of_one_that_died_before_its_first_checkpoint(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    kept = (run.split, run.labels, run.frames)
    for path in kept:
        path.write_text("{}")
    run.start(DistillationConfig(), DatasetInfo("two", ("a", "b"), ((0, 0, 0), (1, 1, 1))))
    assert not any(path.exists() for path in kept)
    for path in (*kept, run.last):
        path.write_text("{}")
    run.start(DistillationConfig(resume=True), DatasetInfo("two", ("a", "b"), ((0, 0, 0), (1, 1, 1))))
    assert all(path.exists() for path in kept)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 300 kB, less than a checkpoint."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "none", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small disk needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("filled", [False, True])
def test_a_full_disk_is_named_with_the_remedy_and_the_run_goes_on(
    small_disk: Path, filled: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run, filler = small_disk / "run", small_disk / "filler"
    if filled:
        with contextlib.suppress(OSError):
            filler.write_bytes(b"0" * 2**20)
    words = [*TRAIN, "--iterations", "2", "--output", str(run)]
    assert main(words) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    # Filled before, the run finds no room for its first file; otherwise none for its first checkpoint.
    file = "config.json" if filled else "checkpoints/best.pt"
    assert error == (
        f"sward train: the disk of {run / file} must have space left, got 'No space left on device'; free some and run "
        "the command again, a training with --resume"
    )
    filler.unlink(missing_ok=True)
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    assert main([*words, "--resume"]) == 0
    assert checkpoint(run)["step"] == 2


@pytest.mark.parametrize(
    ("option", "value", "condition"),
    [
        ("--evaluate-every", "-1", "at least 1"),
        ("--optimizer.power", "-1.0", "at least 0"),
        ("--optimizer.power", "nan", "at least 0"),
        ("--optimizer.warmup", "-3", "at least 0"),
        ("--optimizer.lr", "inf", "above 0 and finite"),
        ("--optimizer.weight-decay", "-0.1", "at least 0"),
        ("--optimizer.weight-decay", "1e+40", "at most 1 / optimizer.lr, 500"),
        ("--optimizer.clip-norm", "0.0", "above 0"),
        ("--label-smoothing", "1.0", "at least 0 and below 1"),
        ("--seed", "-1", "at least 0"),
        ("--batch-norm-images", "1", "at least 2"),
        ("--iterations", "0", "at least 1"),
        ("--dataset.workers", "-1", "at least 0"),
        ("--sward.embed-dim", "0", "at least 1"),
        ("--sward.window-size", "0", "at least 1"),
        ("--sward.margin", "nan", "at least 0"),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(
    option: str, value: str, condition: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "demo", "--teacher.untrained", "--output", str(tmp_path / "run")]
    assert main([*words, option, value]) == 2
    name = option.removeprefix("--").replace("-", "_")
    assert capsys.readouterr().err.startswith(f"sward train: {name} must be {condition}, got {value}")
    assert not (tmp_path / "run").exists()
