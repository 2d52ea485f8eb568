"""A run distils the teacher that its configuration asks for, or none, and says what that teacher has learned from."""

import json
import os
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sward import data, models
from sward.cli.main import main
from sward.cli.starting import apply_words
from sward.config import DatasetConfig, DistillationConfig, TeacherConfig, TeacherTrainingConfig
from sward.runs import train_student, train_teacher
from sward.runs.teachers import introduce_teacher, load_teacher
from sward.training.interruption import TrainingInterrupted
from sward.training.run_folder import KeptData, RunFolder
from sward.training.state import TrainingState
from tests.support.folder_data import write_pairs
from tests.support.training_runs import small

SCENES = data.describe("scenes")
RUN = Path("runs/demo/teacher")


@pytest.fixture(autouse=True)
def trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Leave a run of `timm:convnext_atto` where the preset demo looks for its teacher, `hiera_demo`."""
    monkeypatch.chdir(tmp_path)
    network = models.build("timm:convnext_atto", SCENES.num_classes, depths="(1,1,1,1)")
    RUN.mkdir(parents=True)
    RunFolder(RUN).start(
        TeacherTrainingConfig(model="timm:convnext_atto", model_options={"depths": "(1,1,1,1)"}), SCENES
    )
    torch.save({"model": network.state_dict()}, RunFolder(RUN).best)
    Path("bare").mkdir()
    Path("bare/config.json").write_text(json.dumps({"model_type": "segformer"}))


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (TeacherConfig(run=RUN, untrained=True), "only one of .* got teacher.run and teacher.untrained"),
        (TeacherConfig(run=RUN, weights=Path("w.pt")), "only one of .* got teacher.run and teacher.weights"),
        (TeacherConfig(weights=Path("w.pt"), untrained=True), "only one of .* got teacher.weights and teacher.untr"),
        (TeacherConfig(name="smp:Unet", run=RUN), "teacher.name must be 'timm:convnext_atto', .* got 'smp:Unet'"),
        (TeacherConfig(name="smp:Unet"), "teacher.name must be 'timm:convnext_atto', .* got 'smp:Unet'"),
        (TeacherConfig(options={"depths": "(9,9,9,9)"}), "teacher.options must be .*1,1,1,1.* got .*9,9,9,9"),
    ],
)
def test_another_teacher_than_the_one_asked_for_is_refused(teacher: TeacherConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_teacher(teacher, "demo", SCENES)


def test_a_folder_without_weights_is_not_replaced_by_a_run() -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="must be a transformers folder with weights, got 'transformers:bare' without"):
        load_teacher(TeacherConfig(name="transformers:bare"), "demo", SCENES)


@pytest.mark.parametrize(
    "teacher",
    [
        TeacherConfig(),
        TeacherConfig(run=RUN),
        TeacherConfig(name="timm:convnext_atto"),
        TeacherConfig(options={"depths": "(1,1,1,1)"}),
    ],
)
def test_the_run_names_its_network_where_nobody_asks_for_one(teacher: TeacherConfig) -> None:
    loaded = load_teacher(teacher, "demo", SCENES)
    assert (loaded.name, loaded.options) == ("timm:convnext_atto", {"depths": "(1,1,1,1)"})
    stored = torch.load(RunFolder(RUN).best)["model"]
    assert all(torch.equal(value, stored[key]) for key, value in loaded.network.state_dict().items())


def test_a_file_that_names_another_teacher_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text("epochs: 1\ndataset: {image_size: [64, 64]}\nteacher: {name: 'smp:Unet'}")
    assert main(["train", "mine.yaml"]) == 2
    assert "teacher.name must be 'timm:convnext_atto'" in capsys.readouterr().err
    assert not Path("runs/demo/sward-seed0").exists()


def test_words_replace_the_source_of_a_file() -> None:
    config = DistillationConfig(teacher=TeacherConfig(run=RUN))
    apply_words(config, ["--teacher.untrained"])
    assert config.teacher.run is None
    config = DistillationConfig(teacher=TeacherConfig(untrained=True))
    apply_words(config, ["--teacher.run=runs/demo/teacher"])
    assert not config.teacher.untrained


def on_folder(root: Path) -> DatasetConfig:
    return DatasetConfig(name="folder", root=root.absolute(), image_size=(32, 32), num_classes=2)


def teach(**changes: Any) -> float:
    """Train a teacher on the folder `theirs` for six steps into `runs/own/teacher`; return its best score."""
    config = TeacherTrainingConfig(
        preset="own",
        model="hiera_demo",
        dataset=on_folder(Path("theirs")),
        batch=2,
        epochs=3,
        evaluate_every=1,
        train_trunk=True,
    )
    for name, value in changes.items():
        setattr(config, name, value)
    return train_teacher(config).best_score


def warned_of(root: Path) -> list[str]:
    """Distil the teacher of the preset `own` on the folder `root`; return what the run says of the teacher."""
    shutil.rmtree("student", ignore_errors=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_student(
            small(
                Path("student"),
                preset="own",
                dataset=on_folder(root),
                batch=2,
                iterations=1,
                distillation="kd",
                teacher=TeacherConfig(),
            )
        )
    return [str(each.message) for each in caught if str(each.message).startswith("the teacher")]


def test_an_unfinished_teacher_is_named_with_its_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, teacher = write_pairs(Path("theirs")).absolute(), Path("runs/own/teacher")
    update = TrainingState.update

    def stops_at_the_fourth_step(self: TrainingState, *arguments: Any, **options: Any) -> Any:
        norm = update(self, *arguments, **options)
        if self.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return norm

    with monkeypatch.context() as patch:
        patch.setattr(TrainingState, "update", stops_at_the_fourth_step)
        with pytest.raises(TrainingInterrupted):
            teach()
    assert warned_of(folder) == [
        f"the teacher in {teacher} is unfinished, at step 4 of 6; finish it with the command that began it and --resume"
    ]
    assert f"teacher: {teacher}, trained on folder in {folder}, step 4 of 6, best mean_iou" in capsys.readouterr().out
    best = teach(resume=True)
    assert warned_of(folder) == []
    assert f"step 6 of 6, best mean_iou on validation {100 * best:.2f} %\n" in capsys.readouterr().out
    # A checkpoint that nobody distils may be damaged.
    RunFolder(teacher).last.write_bytes(b"damaged")
    assert warned_of(folder) == []
    assert f"teacher: {teacher}, trained on folder in {folder}\n" in capsys.readouterr().out


def test_a_teacher_that_learned_from_another_folder_is_named_with_both() -> None:
    theirs, ours = write_pairs(Path("theirs")).absolute(), write_pairs(Path("ours")).absolute()
    teach(epochs=1)
    assert warned_of(ours) == []  # a copy
    for path in ours.glob("images/train/*.png"):
        Image.fromarray(np.asarray(Image.open(path))[::-1].copy()).save(path)
    assert warned_of(ours) == [
        f"the teacher in runs/own/teacher was trained on folder in {theirs} and the student learns from folder in "
        f"{ours}; unless that is meant, name another run with --teacher.run"
    ]
    theirs.rename("moved")
    assert warned_of(Path("moved")) == []


def test_the_default_folder_may_hold_the_teacher_of_another_data_set(recwarn: pytest.WarningsRecorder) -> None:
    run, scenes = RunFolder(Path("runs/own/teacher")), data.build("scenes", "train", train=True, image_size=32)
    run.path.mkdir(parents=True)
    run.start(TeacherTrainingConfig(dataset=DatasetConfig(name="cvc_clinicdb")), SCENES, KeptData())
    config = DistillationConfig(preset="own", dataset=DatasetConfig(name="scenes"))
    config.teacher.run = run.path  # asked for by name
    introduce_teacher(run, config, scenes)
    assert not recwarn
    config.teacher.run = None
    introduce_teacher(run, config, scenes)
    assert "was trained on cvc_clinicdb and the student learns from scenes;" in str(recwarn.pop().message)
