"""What a run belongs to: its data, its teacher, its weights, its folder."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sward import models
from sward.cli.main import main
from sward.config import DatasetConfig, DistillationConfig, TeacherConfig, TeacherTrainingConfig
from sward.data import fixed_root
from sward.data.frames import PIECE, WHOLE, frame_sums
from sward.reporting.runs import read_runs
from sward.runs import evaluate_run, load, train_student, train_teacher
from sward.training import checkpoints
from sward.training.run_folder import RunFolder
from tests.support.folder_data import build, write_pairs
from tests.support.training_runs import SMALL_SCENES, contents, on_folder, small, teach


def refuse(config: DistillationConfig, message: str) -> None:
    """Assert that a run is refused and that its folder stays as it is."""
    before = contents(config.output)
    with pytest.raises(ValueError, match=message):
        train_student(config)
    assert contents(config.output) == before


def repaint(path: Path) -> None:
    """Turn a picture upside down: another file with as many pixels of every value."""
    Image.fromarray(np.asarray(Image.open(path))[::-1].copy()).save(path)


@pytest.mark.parametrize(
    ("file", "difference"),
    [
        ("images/train/train1.png", "got other files in train: the image of frame 'train1' has changed"),
        ("masks/val/val0.png", "got other files in val: the mask of frame 'val0' has changed"),
    ],
)
def test_a_run_is_not_resumed_on_changed_files(trained: Path, file: str, difference: str) -> None:
    repaint(trained / "data" / file)
    refuse(on_folder(trained / "data", trained / "run", resume=True, iterations=4), difference)
    repaint(trained / "data" / file)
    train_student(on_folder(trained / "data", trained / "run", resume=True, iterations=4))
    assert checkpoints.load(trained / "run/checkpoints/last.pt")["step"] == 4


def test_a_checkpoint_is_not_continued_on_other_data(trained: Path) -> None:
    """The fingerprint lies in the checkpoint, not only beside it."""
    (trained / "run/frames.json").unlink()
    repaint(trained / "data/images/train/train1.png")
    longer = on_folder(trained / "data", trained / "run", resume=True, iterations=4)
    refuse(longer, "the train data must be that with which the run in .* began, got another")


def test_a_run_is_not_resumed_on_another_split_or_other_labels(trained: Path) -> None:
    run, other = trained / "run", write_pairs(trained / "other", train=5)
    (run / "frames.json").unlink()
    # The folder must not name the other data afterwards: an evaluation would score the run on them.
    refuse(on_folder(other, run, resume=True, iterations=4), "4 masks in train, got 5")
    (run / "split.csv").write_text("frame_id,split\ntrain0,val\n")
    refuse(on_folder(other, run, resume=True, iterations=4), "the frames must be those in .*split.csv, with which the")


def test_copied_data_in_another_folder_is_the_same_data(trained: Path) -> None:
    (trained / "data").rename(trained / "moved")
    train_student(on_folder(trained / "moved", trained / "run", resume=True, iterations=4))


def test_large_files_are_told_apart_by_size_and_three_pieces(tmp_path: Path) -> None:
    dataset = build(write_pairs(tmp_path / "data", classes=3))
    first = dataset.pairs[0].image
    content = bytearray(WHOLE + 2 * PIECE)
    found = set()
    for change in (None, 0, len(content) // 2, -1):
        if change is not None:
            content[change] = 1
        first.write_bytes(content)
        found.add(frame_sums(dataset)[dataset.pairs[0].name])
    first.write_bytes(content + b"\1")
    found.add(frame_sums(dataset)[dataset.pairs[0].name])
    assert len(found) == 5


@pytest.mark.usefixtures("few_images")
def test_a_run_is_not_resumed_with_another_teacher(tmp_path: Path) -> None:
    scenes = DatasetConfig(name="scenes", image_size=(32, 32))
    for name, seed in (("one", 0), ("other", 1)):
        train_teacher(
            TeacherTrainingConfig(
                model="hiera_demo", dataset=scenes, batch=4, iterations=1, train_trunk=True, seed=seed,
                output=tmp_path / name,
            )
        )  # fmt: skip

    def student(teacher: str, **changes: Any) -> DistillationConfig:
        return small(
            tmp_path / "run", dataset=scenes, iterations=1, distillation="kd",
            teacher=TeacherConfig(run=tmp_path / teacher), **changes,
        )  # fmt: skip

    train_student(student("one"))
    refuse(student("other", resume=True), "the teacher must be that with which the run in .* began, got another one")
    train_student(student("one", resume=True))


def head_on(trunk: Path, output: Path, cache: Path, **changes: Any) -> TeacherTrainingConfig:
    return TeacherTrainingConfig(
        **dict(
            model="hiera_demo", trunk_checkpoint=trunk, dataset=DatasetConfig("scenes", image_size=(32, 32), views=1),
            batch=4, iterations=2, cache=cache, output=output,
        ) | changes
    )  # fmt: skip


@pytest.fixture
def trunks(tmp_path: Path) -> list[Path]:
    """Leave two trunks in `a/w.pt` and `b/w.pt`."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        torch.save(models.build("hiera_demo", 2).trunk.state_dict(), tmp_path / name / "w.pt")
    return [tmp_path / name / "w.pt" for name in ("a", "b")]


