"""What the scores of a run belong to: its images, split and weights; and what is said of images that do not suit."""

from __future__ import annotations

import itertools
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sward.cli.main import main
from sward.config import DatasetConfig, DistillationConfig, TeacherConfig
from sward.data import DatasetNotFoundError
from sward.runs import evaluate as evaluate_module
from sward.runs import evaluate_run, evaluation_file, train_student
from sward.training.run_folder import RunFolder
from tests.support.folder_data import write_pairs
from tests.support.training_runs import on_folder, small


def test_scores_are_named_by_all_that_identifies_them(trained: Path) -> None:
    run, other = trained / "run", write_pairs(trained / "elsewhere" / "data", val=1)
    evaluate_run(run)
    plain = evaluation_file(run, "folder", "val")
    assert plain == run / "evaluation-folder-val.json"
    assert evaluation_file(run, root=trained / "data") == plain
    stored = json.loads(plain.read_text())
    assert stored["root"] == str(trained / "data")
    for changes in (dict(root=other), dict(checkpoint="last"), dict(split="train")):
        evaluate_run(run, **changes)
        assert evaluation_file(run, **changes).exists()
    evaluated = {path: json.loads(path.read_text()) for path in run.glob("evaluation-*.json")}
    assert len(evaluated) == 4
    assert evaluated[plain] == stored
    assert len({(each["frames"], each["checkpoint"], each["split"]) for each in evaluated.values()}) == 4
    assert evaluated[evaluation_file(run, root=other)]["images"] == 1
    names = {evaluation_file(run, split_by=by).name for by in (None, "ratio", "a/list.csv", "b/list.csv", "list.csv")}
    assert len(names) == 5


@pytest.fixture
def polyps(tmp_path: Path) -> Path:
    """Leave ClinicDB in `here/cvc_clinicdb`, ColonDB in `here/cvc_colondb`, and a list of their frames."""
    for name, kind in itertools.product(("cvc_clinicdb", "cvc_colondb"), ("images", "masks")):
        (tmp_path / "here" / name / kind).mkdir(parents=True)
        for number in range(1, 7):
            value = np.full((32, 32), 255 * (number % 2) if kind == "masks" else number, np.uint8)
            value[:16] = len(name) if kind == "images" else 0
            Image.fromarray(value).save(tmp_path / f"here/{name}/{kind}/{number}.png")
    splits = {1: "train", 2: "train", 3: "val", 4: "val", 5: "test", 6: "test"}
    rows = "".join(f"{number},{split}\n" for number, split in splits.items())
    (tmp_path / "list.csv").write_text(f"frame_id,split\n{rows}")
    return tmp_path


def on_polyps(root: Path, output: Path, split_by: Path | str, **changes: Any) -> DistillationConfig:
    dataset = DatasetConfig(name="cvc_clinicdb", root=root, image_size=(32, 32), split_by=str(split_by))
    return small(output, **dict(dataset=dataset, batch=2, iterations=1, distillation="none") | changes)


