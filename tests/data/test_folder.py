"""A folder of one's own: its layouts, names, classes and values."""

import re
import shlex
import unicodedata
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sward import data
from sward.cli.main import main
from sward.data import DatasetNotFoundError, FolderOptions
from sward.data.layouts import find_layout, list_tree
from sward.data.packing import pack
from tests.support.polyp_folder import MASK, POLYPS, Write, build, names, write_frame

COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("images/train/{}.jpg", "masks/train/{}.png"),
        ("images/training/{}.jpg", "labels/training/{}.png"),
        ("train/images/{}.png", "train/masks/{}.png"),
        ("images/{}.png", "masks/{}.png"),
        ("imgs/{}.png", "annotations/{}_mask.png"),
        ("images/hospital/case{}/a.png", "masks/hospital/case{}/a.png"),
        ("{}.jpg", "{}_mask.png"),
    ],
)
def test_layouts(tmp_path: Path, write: Write, image: str, mask: str) -> None:
    for number in (1, 2, 10):
        write_frame(write, tmp_path / image.format(number), tmp_path / mask.format(number), number)
    (tmp_path / ".DS_Store").write_bytes(b"x")
    layout = find_layout(tmp_path)
    pairs = layout.pairs("train" if layout.has_splits else None)
    assert [pair.image for pair in pairs] == [tmp_path / image.format(number) for number in (1, 2, 10)]
    assert [pair.mask for pair in pairs] == [tmp_path / mask.format(number) for number in (1, 2, 10)]
    assert len({pair.name for pair in pairs}) == 3
    assert layout.splits() == (["train"] if "train" in image else [])


def test_patterns_name_any_layout(tmp_path: Path, write: Write) -> None:
    for split in ("train", "val"):
        write_frame(write, tmp_path / f"frames/{split}/a.png", tmp_path / f"truth/{split}/GT_a_v2.png")
    options = FolderOptions(
        ("background", "polyp"), ("0", "255"), (), "frames/{split}", "truth/{split}/GT_{name}_v2.png"
    )
    assert names(build(tmp_path, "val", options)) == ["a"]
    with pytest.raises(ValueError, match="images and masks must be given together"):
        find_layout(tmp_path, "frames")
    with pytest.raises(DatasetNotFoundError, match="looked for images and masks in"):
        find_layout(tmp_path)


def test_a_mask_with_another_name_is_suggested(tmp_path: Path, write: Write) -> None:
    write_frame(write, tmp_path / "images/a.png", tmp_path / "masks/a.png")
    write_frame(write, tmp_path / "images/b.png", tmp_path / "masks/b-final.png")
    with pytest.raises(
        ValueError,
        match=r"image .*b\.png has no mask; .* --images 'images' --masks 'masks/\{name\}-final\.png' would take",
    ):
        find_layout(tmp_path).pairs()


def test_the_suggested_pattern_of_a_folder_with_splits_takes_the_mask(tmp_path: Path, write: Write) -> None:
    for split in ("train", "val"):
        write_frame(write, tmp_path / f"images/{split}/a.png", tmp_path / f"masks/{split}/a_truth.png")
    with pytest.raises(ValueError, match="has no mask") as raised:
        find_layout(tmp_path).pairs("train")
    hint = re.search(r"; --images '(.+)' --masks '(.+)' would take a_truth\.png$", str(raised.value))
    assert hint is not None
    images, masks = hint.groups()
    assert (images, masks) == ("images/{split}", "masks/{split}/{name}_truth.png")
    assert [pair.mask.name for pair in find_layout(tmp_path, images, masks).pairs("val")] == ["a_truth.png"]


@pytest.mark.parametrize(
    ("mask", "hint"),
    [
        ("c.png", r"; did you mean c\.png\?"),
        ("C_truth.png", r"; --images 'images' --masks 'masks/\{name\}_truth\.png' would take C_truth\.png"),
        ("c_truth.png", r"; did you mean c_truth\.png\?"),
        ("D.png", ""),
    ],
)
def test_the_mask_that_may_be_meant_is_named(tmp_path: Path, write: Write, mask: str, hint: str) -> None:
    write_frame(write, tmp_path / "images/a.jpg", tmp_path / "masks/a.png")
    write_frame(write, tmp_path / "images/C.jpg", tmp_path / "masks" / mask)
    with pytest.raises(ValueError, match=rf"images/C\.jpg has no mask; .*masks holds no image file named C{hint}$"):
        build(tmp_path, "all")


