"""Model cards of runs and exported files."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from sward.cli.main import main
from sward.config import DistillationConfig, TeacherConfig, TeacherTrainingConfig
from sward.data import DatasetInfo
from sward.losses.masks import state_fingerprint
from sward.reporting.card import write_card
from sward.reporting.runs import group, read_runs, with_companions
from sward.training import checkpoints, run_folder
from sward.training.run_folder import KeptData, RunFolder
from tests.support.deployable import make_run, register

INFO = DatasetInfo("two", ("background", "<script>x</script>"), ((0, 0, 0), (255, 255, 255)))


def score_on_test(folder: Path, dice: float) -> None:
    scores = {"dice": dice, "mean_iou": dice / 2, "images": 31, "class_iou": {}}
    (folder / "evaluation-two-test.json").write_text(json.dumps(scores))


def student(folder: Path, seed: int, dice: float | None) -> Path:
    folder.mkdir(parents=True)
    RunFolder(folder).start(DistillationConfig(seed=seed), INFO)
    if dice is not None:
        score_on_test(folder, dice)
    return folder


def sections(path: Path) -> dict[str, str]:
    parts = re.split(r"^## (.*)\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(["", *parts[1::2]], parts[0::2]))


def test_scores_have_an_interval_where_several_seeds_lie_beside_each_other(tmp_path: Path) -> None:
    one, _, _ = (student(tmp_path / f"sward-seed{seed}", seed, dice) for seed, dice in enumerate((0.60, 0.64, 0.62)))
    # 62 +- 4.303 * 2 / sqrt(3)
    assert "- Dice per image %: 62.00 [57.0, 67.0]" in sections(write_card(one))["Scores"]
    assert "mean over 3 seeds with 95 % intervals" in sections(write_card(one))["Scores"]
    # Another recipe is another network, and damaged neighbours do no harm.
    config = DistillationConfig(seed=3, epochs=7)
    (tmp_path / "longer").mkdir()
    RunFolder(tmp_path / "longer").start(config, INFO)
    score_on_test(tmp_path / "longer", 0.9)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "broken" / "dataset.json").write_text("{")
    assert "- Dice per image %: 62.00 [57.0, 67.0]" in sections(write_card(one))["Scores"]
    # A copy of a run is no other seed.
    shutil.copytree(one, tmp_path / "backup")
    assert "- Dice per image %: 62.00 [57.0, 67.0]" in sections(write_card(one))["Scores"]
    alone = student(tmp_path / "elsewhere" / "sward-seed0", 0, 0.60)
    assert "- Dice per image %: 60.00\n" in sections(write_card(alone))["Scores"]
    assert "one seed, so the spread over seeds is unknown" in sections(write_card(alone))["Scores"]


def test_a_card_names_data_teacher_licence_and_what_it_is_not_for(tmp_path: Path) -> None:
    config = TeacherTrainingConfig(
        model="medsam2_hiera_tiny_resunetpp", trunk_checkpoint=Path("/weights/MedSAM2_latest.pt"), seed=5
    )
    (tmp_path / "teacher").mkdir()
    RunFolder(tmp_path / "teacher").start(config, INFO)
    score_on_test(tmp_path / "teacher", 0.8)
    folder = student(tmp_path / "sward-seed0", 0, None)
    counts = {"train": {"masks": 12, "pixels of background": 300, "pixels of <script>x</script>": 100}}
    (folder / "labels.json").write_text(json.dumps(counts))
    card = sections(write_card(folder))
    assert card["Data"].startswith("\nTrained on two.\n- train: 12 images; background 75.00 %, ")
    assert "Distilled with SWARD from medsam2_hiera_tiny_resunetpp." in card["Teacher and student"]
    assert "Teacher, two-test, 31 images: mIoU % 40.00, Dice per image % 80.00" in card["Teacher and student"]
    assert "The network has not been scored." in card["Scores"]
    assert "The weights of MedSAM2 are licensed under CC-BY-SA 4.0" in card["Licence"]
    assert "SAM 2.1" not in card["Licence"]
    assert "Medical decisions." in card["Not for"]
    text = (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "<script>" not in text
    assert "&lt;script&gt;x&lt;/script&gt;" in text
    assert "This network is itself a teacher." in write_card(tmp_path / "teacher").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("teacher", "name"),
    [
        (TeacherConfig(name="vit", weights=Path("vit.pt")), "vit"),
        (TeacherConfig(name="vit", untrained=True), "vit"),
        (TeacherConfig(name="transformers:here"), "transformers:here"),
        (TeacherConfig(name="vit"), "hiera_demo"),
        (TeacherConfig(name="vit", run=Path("moved")), "hiera_demo"),
    ],
)
def test_a_teacher_beside_a_run_counts_only_where_the_run_can_have_learned_from_it(
    tmp_path: Path, teacher: TeacherConfig, name: str
) -> None:
    for folder, config in (
        ("teacher", TeacherTrainingConfig(model="hiera_demo")),
        ("sward-seed0", DistillationConfig(teacher=teacher)),
    ):
        (tmp_path / folder).mkdir()
        RunFolder(tmp_path / folder).start(config, INFO)
    assert f"Distilled with SWARD from {name}." in write_card(tmp_path / "sward-seed0").read_text(encoding="utf-8")


def test_a_teacher_that_is_not_at_hand_is_named_by_its_folder(tmp_path: Path) -> None:
    folder = student(tmp_path / "sward-seed0", 0, None)
    assert "Distilled with SWARD from the teacher in runs/demo/teacher." in write_card(folder).read_text(
        encoding="utf-8"
    )


def test_students_of_two_teachers_are_two_groups(tmp_path: Path) -> None:
    runs = []
    for seed, teacher in ((0, "one"), (1, "one"), (2, "other")):
        folder = tmp_path / f"sward-seed{seed}"
        folder.mkdir()
        config = DistillationConfig(seed=seed, teacher=TeacherConfig(run=tmp_path / teacher))
        RunFolder(folder).start(config, INFO)
        runs.append(folder)
    assert [[run.config.seed for run in each.runs] for each in group(read_runs(runs))] == [[0, 1], [2]]


def test_a_teacher_trained_anew_in_its_folder_is_another_teacher(tmp_path: Path) -> None:
    first, second = (torch.full((2,), float(value)) for value in range(2))
    (tmp_path / "teacher").mkdir()
    RunFolder(tmp_path / "teacher").start(TeacherTrainingConfig(model="hiera_demo"), INFO)
    checkpoints.save(RunFolder(tmp_path / "teacher").best, {"model": {"weight": second}})
    runs = []
    for seed, weights in ((0, first), (1, second), (2, second)):
        folder = tmp_path / f"sward-seed{seed}"
        folder.mkdir()
        RunFolder(folder).start(DistillationConfig(seed=seed, teacher=TeacherConfig(run=tmp_path / "teacher")), INFO)
        identity = {"teacher": state_fingerprint({"weight": weights})[:16]}
        checkpoints.save(RunFolder(folder).last, {"model": {}, "identity": identity})
        runs.append(folder)
    assert [[run.config.seed for run in each.runs] for each in group(read_runs(runs))] == [[0], [1, 2]]
    assert with_companions(runs[1:]) == [*runs[1:], tmp_path / "teacher"]
    with pytest.warns(UserWarning, match="the teacher in .*teacher is left out: it has other weights than when it"):
        assert with_companions(runs[:1]) == runs[:1]


@pytest.mark.usefixtures("few_images")
def test_scores_of_earlier_weights_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)
    make_run(tmp_path / "run")
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert main(["evaluate", str(tmp_path / "run"), "--split", "train"]) == 0
    run_folder._file_sum.cache_clear()
    (run,) = read_runs([tmp_path / "run"])
    assert {"scenes-val", "scenes-train"} <= run.evaluations.keys()
    assert run_folder._file_sum.cache_info().misses == 1  # a checkpoint may have gigabytes
    with run.folder.best.open("ab") as file:
        file.write(b"trained on")
    with pytest.warns(UserWarning, match="evaluation-scenes-val.json is left out: the run was trained on since"):
        (run,) = read_runs([tmp_path / "run"])
    assert "scenes-val" not in run.evaluations


def test_scores_of_other_images_are_not_averaged(tmp_path: Path) -> None:
    paths = [student(tmp_path / f"sward-seed{seed}", seed, 0.6 + seed / 10) for seed in range(2)]
    for path, frames, second in zip(paths, ("new", "old"), (2, 1)):
        file = path / "evaluation-two-test.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "root": "/data", "frames": frames}))
        os.utime(file, (second, second))
    with pytest.warns(UserWarning, match="two-test of sward-seed1 are left out: they are on other images or masks"):
        runs = read_runs(paths)
    assert [list(run.evaluations) for run in runs] == [["two-test"], []]
    # A card counts those on the images of its own run.
    for path, dice in zip(paths, (60, 70)):
        assert f"- Dice per image %: {dice}.00\n" in sections(write_card(path))["Scores"]


def test_scores_on_two_splits_of_one_data_set_are_kept(tmp_path: Path) -> None:
    paths = [student(tmp_path / f"sward-seed{seed}", seed, 0.6) for seed in range(2)]
    for path, split_by in zip(paths, ("sequence", "ratio")):
        config = DistillationConfig(seed=0)
        config.dataset.split_by = split_by
        RunFolder(path).start(config, INFO)
        file = path / "evaluation-two-test.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "root": "/data", "frames": split_by}))
    assert all("two-test" in run.evaluations for run in read_runs(paths))


@pytest.mark.usefixtures("few_images")
def test_runs_evaluations_and_exports_leave_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)
    make_run(tmp_path / "run")
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    stored = json.loads((tmp_path / "run" / "evaluation-scenes-val.json").read_text())
    line = f"- mIoU %: {100 * stored['mean_iou']:.2f}\n"
    assert line in sections(tmp_path / "run" / "MODEL_CARD.md")["Scores"]
    assert main(["export", str(tmp_path / "run"), "-o", str(tmp_path / "student.onnx"), "--check", "2"]) == 0
    card = (tmp_path / "student.onnx.md").read_text(encoding="utf-8")
    assert "File `student.onnx`, made from the run `run`" in card
    assert "- File: fp32; takes uint8 RGB, returns logits\n- Proof on 2 images of the val split: 0.0000 %" in card
    assert line in card
    assert main(["export", str(tmp_path / "run"), "-o", str(tmp_path / "new.pt2"), "--check", "0"]) == 0
    assert "The file was not compared with PyTorch." in (tmp_path / "new.pt2.md").read_text(encoding="utf-8")


def test_a_card_says_how_many_images_had_no_masks_and_where_the_teacher_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kept = KeptData(frames={"unlabelled": {"a": "1", "b": "2"}})
    for name, teacher in (("random", TeacherConfig(untrained=True)), ("taught", TeacherConfig())):
        config = DistillationConfig(preset="own", teacher=teacher, unlabelled=("photos",))
        (tmp_path / "away" / name).mkdir(parents=True)
        RunFolder(tmp_path / "away" / name).start(config, INFO, kept)
    Path("runs/own/teacher").mkdir(parents=True)
    RunFolder(Path("runs/own/teacher")).start(TeacherTrainingConfig(model="hiera_demo"), INFO)
    random, taught = (sections(write_card(tmp_path / "away" / name)) for name in ("random", "taught"))
    for card in (random, taught):
        assert "- without masks: 2 images, of which the student learns from the teacher alone" in card["Data"]
    assert "The teacher's weights were random." in random["Teacher and student"]
    assert "Distilled with SWARD from hiera_demo." in taught["Teacher and student"]
    assert "The run of the teacher has no scores." in taught["Teacher and student"]
