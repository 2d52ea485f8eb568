"""Decoded frames that are kept in memory for later epochs."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from sward import data
from sward.data import kept
from tests.support.folder_data import assert_same_samples, build, pack


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The images that are decoded, in order."""
    seen: list[Path] = []
    read_image = data.files.read_image

    def read(path: Path, *arguments: object) -> torch.Tensor:
        seen.append(path)
        return read_image(path, *arguments)

    monkeypatch.setattr("sward.data.files.read_image", read)
    return seen


def test_later_epochs_decode_nothing_and_give_the_same_samples(root: Path, opened: list[Path]) -> None:
    keeping, decoding = build(root), build(root)
    decoding.kept = None
    assert_same_samples(keeping, decoding, epochs=3)
    # The frames of this set differ in size.
    assert len(opened) == 6 + 3 * 6


def test_loader_processes_share_what_one_of_them_decoded(root: Path, opened: list[Path]) -> None:
    dataset = build(root)
    # Batches of one: both processes read half of the frames.
    for _ in DataLoader(dataset, batch_size=1, num_workers=2):
        pass
    for index in range(len(dataset)):
        dataset.read(index)
    assert opened == []  # this process decoded nothing


def test_what_a_caller_writes_to_a_frame_stays_with_the_caller(root: Path) -> None:
    dataset = build(root)
    for _ in range(2):
        image, labels, _ = dataset.read(0)
        before = image.clone(), labels.clone()
        image.zero_()
        labels.fill_(9)
    image, labels, _ = dataset.read(0)
    assert torch.equal(image, before[0])
    assert torch.equal(labels, before[1])


def test_a_set_above_the_limit_and_a_frame_above_its_place_are_decoded(
    root: Path, opened: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Frames are 40 x 50 to 55 x 60.
    monkeypatch.setattr(kept, "LIMIT", 6 * 4 * 40 * 50 - 1)
    assert build(root).kept is None
    monkeypatch.setattr(kept, "LIMIT", 6 * 4 * 46 * 54)
    dataset = build(root)
    for index in (*range(6), *range(6)):
        dataset.read(index)
    assert [int(path.stem) for path in opened] == [0, 1, 2, 3, 4, 5, 3, 4, 5]


def test_evaluation_and_packs_keep_nothing(root: Path) -> None:
    assert build(root, "val").kept is None
    pack(root)
    assert build(root).kept is None


def test_a_copy_in_another_process_decodes(root: Path) -> None:
    dataset = build(root)
    image = dataset.read(0)[0]
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.kept is None
    assert torch.equal(copy.read(0)[0], image)
