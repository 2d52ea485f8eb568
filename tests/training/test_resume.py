"""Runs that are interrupted, killed, damaged or out of disk, and go on."""

from __future__ import annotations

import errno
import functools
import json
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sward.cli.main import main
from sward.config import DatasetConfig, DistillationConfig, OptimizerConfig, TeacherConfig
from sward.runs import train_student
from sward.training.interruption import TrainingInterrupted
from sward.training.loop import validate as loop_validate
from sward.training.run_folder import RunFolder
from tests.support.training_runs import (
    assert_equal_runs,
    checkpoint,
    contents,
    records,
    small,
    start,
    start_two,
    write_images,
)

pytestmark = pytest.mark.usefixtures("few_images")


def wait_for_step(process: BaseProcess, run: Path, step: int) -> None:
    while not any(record["step"] >= step for record in RunFolder(run).records()):
        assert process.is_alive(), f"the run ended before step {step}"
        time.sleep(0.005)


STEPS = 8
LINES = 80_000
"""Lines of Python in which a run of this size is killed: it makes two steps in 85,000, a later run fewer each."""
Uninterrupted = Callable[..., Path]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    """Runs that nothing happened to, each made once, in a process like those that they are compared with."""

    @functools.cache
    def make(method: str, steps: int = STEPS) -> Path:
        folder = tmp_path_factory.mktemp("whole") / method
        process = start(small(folder, distillation=method, iterations=steps, evaluate_every=1))
        process.join()
        assert process.exitcode == 0
        return folder

    return make


def workers(count: int) -> DatasetConfig:
    return DatasetConfig(name="scenes", image_size=(64, 64), workers=count)


def train_in_two_parts(make: Callable[..., DistillationConfig], step: int) -> None:
    """Trains until SIGTERM comes at `step` or later, and then, with `resume=True`, to the end."""
    run = make().output
    parted = start(make())
    wait_for_step(parted, run, step)
    parted.terminate()
    parted.join()
    assert parted.exitcode == 128 + signal.SIGTERM
    stopped = checkpoint(run)["step"]
    assert step <= stopped < STEPS
    assert records(run)[-1]["step"] == stopped
    again = start(make(resume=True))
    again.join()
    assert again.exitcode == 0


@pytest.mark.parametrize(("method", "loader_workers"), [("sward", 0), ("sward", 2), ("cirkd", 0)])
def test_a_run_stopped_by_sigterm_ends_bit_for_bit_as_an_uninterrupted_one(
    tmp_path: Path, method: str, loader_workers: int, uninterrupted: Uninterrupted
) -> None:
    options = dict(distillation=method, iterations=STEPS, evaluate_every=1, dataset=workers(loader_workers))
    train_in_two_parts(lambda **changes: small(tmp_path / "parted", **options, **changes), 2)
    assert_equal_runs(uninterrupted(method), tmp_path / "parted")


def test_a_run_on_cached_teacher_features_ends_bit_for_bit_as_an_uninterrupted_one(tmp_path: Path) -> None:
    def settings(name: str, **changes: Any) -> DistillationConfig:
        dataset = DatasetConfig(name="scenes", image_size=(64, 64), views=2)
        teacher = TeacherConfig(untrained=True, image_size=(96, 96), cache=tmp_path / f"{name}-features")
        return small(tmp_path / name, iterations=STEPS, dataset=dataset, teacher=teacher, **changes)

    whole = start(settings("whole"))
    train_in_two_parts(functools.partial(settings, "parted"), 3)
    whole.join()
    assert whole.exitcode == 0
    assert_equal_runs(tmp_path / "whole", tmp_path / "parted")
    assert checkpoint(tmp_path / "parted")["distillation"]["mwad.standardization.0.count"] == STEPS * 4 * 24 * 24
    features = [
        sorted(path.name for path in (tmp_path / f"{name}-features").glob("*/*")) for name in ("whole", "parted")
    ]
    assert features[0] == features[1] != []


