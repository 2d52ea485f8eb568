"""CVC-ClinicDB and CVC-ColonDB: layouts, the three ways to split, and what is said when something is missing."""

import csv
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from sward import data
from sward.data import DatasetNotFoundError
from sward.data.polyps import SPLITS
from tests.support.polyp_folder import Write
from tests.support.real_data import real_data_root

TABLES = Path(data.__file__).parent / "splits"


def names(root: Path, split_by: str, name: str = "cvc_clinicdb") -> dict[str, list[str]]:
    built = {
        split: data.build(name, split, train=False, root=root, image_size=32, split_by=split_by) for split in SPLITS
    }
    return {split: [pair.name for pair in dataset.pairs] for split, dataset in built.items()}


def sequences(name: str) -> dict[str, tuple[str, str]]:
    """Frame -> (sequence, split) from the packaged table."""
    with (TABLES / f"{name}.csv").open() as lines:
        return {row["frame_id"]: (row["sequence_id"], row["split"]) for row in csv.DictReader(lines)}


def write_pairs(root: Path, write: Write, numbers: range, suffixes: tuple[str, str] = (".png", ".png")) -> None:
    for number in numbers:
        write(root / f"images/{number}{suffixes[0]}", np.full((6, 8, 3), number % 256, np.uint8))
        write(root / f"masks/{number}{suffixes[1]}", np.zeros((6, 8), np.uint8))


@pytest.mark.parametrize(("name", "counts"), [("cvc_clinicdb", (428, 75, 109)), ("cvc_colondb", (302, 41, 37))])
def test_packaged_tables_keep_every_sequence_on_one_side(name: str, counts: tuple[int, int, int]) -> None:
    table = sequences(name)
    assert list(table) == [str(number) for number in range(1, sum(counts) + 1)]
    assert tuple(sum(split == each for _, split in table.values()) for each in SPLITS) == counts
    sides: dict[str, set[str]] = {}
    for sequence, split in table.values():
        sides.setdefault(sequence, set()).add(split)
    assert all(len(side) == 1 for side in sides.values())
    assert len(sides) == {"cvc_clinicdb": 29, "cvc_colondb": 15}[name]


def test_parity_halves_colondb_by_sequence(tmp_path: Path, write: Write) -> None:
    write_pairs(tmp_path, write, range(1, 381))
    halves = {
        split: {
            pair.name for pair in data.build("cvc_colondb", split, train=False, root=tmp_path, split_by="parity").pairs
        }
        for split in ("train", "test")
    }
    for name, (sequence, _) in sequences("cvc_colondb").items():
        assert name in halves["test" if int(sequence) % 2 else "train"]
    assert {split: len(found) for split, found in halves.items()} == {"train": 148, "test": 232}
    with pytest.raises(
        FileNotFoundError, match=r"split_by \(--split\) must be 'sequence', 'ratio' or the path of a list"
    ):
        data.build("cvc_clinicdb", "test", train=False, root=tmp_path, split_by="parity")


def test_sequence_split_of_the_official_layout(clinicdb: Path) -> None:
    split = names(clinicdb, "sequence")
    table = sequences("cvc_clinicdb")
    assert {name: each for each in SPLITS for name in split[each]} == {name: row[1] for name, row in table.items()}
    assert split["train"][:3] == ["1", "2", "3"]
    sample = data.build("cvc_clinicdb", "val", train=False, root=clinicdb, image_size=32)[0]
    assert sample.name == "429"
    assert sample.image.shape == (3, 32, 32)
    assert sample.labels.shape == (8, 12)  # the mask's own resolution
    assert sample.labels.sum() == 18
    assert data.denormalise(sample.image).unique().tolist() == [429 % 256]


def test_training_samples_have_one_size_and_both_classes(clinicdb: Path) -> None:
    sample = data.build("cvc_clinicdb", "train", train=True, root=clinicdb, image_size=(32, 64))[3]
    assert sample.image.shape == (3, 32, 64)
    assert sample.labels.shape == (32, 64)
    assert {0, 1} <= set(sample.labels.unique().tolist()) <= {0, 1, 255}


