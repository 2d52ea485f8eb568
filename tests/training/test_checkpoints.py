"""Checkpoints are whole or absent, and damaged ones are refused."""

import os
import random
from pathlib import Path

import pytest
import torch
from torch import nn

from sward.training import checkpoints


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pt"
    checkpoints.save(path, {"model": {"weight": torch.ones(3)}})

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(path, {"model": {"weight": torch.zeros(3)}})
    monkeypatch.undo()
    assert torch.equal(checkpoints.load(path)["model"]["weight"], torch.ones(3))
    assert list(tmp_path.iterdir()) == [path]


def test_a_changed_bit_is_noticed_or_does_no_harm(tmp_path: Path) -> None:
    path, weight = tmp_path / "last.pt", torch.randn(50)
    checkpoints.save(path, {"model": {"weight": weight}, "step": 3})
    whole, refused = path.read_bytes(), 0
    positions = random.Random(0)
    for _ in range(300):
        content = bytearray(whole)
        content[positions.randrange(len(content))] ^= 1 << positions.randrange(8)
        path.write_bytes(content)
        try:
            state = checkpoints.load(path)
        except ValueError:
            refused += 1
        else:
            assert torch.equal(state["model"]["weight"], weight)
            assert state["step"] == 3
    assert refused > 50


@pytest.mark.parametrize("kept", [0, 1, 100, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "last.pt"
    checkpoints.save(path, {"model": {"weight": torch.ones(300)}})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"last\.pt is damaged or not a checkpoint"):
        checkpoints.load(path)


def test_the_file_before_is_kept_and_used_if_the_newest_is_damaged(tmp_path: Path) -> None:
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    assert checkpoints.load_newest([last, previous]) is None
    for step in (1, 2):
        checkpoints.save(last, {"model": {}, "step": step}, keep=previous)
    assert checkpoints.load_newest([last, previous])["step"] == 2
    last.write_bytes(b"rubbish")
    with pytest.warns(UserWarning, match=r"last\.pt is damaged or not a checkpoint"):
        assert checkpoints.load_newest([last, previous])["step"] == 1
    # Out of the way, so that the next save does not put it in the place of the good one.
    assert not last.exists()
    checkpoints.save(last, {"model": {}, "step": 2}, keep=previous)
    assert checkpoints.load_newest([previous])["step"] == 1
    last.write_bytes(b"rubbish")
    previous.write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="there is no earlier checkpoint to resume from"):
        checkpoints.load_newest([last, previous])
    assert last.exists()


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    torch.save({"model": nn.Linear(1, 1)}, path)
    with pytest.raises(ValueError, match="is damaged or not a checkpoint"):
        checkpoints.load(path)


def test_another_file_and_no_file_are_told_apart(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="has no entry 'model'"):
        checkpoints.load(tmp_path / "other.pt")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint at"):
        checkpoints.load(tmp_path / "absent.pt")


def test_weights_of_another_model_are_refused_in_one_line(tmp_path: Path) -> None:
    checkpoints.save(tmp_path / "a.pt", {"model": nn.Linear(2, 3).state_dict()})
    with pytest.raises(
        ValueError, match="does not fit Linear; it was saved from another model: size mismatch"
    ) as error:
        checkpoints.load_model(nn.Linear(2, 4), tmp_path / "a.pt")
    assert "\n" not in str(error.value)
