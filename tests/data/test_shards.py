"""Tar files of unlabelled images: who reads what, in which order, and where a resumed run goes on."""

from __future__ import annotations

import io
import itertools
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sward import data
from sward.data import Batch, CorruptFileError, DatasetNotFoundError
from sward.data.shards import ImageShards, is_shards
from sward.training.batches import unlabelled_batches

SHARDS, IMAGES = 6, 3


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def encoded(number: int) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (40, 48, 3), np.uint8)).save(content, "PNG")
    return content.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six shards of three images, with other files between them."""
    for shard in range(SHARDS):
        with tarfile.open(tmp_path / f"{shard:03}.tar", "w") as archive:
            for number in range(IMAGES):
                add(archive, f"{number}.png", encoded(IMAGES * shard + number))
                add(archive, f"{number}.json", b"{}")
    return tmp_path


def stream(folder: Path, source: str = "{000..005}.tar", **settings: int) -> ImageShards:
    like = data.build("scenes", "train", train=True, image_size=(32, 32), views=2)
    made = ImageShards([f"{folder}/{source}" if ":" not in source else source], like, (32, 32), seed=1)
    for name, value in settings.items():
        setattr(made, name, value)
    return made


def first(batches: Iterator[Batch], count: int) -> list[Batch]:
    return list(itertools.islice(batches, count))


def test_a_pass_deals_every_image_to_one_loader_process_of_one_process(folder: Path) -> None:
    readers = [stream(folder, part=part, parts=2).frames(turn, 3) for part in range(2) for turn in range(3)]
    for number in range(3):
        seen = Counter()
        for reader in readers:
            frames = list(itertools.islice(reader, IMAGES))
            assert {frame.round for frame in frames} == {number}
            assert len({frame.name.split("/")[0] for frame in frames}) == 1
            seen.update(frame.name for frame in frames)
        assert seen == {f"{shard:03}.tar/{image}": 1 for shard in range(SHARDS) for image in range(IMAGES)}


def test_order_differs_between_passes_and_seeds_and_repeats(folder: Path) -> None:
    def names(seed: int) -> list[str]:
        made = stream(folder)
        made.images.seed = seed
        return [frame.name for frame in itertools.islice(made.frames(0, 1), 2 * SHARDS * IMAGES)]

    whole = SHARDS * IMAGES
    assert names(1) == names(1)
    assert names(1)[:whole] != names(1)[whole:]
    assert sorted(names(1)[:whole]) == sorted(names(1)[whole:])
    assert names(1) != names(2)
    # Shuffled across shards, not only within them.
    assert len({name.split("/")[0] for name in names(1)[:IMAGES]}) > 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_goes_on_with_the_images_that_follow(folder: Path, workers: int) -> None:
    whole = first(unlabelled_batches(stream(folder), 4, workers=workers), 9)
    for start in (3, 4):
        rest = first(unlabelled_batches(stream(folder), 4, workers=workers, start=start), 9 - start)
        for one, other in zip(whole[start:], rest, strict=True):
            assert one.names == other.names
            assert torch.equal(one.images, other.images)
    assert (whole[0].labels == 0).all()
    assert whole[0].images.shape == (4, 3, 32, 32)


def test_an_image_has_as_many_views_as_the_labelled_ones(folder: Path) -> None:
    views: dict[str, set[bytes]] = {}
    for batch in first(iter(stream(folder, batch=SHARDS * IMAGES)), 6):
        for name, image in zip(batch.names, batch.images):
            views.setdefault(name, set()).add(image.numpy().tobytes())
    assert len(views) == SHARDS * IMAGES
    # Two views may come out alike by chance.
    counts = Counter(len(found) for found in views.values())
    assert counts.keys() <= {1, 2}
    assert counts[2] > counts[1]


def test_masks_beside_the_images_are_left_out_and_named(folder: Path) -> None:
    with tarfile.open(folder / "010.tar", "w") as archive:
        for number in range(2):
            add(archive, f"{number}.png", encoded(number))
            add(archive, f"{number}.seg.png", encoded(9))
    with pytest.warns(UserWarning, match=r"two suffixes are left out, such as 0.seg.png in .*010.tar$") as caught:
        names = next(iter(stream(folder, "010.tar", batch=4))).names
    assert Counter(names) == {"010.tar/0": 2, "010.tar/1": 2}
    assert sum("two suffixes" in str(warning.message) for warning in caught) == 1


def test_commands_write_shards(folder: Path) -> None:
    source = f"pipe:cat {folder}/{{000..005}}.tar"
    assert all(is_shards(name) for name in (source, "a/{0..9}.tar", "s3://b/a.tar.gz"))
    assert not any(is_shards(name) for name in ("folder", "list.txt"))
    ours, theirs = (next(iter(made)) for made in (stream(folder, batch=4), stream(folder, source, batch=4)))
    assert torch.equal(ours.images, theirs.images)


def test_what_cannot_be_read(folder: Path) -> None:
    with pytest.raises(DatasetNotFoundError, match=r"unlabelled must name existing shards, got .*/006.tar, which does"):
        stream(folder, "{004..007}.tar")
    with pytest.raises(ValueError, match="must name at least 8 shards, one per loader process, got 6; lower --dataset"):
        stream(folder).check(processes=2, workers=4)
    stream(folder).check(processes=2, workers=3)
    with tarfile.open(folder / "007.tar", "w") as archive:
        add(archive, "note.txt", b"nothing to see")
    with pytest.raises(CorruptFileError, match="shards must hold images, got none in"):
        next(iter(stream(folder, "007.tar")))
    with tarfile.open(folder / "008.tar", "w") as archive:
        for number in range(4):
            add(archive, f"{number}.png", encoded(number) if number else encoded(number)[:100])
    with pytest.raises(CorruptFileError, match=r"cannot read 008.tar/0: the file is damaged"):
        next(iter(stream(folder, "008.tar", batch=4)))
    damaged = stream(folder, "008.tar", batch=4)
    damaged.images.set_on_corrupt("skip")
    with pytest.warns(UserWarning, match=r"skipped: cannot read 008.tar/0"):
        names = next(iter(damaged)).names
    assert len(names) == 4
    assert set(names) == {f"008.tar/{number}" for number in (1, 2, 3)}
    content = (folder / "000.tar").read_bytes()
    (folder / "009.tar").write_bytes(content[:3000])
    with pytest.raises(CorruptFileError, match=r"cannot read the shard .*009.tar \("):
        first(iter(stream(folder, "009.tar")), 3)
    with pytest.raises(CorruptFileError, match=r"cannot read the shard pipe:cat .*/nowhere \("):
        next(iter(stream(folder, f"pipe:cat {folder}/nowhere")))


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_cannot_be_used_are_named_or_skipped(folder: Path, workers: int) -> None:
    wide = io.BytesIO()
    Image.fromarray(np.full((40, 48), 4000, np.uint16)).save(wide, "PNG")
    with tarfile.open(folder / "008.tar", "w") as archive:
        for number in range(4):
            add(archive, f"{number}.png", encoded(number) if number else wide.getvalue())
    with pytest.raises(ValueError, match=r"^image 008.tar/0 must have 8 bits per channel, .*0 4095$"):
        next(unlabelled_batches(stream(folder, "008.tar"), 4, workers=workers))
    skipping = stream(folder, "008.tar")
    skipping.images.set_on_corrupt("skip")
    names = next(unlabelled_batches(skipping, 4, workers=workers)).names
    assert len(names) == 4
    assert set(names) == {f"008.tar/{number}" for number in (1, 2, 3)}


def test_webdataset_is_needed_for_shards_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ModuleNotFoundError, match=r"need webdataset, .* pip install 'sward\[stream\]'"):
        stream(folder)