def test_ratio_split_has_the_papers_shares_and_is_fixed_for_good(clinicdb: Path) -> None:
    split = names(clinicdb, "ratio")
    assert [len(split[each]) for each in SPLITS] == [490, 61, 61]
    assert len(set().union(*split.values())) == 612
    # Written down: a change of this draw would silently make new results incomparable to old ones.
    assert split["val"][:5] == ["286", "245", "374", "610", "178"]
    assert split["test"][:5] == ["436", "319", "386", "217", "101"]


def test_lists_beside_the_images_come_first(clinicdb: Path, tmp_path: Path) -> None:
    shutil.copytree(clinicdb, tmp_path, dirs_exist_ok=True, copy_function=os.link)
    lists = tmp_path / "CVC-ClinicDB/lists"
    lists.mkdir()
    for split, numbers in (("train", "5\n7\n"), ("val", "9\n"), ("test", "600\n1\n")):
        (lists / f"seq_{split}.txt").write_text(numbers)
    assert names(tmp_path, "sequence") == {"train": ["5", "7"], "val": ["9"], "test": ["600", "1"]}


@pytest.mark.parametrize("split", SPLITS)
def test_a_frame_in_two_lists_beside_the_images_is_refused(clinicdb: Path, tmp_path: Path, split: str) -> None:
    shutil.copytree(clinicdb, tmp_path, dirs_exist_ok=True, copy_function=os.link)
    lists = tmp_path / "CVC-ClinicDB/lists"
    lists.mkdir()
    for each, numbers in (("train", "5\n7\n"), ("val", "9\n"), ("test", "600\n7\n")):
        (lists / f"seq_{each}.txt").write_text(numbers)
    with pytest.raises(
        ValueError, match=r"frame '7' must be in one split, got train and test in .*lists/seq_\{split\}"
    ):
        data.build("cvc_clinicdb", split, train=False, root=tmp_path)
    # Scores on every frame need no split.
    assert len(data.build("cvc_clinicdb", "all", train=False, root=tmp_path)) == 612


@pytest.mark.parametrize("split", SPLITS)
def test_lists_beside_the_images_must_be_all_there(clinicdb: Path, tmp_path: Path, split: str) -> None:
    """Two lists and the packaged table for the third split would share frames."""
    shutil.copytree(clinicdb, tmp_path, dirs_exist_ok=True, copy_function=os.link)
    lists = tmp_path / "CVC-ClinicDB/lists"
    lists.mkdir()
    for each, numbers in (("train", range(1, 500)), ("val", range(500, 613))):
        (lists / f"seq_{each}.txt").write_text("\n".join(map(str, numbers)))
    with pytest.raises(
        data.DatasetNotFoundError, match=r"incomplete: there is no seq_test\.txt beside the other lists"
    ):
        data.build("cvc_clinicdb", split, train=False, root=tmp_path)


def test_a_frame_that_a_list_names_twice_counts_once(tmp_path: Path, write: Write) -> None:
    write_pairs(tmp_path / "cvc_colondb", write, range(1, 8))
    for split, text in (("train", "1\n2"), ("val", "4"), ("test", "6\n6\n7")):
        (tmp_path / f"my_{split}.txt").write_text(text)
    assert names(tmp_path, str(tmp_path / "my_{split}.txt"), "cvc_colondb")["test"] == ["6", "7"]


def test_split_by_list_files(tmp_path: Path, write: Write) -> None:
    write_pairs(tmp_path / "cvc_colondb", write, range(1, 8), (".tif", ".webp"))
    for split, text in (("train", "\ufeff1\n2 \n3"), ("val", "4"), ("test", "6\n")):
        (tmp_path / f"my_{split}.txt").write_text(text)
    expected = {"train": ["1", "2", "3"], "val": ["4"], "test": ["6"]}
    assert names(tmp_path, str(tmp_path / "my_{split}.txt"), "cvc_colondb") == expected
    rows = "".join(f"{name},{split}\n" for split, listed in expected.items() for name in listed)
    (tmp_path / "split.csv").write_text("frame_id,split\n" + rows)
    assert names(tmp_path, str(tmp_path / "split.csv"), "cvc_colondb") == expected


