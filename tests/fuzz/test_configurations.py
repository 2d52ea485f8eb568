"""Random configurations of `sward train`: two steps, or one sentence and exit status 2 before a folder exists."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
from hypothesis import strategies as st

from sward.cli.main import main
from tests.support.folder_data import write_pairs
from tests.support.fuzzing import assert_sentence, examples, for_each
from tests.support.training_runs import checkpoint

pytestmark = pytest.mark.usefixtures("few_images")

NUMBERS = ["0", "1", "2", "3", "-1", "1e-3", "0.5", "nan", "inf", "-inf", "1e40", "99999999999999999999", "x", ""]
OPTIONS: dict[str, list[list[str]]] = {
    "--model": [["unext"], ["unext"], ["resunetpp"], ["unet"], ["timm:"], [":"], ["os:getcwd"], ["nowhere:f"], [""]],
    "--distillation": [["none"], ["sward"], ["kd"], ["cwd"], ["at"], ["fitnet"], ["maskd"], ["swrad"], [""]],
    "--batch": [["1"], ["2"], ["3"], ["18"], ["19"], ["0"], ["-1"], ["1.5"]],
    "--dataset.image-size": [["32", "32"], ["33", "47"], ["64", "32"], ["1", "1"], ["8", "8"], ["0", "32"], ["32"]],
    "--dataset.name": [["scenes"], ["folder"], ["camvid"], ["polyp"]],
    "--dataset.root": [["data"], ["nowhere"], ["data/images"], ["file.txt"]],
    "--dataset.num-classes": [["2"], ["1"], ["256"], ["5"]],
    "--dataset.split-by": [["ratio"], ["80/10/10"], ["file.txt"]],
    "--dataset.views": [["1"], ["2"], ["0"]],
    "--dataset.workers": [["0"], ["1"], ["-1"]],
    "--dataset.packed": [["none"], ["auto"], ["nowhere"]],
    "--sward.window-size": [["4"], ["2", "4"], ["1"], ["100"], ["0"], ["2", "3", "4", "5", "6"]],
    "--sward.embed-dim": [["1"], ["7"], ["8"], ["0"]],
    "--sward.shift": [["none"], ["deterministic"], ["left"]],
    "--sward.terms": [["0", "0", "0"], ["1", "0", "1"], ["1", "1"], ["nan", "1", "1"]],
    "--sward.weights": [["0", "0"], ["1", "1"], ["-1", "0"], ["1", "inf"]],
    "--sward.student-layers": [["encoder1"], ["nonsense"], ["nonsense", "too"]],
    "--sward.teacher-layers": [["trunk"], ["nonsense"]],
    "--teacher.image-size": [["64", "64"], ["48", "32"], ["0", "0"]],
    "--teacher.name": [["hiera_demo"], ["unext"], ["nobody"]],
    "--teacher.normalization": [["standardize"], ["none"]],
    "--teacher.cache": [["cache"], ["file.txt"]],
    "--precision": [["fp32"], ["bf16"], ["fp16"], ["fp8"]],
    "--channels-last": [[]],
    "--seed": [["1"], ["4294967296"], ["9223372036854775807"], ["18446744073709551616"], ["-1"]],
    "--task": [["ce"], ["dice"], ["ce+dice"], ["focal"], ["mse"]],
    "--class-weights": [["auto"], ["1", "1", "1", "1", "1"], ["1"], ["-1", "1", "1", "1", "1"], ["nan"] * 5, ["0"] * 5],
    "--label-smoothing": [[number] for number in NUMBERS],
    "--metric": [["mean_iou"], ["dice"], ["mean_dice"], ["loss"]],
    "--evaluate-every": [["1"], ["0"], ["-1"]],
    "--batch-norm-images": [["1"], ["2"], ["1000"], ["0"]],
    "--log-every": [["1"], ["0"]],
    "--checkpoint-every": [["1"], ["0"]],
    "--optimizer.lr": [[number] for number in NUMBERS],
    "--optimizer.weight-decay": [[number] for number in NUMBERS],
    "--optimizer.power": [[number] for number in NUMBERS],
    "--optimizer.warmup": [[number] for number in NUMBERS],
    "--optimizer.clip-norm": [[number] for number in NUMBERS],
    "--optimizer.schedule": [["cosine"], ["poly"], ["step"]],
    "--device": [["cpu"], ["cuda"], ["cuda:7"], ["meta"], ["mps"], [""], ["xpu"], ["cpu:3"]],
    "--unlabelled": [["data/images/train"], ["nowhere"], ["file.txt"]],
    "--unlabelled-batch": [["1"], ["0"], ["100"]],
    "--on-corrupt": [["skip"], ["stop"], ["cry"]],
    "--recipe": [["paper"], ["none"]],
    "--tensorboard": [[]],
    "--nonsense": [["1"]],
}
FILES = [
    "{}",
    "[]",
    "3",
    "batch: x",
    "batch: [2]",
    "dataset: 3",
    "dataset: {name: 7}",
    "dataset: {image_size: 32}",
    "dataset: {image_size: [32]}",
    "optimizer: {lr: {}}",
    "a: b: c",
    "seed: true",
    "precision: fp8",
    "task: 1",
    "model_options: [1]",
    "sward: {terms: [1, 2]}",
    "teacher: {run: 3}",
    "unlabelled: data",
    "class_weights: auto",
    "output: 7",
    "1: 2",
    "\x00",
    "iterations: 2",
]


def choices() -> st.SearchStrategy[list[list[str]]]:
    option = st.sampled_from(sorted(OPTIONS)).flatmap(
        lambda name: st.sampled_from(OPTIONS[name]).map(lambda values: [name, *values])
    )
    return st.lists(option, min_size=0, max_size=4, unique_by=lambda words: words[0])


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path / "data")
    (tmp_path / "file.txt").write_text("a file")
    return tmp_path


@examples(25, 1500)
def test_a_configuration_trains_or_is_refused(count: int, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = itertools.count()
    outcomes = {"trained": 0, "refused": 0}

    def check(options: list[list[str]]) -> None:
        output = workplace / f"run{next(numbers)}"
        chosen = {words[0] for words in options}
        words = [word for words in options for word in words]
        defaults = {"--batch": ["2"], "--dataset.image-size": ["32", "32"], "--distillation": ["none"]}
        for name, values in defaults.items():
            if name not in chosen:
                words += [name, *values]
        if "--distillation" in chosen:
            words += ["--teacher.untrained"]
        words += ["--iterations", "2", "--output", str(output)]
        capsys.readouterr()
        try:
            code = main(["train", "demo", *words])
        except SystemExit as stop:  # the parser of options
            code = stop.code
            assert code == 2
            assert not output.exists()
            return
        error = capsys.readouterr().err
        if code == 0:
            assert checkpoint(output)["step"] == 2
            outcomes["trained"] += 1
            shutil.rmtree(output)
            return
        if code == 1 and "is not finite" in error and "--optimizer.lr" in chosen:
            return  # Any rate may be too high; nothing but the loss tells.
        assert code == 2, f"{words}: {error}"
        sentences = [line for line in error.splitlines() if line.startswith("sward train")]
        assert len(sentences) == 1, f"{words}: {error}"
        assert "Traceback" not in error
        assert not output.exists(), f"{words}: {error}"
        outcomes["refused"] += 1

    for_each(choices(), count, check)
    assert outcomes["refused"] > 0
    assert outcomes["trained"] > 0


@pytest.mark.parametrize("text", FILES)
def test_a_file_trains_or_is_refused(text: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "config.yaml").write_text(text)
    words = ["--distillation", "none", "--batch", "100", "--iterations", "2", "--output", "run"]
    # A batch that is too large: a file that is right is refused for it, after all of the file has been read.
    assert main(["train", "config.yaml", *words]) == 2
    printed = capsys.readouterr().err.strip()
    assert_sentence(printed, "sward train: ")
    assert not Path("run").exists()
    if text in ("{}", "iterations: 2"):
        assert "batch must be at most 18" in printed
    else:
        assert "config.yaml must" in printed