def test_the_folder_of_one_data_set_is_never_scored_as_another(polyps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(polyps)
    monkeypatch.delenv("SWARD_DATA", raising=False)
    split = str(polyps / "list.csv")
    others: dict[str, Any] = dict(dataset="cvc_colondb", split="val", split_by=split)
    train_student(on_polyps(polyps / "here/cvc_clinicdb", polyps / "alone", split))
    with pytest.raises(DatasetNotFoundError, match=r"CVC-ColonDB not found: .*or set the root"):
        evaluate_run(polyps / "alone", **others)
    train_student(on_polyps(polyps / "here", polyps / "beside", split))
    evaluate_run(polyps / "beside", **others)
    evaluate_run(polyps / "alone", root=polyps / "here", **others)
    found = [
        json.loads(evaluation_file(polyps / name, **others, **more).read_text())["frames"]
        for name, more in (("beside", {}), ("alone", dict(root=polyps / "here")))
    ]
    evaluate_run(polyps / "alone")
    own = json.loads(evaluation_file(polyps / "alone").read_text())["frames"]
    assert found[0] == found[1] != own
    assert "-by-list-" in evaluation_file(polyps / "beside", **others).name


def test_a_folder_is_scored_by_runs_on_folders_only(polyps: Path) -> None:
    train_student(on_polyps(polyps / "here", polyps / "run", polyps / "list.csv"))
    with pytest.raises(ValueError, match="dataset must be one that defines its classes, got 'folder'; only a run that"):
        evaluate_run(polyps / "run", dataset="folder", root=polyps / "here/cvc_colondb", split="all")


def test_the_split_that_a_run_began_with_is_scored_though_its_list_has_changed(
    polyps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(polyps)
    train_student(on_polyps(polyps / "here", polyps / "run", "list.csv"))

    def scored(**changes: Any) -> str:
        evaluate_run(polyps / "run", **changes)
        found: str = json.loads(evaluation_file(polyps / "run", **changes).read_text())["frames"]
        return found

    before = scored()
    text = Path("list.csv").read_text()
    Path("list.csv").write_text(text.replace("3,val", "3,test").replace("5,test", "5,val"))
    assert scored() == scored(split_by="list.csv") == before
    with pytest.raises(ValueError, match=r"the frames must be those in .*split\.csv, with which the run began"):
        train_student(on_polyps(polyps / "here", polyps / "run", "list.csv", resume=True, iterations=2))
    Path("other.csv").write_text(Path("list.csv").read_text())
    assert scored(split_by="other.csv") != before
    monkeypatch.chdir(polyps / "here")
    assert scored() == before


def test_the_split_that_a_run_has_drawn_is_not_drawn_again(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", train=10)
    (tmp_path / "data").mkdir()
    for kind in ("images", "masks"):
        (tmp_path / "pairs" / kind / "train").rename(tmp_path / "data" / kind)
    config = on_folder(tmp_path / "data", tmp_path / "run")
    config.dataset.split_by = "60/20/20"
    train_student(config)
    for number, kind in itertools.product(range(10, 40), ("images", "masks")):
        shutil.copy(tmp_path / f"data/{kind}/train0.png", tmp_path / f"data/{kind}/train{number}.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for changes in ({}, dict(split_by="60/20/20"), dict(split_by="60/20/20", root=tmp_path / "run/../data")):
            assert evaluate_run(tmp_path / "run", split="test", **changes).images == 2  # type: ignore[arg-type]
        assert evaluate_run(tmp_path / "run", split="test", split_by="80/10/10").images == 4
        (tmp_path / "data").rename(tmp_path / "here")
        (tmp_path / "other").mkdir()
        for kind in ("images", "masks"):
            (tmp_path / "other" / kind).mkdir()
            shutil.copy(tmp_path / f"here/{kind}/train0.png", tmp_path / f"other/{kind}/x.png")
        with pytest.raises(ValueError, match=r"'train\d', which does not exist; to score every .*, take --split all$"):
            evaluate_run(tmp_path / "run", split="test", root=tmp_path / "other")
        assert evaluate_run(tmp_path / "run", split="all", root=tmp_path / "other").images == 1
        # A folder with splits of its own needs none of the run's.
        write_pairs(tmp_path / "split", train=2, val=3)
        assert evaluate_run(tmp_path / "run", split="val", root=tmp_path / "split").images == 3


def test_scores_on_images_that_were_trained_on_come_with_a_warning(trained: Path) -> None:
    copy = write_pairs(trained / "mixed", val=1)
    trained_on = (trained / "data/images/train/train2.png").read_bytes()
    (copy / "images/val/val0.png").write_bytes(trained_on)
    with pytest.warns(UserWarning, match="1 of the 1 images of the split val were trained on"):
        evaluate_run(trained / "run", root=copy)
    with pytest.warns(UserWarning, match="1 images of val have the same bytes as images of train") as warned:
        train_student(on_folder(copy, trained / "leaking"))
    assert len([each for each in warned if "images" in str(each.message)]) == 1
    distilled: dict[str, Any] = dict(distillation="kd", teacher=TeacherConfig(name="hiera_demo", untrained=True))
    config = on_folder(trained / "data", trained / "more", unlabelled=(str(trained / "data/images/val"),), **distilled)
    with pytest.warns(UserWarning, match="2 validation images are unlabelled images too"):
        train_student(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate_run(trained / "run")


def test_a_folder_that_cannot_be_written_does_not_lose_the_scores(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read_only(path: Path) -> None:
        raise ValueError(f"cannot write to {path} (Read-only file system); choose another --output")

    monkeypatch.setattr(evaluate_module, "make_folder", read_only)
    with pytest.warns(UserWarning, match=r"cannot write to .* \(Read-only file system\); the scores are printed and"):
        assert main(["evaluate", str(trained / "run")]) == 0
    assert "mIoU" in capsys.readouterr().out
    assert not list((trained / "run").glob("evaluation-*"))
    older = evaluation_file(trained / "run")
    older.write_text("{}")
    with pytest.warns(UserWarning, match="the scores are printed and not stored"):
        assert main(["evaluate", str(trained / "run")]) == 0
    assert "written" not in capsys.readouterr().out
    assert older.read_text() == "{}"


def test_scores_of_an_unfinished_run_come_with_a_warning(trained: Path) -> None:
    run = RunFolder(trained / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate_run(run.path)
    longer = json.loads(run.config.read_text())
    longer["iterations"], longer["epochs"] = 400, None
    run.config.write_text(json.dumps(longer))
    with pytest.warns(UserWarning, match=r"the run in .*run is unfinished, at step \d+ of 400; finish it with the"):
        evaluate_run(run.path)


def test_masks_of_other_values_are_noticed_when_a_run_is_scored(trained: Path) -> None:
    copy = write_pairs(trained / "other", val=2)
    for path in (copy / "masks/val").iterdir():
        values = np.asarray(Image.open(path))
        Image.fromarray(np.where(values == 1, 255, 0).astype(np.uint8)).save(path)
    with pytest.warns(
        UserWarning, match=r"no mask of the split val holds class 1; .* pixels are 255, which means ignore"
    ):
        evaluate_run(trained / "run", root=copy)
