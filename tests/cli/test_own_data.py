"""The short options of a folder of one's own, and the whole way from its masks to a run."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sward.cli.main import main
from sward.cli.own_data import expand
from sward.config import DatasetConfig
from sward.training.run_folder import RunFolder

DISC = (np.hypot(*(np.indices((40, 48)) - 20)) < 12).astype(np.uint8)


def test_short_options_stand_for_those_of_the_configuration() -> None:
    words = "own --data x,y --classes a,b c --mask-values=#000000,#ffffff --split=80/10/10 --group-by a,b"
    words += " --class-weights 1,5 --batch 4"
    assert expand(words.split()) == [
        *["own", "--dataset.root", "x,y", "--dataset.classes", "a", "b", "c"],
        *["--dataset.mask-values", "#000000", "#ffffff", "--dataset.split-by=80/10/10"],
        *["--dataset.group-by", "a,b", "--class-weights", "1", "5", "--batch", "4"],
    ]


@pytest.fixture
def polyps(tmp_path: Path) -> Path:
    """Ten photos with JPEG masks of 0 and 255, in one folder without splits."""
    for number in range(10):
        image = np.random.default_rng(number).integers(0, 99, (40, 48, 3), np.uint8) + 99 * DISC[..., None]
        for kind, pixels in (("images", image), ("masks", 255 * DISC)):
            path = tmp_path / f"polyps/{kind}/{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return tmp_path / "polyps"


def train(root: Path, run: Path, *options: str) -> int:
    fixed = ["--distillation", "none", "--epochs", "1", "--batch", "4", "--dataset.image-size", "32", "32"]
    return main(
        ["train", "own", "--data", str(root), "--output", str(run), "--dataset.views", "None", *fixed, *options]
    )


def test_from_jpeg_masks_without_splits_to_scores_and_predictions(
    polyps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    options = ["--classes", "background,polyp", "--mask-values", "0,255", "--split", "80/10/10", "--metric", "dice"]
    assert train(polyps, run, *options) == 0, capsys.readouterr().err
    config, info = RunFolder(run).read()
    assert info.classes == ("background", "polyp")
    assert config.dataset.split_by == "80/10/10"
    split = (run / "split.csv").read_text().splitlines()
    assert split[0] == "frame_id,split"
    assert sorted(line.split(",")[1] for line in split[1:]) == ["test", *["train"] * 8, "val"]
    # A frame more: the run is still scored on the frames that it has not seen.
    for kind in ("images", "masks"):
        (polyps / kind / "new.jpg").write_bytes((polyps / kind / "1.jpg").read_bytes())
    assert main(["evaluate", str(run), "--split", "test"]) == 0
    assert "test split, 1 images" in capsys.readouterr().out
    assert main(["predict", str(run), str(polyps / "images/0.jpg")]) == 0
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").stat().st_size > 1000
    assert train(polyps, run, *options, "--resume", "--epochs", "2") == 2
    assert "the frames must be those in" in capsys.readouterr().err
    for kind in ("images", "masks"):
        (polyps / kind / "new.jpg").unlink()
    assert "1,train" in split
    Image.fromarray(255 * DISC[::-1] * DISC).save(polyps / "masks/1.jpg")
    assert train(polyps, run, *options, "--resume", "--epochs", "2") == 2
    assert "the data must be that with which the run in" in capsys.readouterr().err


def test_a_run_finds_its_data_from_any_folder(
    polyps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--classes", "background,polyp", "--mask-values", "0,255", "--split", "80/10/10"]
    assert train(Path("polyps"), tmp_path / "run", *options) == 0, capsys.readouterr().err
    monkeypatch.chdir("/")
    assert RunFolder(tmp_path / "run").read()[0].dataset.root == polyps
    assert main(["evaluate", str(tmp_path / "run")]) == 0


def test_training_warns_of_images_that_are_tested_on_too(polyps: Path, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(
        "frame_id,split\n"
        + "".join(f"{number},{'train' if number < 8 else 'val'}\n" for number in range(9))
        + "9,test\n"
    )
    options = ["--mask-values", "0,255", "--split", str(tmp_path / "list.csv")]
    (polyps / "images/9.jpg").write_bytes((polyps / "images/4.jpg").read_bytes())
    with pytest.warns(UserWarning, match="1 images of test have the same bytes as images of train, such as 9 and 4;"):
        assert train(polyps, tmp_path / "run", *options) == 0
    # No test mask that is damaged or missing stops a training, nor does a test split that is not there.
    (polyps / "masks/9.jpg").write_bytes(b"")
    with pytest.warns(UserWarning, match="1 images of test have the same bytes"):
        assert train(polyps, tmp_path / "damaged", *options) == 0
    (tmp_path / "list.csv").write_text((tmp_path / "list.csv").read_text().replace("9,test\n", ""))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert train(polyps, tmp_path / "without", *options) == 0
    for kind in ("images", "masks"):
        for number, split in enumerate([*["train"] * 8, "val", "test"]):
            (tmp_path / f"split/{kind}/{split}").mkdir(parents=True, exist_ok=True)
            (polyps / kind / f"{number}.jpg").rename(tmp_path / f"split/{kind}/{split}/{number}.jpg")
    (tmp_path / "split/masks/test/9.jpg").rename(tmp_path / "split/masks/test/of_another.jpg")
    assert train(tmp_path / "split", tmp_path / "incomplete", *options[:2]) == 0


def test_scores_of_other_images_need_no_groups(
    polyps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    options = ["--classes", "background,polyp", "--mask-values", "0,255", "--split", "60/20/20", "--group-by", r"(\d)"]
    assert train(polyps, run, *options) == 0, capsys.readouterr().err
    for kind in ("images", "masks"):
        (polyps / kind / "late.jpg").write_bytes((polyps / kind / "1.jpg").read_bytes())
        for split in ("train", "val", "test"):
            (tmp_path / f"other/{kind}/{split}").mkdir(parents=True)
            (tmp_path / f"other/{kind}/{split}/abc.jpg").write_bytes((polyps / kind / "2.jpg").read_bytes())
        (tmp_path / f"flat/{kind}").mkdir(parents=True)
        (tmp_path / f"flat/{kind}/abc.jpg").write_bytes((polyps / kind / "2.jpg").read_bytes())
    (tmp_path / "flat.csv").write_text("frame_id,split\nabc,test\n")
    assert main(["evaluate", str(run), "--split", "test"]) == 0, capsys.readouterr().err
    assert "test split, 2 images" in capsys.readouterr().out
    flat = ["--root", str(tmp_path / "flat"), "--split", "test", "--split-by", str(tmp_path / "flat.csv")]
    assert main(["evaluate", str(run), *flat]) == 0, capsys.readouterr().err
    assert "test split, 1 images" in capsys.readouterr().out
    # A run on folders with splits keeps no list.
    for kind in ("images", "masks"):
        for number, split in enumerate([*["train"] * 8, "val", "test"]):
            (polyps / kind / split).mkdir(exist_ok=True)
            (polyps / kind / f"{number}.jpg").rename(polyps / kind / split / f"{number}.jpg")
    options[options.index("--split") : options.index("--group-by")] = []
    assert train(polyps, tmp_path / "folders", *options) == 0, capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "folders"), "--root", str(tmp_path / "other")]) == 0


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("group_by", "^x", "None for cvc_clinicdb, got '^x'"),
        ("classes", ("a", "b"), "empty for cvc_clinicdb, got a, b"),
        ("mask_values", ("0", "255"), "empty for cvc_clinicdb, got 0, 255"),
        ("ignore_values", ("7",), "empty for cvc_clinicdb, got 7"),
        ("images", "frames", "None for cvc_clinicdb, got 'frames'"),
        ("masks", "{name}", "None for cvc_clinicdb, got '{name}'"),
        ("split_seed", 3, "0 for cvc_clinicdb, got 3"),
    ],
)
def test_options_of_a_folder_are_refused_for_other_data(option: str, value: Any, said: str) -> None:
    settings: dict[str, Any] = {option: value}
    with pytest.raises(ValueError, match=re.escape(f"dataset.{option} must be {said}; only a folder has this option")):
        DatasetConfig(name="cvc_clinicdb", **settings).check()
    DatasetConfig(name="folder", **settings).check()


def test_the_seed_of_a_share_of_masks_belongs_to_every_data_set() -> None:
    DatasetConfig(name="cvc_clinicdb", labelled_share=0.5, split_seed=3).check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split", "80/10/10"], "num_classes must be 2 to 255 for the data set 'folder', got None"),
        (["--classes", "a,b"], "pass --split 80/10/10"),
        (
            ["--classes", "a,b", "--split", "80/10/10"],
            "must be lossless (PNG) to hold class indices, got JPEG, which changes them; name values that are far "
            "apart with --mask-values",
        ),
        (
            ["--mask-values", "0,255", "--split", "80/30"],
            "the shares of split_by (--split) must add up to 100, got 80/30",
        ),
        (
            ["--mask-values", "0,255", "--split", "80/ten"],
            "split_by (--split) must be shares such as '80/10/10' or the path of a list, got '80/ten'",
        ),
        (["--classes", "a,b", "--mask-values", "0,1", "--split", "80/10/10"], "must be lossless (PNG)"),
        (["--classes", "a,b,c", "--mask-values", "0,128,255", "--split", "80/10/10"], "class 'b' must be in at least"),
        (
            ["--classes", "a,b", "--mask-values", "0,255", "--split", "100/0/0"],
            "above 0 for train and val, got 100/0/0",
        ),
    ],
)
def test_wrong_inputs_are_one_sentence_before_a_run_folder_exists(
    polyps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert train(polyps, tmp_path / "run", *options) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "run").exists()


def test_task_losses_on_the_command_line(polyps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--classes", "background,polyp", "--mask-values", "0,255", "--split", "80/10/10"]
    task = ["--task", "ce+dice", "--class-weights", "auto", "--label-smoothing", "0.1", "--metric", "mean_dice"]
    assert train(polyps, tmp_path / "run", *options, *task) == 0, capsys.readouterr().err
    assert "best mean_dice on validation" in capsys.readouterr().out
    (first, *_) = RunFolder(tmp_path / "run").records()
    assert first["task"] > 0


def as_png(polyps: Path, pixels: np.ndarray, numbers: range = range(10)) -> None:
    """Replace JPEG masks by PNG ones."""
    for number in numbers:
        (polyps / f"masks/{number}.jpg").unlink(missing_ok=True)
        Image.fromarray(pixels).save(polyps / f"masks/{number}.png")


LISTED = "frame_id,split\n" + "".join(f"{number},{'train' if number < 8 else 'val'}\n" for number in range(10))


@pytest.mark.parametrize("command", ["train", "train-teacher", "train-masks"])
def test_masks_of_0_and_255_never_train_without_a_foreground(
    polyps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    as_png(polyps, 255 * DISC)
    words = ["own", "--data", str(polyps), "--classes", "background,polyp", "--split", "80/10/10"]
    words += {"train": ["--distillation", "none"], "train-teacher": ["--model-weights", "random"]}.get(
        command, ["--method", "maskd"]
    )
    assert main([command, *words, "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.strip()
    assert "class 'polyp' must be in at least one training mask" in error
    assert "pass --mask-values 0,255 if they are polyp" in error
    assert not (tmp_path / "run").exists()


def test_validation_without_foreground_has_a_score_and_best_weights(
    polyps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    as_png(polyps, DISC)
    as_png(polyps, 0 * DISC, range(8, 10))
    (tmp_path / "list.csv").write_text(LISTED)
    options = ["--classes", "background,polyp", "--split", str(tmp_path / "list.csv"), "--metric", "dice"]
    with pytest.warns(
        UserWarning, match="no mask of the split val holds polyp; its Dice is the share of images without"
    ):
        assert train(polyps, tmp_path / "run", *options) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert re.search(r"best dice on validation: \d+\.\d\d %", printed)
    with pytest.warns(UserWarning, match="no mask of the split val holds polyp"):
        assert main(["evaluate", str(tmp_path / "run")]) == 0
    scores = json.loads((tmp_path / "run/evaluation-folder-val.json").read_text())
    assert scores["dice"] in (0, 0.5, 1)  # an image without a prediction counts 1, one with a prediction 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (np.zeros((40, 47), np.uint8), "must have the size of"),
        (7 * DISC, "7"),
        (None, "cannot read"),
    ],
)
def test_a_bad_validation_mask_ends_a_training_before_it_begins(
    polyps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: np.ndarray | None, message: str
) -> None:
    as_png(polyps, DISC)
    if damage is None:
        (polyps / "masks/9.png").write_bytes((polyps / "masks/9.png").read_bytes()[:40])
    else:
        as_png(polyps, damage, range(9, 10))
    (tmp_path / "list.csv").write_text(LISTED)
    options = ["--classes", "background,polyp", "--split", str(tmp_path / "list.csv")]
    assert train(polyps, tmp_path / "run", *options) == 2
    error = capsys.readouterr().err.strip()
    assert "masks/9.png" in error
    assert message in error
    assert not (tmp_path / "run").exists()


def test_a_run_whose_data_is_gone_names_the_whole_path(
    polyps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(polyps)
    options = ["--classes", "background,polyp", "--mask-values", "0,255", "--split", "80/10/10"]
    assert train(Path("."), tmp_path / "run", *options) == 0, capsys.readouterr().err
    (tmp_path / "run").rename(tmp_path / "moved")
    monkeypatch.chdir("/")
    assert main(["evaluate", str(tmp_path / "moved")]) == 0
    polyps.rename(tmp_path / "away")
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "moved")]) == 2
    assert str(polyps) in capsys.readouterr().err
