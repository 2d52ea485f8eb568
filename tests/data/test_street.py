"""Cityscapes, CamVid and folders of image and mask pairs: trees, label values, and one sentence for each mistake."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sward import data
from sward.data import DatasetNotFoundError
from sward.data.cityscapes import INFO, TRAIN_IDS
from tests.support.polyp_folder import Write
from tests.support.real_data import real_data_root


def grey_image(height: int = 8, width: int = 16) -> np.ndarray:
    return np.full((height, width, 3), 99, np.uint8)


# Cityscapes


def write_cityscapes(root: Path, write: Write, split: str, frame: str, label_ids: np.ndarray) -> Path:
    city = frame.split("_")[0]
    write(root / f"leftImg8bit/{split}/{city}/{frame}_leftImg8bit.png", grey_image(*label_ids.shape))
    mask = root / f"gtFine/{split}/{city}/{frame}_gtFine_labelIds.png"
    write(mask, label_ids)
    return mask


def test_cityscapes_label_ids_are_torchvisions() -> None:
    from torchvision.datasets import Cityscapes

    listed = [each for each in Cityscapes.classes if 0 <= each.train_id < 255]
    assert [(TRAIN_IDS[each.id], INFO.classes[each.train_id]) for each in listed] == [
        (each.train_id, each.name) for each in listed
    ]
    assert [INFO.palette[each.train_id] for each in listed] == [each.color for each in listed]
    ignored = [each.id for each in Cityscapes.classes if each.train_id in (-1, 255) and each.id >= 0]
    assert (TRAIN_IDS[ignored] == 255).all()
    assert sorted(set(TRAIN_IDS.tolist())) == [*range(19), 255]


def test_cityscapes_tree(tmp_path: Path, write: Write) -> None:
    labels = np.array([[0, 7, 33, 255]] * 32, np.uint8).repeat(16, 1)
    for frame in ("ulm_000001_000019", "aachen_000000_000019"):
        write_cityscapes(tmp_path / "cityscapes", write, "train", frame, labels)
    write_cityscapes(tmp_path / "cityscapes", write, "val", "lindau_000000_000019", labels)
    training = data.build("cityscapes", "train", train=True, root=tmp_path, image_size=(32, 64))
    assert [pair.name for pair in training.pairs] == ["aachen_000000_000019", "ulm_000001_000019"]
    assert training[0].image.shape == (3, 32, 64)
    assert training[0].labels.shape == (32, 64)
    # The root may be the tree itself; evaluation is at full resolution, whatever the image_size.
    validation = data.build("cityscapes", "val", train=False, root=tmp_path / "cityscapes", image_size=(32, 32))
    assert validation[0].image.shape == (3, 32, 64)
    assert validation[0].labels[0].unique_consecutive().tolist() == [255, 0, 18, 255]


def test_cityscapes_incomplete(tmp_path: Path, write: Write) -> None:
    mask = write_cityscapes(tmp_path, write, "train", "ulm_1_2", np.zeros((8, 16), np.uint8))
    with pytest.raises(DatasetNotFoundError, match=r"incomplete: no file matches leftImg8bit/val/\*/\*_left"):
        data.build("cityscapes", "val", train=False, root=tmp_path)
    mask.unlink()
    with pytest.raises(
        DatasetNotFoundError, match=r"ulm_1_2_gtFine_labelIds.png is missing; .*gtFine_trainvaltest.zip"
    ):
        data.build("cityscapes", "train", train=True, root=tmp_path)
    (tmp_path / "gtFine/train/ulm").rmdir()
    (tmp_path / "gtFine/train").rmdir()
    (tmp_path / "gtFine").rmdir()
    with pytest.raises(DatasetNotFoundError, match="incomplete: the folder 'gtFine' is missing next to 'leftImg8bit'"):
        data.build("cityscapes", "train", train=True, root=tmp_path)


def test_what_is_left_out_of_cityscapes_is_named_once(tmp_path: Path, write: Write) -> None:
    labels = np.zeros((8, 16), np.uint8)
    for split in ("train", "val"):
        write_cityscapes(tmp_path, write, split, "ulm_1_2", labels)

    def warned(split: str) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert len(data.build("cityscapes", split, train=False, root=tmp_path)) == 1
        return [str(each.message) for each in caught]

    # What the official tree holds beside the files that are read.
    write(tmp_path / "gtFine/train/ulm/ulm_1_2_gtFine_color.png", labels)
    (tmp_path / "gtFine/train/ulm/ulm_1_2_gtFine_polygons.json").write_text("{}")
    (tmp_path / "leftImg8bit/train/ulm/._ulm_1_9_leftImg8bit.jpg").write_bytes(b"x")
    assert warned("train") == []
    write(tmp_path / "leftImg8bit/train/ulm/ulm_1_10_leftImg8bit.jpg", grey_image())
    write(tmp_path / "leftImg8bit/train/ulm_1_3_leftImg8bit.png", grey_image())
    write(tmp_path / "gtFine/train/ulm/ulm_1_4_gtFine_labelIds.png", labels)
    (tmp_path / "leftImg8bit/train/ulm/ulm_1_9_leftImg8bit.heic").write_bytes(b"x")
    (message,) = warned("train")
    assert message.startswith(
        f"4 files are left out in {tmp_path}: gtFine/train/ulm/ulm_1_4_gtFine_labelIds.png, "
        "leftImg8bit/train/ulm/ulm_1_9_leftImg8bit.heic, leftImg8bit/train/ulm/ulm_1_10_leftImg8bit.jpg and 1 more; "
        "an image must be leftImg8bit/train/CITY/FRAME_leftImg8bit.png"
    )
    assert warned("val") == []


def test_cityscapes_wrong_label_and_split(tmp_path: Path, write: Write) -> None:
    write_cityscapes(tmp_path, write, "val", "ulm_1_2", np.full((8, 16), 34, np.uint8))
    with pytest.raises(ValueError, match=r"ulm_1_2_gtFine_labelIds.png must be 0 to 33, got 34"):
        data.build("cityscapes", "val", train=False, root=tmp_path)[0]
    with pytest.raises(ValueError, match="the labels of its test images are not public"):
        data.build("cityscapes", "test", train=False, root=tmp_path)
    with pytest.raises(ValueError, match="split must be train or val for cityscapes, got 'dev'"):
        data.build("cityscapes", "dev", train=False, root=tmp_path)


# CamVid


@pytest.mark.parametrize("layout", [("images/{}", "masks/{}"), ("{}", "{}annot")])
def test_camvid_layouts(tmp_path: Path, write: Write, layout: tuple[str, str]) -> None:
    for split in ("train", "val"):
        write(tmp_path / "camvid" / layout[0].format(split) / "0001TP_006690.png", grey_image(4, 12))
        mask = np.arange(12, dtype=np.uint8)[None].repeat(4, 0)
        write(tmp_path / "camvid" / layout[1].format(split) / "0001TP_006690.png", mask)
    sample = data.build("camvid", "val", train=False, root=tmp_path, image_size=(32, 64))[0]
    assert sample.image.shape == (3, 32, 64)
    assert sample.labels[0].tolist() == [*range(11), 255]
    assert data.build("camvid", "train", train=True, root=tmp_path, image_size=32)[0].labels.shape == (32, 32)
    with pytest.raises(DatasetNotFoundError, match="'images/test' and 'masks/test' or 'test' and 'testannot'"):
        data.build("camvid", "test", train=False, root=tmp_path)


def test_camvid_mistakes(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "images/train/a.png", grey_image())
    with pytest.raises(DatasetNotFoundError, match="the folder 'masks/train' is missing next to 'images/train'"):
        data.build("camvid", "train", train=True, root=tmp_path)
    write(tmp_path / "masks/train/a.png", np.full((8, 16), 12, np.uint8))
    with pytest.raises(ValueError, match=r"a.png must be 0 to 11, 11 for void, got 12"):
        data.build("camvid", "train", train=True, root=tmp_path)[0]
    with pytest.raises(ValueError, match="split must be train, val or test for camvid, got 'trainval'"):
        data.build("camvid", "trainval", train=True, root=tmp_path)


def test_camvid_real_frames() -> None:
    root = real_data_root("camvid")
    sets = [data.build("camvid", split, train=False, root=root) for split in ("train", "val")]
    assert [len(each) for each in sets] == [367, 101]
    sample = sets[1][10]
    assert sample.image.shape == (3, 352, 480)
    assert sample.labels.shape == (360, 480)
    assert set(sample.labels.unique().tolist()) <= {*range(11), 255}
    road, sky = sample.labels == 3, sample.labels == 0
    rows = np.arange(360)[:, None]
    assert (road.numpy() * rows).sum() / road.sum() > (sky.numpy() * rows).sum() / sky.sum()


# Any folder


@pytest.fixture
def pairs(tmp_path: Path, write: Write) -> Path:
    for number in (1, 2, 10):
        write(tmp_path / f"images/train/frame{number}.jpg", grey_image())
        write(tmp_path / f"masks/train/frame{number}.png", np.array([[0, 1, 2, 255]] * 8, np.uint8).repeat(4, 1))
    return tmp_path


def build_folder(root: Path, train: bool = False) -> data.SegmentationDataset:
    return data.build("folder", "train", train=train, root=root, image_size=32, num_classes=3)


def test_folder(pairs: Path) -> None:
    dataset = build_folder(pairs)
    assert [pair.name for pair in dataset.pairs] == ["frame1", "frame2", "frame10"]
    assert dataset.info.num_classes == 3
    assert dataset[0].labels[0].unique_consecutive().tolist() == [0, 1, 2, 255]
    assert build_folder(pairs, train=True)[2].labels.shape == (32, 32)


def test_folder_reads_palette_and_16_bit_masks(pairs: Path, write: Write) -> None:
    values = np.full((8, 16), 2, np.uint8)
    palette = Image.fromarray(values)
    palette.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0])
    palette.save(pairs / "masks/train/frame1.png")
    write(pairs / "masks/train/frame2.png", values.astype(np.uint16))
    for index in (0, 1):
        assert build_folder(pairs)[index].labels.unique().tolist() == [2]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.full((8, 16), 3, np.uint8), r"masks/train/frame2.png must be 0 to 2, or 255 for pixels to ignore, got 3"),
        (np.full((8, 16), 300, np.uint16), r"frame2.png must be 0 to 2, .* got 300"),
        (
            np.zeros((8, 15), np.uint8),
            r"frame2.png must have the size of its image .*frame2.jpg, 16 x 8 pixels, got 15 x 8",
        ),
        (np.eye(3, dtype=np.uint8)[None].repeat(8, 0), r"frame2.png must have one channel .* got the mode RGB"),
    ],
)
def test_folder_wrong_masks(pairs: Path, write: Write, mask: np.ndarray, message: str) -> None:
    write(pairs / "masks/train/frame2.png", mask)
    with pytest.raises(ValueError, match=message):
        build_folder(pairs)[1]


@pytest.mark.parametrize("damage", ["cut short", "not an image", "empty"])
def test_damaged_image_is_named(pairs: Path, damage: str) -> None:
    path = pairs / "images/train/frame2.jpg"
    whole = path.read_bytes()
    path.write_bytes({"cut short": whole[: len(whole) // 2], "not an image": b"<html>404</html>", "empty": b""}[damage])
    with pytest.raises(ValueError, match=r"cannot read .*images/train/frame2.jpg: the file is damaged") as caught:
        build_folder(pairs)[1]
    assert "\n" not in str(caught.value)


def test_image_removed_while_training(pairs: Path) -> None:
    dataset = build_folder(pairs)
    (pairs / "images/train/frame1.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no image file .*frame1.jpg"):
        dataset[0]


def test_folder_missing_or_empty(pairs: Path, write: Write) -> None:
    with pytest.raises(DatasetNotFoundError, match=r"'images/val' and 'masks/val' in .*a mask of the same name"):
        data.build("folder", "val", train=False, root=pairs, num_classes=3)
    (pairs / "masks/train/frame10.png").unlink()
    with pytest.raises(ValueError, match=r"image .*frame10.jpg has no mask"):
        build_folder(pairs)
    for kind in ("images", "masks"):
        (pairs / kind / "val").mkdir()
    with pytest.raises(DatasetNotFoundError, match="is empty: images/val holds no image"):
        data.build("folder", "val", train=False, root=pairs, num_classes=3)


def test_two_images_of_one_name(pairs: Path, write: Write) -> None:
    write(pairs / "images/train/frame1.png", grey_image())
    with pytest.raises(ValueError, match=r"must be unique, got frame1.jpg and frame1.png"):
        build_folder(pairs)


def test_other_files_are_passed_over(pairs: Path) -> None:
    (pairs / "images/train/Thumbs.db").write_bytes(b"x")
    (pairs / "images/train/._frame1.jpg").write_bytes(b"x")
    assert len(build_folder(pairs)) == 3