def test_split_tables_from_spreadsheets(tmp_path: Path, write: Write) -> None:
    write_pairs(tmp_path / "cvc_colondb", write, range(1, 4))
    write(tmp_path / "cvc_colondb/images/a b.png", np.zeros((6, 8, 3), np.uint8))
    write(tmp_path / "cvc_colondb/masks/a b.png", np.zeros((6, 8), np.uint8))
    path = tmp_path / "split.csv"
    path.write_text("\ufeffframe_id; Split\n1; Train\na b;train\n2;VAL\n3;test\n", encoding="utf-8")
    assert names(tmp_path, str(path), "cvc_colondb") == {"train": ["1", "a b"], "val": ["2"], "test": ["3"]}
    path.write_text("frame_id,split\n1,train\n2,val\n1,test\n")
    with pytest.raises(ValueError, match=r"frame '1' must be in one split, got train and test in the split list"):
        names(tmp_path, str(path), "cvc_colondb")


def test_list_files_that_do_not_fit(tmp_path: Path, write: Write) -> None:
    write_pairs(tmp_path / "cvc_colondb", write, range(1, 4))

    def build(split_by: str) -> None:
        data.build("cvc_colondb", "train", train=True, root=tmp_path, split_by=split_by)

    with pytest.raises(
        FileNotFoundError,
        match=r"split_by \(--split\) must be 'sequence', 'ratio' or the path of a list, got 'nowhere\.csv'",
    ):
        build("nowhere.csv")
    (tmp_path / "bare.txt").write_text("1\n2\n")
    with pytest.raises(ValueError, match=r"must be a CSV file with the columns frame_id and split, or .* \{split\}"):
        build(str(tmp_path / "bare.txt"))
    (tmp_path / "a_train.txt").write_text("1\n17\n")
    with pytest.raises(ValueError, match=r"a_train.txt names frame '17', which does not exist"):
        build(str(tmp_path / "a_{split}.txt"))
    (tmp_path / "a_train.txt").write_text("1\n")
    (tmp_path / "a_val.txt").write_text("2\n1\n")
    with pytest.raises(ValueError, match="frame '1' must be in one split, got train and val"):
        build(str(tmp_path / "a_{split}.txt"))
    (tmp_path / "empty.csv").write_text("frame_id,split\n1,val\n")
    with pytest.raises(ValueError, match="names no frame for this split"):
        build(str(tmp_path / "empty.csv"))


@pytest.mark.parametrize("images", [300, 380])
def test_colondb_comes_in_two_sizes(tmp_path: Path, write: Write, images: int) -> None:
    write_pairs(tmp_path / "cvc_colondb", write, range(1, images + 1))
    split = names(tmp_path, "ratio", "cvc_colondb")
    assert [len(split[each]) for each in SPLITS] == {300: [240, 30, 30], 380: [304, 38, 38]}[images]
    by_sequence = names(tmp_path, "sequence", "cvc_colondb")
    assert sum(map(len, by_sequence.values())) == images
    assert all(by_sequence.values())


def test_incomplete_download(tmp_path: Path, write: Write) -> None:
    write_pairs(tmp_path / "cvc_clinicdb", write, range(1, 11))
    for split_by in ("sequence", "ratio"):
        with pytest.raises(DatasetNotFoundError, match=r"incomplete: it must have 612 images, got 10; .*https://"):
            data.build("cvc_clinicdb", "train", train=True, root=tmp_path, split_by=split_by)
    write_pairs(tmp_path / "cvc_colondb", write, range(1, 11))
    for name in ("cvc_clinicdb", "cvc_colondb"):
        with pytest.raises(DatasetNotFoundError, match=r"incomplete: it must have .* images, got 10"):
            data.build(name, "all", train=False, root=tmp_path)


def test_missing_folder_beside_the_images(tmp_path: Path) -> None:
    (tmp_path / "cvc_clinicdb/Original").mkdir(parents=True)
    with pytest.raises(
        DatasetNotFoundError, match="incomplete: the folder 'Ground Truth' is missing next to 'Original'"
    ):
        data.build("cvc_clinicdb", "train", train=True, root=tmp_path)


