"""Pairs of image files: files that are left out or cannot be read, other Unicode, and training views that repeat."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from sward.data import CorruptFileError
from sward.data.files import list_images, stored
from sward.data.unlabelled import UnlabelledImages
from tests.support.folder_data import build, damage
from tests.support.polyp_folder import Write


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_a_corrupt_file_stops_or_is_replaced_by_the_next(root: Path, kind: str) -> None:
    for number in (2, 3):
        damage(root / kind / f"train/{number}.png")
    with pytest.raises(CorruptFileError, match=rf"cannot read .*{kind}/train/2.png: the file is damaged"):
        build(root)[2]
    dataset = build(root, on_corrupt="skip")
    with pytest.warns(UserWarning, match="skipped: cannot read") as warned:
        names = [dataset[index].name for _ in range(2) for index in range(6)]
    assert names == ["0", "1", "4", "4", "4", "5"] * 2
    assert [f"{kind}/train/{number}.png" in str(each.message) for each, number in zip(warned, (2, 3))] == [True, True]
    assert len(warned) == 2
    # The replacement is augmented as the place it stands in, so the batch does not hold one view twice.
    assert not torch.equal(dataset[2].image, dataset[4].image)


def test_the_last_image_is_replaced_by_the_first_and_none_left_is_an_error(root: Path) -> None:
    damage(root / "images/train/5.png")
    dataset = build(root, on_corrupt="skip")
    with pytest.warns(UserWarning, match="skipped: cannot read"):
        assert dataset[5].name == "0"
    for number in range(5):
        damage(root / f"images/train/{number}.png")
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(CorruptFileError, match="none of the 6 images of folder in"),
    ):
        build(root, on_corrupt="skip")[0]


def test_skipping_is_for_training_and_for_files_that_cannot_be_read(root: Path, write: Write) -> None:
    with pytest.raises(ValueError, match="skipping images would change the score"):
        build(root, "val", on_corrupt="skip")
    with pytest.raises(ValueError, match="on_corrupt must be 'stop' or 'skip', got 'drop'"):
        build(root, on_corrupt="drop")
    write(root / "masks/train/1.png", np.full((43, 52), 9, np.uint8))
    with pytest.raises(ValueError, match="must be 0 to 2, or 255 for pixels to ignore, got 9"):
        build(root, on_corrupt="skip")[1]


def test_skipping_does_not_depend_on_workers(root: Path) -> None:
    damage(root / "images/train/2.png")
    with pytest.warns(UserWarning, match="skipped"):
        alone = list(DataLoader(build(root, on_corrupt="skip"), batch_size=3))
    shared = list(DataLoader(build(root, on_corrupt="skip"), batch_size=3, num_workers=2))
    for one, other in zip(alone, shared, strict=True):
        assert one.name == other.name
        assert torch.equal(one.image, other.image)


def test_views_repeat_and_are_for_training(root: Path) -> None:
    dataset, free = build(root, views=2), build(root)
    seen = []
    for epoch in range(4):
        dataset.set_epoch(epoch)
        seen.append(dataset[0].image)
    free.set_epoch(1)
    assert torch.equal(seen[1], free[0].image)
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0], seen[1])
    with pytest.raises(ValueError, match="views must be at least 1 for training sets and None otherwise, got 0"):
        build(root, views=0)


@pytest.mark.parametrize(
    "suffix",
    [
        *("jfif", "jpe", "mpo", "apng", "heif", "heic", "jxl", "j2k", "j2c", "jpx", "dib", "pcx", "psd", "svg", "pbm"),
        *("pfm", "exr", "hdr", "dng", "npy", "npz", "dcm", "nii.gz", "JFIF", "Heic"),
    ],
)
def test_no_picture_is_left_out_without_a_word(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a.{suffix}").write_bytes(b"x")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        listed = list_images(tmp_path)
    named = [str(each.message).endswith(f"skipped in {tmp_path}: a.{suffix}") for each in caught]
    assert named == ([] if listed else [True])


def test_paths_are_found_in_other_unicode(tmp_path: Path, write: Write) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    write(tmp_path / f"{decomposed}/{composed} 1.png", np.zeros((8, 8), np.uint8))
    wanted = [
        f"{folder}/{name} {number}.png"
        for folder in (composed, decomposed)
        for name, number in ((decomposed, 1), (composed, 2))
    ]
    there = tmp_path / f"{decomposed}/{composed} 1.png"
    assert stored(tmp_path / each for each in wanted) == [there, tmp_path / wanted[1], there, tmp_path / wanted[3]]
    assert stored([Path("nowhere/a.png"), tmp_path]) == [Path("nowhere/a.png"), tmp_path]
    if not (tmp_path / f"{decomposed}/{decomposed} 1.png").exists():
        # Either file may be meant where both are there and neither has exactly the name.
        double = "e\u0301\u00e9"
        for name in ("\u00e9\u00e9", "e\u0301e\u0301"):
            write(tmp_path / f"{name}.png", np.zeros((8, 8), np.uint8))
        assert stored([tmp_path / f"{double}.png"]) == [tmp_path / f"{double}.png"]


def test_lists_of_unlabelled_images_hold_one_path_per_line(root: Path, tmp_path: Path, write: Write) -> None:
    on_disk = ["x/a b.png", "x/cafe\u0301 1.png", "x/a.png"]
    for name in on_disk:
        write(tmp_path / name, np.zeros((40, 40, 3), np.uint8))
    (tmp_path / "list.txt").write_text("\ufeffx/a b.png\n\n  x/caf\u00e9 1.png \r\n", encoding="utf-8")
    images = UnlabelledImages([tmp_path / "list.txt"], build(root), (32, 32), seed=0)
    assert [pair.image for pair in images.pairs] == [tmp_path / name for name in on_disk[:2]]
    assert images[1].image.shape == (3, 32, 32)
    (tmp_path / "list.txt").write_text("x/a b.png\nx/caf\u00e8 1.png\n", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*x/caf\u00e8 1\.png, which .*list\.txt names"):
        UnlabelledImages([tmp_path / "list.txt"], build(root), (32, 32), seed=0)
