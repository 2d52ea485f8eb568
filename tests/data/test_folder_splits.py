"""The splits of a folder of one's own: drawn, given as a list or a table, kept by group."""

from pathlib import Path
from typing import Any

import pytest

from sward.data import FolderOptions
from sward.data.folder import ImageFolder
from sward.data.lists import draw_splits
from tests.support.polyp_folder import MASK, Write, build, names, write_frame


def test_a_drawn_split_is_a_partition_that_names_and_seed_decide(unsplit: Path) -> None:
    split = {each: names(build(unsplit, each, split_by="80/10/10")) for each in ("train", "val", "test")}
    assert [len(each) for each in split.values()] == [16, 2, 2]
    everyone = [name for each in split.values() for name in each]
    assert sorted(everyone) == sorted(names(build(unsplit, "all")))
    shuffled = list(reversed(everyone))
    assert draw_splits(shuffled, "80/10/10") == {name: each for each in split for name in split[each]}
    other = draw_splits(everyone, "80/10/10", seed=1)
    assert other != draw_splits(everyone, "80/10/10")
    assert "test" not in draw_splits(everyone, "75/25").values()
    # Written down: another draw would silently turn test frames into training frames.
    assert draw_splits(["a", "b", "c", "d"], "50/25/25") == {"a": "test", "b": "train", "c": "train", "d": "val"}


def test_a_share_of_the_masks_is_drawn_by_hash_and_holds_the_smaller_ones(unsplit: Path) -> None:
    def drawn(share: float, **options: Any) -> tuple[set[str], set[str]]:
        made = build(unsplit, train=True, split_by="80/10/10", labelled_share=share, **options)
        return {pair.name for pair in made.pairs}, {pair.name for pair in made.unlabelled}

    everything, none = drawn(1.0)
    assert not none
    tenth, others = drawn(0.1)
    assert len(tenth) == round(0.1 * len(everything))
    assert tenth | others == everything
    assert not tenth & others
    assert tenth < drawn(0.5)[0] < everything
    assert drawn(0.1) == (tenth, others)
    assert drawn(0.1, share_seed=1)[0] != tenth
    assert len(drawn(1e-6)[0]) == 1
    made = build(unsplit, train=True, split_by="80/10/10", labelled_share=0.1)
    assert made[0].name in tenth
    for share in (0.0, 1.1):
        with pytest.raises(ValueError, match="labelled_share must be above 0 and at most 1, got"):
            drawn(share)
    with pytest.raises(ValueError, match="labelled_share must be 1 for evaluation"):
        build(unsplit, "val", split_by="80/10/10", labelled_share=0.5)


def test_groups_stay_in_one_split(unsplit: Path) -> None:
    everyone = names(build(unsplit, "all"))
    assigned = draw_splits(everyone, "50/25/25", group_by=r"^(p\d)_")
    patients = {name.split("_")[0]: split for name, split in assigned.items()}
    assert all(assigned[name] == patients[name.split("_")[0]] for name in everyone)
    assert sorted(patients.values()) == ["test", "train", "train", "val"]
    table = unsplit / "groups.csv"
    table.write_text("frame_id,group\n" + "".join(f"{name},{name[:2]}\n" for name in everyone))
    assert draw_splits(everyone, "50/25/25", group_by=str(table)) == assigned
    for group_by, message in (("^x", "none for 'p0_0'"), ("(", "must be a regular expression or a CSV file")):
        with pytest.raises(ValueError, match=message):
            draw_splits(everyone, "50/25/25", group_by=group_by)
    with pytest.raises(ValueError, match="must leave a frame for train, got 80/10/10 of 20 frames in 1 groups"):
        draw_splits(everyone, "80/10/10", group_by="^p")


