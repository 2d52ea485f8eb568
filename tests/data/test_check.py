"""Masks are read before step 1: what is wrong with them is said there, with its cause."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sward import data
from sward.cli.main import main
from sward.data import check
from sward.data.check import check_classes, check_splits, count_labels, find_copies
from sward.data.files import PairedFiles
from tests.support.folder_data import damage
from tests.support.polyp_folder import Write

DISC = (np.hypot(*(np.indices((16, 24)) - 8)) < 5).astype(np.uint8)


@pytest.fixture
def polyps(tmp_path: Path, write: Write) -> Path:
    """Four training and two validation frames with masks of 0 and 1."""
    for split, count in (("train", 4), ("val", 2)):
        for number in range(count):
            write(tmp_path / f"images/{split}/{number}.png", np.full((16, 24, 3), number, np.uint8))
            write(tmp_path / f"masks/{split}/{number}.png", DISC)
    return tmp_path


def build(root: Path, split: str = "train", num_classes: int = 2) -> PairedFiles:
    made = data.build("folder", split, train=split == "train", root=root, num_classes=num_classes, image_size=32)
    assert isinstance(made, PairedFiles)
    return made


def test_labels_are_counted_and_read_once(polyps: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write(polyps / "masks/train/3.png", np.zeros_like(DISC))
    write(polyps / "masks/train/2.png", np.where(DISC == 1, 255, 0).astype(np.uint8))
    with pytest.warns(UserWarning, match="2 of 4 training masks are all class 0"):
        counts = check_splits({"train": build(polyps)})["train"]
    disc = int(DISC.sum())
    assert counts.pixels.tolist() == [[384 - disc, disc, 0]] * 2 + [[384 - disc, 0, disc], [384, 0, 0]]
    assert counts.shares == pytest.approx([(4 * 384 - 3 * disc) / (4 * 384 - disc), 2 * disc / (4 * 384 - disc)])
    read = []
    decode = PairedFiles.read_mask
    monkeypatch.setattr(PairedFiles, "read_mask", lambda self, pair: read.append(pair.name) or decode(self, pair))
    assert count_labels(build(polyps)).pixels.tolist() == counts.pixels.tolist()
    assert read == []
    write(polyps / "masks/train/1.png", np.ones_like(DISC))
    assert count_labels(build(polyps)).pixels[1].tolist() == [0, 384, 0]
    assert read == ["1"]


def test_a_foreground_that_means_ignore_is_an_error_with_the_cure(polyps: Path, write: Write) -> None:
    for number in range(4):
        write(polyps / f"masks/train/{number}.png", 255 * DISC)
    with pytest.raises(
        ValueError, match=r"class 'class 1' must be .* none in 4 masks; 18% .* pass --mask-values 0,255"
    ):
        check_splits({"train": build(polyps)})


def test_a_pack_of_such_masks_is_not_written_either(
    polyps: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, number in (*(("train", number) for number in range(4)), ("val", 0), ("val", 1)):
        write(polyps / f"masks/{split}/{number}.png", 255 * DISC)
    assert main(["data", "pack", "folder", "--root", str(polyps), "--num-classes", "2"]) == 2
    assert "pass --mask-values 0,255" in capsys.readouterr().err
    assert not (polyps / "sward-pack").exists()


def test_a_declared_class_without_pixels_is_an_error(polyps: Path) -> None:
    with pytest.raises(ValueError, match=r"class 'class 2' .* the masks hold class 0, class 1; check --classes"):
        check_splits({"train": build(polyps, num_classes=3)})


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((16, 23), np.uint8), r"must have the size of its image .*, got 23 x 16"),
        (np.full((16, 24), 7, np.uint8), r"labels of mask .*val/1.png must be 0 to 1.* got 7"),
        (np.eye(3, dtype=np.uint8)[None].repeat(16, 0), r"val/1.png must have one channel"),
        (None, r"cannot read .*val/1.png: the file is damaged"),
    ],
)
def test_bad_validation_masks_are_found_too(polyps: Path, write: Write, mask: np.ndarray | None, message: str) -> None:
    if mask is None:
        damage(polyps / "masks/val/1.png")
    else:
        write(polyps / "masks/val/1.png", mask)
    with pytest.raises(ValueError, match=message):
        check_splits({"train": build(polyps), "val": build(polyps, "val")}, skip_corrupt=True)


def test_corrupt_training_masks_may_be_skipped(polyps: Path) -> None:
    damage(polyps / "masks/train/0.png")
    assert len(check_splits({"train": build(polyps)}, skip_corrupt=True)["train"].pixels) == 3
    with pytest.raises(ValueError, match=r"train/0\.png"):
        check_splits({"train": build(polyps)})


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp"])
def test_images_that_end_early_are_found_before_step_1(polyps: Path, write: Write, suffix: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    (polyps / "images/train/2.png").unlink()
    image = polyps / f"images/train/2{suffix}"
    write(image, pixels)
    write(polyps / "masks/train/2.png", np.zeros((64, 96), np.uint8))
    check_splits({"train": build(polyps)})
    # Whole, with something behind it, as some cameras write.
    content = image.read_bytes()
    image.write_bytes(content + bytes(10_000))
    check_splits({"train": build(polyps)})
    image.write_bytes(content[: 2 * len(content) // 3])
    with pytest.raises(ValueError, match=rf"cannot read .*train/2{suffix}: the file is damaged"):
        check_splits({"train": build(polyps)})
    assert len(check_splits({"train": build(polyps)}, skip_corrupt=True)["train"].pixels) == 3


def test_copies_across_splits_are_named(polyps: Path) -> None:
    (polyps / "images/val/1.png").write_bytes((polyps / "images/train/3.png").read_bytes())
    with pytest.warns(UserWarning, match="2 images of val have the same bytes as images of train, such as 0 and 0;"):
        check_splits({"train": build(polyps), "val": build(polyps, "val")})
    for number in range(3):
        (polyps / "images/test").mkdir(exist_ok=True)
        shutil.copy(polyps / "images/train/3.png", polyps / f"images/test/{number}.png")
        (polyps / "masks/test").mkdir(exist_ok=True)
        (polyps / f"masks/test/{number}.png").write_bytes(b"not read")
    with pytest.warns(UserWarning, match="have the same bytes") as warned:
        check_splits({"train": build(polyps), "val": build(polyps, "val")}, compared={"test": build(polyps, "test")})
    assert [str(each.message).split(";")[0] for each in warned] == [
        "2 images of val have the same bytes as images of train, such as 0 and 0",
        "3 images of test have the same bytes as images of train, such as 0 and 3",
    ]
    # Of one size, but not the same.
    content = (polyps / "images/train/0.png").read_bytes()
    for number in range(2):
        (polyps / f"images/val/{number}.png").write_bytes(content[:-1] + bytes([content[-1] ^ (number + 1)]))
    assert find_copies({name: build(polyps, name).pairs for name in ("train", "val")}) == []


def test_validation_without_foreground_is_a_warning(polyps: Path, write: Write) -> None:
    for number in range(2):
        write(polyps / f"masks/val/{number}.png", np.zeros_like(DISC))
    with pytest.warns(UserWarning, match="no mask of the split val holds class 1; its Dice is the share of images"):
        check_splits({"val": build(polyps, "val")})


def test_masks_of_other_values_in_validation_are_noticed(polyps: Path, write: Write) -> None:
    for number in range(2):
        write(polyps / f"masks/val/{number}.png", 255 * DISC)
    with pytest.warns(
        UserWarning, match=r"no mask of the split val holds class 1; .*; 18% of the pixels are 255, which"
    ):
        check_splits({"val": build(polyps, "val")})
    # Of more classes one may be missing by chance, unless pixels are ignored that may be it.
    for number in range(2):
        write(
            polyps / f"masks/val/{number}.png", DISC * np.where(np.indices(DISC.shape)[1] < 8, 255, 1).astype(np.uint8)
        )
    with pytest.warns(
        UserWarning, match=r"no mask of the split val holds class 2; \d+% .*: if they are meant to be class 2,"
    ):
        check_splits({"val": build(polyps, "val", num_classes=3)})
    for number in range(2):
        write(polyps / f"masks/val/{number}.png", DISC)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_splits({"val": build(polyps, "val", num_classes=3)})


def test_validation_without_a_labelled_pixel_is_refused(polyps: Path, write: Write) -> None:
    for number in range(2):
        write(polyps / f"masks/val/{number}.png", np.full_like(DISC, 255))
    with pytest.raises(ValueError, match=r"split val must hold a labelled pixel, got 255, .* in every pixel of 2"):
        check_splits({"val": build(polyps, "val")})


def test_validation_images_out_of_the_stated_range_are_found_before_step_1(polyps: Path, write: Write) -> None:
    write(polyps / "images/val/1.png", np.full((16, 24), 5000, np.uint16))
    dataset = build(polyps, "val")
    for highest, fits in ((5000, True), (4095, False), (5000, True)):
        dataset.image_range = (0, highest)
        if fits:
            check_splits({"val": dataset})
            continue
        with pytest.raises(
            ValueError, match=r"val/1\.png must be in the stated range, 0 to 4095, got uint16 values from"
        ):
            check_splits({"val": dataset})


def test_images_of_more_bits_are_found_before_step_1(polyps: Path, write: Write) -> None:
    write(polyps / "images/train/2.png", np.full((16, 24), 4000, np.uint16))
    with pytest.raises(
        ValueError, match=r"train/2\.png must have 8 bits per channel, got the mode I;16; state the range"
    ):
        check_splits({"train": build(polyps)})
    dataset = build(polyps)
    dataset.image_range = (0, 4095)
    check_splits({"train": dataset})


def test_a_cache_that_cannot_be_written_is_no_error(polyps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(polyps / "masks/train/0.png"))
    assert len(check.count_labels(build(polyps)).pixels) == 4


def test_a_mask_that_may_be_upside_down_is_warned_of_in_training_and_evaluation(polyps: Path) -> None:
    # Half a turn, which keeps the size.
    exif = Image.Exif()
    exif[0x0112] = 3
    for split, name in (("train", "1"), ("val", "0")):
        path = polyps / f"images/{split}/{name}.png"
        Image.open(path).save(path, exif=exif)
    message = "1 images of {} have an EXIF orientation and their masks have none, such as {}; check in an image viewer"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_splits({"train": build(polyps), "val": build(polyps, "val")})
    said = [str(warning.message) for warning in caught]
    assert sum(text.startswith(message.format("train", "1")) for text in said) == 1
    assert sum(text.startswith(message.format("val", "0")) for text in said) == 1
    with pytest.warns(UserWarning, match="2 images of the data set have an EXIF orientation .*, such as 1;"):
        check_classes([build(polyps), build(polyps, "val")])
    for split, name in (("train", "1"), ("val", "0")):
        path = polyps / f"masks/{split}/{name}.png"
        Image.open(path).transpose(Image.Transpose.ROTATE_180).save(path, exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_splits({"train": build(polyps), "val": build(polyps, "val")})
