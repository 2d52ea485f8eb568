"""Packing: the same samples as decoding, and a pack that any interruption leaves unfinished or whole."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sward import atomic, data
from sward.cli.main import main
from sward.data import CorruptFileError, packed, packing
from sward.data.packed import FOLDER, Index
from tests.support.executed_lines import count_lines, killed_at_line
from tests.support.folder_data import assert_same_samples, build, contents, damage, pack
from tests.support.polyp_folder import Write
from tests.support.real_data import real_data_root


def test_packed_samples_are_the_decoded_ones_bit_for_bit(root: Path) -> None:
    result = pack(root)
    assert result.folder == root / FOLDER
    assert (result.frames, result.kept, result.corrupt) == (8, 0, 0)
    assert len(list(result.folder.glob("*.bin"))) > 1
    for split in ("train", "val"):
        packed = build(root, split)
        assert packed.packed is not None
        assert_same_samples(packed, build(root, split, "none"))


@pytest.mark.parametrize("name", ["cvc_clinicdb", "camvid"])
def test_real_images_packed_are_the_decoded_ones(name: str, tmp_path: Path) -> None:
    root = real_data_root(name)
    datasets = data.build_for_packing(name, root=root)  # the first is the training split
    for dataset in datasets:
        dataset.pairs = dataset.pairs[:5]
    packing.pack(datasets, tmp_path / "pack")
    packed, decoded = (data.build(name, "train", train=True, root=root, image_size=64, packed="none") for _ in range(2))
    for dataset in (packed, decoded):
        dataset.pairs = datasets[0].pairs
    packed.use_pack(str(tmp_path / "pack"))
    assert_same_samples(packed, decoded, epochs=2)


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


def test_packs_hold_the_upright_picture(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the upper left corner of what is stored belongs to the upper right
    stored = np.zeros((32, 48, 3), np.uint8)
    stored[:8, :16] = 255
    (root / "images/train/0.png").unlink()
    Image.fromarray(stored).save(root / "images/train/0.jpg", exif=exif, quality=100)
    mask = np.zeros((48, 32), np.uint8)
    mask[:16, -8:] = 1
    Image.fromarray(mask).save(root / "masks/train/0.png")
    pack(root)
    dataset = build(root)
    assert dataset.packed is not None
    image, labels = dataset.packed.read(0)
    assert dataset.pairs[0].name == "0"
    assert image.shape == (3, 48, 32)
    assert torch.equal(image[0] > 127, torch.from_numpy(mask == 1))
    assert torch.equal(labels, torch.from_numpy(mask))


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
            with pytest.warns(
                UserWarning, match=r"is unfinished, decoding images instead; pack again with 'sward data"
            ):
                assert build(root).packed is None
    with pytest.raises(ValueError, match=r"pack in .* is unfinished; pack again with"):
        build(root, packed=str(root / FOLDER))
    assert pack(root).frames == 8
    assert_same_samples(build(root), build(root, packed="none"), epochs=1)
    assert contents(root / FOLDER) == contents(tmp_path / "whole")


def test_killed_at_any_moment(root: Path, tmp_path: Path) -> None:
    """SIGKILL at a dozen lines from the first to the last; whatever it leaves, packing again makes the same pack."""
    for number in range(10, 30):
        for kind in ("images", "masks"):
            shutil.copy(root / kind / "train/5.png", root / kind / f"train/{number}.png")
    modules = (packing, packed, atomic)
    lines = count_lines(lambda: pack(root, tmp_path / "whole"), *modules)
    unfinished = 0
    for line in range(0, lines, lines // 11):
        # A fork: a new interpreter would first import torch.
        child = os.fork()
        if child == 0:
            with killed_at_line(line, *modules):
                pack(root)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status)
        index = root / FOLDER / "index.json"
        if index.exists() and json.loads(index.read_text())["complete"]:
            assert contents(root / FOLDER) == contents(tmp_path / "whole")
        else:
            unfinished += 1
            assert pack(root).frames == 28
            assert contents(root / FOLDER) == contents(tmp_path / "whole")
        shutil.rmtree(root / FOLDER)
    assert unfinished > 8


@pytest.mark.parametrize("leftover", ["00007.bin", "00007.bin.partial"])
def test_leftovers_of_a_killed_pack_are_removed(root: Path, leftover: str) -> None:
    """Also where the new pack has fewer shards, so that none takes its name."""
    (root / FOLDER).mkdir()
    (root / FOLDER / leftover).write_bytes(b"part of a frame")
    pack(root)
    shards = {shard.file for shard in Index.read(root / FOLDER).shards}
    assert set(contents(root / FOLDER)) == {"index.json", "lock", *shards}
    assert "00007.bin" not in shards


def test_other_files_are_never_touched(root: Path, tmp_path: Path) -> None:
    """A pack removes what an interrupted one has left; in a folder of somebody else's, that would be theirs."""
    for name in ("pytorch_model.bin", "movie.mkv.partial", "notes.txt"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("precious")
        (folder / "lock").write_text("theirs")
        with pytest.raises(ValueError, match=rf"output .* must be an empty folder, .* which holds {re.escape(name)}"):
            pack(root, folder)
        assert (folder / name).read_text() == "precious"
        assert (folder / "lock").read_text() == "theirs"
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / ".gitignore.partial").touch()
    pack(root, hidden)
    assert (hidden / ".gitignore.partial").exists()


def test_a_full_disk_keeps_what_was_written(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_index = Index.write
    written = 0

    def fail(self: Index, folder: Path) -> None:
        nonlocal written
        written += 1
        if written == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_index(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(Index, "write", fail)
        with pytest.raises(ValueError, match=r"the disk of .*sward-pack is full; free some space and pack again"):
            pack(root)
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


# Command line


def test_command_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["data", "pack", "folder", "--root", str(root), "--num-classes", "3"]
    assert main(arguments) == 0
    assert f"pack: {root / FOLDER}" in capsys.readouterr().out
    assert json.loads((root / FOLDER / "index.json").read_text())["complete"]
    assert main(arguments) == 0
    assert "8 of them reused" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pack", "folder", "--root", "{root}"], "num_classes must be 2 to 255"),
        (["pack", "scenes"], "scenes are generated"),
        (["pack", "cityscape"], "did you mean cityscapes"),
        (["pack", "camvid", "--root", "{root}/images/train"], "CamVid not found"),
        (["pack", "unlabelled", "--root", "{root}", "--num-classes", "3"], "num_classes must be None for unlabelled"),
        (["pack", "folder", "--root", "{root}", "--num-classes", "3", "--workers", "-3"], "workers must be at least 1"),
        (["list"], "unknown command 'data list'; did you mean 'data pack' or 'data check'?"),
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
