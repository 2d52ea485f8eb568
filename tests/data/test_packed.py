"""Reading packs: what is read is the pack, and a pack that does not fit its sources is refused in one sentence."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from sward import data
from sward.data.packed import FOLDER
from tests.support.folder_data import assert_same_samples, build, contents, pack
from tests.support.polyp_folder import Write


def test_pack_is_what_is_read(root: Path) -> None:
    """The files are not opened any more: their content may change as long as size and time stay."""
    pack(root)
    whole = build(root)[0]
    path = root / "images/train/0.png"
    status = path.stat()
    path.write_bytes(bytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert torch.equal(build(root)[0].image, whole.image)


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


# Stale and damaged packs


@pytest.mark.parametrize("changed", ["images/train/1.png", "masks/train/1.png"])
def test_changed_sources_make_the_pack_stale_until_it_is_packed_again(root: Path, changed: str, write: Write) -> None:
    pack(root)
    with Image.open(root / changed) as image:
        write(root / changed, 0 * np.asarray(image))
    with pytest.raises(ValueError, match=rf"is stale: .*{changed} has changed; pack again with 'sward data pack"):
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
    with pytest.raises(ValueError, match=r"new.png is not in the pack in .*; pack again"):
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
        r"00000.bin is damaged: the checksum of images/train/0.png does not match; pack again with "
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
    with pytest.raises(ValueError, match=r"00001.bin must have \d+ bytes, got \d+; pack again"):
        build(root)
    shard.unlink()
    with pytest.raises(ValueError, match=r"00001.bin must have \d+ bytes, got 0"):
        build(root)
    assert pack(root).frames == 8
    build(root)


def test_damaged_or_newer_index(root: Path) -> None:
    pack(root)
    index = root / FOLDER / "index.json"
    whole = index.read_text()
    index.write_text(whole[:-20])
    with pytest.raises(ValueError, match=r"index.json is damaged .*; pack again"):
        build(root)
    index.write_text(whole.replace('"format": 2', '"format": 3'))
    with pytest.raises(ValueError, match=r"the format of the pack in .* must be 2, got 3"):
        build(root)
    assert pack(root).kept == 0
    build(root)


def test_a_pack_of_something_else_is_refused(root: Path, tmp_path: Path) -> None:
    pack(root)
    with pytest.raises(ValueError, match="must be of folder with 4 classes, got folder with 3"):
        data.build("folder", "train", train=True, root=root, num_classes=4)
    with pytest.raises(FileNotFoundError, match=r"there is no pack in .*nowhere; write one with 'sward data pack"):
        build(root, packed=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="packed must be 'auto' or 'none' for scenes, got 'somewhere'"):
        data.build("scenes", "train", train=True, packed="somewhere")
    with pytest.raises(ValueError, match="scenes are generated and need no pack"):
        data.build_for_packing("scenes")
    for name in ("camvid", "unlabelled"):
        with pytest.raises(ValueError, match=rf"mask_values must be empty for {name}, got .*; only a folder"):
            data.build_for_packing(name, root=root, folder_options=data.FolderOptions(mask_values=("0", "255")))
