"""What a run logs, and the alarm when its loss is no longer a number."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sward import data, runs
from sward.cli.main import main
from sward.config import MaskMethod, MaskTrainingConfig, TeacherConfig
from sward.losses import MWADLoss, SegmentationCrossEntropy
from sward.runs import train_masks, train_student
from sward.runs.teachers import LoadedTeacher
from sward.training.observation import (
    CollapseWatch,
    LossWatch,
    NonFiniteLossError,
    StepOutput,
    Stopwatch,
    forget_peak_memory,
    peak_memory,
)
from sward.training.run_folder import RunFolder
from sward.training.state import TrainingState
from tests.support.training_runs import SMALL_SCENES, checkpoint, records, small, write_images

pytestmark = pytest.mark.usefixtures("few_images")


def test_a_log_line_holds_raw_and_weighted_terms_health_and_cost(tmp_path: Path) -> None:
    config = small(tmp_path / "run", log_every=2)
    train_student(config)
    lines = [record for record in records(config.output) if "loss" in record]
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        weighted = line["weighted"]
        assert set(weighted) == {"task", "attention", "value", "context", "separation", "compactness"}
        assert sum(weighted.values()) == pytest.approx(line["loss"], rel=1e-5)
        beta, gamma = config.sward.weights
        assert weighted["attention"] == pytest.approx(beta * line["attention"], rel=1e-5)
        assert weighted["separation"] == pytest.approx(gamma * line["separation"], rel=1e-5)
        assert {f"stage{stage}/student/value_rank" for stage in range(4)} <= set(line["diagnostics"])
        assert line["gradient_norm"] > 0
        assert line["lr"] > 0 or line["step"] == 4
        assert 2**27 < line["peak_memory_bytes"] < 2**40
    elapsed = lines[1]["seconds"] - lines[0]["seconds"]
    assert lines[1]["images_per_second"] == pytest.approx(2 * config.batch / elapsed, rel=1e-6)


def test_images_without_labels_count_as_images_per_second(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    config = small(tmp_path / "run", iterations=2, unlabelled=(tmp_path / "images",), unlabelled_batch=3)
    train_student(config)
    first, second = records(config.output)[:2]
    expected = (config.batch + 3) / (second["seconds"] - first["seconds"])
    assert second["images_per_second"] == pytest.approx(expected, rel=1e-6)


def test_how_often_a_run_is_logged_changes_nothing(tmp_path: Path) -> None:
    for every in (1, 4):
        train_student(small(tmp_path / str(every), log_every=every))
    often, seldom = (checkpoint(tmp_path / name)["model"] for name in ("1", "4"))
    assert all(torch.equal(often[key], seldom[key]) for key in often)


HEALTHY = {"value_rank": 12.0, "value_cosine": 0.97, "attention_entropy": 0.998}


@pytest.mark.parametrize(
    ("sign", "collapsed"), [("value_rank", 1.2), ("value_cosine", 0.995), ("attention_entropy", 0.9998)]
)
def test_a_collapse_that_lasts_is_warned_of_once_with_its_cure(sign: str, collapsed: float) -> None:
    watch = CollapseWatch()

    def look(side: str = "teacher", **changes: float) -> None:
        watch.look({f"stage0/student/{name}": value for name, value in HEALTHY.items()})
        watch.look({f"stage2/{side}/{name}": value for name, value in {**HEALTHY, **changes}.items()})

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(watch.WINDOW - 1):
            look(**{sign: collapsed})
        look()
        for _ in range(watch.WINDOW - 1):
            look(**{sign: collapsed})
        for _ in range(watch.WINDOW):
            look("student", **{sign: collapsed})
    with pytest.warns(
        UserWarning, match=r"projections of stage2 have collapsed: .* --sward.teacher-projections frozen"
    ):
        look(**{sign: collapsed})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2 * watch.WINDOW):
            look(**{sign: collapsed})


def test_a_run_whose_projections_collapse_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CollapseWatch, "WINDOW", 3)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*have collapsed")
        train_student(small(tmp_path / "healthy"))

    def forgetful(self: MWADLoss, *features: object) -> dict[str, Tensor]:
        return {"stage1/teacher/value_rank": torch.tensor(1.0)}

    monkeypatch.setattr(MWADLoss, "diagnostics", forgetful)
    with pytest.warns(UserWarning, match="projections of stage1 have collapsed: effective rank of the values 1 "):
        train_student(small(tmp_path / "collapsed"))


class PoisonedAt(SegmentationCrossEntropy):
    """A task loss that is not a number from the third step on; its first call is the step that is tried before."""

    calls = -1

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        PoisonedAt.calls += 1
        return super().forward(logits, labels) * (float("nan") if PoisonedAt.calls >= 3 else 1.0)


def test_a_loss_that_is_not_finite_stops_with_step_terms_and_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    PoisonedAt.calls = -1
    monkeypatch.setattr("sward.runs.train.SegmentationCrossEntropy", PoisonedAt)
    run = tmp_path / "run"
    options = ["--distillation", "none", "--dataset.image-size", "64", "64", "--batch", "4", "--iterations", "8"]
    # Five steps pass between two looks; the first bad one is named all the same.
    options += ["--log-every", "5", "--checkpoint-every", "2", "--output", str(run)]
    assert main(["train", "demo", *options]) == 1
    printed = capsys.readouterr().err
    assert "the loss of step 3 is not finite (task nan) for the images" in printed
    dataset = data.build("scenes", "train", image_size=(64, 64), train=True, seed=0)
    names = printed.split("for the images ")[1].split(";")[0].split(", ")
    assert len(set(names)) == 4
    assert set(names) <= {dataset.read(index)[2] for index in range(len(dataset))}
    assert checkpoint(run)["step"] == 2
    assert all(value.isfinite().all() for value in checkpoint(run)["model"].values())


@pytest.mark.parametrize("command", ["train", "train-teacher"])
def test_a_learning_rate_that_is_far_too_high_ends_in_one_sentence(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--distillation", "none"] if command == "train" else ["--train-trunk"]
    options += [
        "--optimizer.lr",
        "1e30",
        "--optimizer.weight-decay",
        "0",
        "--dataset.image-size",
        "32",
        "32",
        "--batch",
        "4",
        "--iterations",
        "20",
    ]
    assert main([command, "demo", *options, "--output", str(tmp_path / "run")]) == 1
    printed = capsys.readouterr().err
    assert f"sward {command}: the loss of step 2 is not finite (task " in printed
    assert printed.endswith("earlier checkpoints are kept; try a lower --optimizer.lr or --optimizer.clip-norm 1\n")
    assert "Traceback" not in printed


def test_a_teacher_that_is_not_finite_is_named_with_layer_and_image() -> None:
    loss = torch.tensor(float("nan"))
    maps = {"deep": torch.ones(2, 3, 4, 4), "shallow": torch.ones(2, 3, 8, 8)}
    maps["shallow"][1, 2, 5, 5] = float("inf")
    watch = LossWatch()
    inputs = {
        "the image": torch.ones(2, 3, 8, 8),
        **{f"the teacher's map {name!r}": each for name, each in maps.items()},
    }
    watch.remember(7, StepOutput(loss, {"kd": loss}, {}, {}), ["a.png", "b.png"], inputs)
    with pytest.raises(NonFiniteLossError) as error:
        watch.check()
    assert str(error.value) == (
        "the loss of step 7 is not finite (kd nan) for the images a.png, b.png, where the teacher's map 'shallow' is "
        "not finite for b.png; earlier checkpoints are kept"
    )


@pytest.fixture
def broken_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    load = runs.train.load_teacher

    def broken(*arguments: Any) -> LoadedTeacher:
        teacher = load(*arguments)
        with torch.no_grad():
            next(teacher.network.parameters()).fill_(float("inf"))
        return teacher

    monkeypatch.setattr(runs.train, "load_teacher", broken)


@pytest.mark.usefixtures("broken_teacher")
def test_a_run_with_a_broken_teacher_says_that_it_is_the_teacher(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match="where the teacher's map 'logits' is not finite for"):
        train_student(small(tmp_path / "run", distillation="kd"))


@pytest.mark.usefixtures("broken_teacher")
@pytest.mark.parametrize("method", ["maskd", "freekd"])
def test_masks_of_a_broken_teacher_are_not_saved(method: MaskMethod, tmp_path: Path) -> None:
    config = MaskTrainingConfig(
        method=method,
        dataset=SMALL_SCENES,
        teacher=TeacherConfig(name="hiera_demo", untrained=True),
        batch=4,
        steps=2,
        output=tmp_path / "masks.pt",
    )
    with pytest.raises(
        FloatingPointError, match=r"the loss of step 1 is not finite while masks of the teacher's layer"
    ):
        train_masks(config)
    assert not config.output.exists()


def test_weights_that_are_not_finite_after_a_finite_loss_are_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = TrainingState.update

    def break_one(self: TrainingState, *arguments: Any, **options: Any) -> Tensor | None:
        norm = update(self, *arguments, **options)
        if self.step == 4:
            next(self.model.parameters()).data.view(-1)[0] = float("inf")
        return norm

    monkeypatch.setattr(TrainingState, "update", break_one)
    config = small(tmp_path / "run", distillation="none", checkpoint_every=2)
    with pytest.raises(NonFiniteLossError, match="the weights after step 4 are not finite, although its loss is; earl"):
        train_student(config)
    assert checkpoint(config.output)["step"] == 2


def test_a_watch_forgets_what_it_has_looked_at() -> None:
    watch = LossWatch()
    watch.check()
    for step, loss in ((1, 1.0), (2, 2.0)):
        watch.remember(step, StepOutput(torch.tensor(loss, requires_grad=True), {}, {}, {}), ["a"])
    watch.check()
    for step, loss in ((3, 1.0), (4, float("inf")), (5, float("nan"))):
        terms = {"task": torch.tensor(loss)}
        watch.remember(step, StepOutput(torch.tensor(loss), terms, terms, {}), [f"image {step}"])
    with pytest.raises(NonFiniteLossError, match=r"step 4 is not finite \(task inf\) for the images image 4;"):
        watch.check()


def test_a_paused_stopwatch_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    watch = Stopwatch()
    now[0] = 103.0
    with watch.paused():
        now[0] = 150.0
    now[0] = 151.0
    assert watch.read() == 4.0
    watch.start(10.0)
    now[0] = 152.0
    assert watch.read() == 11.0


def test_tensorboard_gets_the_numbers_of_the_log(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the package tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = small(tmp_path / "run", iterations=2, tensorboard=True)
    train_student(config)
    events = EventAccumulator(str(config.output / "tensorboard"))
    events.Reload()
    for line in RunFolder(config.output).records():
        if "loss" in line:
            for name, value in (("loss", line["loss"]), ("weighted/value", line["weighted"]["value"])):
                (logged,) = [event.value for event in events.Scalars(name) if event.step == line["step"]]
                assert logged == pytest.approx(value)
    assert "validation/mean_iou" in events.Tags()["scalars"]


def test_tensorboard_without_its_package_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    options = ["--distillation", "none", "--dataset.image-size", "64", "64", "--batch", "4", "--iterations", "1"]
    assert main(["train", "demo", *options, "--tensorboard", "--output", str(tmp_path / "run")]) == 2
    assert "--tensorboard needs the package tensorboard; install it" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_peak_memory_sees_what_was_held_and_forgets_what_was_before() -> None:
    device = torch.device("cpu")
    if not forget_peak_memory(device):
        pytest.skip("this system cannot reset the peak resident size of a process")
    held = torch.ones(50_000_000)
    del held
    large = peak_memory(device)
    forget_peak_memory(device)
    small = peak_memory(device)
    assert large is not None
    assert small is not None
    assert 180e6 < large - small < 260e6