@pytest.mark.parametrize(
    ("split", "split_by", "message"),
    [
        ("train", None, "split_by must be set for a folder without train and val, got None; pass --split 80/10/10"),
        ("train", "80/10/20", "must add up to 100, got 80/10/20"),
        ("train", "0/50/50", "must be above 0 for train and val, got 0/50/50"),
        ("train", "90/0/10", "must be above 0 for train and val, got 90/0/10"),
        ("dev", "80/10/10", "split must be train, val, test or all for a folder without splits, got 'dev'"),
    ],
)
def test_splits_that_are_missing_or_wrong(unsplit: Path, split: str, split_by: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(unsplit, split, split_by=split_by)


def test_a_folder_with_splits_is_not_split_again(tmp_path: Path, write: Write) -> None:
    for split in ("train", "valid"):
        write_frame(write, tmp_path / f"images/{split}/a.png", tmp_path / f"masks/{split}/a.png")
    assert names(build(tmp_path, "val")) == ["a"]
    with pytest.raises(
        ValueError, match="split_by must be None for a folder with the splits train, val, got '80/10/10'"
    ):
        build(tmp_path, split_by="80/10/10")


def test_lists_split_a_folder_and_are_checked(unsplit: Path) -> None:
    table = unsplit / "split.csv"
    table.write_text("frame_id,split\np0_0,train\np1_1,val\n")
    assert names(build(unsplit, split_by=str(table))) == ["p0_0"]
    table.write_text("frame_id,split\np0_0,train\np1-1,val\n")
    with pytest.raises(ValueError, match="names frame 'p1-1', which does not exist; did you mean 'p1_1'"):
        build(unsplit, split_by=str(table))
    for split, listed in (("train", "p0_0\np1_1\n"), ("val", "p2_2\n")):
        (unsplit / f"{split}.txt").write_text(listed)
    assert names(build(unsplit, split_by=str(unsplit / "{split}.txt"))) == ["p0_0", "p1_1"]
    (unsplit / "val.txt").write_text("p1_1\n")
    with pytest.raises(ValueError, match="frame 'p1_1' must be in one split, got train and val"):
        build(unsplit, split_by=str(unsplit / "{split}.txt"))


def write_grouped(root: Path, write: Write, kind: str, split_of: dict[str, str]) -> dict[str, Any]:
    """Write frames whose split a list, a table or folders give; return what `build` needs."""
    for name, split in split_of.items():
        part = f"{split}/{name}" if kind == "folders" else name
        write_frame(write, root / f"images/{part}.png", root / f"masks/{part}.png")
    if kind == "list":
        (root / "list.csv").write_text("frame_id,split\n" + "".join(f"{n},{s}\n" for n, s in split_of.items()))
        return {"root": root, "split_by": str(root / "list.csv")}
    if kind == "table":
        rows = "".join(f"images/{n}.png,masks/{n}.png,{s}\n" for n, s in split_of.items())
        (root / "table.csv").write_text("image,mask,split\n" + rows)
        return {"root": root / "table.csv"}
    return {"root": root}


@pytest.mark.parametrize("kind", ["list", "table", "folders"])
def test_a_given_split_must_keep_groups_together(tmp_path: Path, write: Write, kind: str) -> None:
    settings = write_grouped(tmp_path, write, kind, {"p1_1": "train", "p2_1": "val", "p3_1": "test", "p1_2": "test"})

    def train(group_by: str) -> ImageFolder:
        options = FolderOptions(("background", "polyp"), ("0,255",), group_by=group_by)
        return build(options=options, train=True, **settings)

    with pytest.raises(ValueError, match=r"one split, got 'p1' in (train and test|test and train), with the frames"):
        train(r"(p\d)_")
    assert len(train(r"(p\d_\d)")) == 1
    for group_by in (r"(p[12])_", r"p\d_\d(x?)"):
        with pytest.raises(ValueError, match=r"group_by must give every frame a group, got none for '.*p"):
            train(group_by)
    prefix = "images/" if kind == "table" else ""
    (tmp_path / "groups.csv").write_text(
        f"frame_id,group\n{prefix}p1_1,a\n{prefix}p2_1,b\n{prefix}p3_1,c\n{prefix}p1_2,a\n"
    )
    with pytest.raises(ValueError, match="got 'a' in"):
        train(str(tmp_path / "groups.csv"))
    with pytest.raises(FileNotFoundError, match=r"group_by .* or a CSV file, got 'no\.csv'; there is no such file"):
        train("no.csv")
    (tmp_path / "groups.csv").write_text("frame,group\n")
    with pytest.raises(ValueError, match=r"the table of groups .*csv must be .* frame_id and group, got frame, group$"):
        train(str(tmp_path / "groups.csv"))


def test_groups_are_compared_where_the_pattern_names_the_split_twice(tmp_path: Path, write: Write) -> None:
    for split in ("train", "val"):
        write_frame(
            write, tmp_path / f"{split}/{split}_images/p1_{split}.png", tmp_path / f"truth/{split}/p1_{split}.png"
        )
    options = FolderOptions(
        ("a", "b"), ("0", "255"), images="{split}/{split}_images", masks="truth/{split}/{name}.png", group_by=r"(p\d)_"
    )
    with pytest.raises(ValueError, match="got 'p1' in"):
        build(tmp_path, options=options, train=True)


def test_groups_are_found_in_test_images_without_masks(tmp_path: Path, write: Write) -> None:
    write_grouped(tmp_path, write, "folders", {"p1_1": "train", "p2_1": "val"})
    write(tmp_path / "images/test/p1_2.png", MASK)
    with pytest.raises(ValueError, match="got 'p1' in"):
        build(tmp_path, options=FolderOptions(("a", "b"), ("0", "255"), group_by=r"(p\d)_"), train=True)


def test_a_table_with_splits_is_not_split_again_but_a_list_holds(tmp_path: Path, write: Write) -> None:
    split_of = {f"{number}": "train" if number < 6 else "val" if number < 8 else "test" for number in range(10)}
    table = write_grouped(tmp_path, write, "table", split_of)["root"]
    with pytest.raises(
        ValueError, match="split_by must be None or the path of a list for a table with the column split, got '80/10/1"
    ):
        build(table, split_by="80/10/10")
    (tmp_path / "list.csv").write_text("frame_id,split\nimages/9,train\nimages/0,val\n")
    assert names(build(table, split_by=str(tmp_path / "list.csv"))) == ["images/9"]


@pytest.mark.parametrize("kind", ["list", "table"])
def test_words_for_splits_are_those_of_folders_and_others_are_refused(tmp_path: Path, write: Write, kind: str) -> None:
    settings = write_grouped(
        tmp_path, write, kind, {"a": "Training", "b": " valid ", "c": "testing", "d": "", "e": "Val"}
    )
    found = {split: [name[-1] for name in names(build(split=split, **settings))] for split in ("train", "val", "test")}
    assert found == {"train": ["a"], "val": ["b", "e"], "test": ["c"]}
    settings = write_grouped(tmp_path, write, kind, {"a": "train", "b": "val", "c": "tran"})
    with pytest.raises(ValueError, match=rf"split of frame '.*c' in .*{kind}\.csv must be train, val, .* got 'tran'"):
        build(**settings)


def test_one_table_names_every_file(tmp_path: Path, write: Write) -> None:
    for name in ("a", "b"):
        write_frame(write, tmp_path / f"x/{name}.jpg", tmp_path / f"y/{name}.png")
    table = tmp_path / "frames.csv"
    table.write_text("image,mask,split\nx/a.jpg,y/a.png,train\nx/b.jpg,y/b.png,val\n")
    assert names(build(table)) == ["x/a"]
    assert build(table, "val")[0].labels.sum() == 18
    table.write_text("image,mask\nx/a.jpg,y/a.png\nx/c.jpg,y/b.png\n")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*x/c\.jpg, which .*frames\.csv names"):
        build(table)
    for option, pattern in (("images", "x"), ("masks", "y/{name}.png")):
        with pytest.raises(ValueError, match=rf"{option} \(--{option}\) must be left out .* got '{pattern}'"):
            build(table, options=FolderOptions(("background", "polyp"), **{option: pattern}))
    table.write_text("picture,mask\nx/a.jpg,y/a.png\n")
    with pytest.raises(ValueError, match=r"frames .*csv must be a CSV file with .* image and mask, got picture, mask$"):
        build(table)
    table.write_bytes("image,mask\nx/ä.jpg,y/a.png\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"the table of frames .*csv must be UTF-8 text, got the byte 0xe4"):
        build(table)


def test_tables_come_from_spreadsheets_and_name_a_frame_once(tmp_path: Path, write: Write) -> None:
    for name in ("a 1", "b"):
        write_frame(write, tmp_path / f"x/{name}.jpg", tmp_path / f"y/{name}.png")
    table = tmp_path / "frames.csv"
    for text in (
        "\ufeffImage; Mask; Split\nx/a 1.jpg; y/a 1.png; Train\n\nx/b.jpg ;y/b.png;VAL\n",
        "\ufeffimage, mask, split\n x/a 1.jpg, y/a 1.png, train\nx/b.jpg , y/b.png , val\n",
    ):
        table.write_text(text, encoding="utf-8")
        assert build(table).pairs == [("x/a 1", tmp_path / "x/a 1.jpg", tmp_path / "y/a 1.png")]
        assert names(build(table, "val")) == ["x/b"]
    for again in ("x/b.jpg,y/b.png,train", "x/b.jpg,y/a 1.png,val"):
        table.write_text(f"image,mask,split\nx/b.jpg,y/b.png,val\nx/a 1.jpg,y/a 1.png,train\n{again}\n")
        with pytest.raises(ValueError, match=r"frames of .*frames\.csv must be listed once, got 'x/b' twice"):
            build(table)


def test_text_lists_hold_one_name_per_line_also_with_spaces(tmp_path: Path, write: Write) -> None:
    for name in ("a b", "a", "b", "c  d, e"):
        write_frame(write, tmp_path / f"images/{name}.png", tmp_path / f"masks/{name}.png")
    (tmp_path / "train.txt").write_text("a b\n  c  d, e \n\n")
    (tmp_path / "val.txt").write_text("a\r\n")
    split_by = str(tmp_path / "{split}.txt")
    # In the order of the folder.
    assert names(build(tmp_path, "train", split_by=split_by)) == ["a b", "c  d, e"]
    assert names(build(tmp_path, "val", split_by=split_by)) == ["a"]