def test_a_run_with_unlabelled_images_ends_bit_for_bit_as_an_uninterrupted_one(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 7)

    def settings(name: str, **changes: Any) -> DistillationConfig:
        dataset = DatasetConfig(name="scenes", image_size=(64, 64), views=2)
        teacher = TeacherConfig(untrained=True, cache=tmp_path / f"{name}-features")
        # Three of seven images: an epoch of theirs ends between two steps of the run.
        extra = dict(unlabelled=(tmp_path / "images",), unlabelled_batch=3)
        return small(tmp_path / name, iterations=STEPS, dataset=dataset, teacher=teacher, **extra, **changes)

    whole = start(settings("whole"))
    train_in_two_parts(functools.partial(settings, "parted"), 3)
    whole.join()
    assert whole.exitcode == 0
    assert_equal_runs(tmp_path / "whole", tmp_path / "parted")


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_command_with_a_checkpoint_and_a_sentence(
    sent: signal.Signals,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(sent)
    options = ["--distillation", "none", "--dataset.image-size", "64", "64", "--batch", "4", "--iterations", "5"]
    options += ["--log-every", "1", "--output", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr("sward.training.loop.log_record", SignalAtStep(2, sent))
        assert main(["train", "demo", *options]) == code
    assert (
        f"stopped by {sent.name} after step 3 of 5, with a checkpoint in {tmp_path / 'run'}; "
        "resume with the same command; 'sward train' and 'train-teacher' also need --resume"
    ) in capsys.readouterr().err
    assert checkpoint(tmp_path / "run")["step"] == 3
    assert signal.getsignal(sent) == before
    assert main(["train", "demo", *options, "--resume"]) == 0
    assert checkpoint(tmp_path / "run")["step"] == 5


def test_a_signal_during_the_last_validation_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A study that trains its runs one after the other would begin the next."""

    def validate(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return loop_validate(*arguments)

    monkeypatch.setattr("sward.training.loop.validate", validate)
    with pytest.raises(TrainingInterrupted, match="stopped by SIGTERM after step 4 of 4"):
        train_student(small(tmp_path / "run", distillation="none"))
    assert checkpoint(tmp_path / "run")["step"] == 4
    assert "validation" in records(tmp_path / "run")[-1]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to find the loader processes")
def test_a_signal_to_the_loader_processes_too_ends_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    """`timeout` and batch systems signal every process of a group."""
    process = start(small(tmp_path / "run", iterations=400, distillation="none", dataset=workers(2)))
    wait_for_step(process, tmp_path / "run", 3)
    loaders = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(loaders) == 2
    for loader in loaders:
        os.kill(int(loader), signal.SIGTERM)
    process.terminate()
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM
    assert checkpoint(tmp_path / "run")["step"] >= 3
    assert not any(Path(f"/proc/{loader}").exists() for loader in loaders)


class SignalAtStep:
    """Stands in for `log_record` and sends this process a signal at a given step."""

    def __init__(self, step: int, sent: signal.Signals) -> None:
        self.step, self.sent = step, sent

    def __call__(self, state, output, *others):
        if state.step == self.step:
            os.kill(os.getpid(), self.sent)
        return {"step": state.step, "loss": output.loss.item(), "task": 0.0}


@pytest.mark.parametrize(("kills", "steps"), [(3, STEPS), pytest.param(20, 40, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_bit_for_bit_as_one_never_killed(
    tmp_path: Path, kills: int, steps: int, uninterrupted: Uninterrupted
) -> None:
    options = dict(iterations=steps, evaluate_every=1, checkpoint_every=1)
    moments = random.Random(7)
    for _ in range(kills):
        process = start(small(tmp_path / "killed", **options, resume=True), killed_at=moments.randrange(LINES))
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run was over before it could be killed often enough"
    last = start(small(tmp_path / "killed", **options, resume=True))
    last.join()
    assert last.exitcode == 0
    assert_equal_runs(uninterrupted("sward", steps), tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("loader_workers", [0, 2])
def test_kills_at_fifty_moments_of_the_clock_lose_nothing(
    tmp_path: Path, loader_workers: int, uninterrupted: Uninterrupted
) -> None:
    """As above, but anywhere: also inside torch, while a file is synced, and while loader processes start."""
    steps = 400
    options = dict(iterations=steps, evaluate_every=1, checkpoint_every=1, dataset=workers(loader_workers))
    moments, run = random.Random(11), tmp_path / "killed"
    # Around the way to the first steps, wherever this runs: a life makes few of them, so that there are many lives. The
    # very first process is slower, since it also starts the server.
    start(small(tmp_path / "server", iterations=1)).join()
    began = time.monotonic()
    first = start(small(run, **options, resume=True))
    wait_for_step(first, run, 2)
    way = time.monotonic() - began
    first.kill()
    first.join()
    kills = 1
    while kills < 50:
        process = start(small(run, **options, resume=True))
        process.join(way * moments.uniform(0.7, 1.2))
        if process.exitcode is not None:
            assert process.exitcode == 0, "the run ended by itself"
            break
        process.kill()
        process.join()
        kills += 1
    last = start(small(run, **options, resume=True))
    last.join()
    assert last.exitcode == 0
    assert kills >= 30, f"the run was over after {kills} kills"
    assert_equal_runs(uninterrupted("sward", steps), run)


@pytest.mark.parametrize(("kills", "steps"), [(2, STEPS), pytest.param(50, 150, marks=pytest.mark.slow)])
def test_two_processes_of_which_one_is_killed_end_bit_for_bit_as_two_never_killed(
    tmp_path: Path, kills: int, steps: int
) -> None:
    options = dict(iterations=steps, evaluate_every=1, checkpoint_every=1)
    moments, run = random.Random(13), tmp_path / "killed"
    for _ in range(kills):
        pair = start_two(small(run, **options, resume=True), {moments.randrange(2): moments.randrange(LINES // 2)})
        while all(process.exitcode is None for process in pair):
            time.sleep(0.02)
        for process in pair:
            process.kill()  # as torchrun ends the others of one that died
            process.join()
        assert -signal.SIGKILL in [process.exitcode for process in pair], "the run was over before it could be killed"
    for folder, resume in ((run, True), (tmp_path / "whole", False)):
        pair = start_two(small(folder, **options, resume=resume))
        for process in pair:
            process.join()
        assert [process.exitcode for process in pair] == [0, 0]
    assert_equal_runs(tmp_path / "whole", run)


def test_the_checkpoint_before_a_damaged_one_is_used(tmp_path: Path) -> None:
    train_student(small(tmp_path / "whole", iterations=6))
    train_student(small(tmp_path / "run", iterations=6, checkpoint_every=2))
    folder = tmp_path / "run" / "checkpoints"
    assert checkpoint(tmp_path / "run", "previous")["step"] == 4
    content = bytearray((folder / "last.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "last.pt").write_bytes(content)
    with pytest.warns(UserWarning, match=r"last\.pt is damaged or not a checkpoint; resuming from .*previous\.pt"):
        train_student(small(tmp_path / "run", iterations=6, checkpoint_every=2, resume=True))
    assert (folder / "last.pt.damaged").read_bytes() == content
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")


def test_nothing_whole_to_go_on_from_is_said_and_nothing_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_student(small(tmp_path / "run", iterations=2, checkpoint_every=1))
    folder = tmp_path / "run" / "checkpoints"
    for name in ("last.pt", "previous.pt"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-100])
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="there is no earlier checkpoint to resume from"):
        train_student(small(tmp_path / "run", iterations=4, resume=True))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == lines
    assert {"last.pt", "previous.pt", "best.pt"} <= set(os.listdir(folder))


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    train_student(small(tmp_path / "run", iterations=1))
    train_student(small(tmp_path / "other", iterations=1, distillation="none"))
    (tmp_path / "other" / "checkpoints" / "last.pt").replace(tmp_path / "run" / "checkpoints" / "last.pt")
    before = contents(tmp_path / "run")
    with pytest.raises(ValueError, match="does not belong to this configuration, so the run cannot be resumed"):
        train_student(small(tmp_path / "run", iterations=2, resume=True))
    assert contents(tmp_path / "run") == before


def test_a_run_is_not_resumed_with_another_configuration_and_stays_as_it_is(tmp_path: Path) -> None:
    options = dict(iterations=2, distillation="none")
    train_student(small(tmp_path / "run", **options))
    before = contents(tmp_path / "run")
    for changes, difference in (
        (dict(optimizer=OptimizerConfig(lr=0.5)), r"optimizer\.lr is 0\.001, not 0\.5"),
        (dict(distillation="kd"), "distillation is none, not kd"),
        (dict(batch=2), "batch is 4, not 2"),
        (dict(iterations=1), "iterations is 2, not 1"),
        (dict(iterations=None, epochs=3), "epochs is None, not 3"),
    ):
        with pytest.raises(ValueError, match=f"holds a run with another configuration: {difference}; resume it"):
            train_student(small(tmp_path / "run", **(options | changes), resume=True))
        assert contents(tmp_path / "run") == before


def test_a_resumed_run_may_become_longer_and_work_elsewhere(tmp_path: Path) -> None:
    train_student(small(tmp_path / "run", iterations=2, distillation="none"))
    changes = dict(device="cpu", log_every=2, checkpoint_every=1, on_corrupt="skip", dataset=workers(1))
    (tmp_path / "run").rename(tmp_path / "moved")
    train_student(small(tmp_path / "moved", iterations=4, distillation="none", resume=True, **changes))
    assert checkpoint(tmp_path / "moved")["step"] == 4
    assert json.loads((tmp_path / "moved" / "config.json").read_text())["iterations"] == 4


def test_a_longer_run_takes_and_logs_the_rate_of_its_schedule_in_every_step(tmp_path: Path) -> None:
    used: list[float] = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    try:
        for steps in (4, 8):
            train_student(small(tmp_path / "run", iterations=steps, distillation="none", resume=True))
    finally:
        hook.remove()
    by_hand = [1e-3 * (1 - step / steps) ** 0.9 for steps, first in ((4, 0), (8, 4)) for step in range(first, steps)]
    assert used == pytest.approx(by_hand)
    assert [line["lr"] for line in records(tmp_path / "run") if "lr" in line] == used


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a file that is always full")
def test_a_full_disk_loses_nothing_that_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_student(small(tmp_path / "whole", iterations=8, evaluate_every=1))
    options = dict(iterations=8, evaluate_every=1, checkpoint_every=2)
    folder = tmp_path / "run" / "checkpoints"
    with monkeypatch.context() as patch:
        patch.setattr("sward.training.loop.log_record", FullDiskAtStep(5, folder / "last.pt.partial"))
        with pytest.raises(OSError, match="No space left") as error:
            train_student(small(tmp_path / "run", **options))
    assert error.value.errno == errno.ENOSPC
    assert sorted(os.listdir(folder)) == ["best.pt", "last.pt", "previous.pt"]
    assert checkpoint(tmp_path / "run")["step"] == 4
    train_student(small(tmp_path / "run", **options, resume=True))
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")


class FullDiskAtStep:
    """Stands in for `log_record` and makes the next checkpoint meet a full disk."""

    def __init__(self, step: int, partial: Path) -> None:
        from sward.training.loop import log_record

        self.step, self.partial, self.log_record = step, partial, log_record

    def __call__(self, state, *others):
        if state.step == self.step:
            self.partial.symlink_to("/dev/full")
        return self.log_record(state, *others)


def test_a_line_cut_short_by_a_crash_is_not_resumed_into(tmp_path: Path) -> None:
    train_student(small(tmp_path / "run", iterations=3, checkpoint_every=2))
    run = RunFolder(tmp_path / "run")
    run.last.unlink()
    with run.metrics.open("a") as file:
        file.write('{"step": 4, "lo')
    train_student(small(tmp_path / "run", iterations=3, resume=True))
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 3]


def test_resuming_what_never_began_begins_it(tmp_path: Path) -> None:
    assert train_student(small(tmp_path / "run", iterations=1, resume=True)).evaluation.images == 4
