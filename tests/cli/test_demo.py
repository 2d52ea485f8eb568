"""The demo: what it trains on what, what it prints and leaves, and that it repeats."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sward import data
from sward.cli import demo
from sward.cli.main import main
from tests.support.training_runs import use_few_images

RUNS = ("teacher", "none-seed0", "none-seed1", "sward-seed0", "sward-seed1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, list[str]]]:
    """Folder, output and warnings of a demo of two seeds and two steps per run, on few images."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        use_few_images(patch)
        patch.setitem(data.scenes.SPLITS, "test", 3)
        patch.setattr(demo, "UNLABELLED", 9)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            words = ["--iterations", "2", "--seeds", "2", "--processes", "1", "--output", str(folder)]
            assert main(["demo", *words]) == 0
        yield folder, printed.getvalue(), [str(each.message) for each in caught]


def test_demo_ends_with_a_table_an_interval_a_checked_file_and_three_files_to_open(
    finished: tuple[Path, str, list[str]],
) -> None:
    folder, printed, _ = finished
    scores = {
        run: 100 * json.loads((folder / run / "evaluation-scenes-test-last.json").read_text())["mean_iou"]
        for run in RUNS
    }
    for name, runs in (("student alone", "none"), ("student + SWARD", "sward")):
        both = [scores[f"{runs}-seed{seed}"] for seed in (0, 1)]
        line = next(line for line in printed.splitlines() if name in line)
        assert f" {sum(both) / 2:.1f} " in line
        assert f"{both[0]:.1f}  {both[1]:.1f}" in line
    gains = [scores[f"sward-seed{seed}"] - scores[f"none-seed{seed}"] for seed in (0, 1)]
    half = 12.706 * abs(gains[0] - gains[1]) / 2  # Student's t with one degree of freedom, two values
    mean = sum(gains) / 2
    assert f"SWARD gains {mean:+.1f} points of mIoU, 95 % interval [{mean - half:.1f}, {mean + half:.1f}]" in printed
    for name in ("predictions.png", "report.html", "student.onnx"):
        assert f"  {folder / name}  " in printed
        assert (folder / name).stat().st_size > 1000
    assert (folder / "predictions.svg").exists()
    proof = json.loads((folder / "student.onnx.json").read_text())["proof"]
    assert (proof["split"], proof["images"]) == ("test", 3)
    assert 100 * proof["mean_iou"] == pytest.approx(scores["sward-seed0"], abs=0.01)


def test_nobody_learns_from_the_scenes_of_another_role(finished: tuple[Path, str, list[str]]) -> None:
    folder, _, _ = finished
    teacher, alone, sward = (_configuration(folder / run) for run in ("teacher", "none-seed0", "sward-seed0"))
    assert teacher["dataset"]["series"] != alone["dataset"]["series"] == sward["dataset"]["series"]
    assert alone["dataset"]["count"] == sward["dataset"]["count"] == demo.LABELLED
    assert teacher["dataset"]["count"] > 1000 * teacher["batch"]  # more than it takes in: it sees none twice
    assert alone["unlabelled"] == []
    assert sward["unlabelled"] == [str(folder / "unlabelled")]

    size = tuple(sward["dataset"]["image_size"])
    known = [data.build("scenes", split, train=False, image_size=size) for split in ("val", "test")]
    known += [
        data.build("scenes", "train", train=False, image_size=size, count=30, series=each["dataset"]["series"])
        for each in (teacher, alone)
    ]
    pictures = {data.denormalise(sample.image).numpy().tobytes() for dataset in known for sample in dataset}
    unlabelled = [data.read_image(path) for path in sorted((folder / "unlabelled").glob("*.png"))]
    assert len(unlabelled) == 9
    assert all(tuple(image.shape) == (3, *size) for image in unlabelled)
    assert not pictures & {image.numpy().tobytes() for image in unlabelled}
    # The comparison can find something: a scene written to a file and read back is the scene.
    assert data.denormalise(known[0][0].image).numpy().tobytes() in pictures


def test_windows_fit_the_maps(finished: tuple[Path, str, list[str]]) -> None:
    folder, _, warned = finished
    assert "student layers: encoder.1" in (folder / "sward-seed0" / "log.txt").read_text()
    assert not [message for message in warned if "padding" in message]


@pytest.mark.slow
def test_a_second_demo_has_the_same_scores_with_any_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = (demo.run(Path("demo"), seeds=2, iterations=3, processes=processes) for processes in (1, 2))
    assert [row.mean_iou for row in first.rows] == [row.mean_iou for row in second.rows]
    assert len({score for row in first.rows for score in row.mean_iou}) == 5


@pytest.mark.parametrize("name", ["seeds", "iterations", "processes"])
def test_no_seeds_steps_or_processes_are_refused_before_any_work(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", f"--{name}", "0", "--output", str(tmp_path / "demo")]) == 2
    assert capsys.readouterr().err == f"sward demo: {name} must be at least 1, got 0\n"
    assert not (tmp_path / "demo").exists()


def test_a_run_of_another_command_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = tmp_path / "sward-seed0" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "last.pt").write_bytes(b"weights")
    assert main(["demo", "--seeds", "1", "--output", str(tmp_path)]) == 2
    assert f"got the run in {tmp_path / 'sward-seed0'}; choose another --output" in capsys.readouterr().err
    assert (checkpoints / "last.pt").read_bytes() == b"weights"
    assert [path.name for path in tmp_path.iterdir()] == ["sward-seed0"]


def _configuration(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "config.json").read_text())
    return found