@pytest.mark.usefixtures("few_images")
@pytest.mark.parametrize("train_trunk", [False, True])
def test_a_teachers_run_is_not_resumed_with_another_trunk(
    trunks: list[Path], train_trunk: bool, tmp_path: Path
) -> None:
    run, caches = tmp_path / "run", [None, None] if train_trunk else [tmp_path / "cache a", tmp_path / "cache b"]
    options: dict[str, Any] = dict(train_trunk=train_trunk)
    train_teacher(head_on(trunks[0], run, caches[0], **options))
    before = contents(run)
    longer: dict[str, Any] = dict(iterations=4, resume=True, **options)
    with pytest.raises(ValueError, match=r"the trunk must be that with which the run in .* began, got another one"):
        train_teacher(head_on(trunks[1], run, caches[1], **longer))
    assert contents(run) == before
    assert not (tmp_path / "cache b").exists()
    (tmp_path / "moved").mkdir()
    trunks[0].rename(tmp_path / "moved/w.pt")
    train_teacher(head_on(tmp_path / "moved/w.pt", run, caches[0], **longer))
    assert checkpoints.load(run / "checkpoints/last.pt")["step"] == 4


@pytest.mark.usefixtures("few_images")
def test_maps_of_a_restored_trunk_are_never_kept_as_those_of_another_one(trunks: list[Path], tmp_path: Path) -> None:
    train_teacher(head_on(trunks[0], tmp_path / "run", tmp_path / "cache a"))
    last = tmp_path / "run/checkpoints/last.pt"
    state = checkpoints.load(last)
    trunk = state["identity"].pop("trunk")  # runs of earlier versions have none
    checkpoints.save(last, state)
    # Under its own name the trunk finds its maps; nothing goes under the name of the other one.
    kept = contents(tmp_path / "cache a")
    shutil.copytree(tmp_path / "cache a", tmp_path / "cache b")
    resumed = head_on(trunks[1], tmp_path / "run", tmp_path / "cache b", iterations=4, resume=True)
    train_teacher(resumed)
    (folder,) = (tmp_path / "cache b").iterdir()
    assert folder.name == next(iter(kept)).parent.name
    assert checkpoints.load(last)["identity"]["trunk"] == trunk
    train_teacher(head_on(trunks[1], tmp_path / "fresh", tmp_path / "cache b"))
    assert len(list((tmp_path / "cache b").iterdir())) == 2


@pytest.mark.parametrize("name", ["config.json", "dataset.json"])
@pytest.mark.parametrize("kept", [0, 1, 40, -3])
def test_a_damaged_file_of_a_run_is_named(
    trained: Path, name: str, kept: int, capsys: pytest.CaptureFixture[str]
) -> None:
    file = trained / "run" / name
    file.write_text(file.read_text()[:kept])
    for words in (["evaluate", str(trained / "run")], ["report", str(trained / "run")]):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert f"{file} is damaged: " in error
        assert error.count("\n") == 1


def test_weights_that_are_not_finite_are_refused_by_name(trained: Path) -> None:
    path = trained / "run/checkpoints/best.pt"
    state = torch.load(path, weights_only=True)
    name = next(iter(state["model"]))
    state["model"][name].view(-1)[3] = float("nan")
    torch.save(state, path)
    with pytest.raises(ValueError, match=rf"{name} in .*best\.pt must be finite, got nan or infinity"):
        load.load_run(trained / "run")


def test_a_run_is_not_resumed_on_weights_that_are_not_finite(tmp_path: Path) -> None:
    options: dict[str, Any] = dict(distillation="none", iterations=4, checkpoint_every=2)
    train_student(small(tmp_path / "run", **options))
    last = RunFolder(tmp_path / "run").last
    state = torch.load(last, weights_only=True)
    name = next(iter(state["model"]))
    state["model"][name].view(-1)[0] = float("inf")
    torch.save(state, last)
    options["iterations"] = 6
    with pytest.warns(
        UserWarning, match=rf"{name} in .*last\.pt must be finite, got nan .* from the previous checkpoint"
    ):
        train_student(small(tmp_path / "run", **options, resume=True))
    assert torch.load(last, weights_only=True)["step"] == 6
    for path in (last, RunFolder(tmp_path / "run").previous):
        torch.save({**state, "step": 6}, path)
    with pytest.raises(
        ValueError, match=rf"{name} in .*previous\.pt must be finite, .* no earlier checkpoint to resume"
    ):
        train_student(small(tmp_path / "run", **{**options, "iterations": 8}, resume=True))