def test_masks_may_have_any_suffix_and_the_usual_endings(tmp_path: Path, write: Write) -> None:
    for image, mask in (("a.jpg", "a.png"), ("C.jpg", "C.gif")):
        write_frame(write, tmp_path / "one/images" / image, tmp_path / "one/masks" / mask)
    dataset = build(tmp_path / "one", "all")
    assert [(pair.name, pair.mask.name) for pair in dataset.pairs] == [("C", "C.gif"), ("a", "a.png")]
    # Every GIF has a palette, and Pillow numbers the two colours of this one 0 and 1.
    assert build(tmp_path / "one", "all", FolderOptions((), ("0", "1")))[0].labels.sum() == 18
    write_frame(write, tmp_path / "two/images/C.jpg", tmp_path / "two/masks/C_mask.png")
    assert [pair.mask.name for pair in build(tmp_path / "two", "all").pairs] == ["C_mask.png"]


def test_no_mask_is_suggested_for_a_part_of_its_number(tmp_path: Path, write: Write) -> None:
    for number in (1, 13):
        write_frame(write, tmp_path / f"images/{number}.png", tmp_path / f"masks/{number}.png")
    write_frame(write, tmp_path / "images/3.png", tmp_path / "masks/3_truth.png")
    with pytest.raises(
        ValueError,
        match=r"3\.png has no mask; .* --images 'images' --masks 'masks/\{name\}_truth\.png' would take 3_truth",
    ):
        find_layout(tmp_path).pairs()
    (tmp_path / "masks/3_truth.png").unlink()
    with pytest.raises(ValueError, match=r"3\.png has no mask; .* no image file named 3$"):
        find_layout(tmp_path).pairs()


def test_trees_join_folders_to_names(tmp_path: Path, write: Write) -> None:
    for path in ("b.png", "a/2.png", "a/10.png", ".hidden/x.png"):
        write(tmp_path / path, MASK)
    assert list(list_tree(tmp_path)) == ["b", "a/2", "a/10"]


