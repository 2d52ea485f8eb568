"""Runs of one study must have one data set, whatever their presets and shares of masks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sward import presets
from sward.reproduce.comparable import Comparable
from sward.training.run_folder import RunFolder

FRAMES = {
    "train": {"1": "a m", "2": "b n", "3": "c o"},
    "val": {"4": "d p"},
    "unlabelled": {"7": "e q"},
}


def check(
    comparable: Comparable, folder: Path, frames: dict[str, dict[str, str]], preset: str = "clinicdb-small"
) -> None:
    folder.mkdir()
    (folder / "frames.json").write_text(json.dumps(frames))
    comparable.check_data(presets.get(preset).student, RunFolder(folder))


@pytest.mark.parametrize(
    ("frames", "different"),
    [
        ({**FRAMES, "train": {"1": "a m", "2": "b n"}}, "in train, frame '3' is missing"),
        ({**FRAMES, "val": {"4": "d x"}}, "in val, the mask of frame '4' has changed"),
        ({**FRAMES, "unlabelled": {"7": "x q"}}, "in unlabelled, the image of frame '7' has changed"),
    ],
)
def test_other_frames_are_refused(frames: dict[str, dict[str, str]], different: str, tmp_path: Path) -> None:
    comparable = Comparable()
    check(comparable, tmp_path / "one", FRAMES)
    check(comparable, tmp_path / "same", {name: FRAMES[name] for name in ("train", "val")})
    with pytest.raises(ValueError, match=f"other was trained on other images or masks than .*one: {different}; choose"):
        check(comparable, tmp_path / "other", frames)


def test_presets_with_fewer_masks_share_the_frames_that_they_have(tmp_path: Path) -> None:
    comparable = Comparable()
    check(comparable, tmp_path / "all", {name: FRAMES[name] for name in ("train", "val")})
    few = {"train": {"2": "b n"}, "val": FRAMES["val"], "unlabelled": {"1": "a m", "3": "c o"}}
    check(comparable, tmp_path / "few", few, "clinicdb-small-10")
    with pytest.raises(ValueError, match=r"in train, the mask of frame '2' has changed"):
        check(comparable, tmp_path / "changed", {**few, "train": {"2": "b x"}}, "clinicdb-small-25")
    with pytest.raises(ValueError, match=r"in val, frame '4' is missing"):
        check(comparable, tmp_path / "renamed", {**few, "val": {"5": "d p"}}, "clinicdb-small-25")


def test_all_frames_count_though_the_first_run_has_few_masks(tmp_path: Path) -> None:
    comparable = Comparable()
    whole = {name: FRAMES[name] for name in ("train", "val")}
    check(comparable, tmp_path / "few", {**whole, "train": {"2": "b n"}}, "clinicdb-small-10")
    check(comparable, tmp_path / "all", whole)
    with pytest.raises(ValueError, match=r"in train, frame '9' is new"):
        check(comparable, tmp_path / "more", {**whole, "train": {**FRAMES["train"], "9": "x y"}})


def test_other_data_sets_and_splits_are_their_own(tmp_path: Path) -> None:
    comparable = Comparable()
    check(comparable, tmp_path / "sequences", FRAMES)
    check(comparable, tmp_path / "random", {"train": {"4": "d p"}, "val": {"1": "a m"}}, "clinicdb-random-small")
    check(comparable, tmp_path / "colondb", {"train": {"1": "z z"}}, "colondb-small")
