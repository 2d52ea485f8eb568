"""Random damage to checkpoints and the files beside them: refused in one sentence that names the file."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from sward.cli.main import main
from sward.config import DistillationConfig
from sward.runs import load, train_student
from sward.training import checkpoints
from tests.support.fuzzing import assert_sentence, examples, for_each
from tests.support.training_runs import small, use_few_images

VALUES: list[Any] = [None, 3, -1, 2.5, "text", [], {}, [1, 2], torch.zeros(2), torch.zeros(0), {"a": 1}, True]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "run"
    with pytest.MonkeyPatch.context() as patch:
        use_few_images(patch)
        train_student(config(folder))
    return folder


def config(output: Path, **changes: Any) -> DistillationConfig:
    return small(output, distillation="none", iterations=2, **changes)


@pytest.fixture
def kept(run: Path) -> Iterator[dict[Path, bytes]]:
    """All files of the run, which are put back at the end."""
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    yield files
    for path, content in files.items():
        path.write_bytes(content)


@examples(40, 3000)
def test_changed_bytes_are_noticed_or_do_no_harm(count: int, run: Path, kept: dict[Path, bytes]) -> None:
    path = run / "checkpoints" / "best.pt"
    whole, state = kept[path], checkpoints.load(path)["model"]
    changes = st.tuples(st.floats(0, 1), st.integers(0, 7), st.sampled_from(["flip", "cut", "zero", "insert"]))

    def check(change: tuple[float, int, str]) -> None:
        share, bit, kind = change
        place = min(int(share * len(whole)), len(whole) - 1)
        content = bytearray(whole)
        if kind == "flip":
            content[place] ^= 1 << bit
        elif kind == "zero":
            content[place : place + 64] = bytes(64)
        elif kind == "insert":
            content[place:place] = b"\x80"
        else:
            del content[place:]
        path.write_bytes(content)
        try:
            _, _, network = load.load_run(run)
        except ValueError as error:
            assert_sentence(str(error), "best.pt")
            return
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())

    for_each(changes, count, check)


@pytest.mark.usefixtures("few_images")
def test_a_checksum_that_is_none_is_refused(run: Path, kept: dict[Path, bytes]) -> None:
    path = run / "checkpoints" / "last.pt"
    state = torch.load(path, weights_only=True)
    state["identity"]["teacher"] = torch.zeros(0)  # neither equal nor unequal to anything
    torch.save(state, path)
    (run / "checkpoints" / "previous.pt").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="the checksum of the teacher is a Tensor"):
        train_student(config(run, resume=True))


@pytest.mark.usefixtures("few_images")
@pytest.mark.parametrize("step", [2.5, -1, 2**70])
def test_a_step_that_is_none_is_refused_at_once(run: Path, kept: dict[Path, bytes], step: float) -> None:
    path = run / "checkpoints" / "last.pt"
    state = torch.load(path, weights_only=True)
    torch.save(state | {"step": step}, path)
    (run / "checkpoints" / "previous.pt").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="its step must be a whole number from 0, got"):
        train_student(config(run, resume=True))


@examples(12, 600)
@pytest.mark.usefixtures("few_images")
def test_other_contents_are_refused(count: int, run: Path, kept: dict[Path, bytes]) -> None:
    path = run / "checkpoints" / "last.pt"
    whole = torch.load(path, weights_only=True)
    places = [*((key,) for key in whole), *(("generators", 0, key) for key in whole["generators"][0]),
              ("optimizer", "state"), ("optimizer", "param_groups"),
              ("model", next(iter(whole["model"]))), ("identity", "teacher")]  # fmt: skip
    ignored = {
        ("seconds",),
        ("scaler",),
        ("identity", "teacher"),
        ("identity",),
        ("distillation",),
        ("validation_due",),
    }

    def check(change: tuple[tuple[Any, ...], Any]) -> None:
        place, value = change
        state = copy.deepcopy(whole)
        inner = state
        for key in place[:-1]:
            inner = inner[key]
        if value == "removed":
            inner.pop(place[-1], None)
        else:
            inner[place[-1]] = value
        torch.save(state, path)
        (run / "checkpoints" / "previous.pt").unlink(missing_ok=True)
        try:
            train_student(config(run, resume=True))
        except ValueError as error:
            assert_sentence(str(error), str(path.parent))
        else:
            assert place in ignored or place[0] in ("generators", "step", "best_score", "optimizer"), place

    values = st.one_of(st.sampled_from(VALUES), st.just("removed"))
    for_each(st.tuples(st.sampled_from(places), values), count, check)


@examples(40, 2000)
def test_damaged_descriptions_are_named(count: int, run: Path, kept: dict[Path, bytes], capsys: Any) -> None:
    changes = st.tuples(
        st.sampled_from(["config.json", "dataset.json"]),
        st.floats(0, 1),
        st.sampled_from([b"", b"\xff", b"{", b'"', b"null", b"[]", b"9" * 400, b"\x00"]),
        st.integers(0, 40),
    )

    def check(change: tuple[str, float, bytes, int]) -> None:
        name, share, inserted, removed = change
        path = run / name
        whole = kept[path]
        place = int(share * len(whole))
        path.write_bytes(whole[:place] + inserted + whole[place + removed :])
        capsys.readouterr()
        code = main(["evaluate", str(run)])
        error = capsys.readouterr().err
        path.write_bytes(whole)
        if code != 0:  # It may have been a comment, such as the name of the preset.
            assert code == 2
            assert_sentence(error.strip().splitlines()[-1], "sward evaluate: ")

    for_each(changes, count, check)
