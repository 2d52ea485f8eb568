"""Recognising finished runs, going on with interrupted ones, refusing others; on generated scenes."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import sward.reproduce
from sward import data, presets
from sward.cli.main import main
from sward.config import DistillationConfig
from sward.config_json import differences
from sward.reproduce.experiments import EvaluationSet, method, teacher_of
from sward.reproduce.experiments import sward as sward_variant
from sward.reproduce.options import Options
from sward.reproduce.study import Study
from sward.reproduce.tables import Costs
from sward.runs import load_distillation, train
from sward.training import checkpoints
from sward.training.run_folder import RunFolder
from tests.support.training_runs import use_few_images

COMMAND = ["reproduce", "methods", "--preset", "demo", "--output", "out"]
QUICK = [*COMMAND, "--iterations", "2", "--only", "none", "sward"]


pytestmark = pytest.mark.usefixtures("few_images")


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    count_no_costs(monkeypatch)


def count_no_costs(patch: pytest.MonkeyPatch) -> None:
    """Counting FLOPs at 512 pixels takes longer than these runs do; test_tables.py holds the count to the paper's."""
    counted = {"unext": Costs(1.0, 2.0), "hiera_demo": Costs(3.0, None), "vit_small_dinov2": Costs(3.0, None)}
    patch.setattr(sward.reproduce, "model_costs", lambda table: counted)


def table_rows(path: Path) -> dict[str, dict[str, str]]:
    """Lines of a CSV table by their first column."""
    return {row["method"]: row for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines())}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the run folders that training was started in."""
    return started_runs(monkeypatch)


def started_runs(patch: pytest.MonkeyPatch) -> list[str]:
    started: list[str] = []
    fit = train.fit

    def spy(*arguments: object, **options: object) -> object:
        started.append(arguments[4].path.name)  # type: ignore[attr-defined]
        return fit(*arguments, **options)  # type: ignore[arg-type]

    patch.setattr(train, "fit", spy)
    return started


class FirstCall(NamedTuple):
    """What the first call of `QUICK` did."""

    folder: Path
    """Where it was called."""
    trained: list[str]
    printed: str


@pytest.fixture(scope="module")
def first_call(tmp_path_factory: pytest.TempPathFactory) -> FirstCall:
    """Call `QUICK` once for all tests that go on from there; they work on copies."""
    folder = tmp_path_factory.mktemp("first-call")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.chdir(folder)
        use_few_images(patch)
        count_no_costs(patch)
        trained = started_runs(patch)
        assert main(QUICK) == 0
    return FirstCall(folder, trained, printed.getvalue())


@pytest.fixture
def first_call_here(first_call: FirstCall, in_an_empty_folder: None) -> FirstCall:
    """Leave the output of that call in this test's folder."""
    shutil.copytree(first_call.folder / "out", "out")
    return first_call


def test_runs_are_trained_once_and_the_table_holds_their_scores(first_call_here: FirstCall, trained: list[str]) -> None:
    assert first_call_here.trained == ["teacher", "none-seed0", "sward-seed0"]
    assert "| + SWARD | 1 |" in first_call_here.printed
    assert "| + FreeKD | 0 | - | - | - | - | - | - |" in first_call_here.printed

    rows = table_rows(Path("out/methods-demo.csv"))
    scores = json.loads(Path("out/demo/sward-seed0/evaluation-scenes-val-last.json").read_text())
    assert scores["checkpoint"] == "last"
    assert float(rows["+ SWARD"]["scenes mIoU mean"]) == pytest.approx(100 * scores["mean_iou"])
    cost = json.loads(Path("out/demo/sward-seed0/cost.json").read_text())
    assert cost["steps"] == 2
    assert float(rows["+ SWARD"]["s/step mean"]) == pytest.approx(cost["seconds"] / 2)

    assert main(QUICK) == 0
    assert trained == []

    # Scores of other weights, as `sward evaluate` leaves them when it is called before the end of a run.
    file = Path("out/demo/sward-seed0/evaluation-scenes-val-last.json")
    file.write_text(json.dumps({**scores, "weights": "0" * 16, "mean_iou": 0.9}))
    assert main(QUICK) == 0
    assert json.loads(file.read_text()) == scores
    assert float(table_rows(Path("out/methods-demo.csv"))["+ SWARD"]["scenes mIoU mean"]) < 90

    assert main([*QUICK[:-1], "--seeds", "2"]) == 0
    assert trained == ["none-seed1"]
    rows = table_rows(Path("out/methods-demo.csv"))
    assert (rows["student alone"]["scenes mIoU n"], rows["+ SWARD"]["scenes mIoU n"]) == ("2", "1")