def warned(root: Path, split: str, **rest: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build(root, split, **rest)
    return [str(each.message) for each in caught]


def test_what_is_left_out_of_a_folder_with_splits_is_named_once(tmp_path: Path, write: Write) -> None:
    for split in ("train", "val"):
        write_frame(write, tmp_path / f"images/{split}/1.png", tmp_path / f"masks/{split}/1.png")
    assert warned(tmp_path, "train", train=True) == []
    for number in (2, 10, 3, 4):
        write(tmp_path / f"masks/train/case/{number}.png", MASK)
    # Two files of one name, which would be refused in a split.
    for name in ("images/7.jpg", "images/7.png", "masks/8.png", "unused.png"):
        write(tmp_path / name, MASK)
    for name in ("b.HEIC", "deep/c.npy", "deep/d.exr", ".hidden.npy", "deep/notes.txt"):
        path = tmp_path / "images/train" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    images, masks = tmp_path / "images/train", tmp_path / "masks/train"
    assert warned(tmp_path, "train", train=True) == [
        f"3 files or folders that are not read as images are skipped in {images}: b.HEIC, deep/c.npy, deep/d.exr",
        f"4 masks without an image in {masks}: case/2, case/3, case/4 and 1 more",
        f"3 files beside the folders of the splits in {tmp_path} are in no split: images/7.jpg, images/7.png, "
        "masks/8.png",
    ]
    assert warned(tmp_path, "val") == []


def test_images_beside_the_folders_of_their_split_are_named(tmp_path: Path, write: Write) -> None:
    for split in ("train", "val"):
        write_frame(write, tmp_path / f"{split}/images/1.png", tmp_path / f"{split}/masks/1.png")
    write(tmp_path / "val/2.png", MASK)
    (named,) = warned(tmp_path, "train")
    assert named.endswith("are in no split: val/2.png")


def test_masks_above_the_folder_of_their_images_are_not_left_out(tmp_path: Path, write: Write) -> None:
    for split in ("train", "val"):
        write_frame(write, tmp_path / f"{split}/photos/1.png", tmp_path / f"{split}/1_m.png")
    options = FolderOptions((), ("0", "255"), images="{split}/photos", masks="{split}/{name}_m.png")
    assert warned(tmp_path, "train", options=options) == []


def test_masks_below_the_folder_of_their_images_are_no_images(tmp_path: Path, write: Write) -> None:
    for number in range(3):
        write_frame(write, tmp_path / f"{number}.png", tmp_path / f"masks/{number}.png")
    assert names(build(tmp_path, "all", FolderOptions((), ("0", "255"), images=".", masks="masks/{name}.png"))) == list(
        "012"
    )


@pytest.mark.parametrize(
    ("image", "mask", "options"),
    [
        ("images/{}.jpg", "masks/{}.png", {}),
        ("{}.jpg", "{}_mask.png", {}),
        ("images/{}.jpg", "masks/{}/{}_v2.png", {"images": "images", "masks": "masks/{name}/{name}_v2.png"}),
    ],
)
def test_masks_without_an_image_are_named(
    tmp_path: Path, write: Write, image: str, mask: str, options: dict[str, str]
) -> None:
    for name in ("a", "b"):
        write_frame(write, tmp_path / image.format(name), tmp_path / mask.format(name, name))
    (tmp_path / image.format("b")).unlink()
    lost = Path(mask.removeprefix("masks/").format("b", "b")).with_suffix("")
    folder = tmp_path / "masks" if mask.startswith("masks/") else tmp_path
    given = FolderOptions(("background", "polyp"), ("0,255",), **options)
    expected = [f"1 masks without an image in {folder}: {lost}"]
    assert warned(tmp_path, "all", options=given) == expected
    # Pictures of masks are not masks where a pattern tells them apart.
    if options:
        write(tmp_path / "masks/a/a_v1.png", MASK)
        write(tmp_path / "masks/a/b_v2.png", MASK)
        assert warned(tmp_path, "all", options=given) == expected


def test_splits_are_found_where_the_pattern_has_more_than_their_name(tmp_path: Path, write: Write) -> None:
    for split in ("train", "valid"):
        write_frame(write, tmp_path / f"x/my_{split}_set/in/a.png", tmp_path / f"y/{split}/a.png")
    (tmp_path / "x/my_test_set").mkdir()
    assert find_layout(tmp_path, "x/my_{split}_set/in", "y/{split}/{name}.png").splits() == ["train", "val"]
    for split in ("train", "valid"):
        write_frame(write, tmp_path / f"z/{split}_{split}/{split}.in/a.png", tmp_path / f"y/{split}/a.png")
    (tmp_path / "z/train_test/test.in").mkdir(parents=True)
    (tmp_path / "z/test_test").mkdir()
    assert find_layout(tmp_path, "z/{split}_{split}/{split}.in", "y/{split}/{name}").splits() == ["train", "val"]


@pytest.mark.parametrize(("listed", "on_disk"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_names_in_other_unicode_are_found(tmp_path: Path, write: Write, listed: str, on_disk: str) -> None:
    image, mask = tmp_path / f"{on_disk}/x/{on_disk}.png", tmp_path / f"masks_{on_disk}/x/{on_disk}_{on_disk}.png"
    write_frame(write, image, mask)
    table = tmp_path / "table.csv"
    table.write_text(
        f"image,mask,split\n{listed}/x/{listed}.png,masks_{listed}/x/{listed}_{listed}.png,train\n", encoding="utf-8"
    )
    (pair,) = build(table).pairs
    assert pair == (f"{COMPOSED}/x/{COMPOSED}", image, mask)
    assert build(table)[0].labels.sum() == 18
    table.write_text(
        table.read_text("utf-8") + f"{on_disk}/x/{on_disk}.png,{mask.relative_to(tmp_path)},val\n", "utf-8"
    )
    with pytest.raises(ValueError, match=rf"must be listed once, got '{COMPOSED}/x/{COMPOSED}' twice"):
        build(table)
    options = FolderOptions((), ("0", "255"), images=listed, masks=f"masks_{listed}/{{name}}_{listed}.png")
    assert build(tmp_path, "all", options).pairs == [(f"x/{COMPOSED}", image, mask)]
    table.write_text("image,mask\nx/missing.png,y/missing.png\n")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*x/missing\.png, which"):
        build(table)


def write_both_forms(write: Write, one: Path, other: Path) -> None:
    write(one, MASK)
    if other.exists() or (one.parent != other.parent and other.parent.exists()):
        pytest.skip("this file system does not tell composed from decomposed names")
    write(other, MASK)


def test_a_file_of_exactly_the_name_comes_first(tmp_path: Path, write: Write) -> None:
    write_both_forms(write, tmp_path / f"{COMPOSED}.png", tmp_path / f"{DECOMPOSED}.png")
    for name in (COMPOSED, DECOMPOSED):
        (tmp_path / "table.csv").write_text(f"image,mask\n{name}.png,{name}.png\n", encoding="utf-8")
        (pair,) = build(tmp_path / "table.csv", "all").pairs
        assert (pair.image.stem, pair.mask.stem) == (name, name)


def test_folders_of_one_name_in_two_forms_are_refused(tmp_path: Path, write: Write) -> None:
    write_both_forms(write, tmp_path / f"{COMPOSED}/1.png", tmp_path / f"{DECOMPOSED}/2.png")
    assert list(list_tree(tmp_path)) == [f"{COMPOSED}/2", f"{COMPOSED}/1"]
    write(tmp_path / f"{DECOMPOSED}/1.png", MASK)
    with pytest.raises(ValueError, match=rf"must be unique, got '{COMPOSED}/1' in two folders whose names differ"):
        list_tree(tmp_path)


@pytest.mark.parametrize("kind", ["csv", "txt"])
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_lists_and_groups_name_nested_frames_in_either_unicode(
    tmp_path: Path, write: Write, kind: str, form: str
) -> None:
    # Images and masks are stored in different forms too.
    for number in (1, 2):
        image, mask = f"{DECOMPOSED}/{COMPOSED} {number}", f"{COMPOSED}/{DECOMPOSED} {number}"
        write_frame(write, tmp_path / f"images/{image}.png", tmp_path / f"masks/{mask}.png")
    frames = [f"{COMPOSED}/{COMPOSED} {number}" for number in (1, 2)]
    one, two = (unicodedata.normalize(form, frame) for frame in frames)
    assert names(build(tmp_path, "all")) == frames
    if kind == "csv":
        split_by = tmp_path / "list.csv"
        split_by.write_text(f"frame_id,split\n{one},train\n{two},val\n", encoding="utf-8")
    else:
        split_by = tmp_path / "{split}.txt"
        (tmp_path / "train.txt").write_text(f"{one}\n", encoding="utf-8")
        (tmp_path / "val.txt").write_text(f"{two}\n", encoding="utf-8")
    assert names(build(tmp_path, "train", split_by=str(split_by))) == frames[:1]
    assert names(build(tmp_path, "val", split_by=str(split_by))) == frames[1:]
    groups = tmp_path / "groups.csv"
    groups.write_text(f"frame_id,group\n{one},g\n{two},g\n", encoding="utf-8")
    options = FolderOptions(("background", "polyp"), ("0,255",), group_by=str(groups))
    with pytest.raises(ValueError, match="must be in one split, got 'g' in train and val"):
        build(tmp_path, "train", options, train=True, split_by=str(split_by))


def test_values_and_names_of_classes(unsplit: Path, write: Write) -> None:
    dataset = build(unsplit, split_by="80/10/10")
    assert dataset.info.classes == ("background", "polyp")
    assert dataset[0].labels.unique().tolist() == [0, 1]
    colours = np.zeros((8, 12, 3), np.uint8)
    colours[:4], colours[4:, :6] = [255, 0, 0], [0, 255, 0]
    for path in (unsplit / "masks").iterdir():
        write(path, colours)
    options = FolderOptions(("wall", "lumen"), ("#ff0000", "#00ff00"), ("#000000",))
    coloured = build(unsplit, options=options, split_by="80/10/10")
    assert coloured.info.palette == ((255, 0, 0), (0, 255, 0))
    assert coloured[0].labels[::4, ::6].tolist() == [[0, 0], [1, 255]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            FolderOptions(("a", "b", "c"), ("0", "255")),
            "must agree on the number of classes, got 3 by classes, 2 by mask",
        ),
        (FolderOptions(("a", "a")), "classes must differ from each other"),
        (FolderOptions(("a", "b"), (), ("255",)), "mask_values must be given with ignore_values 255"),
        (FolderOptions(), "num_classes must be 2 to 255 for the data set 'folder', got None"),
    ],
)
def test_options_that_contradict(options: FolderOptions, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.describe("folder", folder_options=options)


def test_packs_belong_to_their_mask_values(unsplit: Path) -> None:
    pack(data.build_for_packing("folder", root=unsplit, folder_options=POLYPS))
    packed = build(unsplit, split_by="80/10/10")
    assert packed.packed is not None
    assert packed[0].labels.sum() == 18
    with pytest.raises(ValueError, match=r"must be decoded with mask_values 255,0, got mask_values 0,255; pack again"):
        build(unsplit, options=FolderOptions((), ("255", "0")), split_by="80/10/10")


def test_a_folder_that_patterns_name_is_packed_and_the_hint_says_how(tmp_path: Path, write: Write) -> None:
    for name in ("a", "b"):
        write_frame(write, tmp_path / f"frames/{name}.png", tmp_path / f"truth/{name}_gt.png", values=MASK)
    patterns = ["--images", "frames", "--masks", "truth/{name}_gt.png"]
    values = ["--mask-values", "0,255", "--image-range", "0", "255"]
    assert main(["data", "pack", "folder", "--root", str(tmp_path), *patterns, *values]) == 0
    options = FolderOptions((), ("0", "255"), images="frames", masks="truth/{name}_gt.png")
    told: dict[str, Any] = dict(train=False, root=tmp_path, folder_options=options, image_range=(0, 255))
    assert data.build("folder", "all", **told).packed is not None
    write(tmp_path / "frames/a.png", np.zeros((9, 9, 3), np.uint8))
    with pytest.raises(ValueError, match="has changed; pack again with") as stale:
        data.build("folder", "all", **told)
    command = str(stale.value).split("pack again with '", 1)[1].split("', or decode")[0]
    write(tmp_path / "truth/a_gt.png", np.zeros((9, 9), np.uint8))
    assert main(shlex.split(command)[1:]) == 0
    assert data.build("folder", "all", **told).packed is not None


def test_phone_photos_meet_their_masks_upright(tmp_path: Path, write: Write) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    write_frame(write, tmp_path / "images/a.png", tmp_path / "masks/a.png", values=np.ascontiguousarray(MASK.T))
    (tmp_path / "images/a.png").unlink()
    Image.fromarray(np.zeros((8, 12, 3), np.uint8)).save(tmp_path / "images/a.jpg", exif=exif)
    assert build(tmp_path, "all")[0].labels.shape == (12, 8)
    write(tmp_path / "masks/a.png", MASK)
    with pytest.raises(ValueError, match=r"8 x 12 pixels, got 12 x 8; the image is turned by its EXIF orientation"):
        build(tmp_path, "all")[0]


def test_a_test_split_without_masks_does_not_keep_a_folder_from_training(tmp_path: Path, write: Write) -> None:
    for split in ("train", "val", "test"):
        write(tmp_path / f"{split}/img/1.png", np.zeros((8, 12, 3), np.uint8))
        if split != "test":
            write(tmp_path / f"{split}/gt/png/1.png", MASK)
    options = FolderOptions(("a", "b"), images="{split}/img", masks="{split}/gt/png/{name}.png")
    assert names(build(tmp_path, options=options)) == ["1"]


def test_masks_may_repeat_the_name_before_a_digit(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "images/a.png", np.zeros((8, 12, 3), np.uint8))
    for mask in ("a_a2", "b_b2", "b_c2"):
        write(tmp_path / f"masks/{mask}.png", MASK)
    options = FolderOptions(("a", "b"), images="images", masks="masks/{name}_{name}2.png")
    with pytest.warns(UserWarning, match=r"1 masks? .*b_b2"):
        assert names(build(tmp_path, split="all", options=options)) == ["a"]