def test_a_run_is_not_resumed_with_other_masks(tmp_path: Path) -> None:
    teach(tmp_path, iterations=1)
    teacher = TeacherConfig(run=tmp_path / "teacher", masks=tmp_path / "maskd.pt")
    options: dict[str, Any] = dict(distillation="maskd", dataset=SMALL_SCENES, iterations=1)
    train_student(small(tmp_path / "run", **options, teacher=teacher))
    content = torch.load(tmp_path / "maskd.pt", weights_only=True)
    content["state"]["tokens"] += 1
    torch.save(content, tmp_path / "other.pt")
    other = small(tmp_path / "run", **options, teacher=replace(teacher, masks=tmp_path / "other.pt"), resume=True)
    refuse(other, "the masks must be that with which the run in .* began, got another one")
    train_student(small(tmp_path / "run", **options, teacher=teacher, resume=True))


def test_a_run_without_a_root_remembers_where_its_data_was(
    trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(trained)
    monkeypatch.delenv("SWARD_DATA", raising=False)
    config = on_folder(trained / "data", trained / "default")
    config.dataset.root = None
    train_student(config)
    assert RunFolder(trained / "default").read()[0].dataset.root == trained / "data"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    evaluate_run(trained / "default")
    # The variable says it each time, so that a run can be scored on another machine.
    monkeypatch.setenv("SWARD_DATA", str(trained / "data"))
    assert fixed_root("folder", None) is None
    assert fixed_root("scenes", None) is None
    assert fixed_root("folder", Path("x")) == tmp_path / "elsewhere/x"


def test_a_run_is_not_resumed_on_other_unlabelled_images(trained: Path) -> None:
    photos = trained / "photos"
    photos.mkdir()
    for number in range(4):
        shutil.copy(trained / f"data/images/train/train{number}.png", photos / f"{number}.png")
    distilled: dict[str, Any] = dict(distillation="kd", teacher=TeacherConfig(name="hiera_demo", untrained=True))
    config = on_folder(trained / "data", trained / "more", unlabelled=(str(photos),), **distilled)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train_student(config)
        config.resume = True
        repaint(photos / "2.png")
        refuse(config, "got other files in unlabelled: the image of frame 'photos/2' has changed")


def test_teachers_and_trunks_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    teach(tmp_path, iterations=1)
    best = tmp_path / "teacher/checkpoints/best.pt"
    state = torch.load(best, weights_only=True)
    name = next(key for key in state["model"] if key.startswith("trunk."))
    state["model"][name].view(-1)[0] = float("nan")
    torch.save(state, best)
    student = dict(distillation="kd", dataset=SMALL_SCENES, iterations=1)
    for teacher in (TeacherConfig(run=tmp_path / "teacher"), TeacherConfig(name="hiera_demo", weights=best)):
        with pytest.raises(ValueError, match=rf"{name} in .*best\.pt must be finite"):
            train_student(small(tmp_path / "run", **student, teacher=teacher))
    with pytest.raises(ValueError, match=rf"{name.removeprefix('trunk.')} in .*best\.pt must be finite"):
        train_teacher(head_on(best, tmp_path / "head", tmp_path / "cache"))
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "head").exists()


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("frames.json", lambda folder: evaluate_run(folder / "run")),
        ("labels.json", lambda folder: train_student(on_folder(folder / "data", folder / "run", resume=True))),
        ("evaluation-folder-val.json", lambda folder: read_runs([folder / "run"])),
    ],
)
def test_what_a_run_kept_of_its_data_is_named_if_damaged(trained: Path, name: str, read: Callable[[Path], Any]) -> None:
    evaluate_run(trained / "run")
    file = trained / "run" / name
    file.write_text(file.read_text()[:20])
    with pytest.raises(ValueError, match=rf"{name} is damaged"):
        read(trained)


def test_a_run_named_as_a_preset_says_how_to_go_on_with_it(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    assert main(["train", "run", "--resume"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.endswith("or by run/config.json --output run --resume")
    assert main(["train", "run/config.json", "--output", "run", "--resume", "--iterations", "3"]) == 0
    assert torch.load(RunFolder(trained / "run").last, weights_only=True)["step"] == 3
