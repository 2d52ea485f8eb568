"""One process and several with the same global batch, and processes that die."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sward import data, distributed, methods, models, runs
from sward.alignment import Standardization
from sward.cli.main import main
from sward.config import DistillationConfig, MaskTrainingConfig, SWARDConfig, TeacherConfig
from sward.data import Batch, EvaluationTransform, SegmentationDataset
from sward.evaluation import evaluate
from sward.runs import train_masks, train_student
from sward.training import FrozenTeacher, loop
from sward.training.interruption import TrainingInterrupted
from tests.support.training_runs import (
    SERVER,
    SMALL_SCENES,
    SPLITS,
    assert_equal_runs,
    checkpoint,
    group_of_two,
    records,
    small,
    small_cirkd,
    teach,
    write_images,
)

TOLERANCE = 1e-9
"""Of weights after five steps, in float64: AdamW's first steps move every weight by the learning rate, 1e-3, whatever
the size of its gradient, so the rounding of float32 would show as up to 1e-4 where a gradient is nearly zero."""

CASES = {name: name for name in methods.METHODS} | {
    "none": "none",
    "sward, one shift a process": "sward",
    "sward as the paper has it": "sward",
    "sward and unlabelled images": "sward",
    "kd and unlabelled images": "kd",
    **{f"{name}, one process without labels": name.split()[0] for name in ("sward as the paper has it", "kd", "cirkd")},
}
BATCH = 4


def case(folder: Path, name: str, output: Path) -> DistillationConfig:
    shift = "stochastic" if "shift" in name else "deterministic"
    config = small(
        output,
        distillation=CASES[name],
        iterations=5,
        batch=BATCH,
        dataset=SMALL_SCENES,
        sward=SWARDConfig(weights=(1.0, 0.1), window_size=(4,), embed_dim=8, shift=shift),
        teacher=TeacherConfig(run=folder / "teacher", masks=folder / f"{CASES[name]}.pt"),
    )
    if "paper" in name:
        config.use_recipe("paper")
    if "unlabelled" in name:
        config.unlabelled, config.unlabelled_batch = (folder / "images",), 4
    return config


def without_batch_norm(module: nn.Module) -> nn.Module:
    """Every batch norm replaced by a norm of each image: batch statistics are those of a process on a CPU."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(4, child.num_features))
        else:
            without_batch_norm(child)
    return module


def in_float64(network: nn.Module) -> nn.Module:
    network.register_forward_pre_hook(lambda module, images: (images[0].double(),))
    return network.double()


def prepare() -> None:
    """Few images; everything in float64; student and projector without batch norm; CIRKD without its
    `minibatch` term, which by definition pairs the images of one process."""
    torch.set_num_threads(1)
    data.scenes.SPLITS.update(SPLITS)
    build_model, build_loss = models.build, methods.build
    methods.METHODS["cirkd"] = lambda pair: without_batch_norm(small_cirkd(pair, (1.0, 0.0, 1.0, 1.0)))
    methods.build = lambda name, pair: build_loss(name, pair).double()
    # The teacher only here, after its masks were checked against its weights.
    runs.train.FrozenTeacher = lambda network, layers, **_: FrozenTeacher(in_float64(network), layers)
    models.build = lambda name, *rest, **options: (
        in_float64(without_batch_norm(build_model(name, *rest, **options)))
        if name == "unext"
        else build_model(name, *rest, **options)
    )


def train_case(folder: Path, name: str, side: str, hidden: int) -> None:
    """Train a case into `folder/side/name`; where its name says so, the last `hidden` labels of a batch are ignored."""
    stream = loop.batches

    def partly_labelled(*arguments: Any, **options: Any) -> Iterator[Batch]:
        for batch in stream(*arguments, **options):
            batch.labels[len(batch.labels) - hidden :] = 255
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        if "without labels" in name:
            patch.setattr(loop, "batches", partly_labelled)
        train_student(case(folder, name, folder / side / name))