def test_image_without_mask(tmp_path: Path, write: Write) -> None:
    write_pairs(tmp_path, write, range(1, 4))
    (tmp_path / "masks/2.png").unlink()
    with pytest.raises(ValueError, match=r"image .*images/2.png has no mask; .*masks holds no image file named 2"):
        data.build("cvc_clinicdb", "train", train=True, root=tmp_path)


def test_frames_with_other_names_have_no_known_sequence(tmp_path: Path, write: Write) -> None:
    write_pairs(tmp_path / "cvc_colondb", write, range(1001, 1301))
    with pytest.raises(ValueError, match=r"must be numbered 1 to 380 to split by sequence, got '1001'"):
        data.build("cvc_colondb", "train", train=True, root=tmp_path)


def test_unknown_split(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="split must be train, val, test or all for cvc_colondb, got 'dev'"):
        data.build("cvc_colondb", "dev", train=True, root=tmp_path)


@pytest.mark.parametrize("kind", ["grey levels", "RGB", "palette", "1 bit"])
def test_masks_are_polyp_above_127(tmp_path: Path, write: Write, kind: str) -> None:
    from PIL import Image

    grey = np.array([[0, 127, 128, 255]] * 2, np.uint8)
    mask = Image.fromarray(grey)
    if kind == "RGB":
        mask = mask.convert("RGB")
    elif kind == "palette":
        mask = Image.fromarray((grey > 127).astype(np.uint8))
        mask.putpalette([0, 0, 0, 255, 255, 255])
    elif kind == "1 bit":
        mask = Image.fromarray(grey > 127)
    write(tmp_path / "images/a.png", np.zeros((2, 4, 3), np.uint8))
    (tmp_path / "masks").mkdir()
    mask.save(tmp_path / "masks/a.png")
    (tmp_path / "list.csv").write_text("frame_id,split\na,val\n")
    dataset = data.build("cvc_clinicdb", "val", train=False, root=tmp_path, split_by=str(tmp_path / "list.csv"))
    assert dataset[0].labels.tolist() == [[0, 0, 1, 1]] * 2


@pytest.mark.parametrize("name", ["cvc_clinicdb", "cvc_colondb"])
def test_real_frames(name: str) -> None:
    root = real_data_root(name)
    counts = {"cvc_clinicdb": [428, 75, 109], "cvc_colondb": [302, 41, 37]}[name]
    sets = [data.build(name, split, train=False, root=root, image_size=64) for split in SPLITS]
    assert [len(each) for each in sets] == counts
    for dataset in sets:
        sample = dataset[len(dataset) // 2]
        assert sample.labels.shape == {"cvc_clinicdb": (288, 384), "cvc_colondb": (500, 574)}[name]
        assert set(sample.labels.unique().tolist()) == {0, 1}
        assert 0.002 < sample.labels.float().mean() < 0.6
        assert sample.image.std() > 0.3
    ratio = [len(data.build(name, split, train=False, root=root, split_by="ratio")) for split in SPLITS]
    assert ratio == {"cvc_clinicdb": [490, 61, 61], "cvc_colondb": [304, 38, 38]}[name]
    training = data.build(name, "train", train=True, root=root, image_size=64)
    assert torch.equal(training[0].image, training[0].image)


def test_packaged_tables_are_the_published_sequences() -> None:
    for name, source in (("cvc_clinicdb", "metadata.csv"), ("cvc_colondb", "sequences.csv")):
        with (real_data_root(name) / name / source).open() as lines:
            published = {row["frame_id"]: row["sequence_id"] for row in csv.DictReader(lines)}
        assert {frame: row[0] for frame, row in sequences(name).items()} == published
    lists = real_data_root("cvc_clinicdb") / "cvc_clinicdb/lists"
    for split in SPLITS:
        listed = (lists / f"seq_{split}.txt").read_text().split()
        assert listed == [frame for frame, row in sequences("cvc_clinicdb").items() if row[1] == split]