@pytest.mark.usefixtures("first_call_here")
def test_another_configuration_in_the_folder_is_refused_before_any_work(
    trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*COMMAND, "--iterations", "3"]) == 2
    assert (
        "sward reproduce: out/demo/teacher holds a run with another configuration: iterations is 2, not 3; "
        "choose another --output, or remove that folder to train it again" in capsys.readouterr().err
    )
    assert trained == []


@pytest.mark.usefixtures("first_call_here")
def test_a_student_of_another_teacher_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Its configuration is the same, and a table would set it beside students of the new teacher."""
    student = Path("out/demo/sward-seed0")
    assert load_distillation(student) is not None
    path = Path("out/demo/teacher/checkpoints/best.pt")
    state = checkpoints.load(path)
    name = next(key for key, value in state["model"].items() if value.is_floating_point())
    state["model"][name] += 1
    checkpoints.save(path, state)
    assert main(QUICK) == 2
    message = capsys.readouterr().err
    assert f"{student} holds a student of another teacher than that in out/demo/teacher; choose another" in message
    with pytest.raises(ValueError, match=f"the teacher of the run in {student} must be the one that taught it"):
        load_distillation(student)


def test_runs_on_other_data_are_refused(trained: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No configuration holds the folder of the data, and no table may compare runs on two sets of frames."""
    root = tmp_path / "cvc_colondb"
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    half = np.repeat(np.array([[0, 255]], np.uint8), 4, axis=1).repeat(6, axis=0)
    for number in range(1, 381):
        Image.new("RGB", (8, 6), (number % 256, number // 256, 0)).save(root / f"images/{number}.png")
        Image.fromarray(half).save(root / f"masks/{number}.png")
    words = ["reproduce", "methods", "--preset", "colondb-small", "--data", str(tmp_path), "--output", "out"]
    words += ["--only", "none", "--iterations", "1"]
    assert main(words) == 0
    frame = sorted(RunFolder(Path("out/colondb-small/none-seed0")).read_frames()["train"])[0]
    mask = root / f"masks/{frame}.png"
    original = mask.read_bytes()
    Image.fromarray(255 - half).save(mask)
    assert main(words) == 0  # Nothing is left to train.
    assert main([*words, "--seeds", "2"]) == 2
    said = capsys.readouterr().err
    different = f"in train, the mask of frame {frame!r} has changed"
    assert f"the data set now holds other images or masks than out/colondb-small/none-seed0: {different}" in said
    assert trained == ["none-seed0"]

    mask.write_bytes(original)
    scores = Path("out/colondb-small/none-seed0/evaluation-cvc_colondb-test.json")
    before = json.loads(scores.read_text())
    frame = data.build("cvc_colondb", "test", train=False, root=tmp_path, split_by="ratio").pairs[0].name  # type: ignore[attr-defined]
    Image.fromarray(255 - half).save(root / f"masks/{frame}.png")
    assert main([*words, "--seeds", "2"]) == 0
    assert trained == ["none-seed0", "none-seed1"]
    after = json.loads(scores.read_text())
    assert (after["frames"] == before["frames"], after["dice"] == before["dice"]) == (False, False)
    kept = Path("out/colondb-small/none-seed1/frames.json")
    sums = json.loads(kept.read_text())
    del sums["val"][sorted(sums["val"])[0]]
    kept.write_text(json.dumps(sums))
    assert main([*words, "--seeds", "2"]) == 2
    assert (
        "out/colondb-small/none-seed1 was trained on other images or masks than out/colondb-small/none-seed0: in val, "
        "frame" in capsys.readouterr().err
    )


def test_an_interrupted_run_goes_on_to_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        main(["reproduce", "methods", "--preset", "demo", "--output", "whole", "--epochs", "4", "--only", "none"]) == 0
    )

    real = checkpoints.save
    saved: list[Path] = []

    def interrupt(path: Path, state: dict[str, object], **options: object) -> None:
        real(path, state, **options)
        saved.append(path)
        if path.name == "last.pt":
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save", interrupt)
    assert (
        main(["reproduce", "methods", "--preset", "demo", "--output", "out", "--epochs", "4", "--only", "none"]) == 130
    )
    monkeypatch.setattr(checkpoints, "save", real)
    study = Study(Options("methods", output=Path("out"), epochs=4))
    run = method("demo", "none")
    assert study.state(run, 0) == "started"
    assert checkpoints.load(study.folder(run, 0).last)["step"] == 4

    assert main(["reproduce", "methods", "--preset", "demo", "--output", "out", "--epochs", "4", "--only", "none"]) == 0
    assert study.state(run, 0) == "finished"
    whole, resumed = (checkpoints.load(Path(name) / "demo/none-seed0/checkpoints/last.pt") for name in ("whole", "out"))
    assert whole["step"] == resumed["step"] == 8
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, resumed["model"][name]), name


