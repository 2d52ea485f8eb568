"""Nothing in the source runs code from a file, asks a shell, or writes outside of the folder it was given."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import sward
from sward.deploy.images import output_names
from sward.losses import load_masks
from sward.models import build, load_trunk_checkpoint, load_weights
from sward.runs import evaluation_file
from sward.training import checkpoints
from sward.training.run_folder import RunFolder

ROOT = Path(sward.__file__).resolve().parents[1]
SOURCES = [
    path for folder in ("sward", "sward_kernels", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")
]

FORBIDDEN = {
    "eval": "runs text as code",
    "exec": "runs text as code",
    "os.system": "asks a shell",
    "os.popen": "asks a shell",
    "subprocess.getoutput": "asks a shell",
    "pickle.load": "runs code from a file",
    "pickle.loads": "runs code from a file",
    "pickle.Unpickler": "runs code from a file",
    "marshal.loads": "runs code from a file",
    "shelve.open": "runs code from a file",
    "joblib.load": "runs code from a file",
    "torch.jit.load": "runs code from a file",
    "torch.hub.load": "runs code from the network",
    "yaml.load": "builds any object; safe_load does not",
    "yaml.unsafe_load": "builds any object",
    "tempfile.mktemp": "names a file that another process may make first",
}


def name_of(node: ast.expr) -> str:
    """The last two words of a dotted name; "?" for an object without a name."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value).rpartition('.')[2] or '?'}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def faults(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        names = [name_of(node.func), *(name_of(argument) for argument in node.args)]
        options = {keyword.arg: keyword.value for keyword in node.keywords}
        if "torch.load" in names:  # called, or handed to functools.partial
            safe = options.get("weights_only")
            if not (isinstance(safe, ast.Constant) and safe.value is True):
                yield f"line {node.lineno}: torch.load without weights_only=True"
        if names[0] in FORBIDDEN:
            yield f"line {node.lineno}: {names[0]} {FORBIDDEN[names[0]]}"
        for option in ("shell", "allow_pickle"):
            value = options.get(option)
            if value is not None and not (isinstance(value, ast.Constant) and value.value is False):
                yield f"line {node.lineno}: {option} is on"
        if names[0].endswith((".extractall", ".extract")):
            yield f"line {node.lineno}: members of archives may lie outside of the folder"


def test_no_source_file_runs_what_it_reads() -> None:
    assert len(SOURCES) > 100
    found = {str(path): list(faults(ast.parse(path.read_text(encoding="utf-8")))) for path in SOURCES}
    assert {path: each for path, each in found.items() if each} == {}


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=safe)",
        "partial(torch.load, map_location='cpu')",
        "eval(text)",
        "subprocess.run(command, shell=True)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "archive.extractall(folder)",
    ],
)
def test_the_search_finds(line: str) -> None:
    assert list(faults(ast.parse(line)))


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.open, (str(self.path), os.O_CREAT)


def test_no_reader_of_files_runs_code(tmp_path: Path) -> None:
    exploded, network = tmp_path / "exploded", build("hiera_demo", 2)
    for content in ({"model": Bomb(exploded)}, {"kind": Bomb(exploded)}, Bomb(exploded)):
        path = tmp_path / "file.pt"
        torch.save(content, path)
        for read in (
            lambda: checkpoints.load(path),  # noqa: B023
            lambda: load_weights(network, path),  # noqa: B023
            lambda: load_trunk_checkpoint(network, path),  # noqa: B023
            lambda: load_masks(path, network, "trunk"),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=r"file\.pt"):
                read()
    assert not exploded.exists()
    torch.load(path, weights_only=False)
    assert exploded.exists()


def test_names_of_images_stay_in_the_output_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    images = [Path("../../x.png"), Path("../y.png"), Path("z.png"), tmp_path / ".." / "w.png", Path("/etc/v.png")]
    for chosen in (images[:1], images[:3], images):
        for name in output_names(chosen):
            assert not name.is_absolute()
            assert ".." not in name.parts


def test_scores_stay_in_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sward.config import DistillationConfig
    from sward.data import describe

    monkeypatch.setattr(RunFolder, "read", lambda run: (DistillationConfig(), describe("scenes")))
    for word in ("../../elsewhere", "/etc/passwd", "a/b", ".."):
        for options in (dict(split=word), dict(split_by=word), dict(root=Path(word)), dict(dataset=word)):
            file = evaluation_file(tmp_path / "run", **options)
            assert file.parent == tmp_path / "run"
            assert file.resolve().parent == (tmp_path / "run").resolve()