class Striped(SegmentationDataset):
    """Seven images for batches of two: neither the batches nor the images divide evenly by two."""

    def __init__(self) -> None:
        super().__init__(data.DatasetInfo("striped", ("a", "b"), ((0, 0, 0), (9, 9, 9))), EvaluationTransform())

    def __len__(self) -> int:
        return 7

    def read(self, index: int) -> tuple[Tensor, Tensor, str]:
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(0, 256, (3, 8, 8), generator=generator, dtype=torch.uint8)
        return image, (torch.rand(8, 8, generator=generator) < 0.1 * index).to(torch.uint8), str(index)


def scores(group: Any = None) -> dict[str, Any]:
    torch.manual_seed(0)
    return vars(evaluate(nn.Conv2d(3, 2, 3, padding=1), Striped(), batch=2, process_group=group))


def teacher_maps() -> Tensor:
    """Five images, channels of unequal scale."""
    maps = torch.randn(5, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    return maps * torch.tensor([1.0, 500.0])[:, None, None] + torch.tensor([1000.0, 0.0])[:, None, None]


def standardised(maps: Tensor, group: Any = None) -> dict[str, Tensor]:
    standardization = Standardization(2, process_group=group)
    standardization(2 * maps)
    return {"maps": standardization(maps), **standardization.state_dict()}


def one_process(processes: int, folder: Path) -> None:
    prepare()
    for name in CASES:
        train_case(folder, name, "one", hidden=BATCH // processes)


def train_on_shards(folder: Path, name: str) -> None:
    """Four steps on unlabelled images from tar files; `"resumed"` is stopped after two of them."""
    config = case(folder, "sward", folder / "shards" / name)
    config.iterations, config.unlabelled_batch = 4, 4
    config.unlabelled = (f"{folder}/{{0..3}}.tar",)
    config.dataset = dataclasses.replace(SMALL_SCENES, workers=1)
    if name == "resumed":
        remember = loop.LossWatch.remember

        def stop(self: loop.LossWatch, step: int, *rest: Any) -> None:
            remember(self, step, *rest)
            if step == 2:
                signal.raise_signal(signal.SIGTERM)

        loop.LossWatch.remember = stop
        with pytest.raises(TrainingInterrupted):
            train_student(config)
        loop.LossWatch.remember = remember
        config.resume = True
    train_student(config)


def one_of_several(rank: int, processes: int, folder: Path) -> None:
    prepare()
    os.environ["RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=processes)
    for name in CASES:
        train_case(folder, name, "several", hidden=BATCH // processes if rank == processes - 1 else 0)
    if processes == 2:
        for name in ("whole", "resumed"):
            train_on_shards(folder, name)
    torch.save(scores(dist.group.WORLD), folder / f"rank{rank}.pt")
    # One image more on the first process than on the last.
    mine = teacher_maps().tensor_split(processes)[rank]
    torch.save(standardised(mine, dist.group.WORLD), folder / f"standardised{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def processes(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def folder(processes: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A teacher, masks for the methods that need them, and every case trained by one process and by several."""
    folder = tmp_path_factory.mktemp("distributed")
    write_images(folder / "images")
    for shard in range(4):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for number in range(shard, 5):
                archive.add(folder / f"images/{number}.png", f"{number}.png")
    teach(folder, iterations=2)
    running = [SERVER.Process(target=one_process, args=(processes, folder))]
    running += [SERVER.Process(target=one_of_several, args=(rank, processes, folder)) for rank in range(processes)]
    for process in running:
        process.start()
    while any(process.exitcode is None for process in running):
        time.sleep(0.1)
        if any(process.exitcode for process in running):
            for process in running:
                process.kill()  # the others would wait for the one that failed
    assert [process.exitcode for process in running] == [0] * (processes + 1)
    yield folder
    shutil.rmtree(folder)  # 1.7 GB of checkpoints


def test_two_processes_resume_on_the_same_streamed_images(folder: Path, processes: int) -> None:
    if processes != 2:
        pytest.skip("the four shards are streamed by two processes only")
    assert_equal_runs(folder / "shards/whole", folder / "shards/resumed")


@pytest.mark.parametrize("name", [name for name in CASES if "shift" not in name])
def test_one_process_and_several_train_alike(folder: Path, name: str) -> None:
    one, two = folder / "one" / name, folder / "several" / name
    for first, second in zip(records(one), records(two), strict=True):
        assert first["step"] == second["step"]
        if "loss" in first:
            for key in ("loss", "gradient_norm"):
                assert second[key] == pytest.approx(first[key], rel=1e-6)
            # What is logged is rounded to float32 in each process.
            assert second["weighted"] == pytest.approx(first["weighted"], rel=1e-5, abs=1e-6)
    alone, together = checkpoint(one), checkpoint(two)
    for part in ("model", "distillation"):
        for key, value in alone[part].items():
            if isinstance(value, Tensor):
                torch.testing.assert_close(together[part][key], value, rtol=0, atol=TOLERANCE)


def test_the_memory_of_several_processes_is_that_of_one(folder: Path) -> None:
    alone, together = (
        checkpoint(folder / side / "cirkd")["distillation"]["_extra_state"] for side in ("one", "several")
    )
    assert alone["step"] == together["step"] == 5
    for bank in ("pixel_queue", "region_queue"):
        assert alone[bank]["pointer"].sum() > 0
        for part in ("rows", "pointer", "filled"):
            torch.testing.assert_close(together[bank][part], alone[bank][part], rtol=0, atol=1e-5)


def test_each_process_draws_shifts_of_its_own(folder: Path, processes: int) -> None:
    name = "sward, one shift a process"
    drawn = [states["loss"][0] for states in checkpoint(folder / "several" / name)["generators"]]
    (alone,) = checkpoint(folder / "one" / name)["generators"]
    assert torch.equal(drawn[0], alone["loss"][0])
    assert len({tuple(state.tolist()) for state in drawn}) == processes


def test_every_process_gets_exactly_the_scores_of_one(folder: Path, processes: int) -> None:
    for rank in range(processes):
        assert torch.load(folder / f"rank{rank}.pt", weights_only=True) == scores()


def test_maps_are_standardised_over_all_processes(folder: Path, processes: int) -> None:
    each = [torch.load(folder / f"standardised{rank}.pt", weights_only=True) for rank in range(processes)]
    alone = standardised(teacher_maps())
    torch.testing.assert_close(torch.cat([one.pop("maps") for one in each]), alone.pop("maps"))
    for name, value in alone.items():
        assert all(torch.equal(one[name], each[0][name]) for one in each)
        torch.testing.assert_close(each[0][name], value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(batch=3), r"batch must be a multiple of the number of processes \(2\), got 3"),
        (
            dict(distillation="kd", unlabelled=("nowhere",), unlabelled_batch=3),
            r"unlabelled_batch must be a multiple of the number of processes \(2\), got 3; unlabelled_batch counts",
        ),
        (
            dict(sync_batch_norm=True),
            "sync_batch_norm must be off on CPUs, got True; torch's SyncBatchNorm runs on GPUs only",
        ),
    ],
)
def test_what_several_processes_cannot_do_is_said_before_any_work(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(ValueError, match=message):
        train_student(small(tmp_path / "run", **{"distillation": "none"} | changes))
    assert not (tmp_path / "run").exists()


def test_masks_are_learned_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="train-masks must run in one process, got 2; start it without torchrun"):
        train_masks(MaskTrainingConfig())


def test_sync_batch_norm_converts_student_and_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    network = nn.Sequential(nn.Conv2d(3, 4, 1, device="meta"), nn.BatchNorm2d(4, device="meta"))
    assert isinstance(distributed.synchronise_batch_norm(network)[1], nn.SyncBatchNorm)
    monkeypatch.setattr(distributed, "world_size", lambda: 1)
    alone = nn.Sequential(nn.BatchNorm2d(4))
    assert type(distributed.synchronise_batch_norm(alone)[0]) is nn.BatchNorm2d


def test_a_method_without_mwad_leaves_no_parameter_without_gradient(tmp_path: Path) -> None:
    config = small(tmp_path / "run", iterations=1, sward=SWARDConfig(weights=(0.0, 1.0)))
    train_student(config)
    optimizer = checkpoint(config.output)["optimizer"]
    # The student's parameters and MWAD's four projections, which a weight raised later would train.
    assert len(optimizer["param_groups"][0]["params"]) == len(list(models.build("unext", 5).parameters())) + 4
    # Only parameters with a gradient have an optimiser state.
    assert len(optimizer["state"]) == len(optimizer["param_groups"][0]["params"])


DYING = """
import contextlib, os, signal, sys
from pathlib import Path
from sward import data
from sward.training import loop
from sward.cli.main import main

data.scenes.SPLITS.update(train=18, val=4)
log_record = loop.log_record

def dying(state, *others):
    if state.step == 4 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return log_record(state, *others)

loop.log_record = dying
code = main(sys.argv[1:])
threads = []
for file in Path("/proc/self/task").glob("*/comm"):
    with contextlib.suppress(OSError):  # it ended in between
        threads.append(file.read_text())
Path(f"threads-{os.environ['RANK']}").write_text("".join(threads))
sys.exit(code)
"""


def test_torchrun_restarts_a_run_whose_process_died_and_it_goes_on(tmp_path: Path) -> None:
    (tmp_path / "dying.py").write_text(DYING)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command += [str(tmp_path / "dying.py"), "train", "demo", "--distillation", "none", "--output", "run"]
    command += ["--batch", "4", "--iterations", "6", "--log-every", "1", "--checkpoint-every", "3"]
    command += ["--dataset.image-size", "32", "32"]
    root = str(Path(__file__).resolve().parents[2])
    torchrun = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        printed, errors = torchrun.communicate(timeout=240)
    finally:
        torchrun.terminate()  # it ends its processes, which a kill would leave behind
        torchrun.wait(60)
    assert torchrun.returncode == 0, errors
    assert checkpoint(tmp_path / "run")["step"] == 6
    steps = [record["step"] for record in records(tmp_path / "run") if "loss" in record]
    assert steps == [1, 2, 3, 4, 5, 6]
    # A thread of the group that outlives it can end the process with SIGABRT while Python shuts down.
    for rank in range(2):
        threads = (tmp_path / f"threads-{rank}").read_text()
        assert "gloo" not in threads
        assert threads or sys.platform != "linux"
    # Rank 0 alone speaks and writes: one table, one line a step.
    assert printed.count("best mean_iou on validation") == 1


def one_that_may_die(rank: int, environment: dict[str, str], folder: Path) -> None:
    torch.set_num_threads(1)
    data.scenes.SPLITS.update(SPLITS)
    os.environ |= environment
    log_record = loop.log_record

    def log(state: Any, *others: Any) -> dict[str, Any]:
        if rank == 1 and state.step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return log_record(state, *others)

    loop.log_record = log
    with (folder / f"errors{rank}").open("w") as errors, contextlib.redirect_stderr(errors):
        words = ["--dataset.image-size", "32", "32", "--batch", "4", "--iterations", "1000", "--log-every", "1"]
        code = main(["train", "demo", "--distillation", "none", *words, "--output", str(folder / "run")])
    sys.exit(code)


def test_the_others_end_with_a_sentence_if_a_process_dies(tmp_path: Path) -> None:
    running = [
        SERVER.Process(target=one_that_may_die, args=(rank, environment, tmp_path))
        for rank, environment in enumerate(group_of_two())
    ]
    for process in running:
        process.start()
    try:
        running[1].join(300)
        assert running[1].exitcode == -signal.SIGKILL
        running[0].join(60)
        assert running[0].exitcode == 1
    finally:
        for process in running:
            process.kill()
    errors = (tmp_path / "errors0").read_text()
    assert "sward train (process 0): another process of the run must have ended, " in errors
    assert "Traceback" not in errors
