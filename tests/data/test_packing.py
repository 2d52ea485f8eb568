"""Packs: the same samples as decoding, whatever interrupted them, and one sentence where one cannot be used."""

import errno
import json
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from sward import data
from sward.cli.main import main
from sward.data import CorruptFileError, packing
from sward.data.files import PairedFiles
from sward.data.packed import FOLDER, Index
from tests.support.real_data import real_data_root

Write = Callable[[Path, np.ndarray], None]


@pytest.fixture
def root(tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder data set of 6 + 2 frames, each of another size, and shards of two or three frames."""
    monkeypatch.setattr(packing, "SHARD_BYTES", 20_000)
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for number in range(count):
            height, width = 40 + 3 * number, 50 + 2 * number
            write(tmp_path / f"set/images/{split}/{number}.png", rng.integers(0, 256, (height, width, 3), np.uint8))
            write(tmp_path / f"set/masks/{split}/{number}.png", rng.integers(0, 3, (height, width), np.uint8))
    return tmp_path / "set"


def build(root: Path, split: str = "train", packed: str = "auto", **options: object) -> PairedFiles:
    made = data.build(
        "folder", split, train=split == "train", root=root, num_classes=3, image_size=32, packed=packed, **options
    )
    assert isinstance(made, PairedFiles)
    return made


def pack(root: Path, output: Path | None = None, **options: object) -> packing.PackResult:
    return packing.pack(data.build_for_packing("folder", root=root, num_classes=3), output, workers=2, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_samples(one: PairedFiles, other: PairedFiles, epochs: int = 3) -> None:
    assert len(one) == len(other)
    for epoch in range(epochs):
        one.set_epoch(epoch)
        other.set_epoch(epoch)
        for index in range(len(one)):
            a, b = one[index], other[index]
            assert a.name == b.name
            assert torch.equal(a.image, b.image)
            assert torch.equal(a.labels, b.labels)


def test_packed_samples_are_the_decoded_ones_bit_for_bit(root: Path) -> None:
    result = pack(root)
    assert result.folder == root / FOLDER
    assert (result.frames, result.kept, result.corrupt) == (8, 0, 0)
    assert len(list(result.folder.glob("*.bin"))) > 1
    for split in ("train", "val"):
        packed = build(root, split)
        assert packed.packed is not None
        assert_same_samples(packed, build(root, split, "none"))


def test_pack_is_what_is_read(root: Path) -> None:
    """The files are not opened any more: their content may change as long as size and time stay."""
    pack(root)
    whole = build(root)[0]
    path = root / "images/train/0.png"
    status = path.stat()
    path.write_bytes(bytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert torch.equal(build(root)[0].image, whole.image)


@pytest.mark.parametrize("name", ["cvc_clinicdb", "camvid"])
def test_real_images_packed_are_the_decoded_ones(name: str, tmp_path: Path) -> None:
    root = real_data_root(name)
    datasets = data.build_for_packing(name, root=root)
    for dataset in datasets:
        dataset.pairs = dataset.pairs[:5]
    packing.pack(datasets, tmp_path / "pack")
    packed, decoded = (data.build(name, "train", train=True, root=root, image_size=64, packed="none") for _ in range(2))
    for dataset in (packed, decoded):
        dataset.pairs = datasets[SPLIT_ORDER.index("train")].pairs
    packed.use_pack(str(tmp_path / "pack"))
    assert_same_samples(packed, decoded, epochs=2)


SPLIT_ORDER = ("train", "val", "test")


def test_cityscapes_labels_are_packed_as_train_ids(tmp_path: Path, write: Write) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        write(
            tmp_path / f"leftImg8bit/{split}/ulm/ulm_1_{split}_leftImg8bit.png",
            rng.integers(0, 256, (64, 128, 3), np.uint8),
        )
        write(
            tmp_path / f"gtFine/{split}/ulm/ulm_1_{split}_gtFine_labelIds.png",
            rng.integers(0, 34, (64, 128), np.uint8),
        )
    assert packing.pack(data.build_for_packing("cityscapes", root=tmp_path)).frames == 2
    for split in ("train", "val"):
        packed, decoded = (
            data.build("cityscapes", split, train=split == "train", root=tmp_path, image_size=(32, 64), packed=packed)
            for packed in ("auto", "none")
        )
        assert_same_samples(packed, decoded)
        assert set(packed[0].labels.unique().tolist()) <= {*range(19), 255}


def test_workers_read_a_pack_whether_forked_or_spawned(root: Path) -> None:
    pack(root)
    dataset = build(root)
    alone = list(DataLoader(dataset, batch_size=3))
    for workers in DataLoader(dataset, batch_size=3, num_workers=2), pickle.loads(pickle.dumps(dataset)):
        samples = workers if isinstance(workers, DataLoader) else DataLoader(workers, batch_size=3)
        for one, other in zip(alone, samples, strict=True):
            assert torch.equal(one.image, other.image)
    assert len(pickle.dumps(dataset)) < 20_000


def test_a_crop_of_a_packed_frame_leaves_the_file_alone(root: Path) -> None:
    pack(root)
    before = contents(root / FOLDER)
    image, labels, _ = build(root).read(0)
    image.zero_()
    labels.zero_()
    assert contents(root / FOLDER) == before


# Interruption and resumption


def test_packing_again_keeps_what_is_sound(root: Path) -> None:
    pack(root)
    before = contents(root / FOLDER)
    result = pack(root)
    assert (result.frames, result.kept) == (8, 8)
    assert contents(root / FOLDER) == before


def test_an_interrupted_pack_is_not_used_and_goes_on(root: Path, tmp_path: Path) -> None:
    pack(root, tmp_path / "whole")

    for after in (0, 2, 5, 7):
        seen = 0

        def advance(after: int = after) -> None:
            nonlocal seen
            seen += 1
            if seen > after:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            pack(root, advance=advance)
        if (root / FOLDER / "index.json").exists():
            with pytest.warns(UserWarning, match=r"is unfinished, so images are decoded; pack again with 'sward data"):
                assert build(root).packed is None
    with pytest.raises(ValueError, match=r"pack in .* is unfinished: pack again with"):
        build(root, packed=str(root / FOLDER))
    assert pack(root).frames == 8
    assert_same_samples(build(root), build(root, packed="none"), epochs=1)
    assert contents(root / FOLDER) == contents(tmp_path / "whole")


def test_killed_at_any_moment(root: Path) -> None:
    """SIGKILL, a dozen times, each a little later; the pack that is finished after that is sound."""
    for number in range(10, 60):
        for kind in ("images", "masks"):
            shutil.copy(root / kind / "train/5.png", root / kind / f"train/{number}.png")
    unfinished = 0
    for attempt in range(12):
        # A fork: a new interpreter would need seconds to import torch.
        child = os.fork()
        if child == 0:
            pack(root)
            os._exit(0)
        time.sleep(0.003 * attempt)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        index = root / FOLDER / "index.json"
        unfinished += not (index.exists() and json.loads(index.read_text())["complete"])
    assert unfinished > 3
    result = pack(root)
    assert result.frames == 58
    assert not list(result.folder.glob("*.partial"))
    assert_same_samples(build(root), build(root, packed="none"), epochs=1)


def test_a_full_disk_keeps_what_was_written(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_index = Index.write
    written = 0

    def fail(self: Index, folder: Path) -> None:
        nonlocal written
        written += 1
        if written == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_index(self, folder)

    monkeypatch.setattr(Index, "write", fail)
    with pytest.raises(ValueError, match=r"the disk of .*sward-pack is full: make room and start again"):
        pack(root)
    monkeypatch.undo()
    result = pack(root)
    assert result.frames == 8
    assert 0 < result.kept < 8


def test_too_small_a_disk_is_noticed_before_any_work(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"packing needs 0.0 GB more in .*, but only 0.0 GB are free"):
        pack(root)
    assert not list((root / FOLDER).glob("*.bin"))


def test_two_processes_do_not_pack_to_one_folder(root: Path) -> None:
    (root / FOLDER).mkdir()
    with packing._only_one(root / FOLDER), pytest.raises(ValueError, match="another process is packing to"):
        pack(root)


# Stale and damaged packs


@pytest.mark.parametrize("changed", ["images/train/1.png", "masks/train/1.png"])
def test_changed_sources_make_the_pack_stale_until_it_is_packed_again(root: Path, changed: str, write: Write) -> None:
    pack(root)
    with Image.open(root / changed) as image:
        write(root / changed, 0 * np.asarray(image))
    with pytest.raises(ValueError, match=rf"is stale, .*{changed} has changed since: pack again with 'sward data pack"):
        build(root)
    assert build(root, packed="none").packed is None
    build(root, "val")
    result = pack(root)
    assert 0 < result.kept < 8
    assert_same_samples(build(root), build(root, packed="none"), epochs=1)


def test_new_and_removed_images(root: Path) -> None:
    pack(root)
    for kind in ("images", "masks"):
        shutil.copy(root / kind / "train/0.png", root / kind / "train/new.png")
    with pytest.raises(ValueError, match=r"new.png is not in the pack in .*: pack again"):
        build(root)
    for kind in ("images", "masks"):
        (root / kind / "train/new.png").unlink()
        (root / kind / "train/0.png").unlink()
    assert_same_samples(build(root), build(root, packed="none"), epochs=1)
    assert pack(root).frames == 7


def flip_a_byte(path: Path, position: int) -> None:
    values = bytearray(path.read_bytes())
    values[position] ^= 1
    path.write_bytes(values)


def test_a_wrong_checksum_names_the_file_and_packing_again_repairs_it(root: Path) -> None:
    pack(root)
    flip_a_byte(root / FOLDER / "00000.bin", 100)
    dataset = build(root)
    message = (
        r"00000.bin is damaged: the checksum of images/train/0.png is wrong; pack again with "
        rf"'sward data pack folder --root {root} --num-classes 3'"
    )
    with pytest.raises(ValueError, match=message):
        dataset[0]
    dataset[1]
    pack(root)
    assert_same_samples(build(root), build(root, packed="none"), epochs=1)


def test_a_shard_cut_short_or_gone(root: Path) -> None:
    pack(root)
    shard = root / FOLDER / "00001.bin"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"00001.bin holds \d+ bytes of \d+: pack again"):
        build(root)
    shard.unlink()
    with pytest.raises(ValueError, match=r"00001.bin holds 0 bytes of"):
        build(root)
    assert pack(root).frames == 8
    build(root)


def test_damaged_or_newer_index(root: Path) -> None:
    pack(root)
    index = root / FOLDER / "index.json"
    whole = index.read_text()
    index.write_text(whole[:-20])
    with pytest.raises(ValueError, match=r"index.json is damaged .*: pack again"):
        build(root)
    index.write_text(whole.replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match="has format 2, but this version of sward reads 1"):
        build(root)
    assert pack(root).kept == 0
    build(root)


def test_a_pack_of_something_else_is_refused(root: Path, tmp_path: Path) -> None:
    pack(root)
    with pytest.raises(ValueError, match="is of folder with 3 classes, not of folder with 4"):
        data.build("folder", "train", train=True, root=root, num_classes=4)
    with pytest.raises(FileNotFoundError, match=r"there is no pack in .*nowhere: write one with 'sward data pack"):
        build(root, packed=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="scenes are generated: there is nothing to pack"):
        data.build("scenes", "train", train=True, packed="somewhere")
    with pytest.raises(ValueError, match="scenes are generated: there is nothing to pack"):
        data.build_for_packing("scenes")


# Corrupt files


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_a_corrupt_file_stops_or_is_replaced_by_the_next(root: Path, kind: str) -> None:
    for number in (2, 3):
        damage(root / kind / f"train/{number}.png")
    with pytest.raises(CorruptFileError, match=rf"cannot read .*{kind}/train/2.png as an image"):
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
    with pytest.raises(ValueError, match="a score without some of the images is another score"):
        build(root, "val", on_corrupt="skip")
    with pytest.raises(ValueError, match="on_corrupt must be 'stop' or 'skip', got 'drop'"):
        build(root, on_corrupt="drop")
    write(root / "masks/train/1.png", np.full((43, 52), 9, np.uint8))
    with pytest.raises(ValueError, match="holds the value 9"):
        build(root, on_corrupt="skip")[1]


def test_packing_stops_at_a_corrupt_file_or_leaves_it_out(root: Path) -> None:
    damage(root / "images/train/2.png")
    with pytest.raises(CorruptFileError, match=r"cannot read .*images/train/2.png"):
        pack(root)
    with pytest.warns(UserWarning, match=r"skipped: cannot read .*images/train/2.png"):
        result = pack(root, on_corrupt="skip")
    assert (result.frames, result.corrupt) == (7, 1)
    with pytest.raises(CorruptFileError, match=r"cannot read .*images/train/2.png"):
        build(root)[2]
    dataset = build(root, on_corrupt="skip")
    with pytest.warns(UserWarning, match=r"skipped: cannot read .*images/train/2.png"):
        assert dataset[2].name == "3"


def test_skipping_does_not_depend_on_workers(root: Path) -> None:
    damage(root / "images/train/2.png")
    with pytest.warns(UserWarning, match="skipped"):
        alone = list(DataLoader(build(root, on_corrupt="skip"), batch_size=3))
    shared = list(DataLoader(build(root, on_corrupt="skip"), batch_size=3, num_workers=2))
    for one, other in zip(alone, shared, strict=True):
        assert one.name == other.name
        assert torch.equal(one.image, other.image)


# Fixed views


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
    with pytest.raises(ValueError, match="views must be at least 1 and is for training sets, got 0"):
        build(root, views=0)


# Command line


def test_command_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["data", "pack", "folder", "--root", str(root), "--num-classes", "3"]
    assert main(arguments) == 0
    assert f"pack: {root / FOLDER}" in capsys.readouterr().out
    assert json.loads((root / FOLDER / "index.json").read_text())["complete"]
    assert main(arguments) == 0
    assert "8 of them there before and sound" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pack", "folder", "--root", "{root}"], "needs num_classes"),
        (["pack", "scenes"], "scenes are generated"),
        (["pack", "cityscape"], "did you mean cityscapes"),
        (["pack", "camvid", "--root", "{root}/images/train"], "CamVid not found"),
        (["list"], "unknown command 'data list'; did you mean 'data pack'?"),
        (
            ["pack", "folder", "--root", "{root}", "--num-classes", "3", "--output", "{root}/images/train/0.png"],
            "--output",
        ),
    ],
)
def test_mistakes_on_the_command_line(
    root: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", *(word.format(root=root) for word in words)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data"]) == 0
    printed = capsys.readouterr().out
    assert "sward data pack NAME" in printed
    assert "cityscapes, cvc_clinicdb, cvc_colondb, camvid, folder" in printed
