"""Folders of one's own whose layout decides what is trained on and what is scored."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest

from sward.cli.main import main
from sward.data.layouts import find_layout, table_pairs
from tests.support.polyp_folder import Write, write_frame


def frames(write: Write, root: Path, *places: str, suffix: str = "") -> None:
    """Two frames per place: an image at `images PLACE` and its mask at the same place of `masks`, or beside it."""
    for place in places:
        for name in ("a", "b"):
            image = root / place / f"{name}.png" if suffix else root / "images" / place / f"{name}.png"
            mask = root / place / f"{name}{suffix}.png" if suffix else root / "masks" / place / f"{name}.png"
            write_frame(write, image, mask, values=np.indices((8, 12))[1].astype(np.uint8) % 3)


def test_splits_of_images_beside_their_masks_are_kept_apart(tmp_path: Path, write: Write) -> None:
    """As Roboflow exports them: copies of one photo lie in one split, which a random one would not respect."""
    frames(write, tmp_path, "train", "valid", "test", suffix="_mask")
    (tmp_path / "sward-pack").mkdir()
    (tmp_path / "notes").mkdir()
    layout = find_layout(tmp_path)
    assert (layout.images, layout.masks) == ("{split}", "{split}/{name}_mask")
    assert layout.splits() == ["test", "train", "val"]
    assert [pair.name for pair in layout.pairs("val")] == ["a", "b"]
    write(tmp_path / "previews/x.png", np.zeros((8, 8, 3), np.uint8))
    for name in ("a", "b"):
        (tmp_path / f"test/{name}_mask.png").unlink()
    with pytest.warns(UserWarning, match="has no masks for previews, test, left out"):
        assert layout.labelled_splits() == ["train", "val"]


def test_a_folder_called_train_alone_is_no_split(tmp_path: Path, write: Write) -> None:
    frames(write, tmp_path, "train", suffix="_mask")
    with pytest.warns(UserWarning, match="folders called train; to keep splits apart"):
        layout = find_layout(tmp_path)
    assert [pair.name for pair in layout.pairs()] == ["train/a", "train/b"]


def test_folders_called_as_splits_that_are_read_as_one_set_are_named(tmp_path: Path, write: Write) -> None:
    frames(write, tmp_path, "Train", "Val")
    with pytest.warns(UserWarning, match="taken as one set, though some lie in folders called Train, Val; to keep"):
        find_layout(tmp_path)
    frames(write, tmp_path / "patients", "Anna", "Ben")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(find_layout(tmp_path / "patients").pairs()) == 4
        assert len(find_layout(tmp_path, "images", "masks/{name}").pairs()) == 4


@pytest.mark.parametrize("command", [["check"], ["pack", "folder", "--num-classes", "3", "--root"]])
def test_a_split_without_masks_is_left_out_with_a_warning(
    command: list[str], tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    """Challenges keep the masks of their test images to themselves."""
    frames(write, tmp_path, "train", "val")
    write(tmp_path / "images/test/1.png", np.zeros((8, 8, 3), np.uint8))
    for _ in range(2):
        with pytest.warns(UserWarning, match="has no masks for test, left out"):
            assert main(["data", *command, str(tmp_path)]) == 0, capsys.readouterr().err


def test_a_name_that_is_not_utf8_is_refused_by_the_first_command(
    tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    frames(write, tmp_path, "")
    try:
        for kind in ("images", "masks"):
            os.rename(tmp_path / kind / "a.png", os.fsencode(tmp_path / kind) + b"/\xe9.png")
    except OSError:
        pytest.skip("this file system has names in UTF-8 only")
    assert main(["data", "check", str(tmp_path)]) == 2
    assert r"must be UTF-8, got b'\xe9.png'; rename the file" in capsys.readouterr().err


def test_a_row_without_an_image_is_named(tmp_path: Path, write: Write) -> None:
    frames(write, tmp_path, "")
    (tmp_path / "frames.csv").write_text("image,mask\nimages/a.png,masks/a.png\n,masks/b.png\n")
    with pytest.raises(ValueError, match=r"frames.csv must name an image and a mask in every row, got none in 2$"):
        table_pairs(tmp_path / "frames.csv")