def test_dry_run_says_everything_and_does_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "methods", "--preset", "demo", "--seeds", "2", "--output", "out", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "demo/sward-seed1: new" in printed
    assert "sward train demo --seed 1 --output out/demo/sward-seed1 --teacher.run out/demo/teacher" in printed
    assert "sward train-masks demo --method freekd" in printed
    assert not Path("out").exists()


def test_the_printed_command_trains_the_same_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["reproduce", "questions", "--preset", "demo", "--iterations", "1", "--output", "out", "--dry-run"]) == 0
    )
    printed = capsys.readouterr().out.splitlines()
    study = Study(Options("questions", preset="demo", iterations=1, output=Path("out")))
    words = next(line for line in printed if "out/demo/sward-window-4-seed0" in line).split()[1:]
    assert main(["train-teacher", "demo", "--iterations", "1", "--output", "out/demo/teacher"]) == 0
    assert main(words) == 0
    assert study.state(sward_variant("demo", "window-4", window_size=(4,)), 0) == "started"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--iterations", "2", "--epochs", "2"], "only one of iterations and epochs may be set, got 2 and 2"),
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
        (
            ["--preset", "own", "--dry-run"],
            "preset must be one that names its data set, got 'own', which is for a folder",
        ),
        (["--image", "-1"], "image must be left out for methods; it belongs to figure1, figure3, attention"),
        (["--pixel", "3", "3"], "pixel must be left out for methods; it belongs to attention"),
        (["--target", "car"], "target must be left out for methods; it belongs to figure1, attention"),
        (["--only", "swrd"], "only must name runs of methods, got 'swrd'; they are at, cirkd"),
        (["--preset", "clinicdb-small", "--data", "nowhere"], "there is no pretrained trunk at checkpoints/vit_small"),
        (["--preset", "clinicdb-small", "--data", "nowhere", "--untrained-trunk"], "CVC-ClinicDB not found"),
    ],
)
def test_mistakes_end_in_one_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, *words]) == 2
    assert sentence in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_preset_is_refused_where_the_paper_sets_the_pairs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "table3", "--preset", "demo", "--output", "out", "--dry-run"]) == 2
    assert "preset must be None for table3, got 'demo'; use methods instead" in capsys.readouterr().err


def test_differences_name_the_field_and_leave_out_where_a_run_works() -> None:
    one, other = DistillationConfig(), DistillationConfig()
    other.output, other.dataset.root, other.dataset.workers, other.resume = Path("a"), Path("b"), 3, True
    other.teacher.run, other.device = Path("c"), "cpu"
    assert differences(one, other) == []
    other.optimizer.lr = 0.5
    assert differences(one, other) == ["optimizer.lr is 0.001, not 0.5"]


def test_images_without_masks_may_lie_elsewhere_but_addresses_stay() -> None:
    def compared(*pairs: tuple[str, str]) -> list[str]:
        before, after = zip(*pairs)
        return differences(DistillationConfig(unlabelled=before), DistillationConfig(unlabelled=after))

    assert compared(("runs/list.txt", "/moved/runs/list.txt"), ("/a/frames", "frames")) == []
    assert len(compared(("list.txt", "other.txt"))) == 1
    assert len(compared(("/a/{0..9}.tar", "/b/{0..9}.tar"))) == 1


def test_missing_unseen_images_leave_a_column_empty_and_say_so(
    monkeypatch: pytest.MonkeyPatch, trained: list[str]
) -> None:
    study = Study(Options("methods", preset="demo", iterations=1, output=Path("out"), data=Path("nowhere")))
    run = method("demo", "none")
    study.train(run, 0)
    unseen = EvaluationSet("CVC-ColonDB, unseen", "all", (("mDice", "dice"),), dataset="cvc_colondb", optional=True)
    assert study.evaluation(run, 0, unseen) is None
    own = study.evaluation(run, 0, EvaluationSet("scenes", "val", (("mIoU", "mean_iou"),)))
    assert own is not None
    assert not math.isnan(own.mean_iou)


def test_teacher_has_one_seed_and_comes_first() -> None:
    study = Study(Options("methods", preset="demo", seeds=2))
    schedule = study.schedule([method("demo", "none"), method("demo", "sward"), teacher_of("demo")][::-1])
    assert [(run.name, seed) for run, seed in schedule] == [
        ("teacher", 0),
        ("sward", 0),
        ("none", 0),
        ("sward", 1),
        ("none", 1),
    ]


def test_masks_of_a_small_preset_take_fewer_steps_than_its_student() -> None:
    study = Study(Options("peers"))
    small = [name for name in presets.names() if presets.get(name).student.dataset.image_size < (256, 256)]
    assert {"demo", "clinicdb-random-small", "clinicdb-small-10"} < {*small}
    for name in small:
        assert (study.masks_config(method(name, "maskd"), "maskd").steps or 10_000) <= 300, name
