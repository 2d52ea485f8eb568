"""The command line: what it runs, and what it says to a user's mistakes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from sward import data, methods, presets
from sward.cli.main import COMMANDS, main
from sward.config import DistillationConfig, SWARDConfig, TeacherTrainingConfig
from sward.config_json import from_json, to_json
from sward.losses import RECIPES

TINY = ["--dataset.image-size", "64", "64", "--batch", "2", "--iterations", "2"]


pytestmark = pytest.mark.usefixtures("few_images")


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def test_train_evaluate_predict_in_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train-teacher", "demo", *TINY]) == 0
    assert main(["train", "demo", *TINY, "--optimizer.lr", "1e-4", "--sward.window-size", "4"]) == 0
    run = Path("runs/demo/sward-seed0")
    config = json.loads((run / "config.json").read_text())
    assert config["optimizer"]["lr"] == 1e-4
    assert config["sward"]["window_size"] == [4]

    assert main(["evaluate", str(run)]) == 0
    scores = json.loads((run / "evaluation-scenes-val.json").read_text())
    assert scores["images"] == 4
    assert 0 <= scores["mean_iou"] <= 1

    Image.new("RGB", (50, 37), (200, 30, 30)).save("photo.jpg")
    capsys.readouterr()
    assert main(["predict", str(run), "photo.jpg"]) == 0
    mask, overlay = (Path(line) for line in capsys.readouterr().out.split())
    with Image.open(mask) as image:
        assert (image.size, image.mode) == ((50, 37), "P")
        assert tuple(image.getpalette()[:3]) == data.describe("scenes").palette[0]
    with Image.open(overlay) as image:
        assert image.size == (50, 37)


@pytest.mark.parametrize("words", [["--recipe", "paper"], ["--recipe=paper"]])
def test_a_recipe_sets_what_no_other_option_does(words: list[str]) -> None:
    options = ["--teacher.untrained", *TINY, "--sward.context-reduction", "mean", *words]
    assert main(["train", "demo", *options]) == 0
    config = from_json(DistillationConfig, Path("runs/demo/sward-seed0/config.json").read_text())
    assert config.recipe == "paper"
    assert config.sward == SWARDConfig(
        weights=(2.0, 1.0),
        teacher_normalization="none",
        teacher_projections="learned",
        context_reduction="mean",
        normalize=False,
        window_size=(8, 8, 4, 8),
        embed_dim=32,
        pdr_layer="encoder.2",
        student_layers=("encoder.1", "encoder.2", "encoder.3", "up.3"),
        teacher_layers=("levels.0", "levels.1", "levels.2", "head.fuse"),
    )
    with pytest.raises(SystemExit):
        main(["train", "demo", "--recipe", "best"])


def test_presets_of_the_paper_follow_it_and_the_others_what_is_recommended() -> None:
    for name in presets.names():
        student = presets.get(name).student
        paper = presets.get(name).description.startswith("Table")
        assert student.recipe == ("paper" if paper else "recommended")
        recipe = RECIPES[student.recipe]
        assert all(getattr(student.sward, field) == value for field, value in recipe._asdict().items())


def test_other_methods_train_on_standardised_features_too(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["train", "demo", *TINY, "--teacher.untrained", "--teacher.normalization", "standardize"]
    assert main([*options, "--distillation", "cirkd"]) == 0
    state = torch.load("runs/demo/cirkd-seed0/checkpoints/last.pt", weights_only=True)["distillation"]
    assert state["standardization.0.count"] > 0
    assert main([*options, "--distillation", "cwd"]) == 2
    assert "'none' for the method 'cwd', got 'standardize'; it reads the teacher's logits" in capsys.readouterr().err


@pytest.mark.parametrize("method", [name for name in methods.METHODS if name != "sward"])
def test_every_method_trains_from_the_command_line(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train-teacher", "demo", *TINY]) == 0
    options = [*TINY, "--distillation", method]
    if method in ("maskd", "freekd"):
        assert main(["train", "demo", *options]) == 2
        assert f"sward train-masks demo --method {method}" in capsys.readouterr().err
        assert main(["train-masks", "demo", "--method", method, "--steps", "2", "--batch", "2", *TINY[:3]]) == 0
    assert main(["train", "demo", *options]) == 0
    assert (Path("runs/demo") / f"{method}-seed0" / "checkpoints" / "last.pt").exists()


def test_overview(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in COMMANDS)
    assert all(preset in printed for preset in presets.names())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trian", "demo"], "unknown command 'trian'; did you mean train"),
        (["train"], "name a preset first, such as 'sward train cityscapes-mbv3'"),
        (["train", "demmo"], "unknown preset 'demmo'; did you mean 'demo'?"),
        (
            ["train", "demo", *TINY],
            "there is no trained teacher at runs/demo/teacher; train it with 'sward train-teacher demo'",
        ),
        (["train", "demo", "--distillation", "swardd"], "unknown distillation method 'swardd'; did you mean 'sward'"),
        (["train", "demo", "--distillation", "none", "--dataset.image-size", "50", "50"], "multiple"),
        (["train", "demo", "--distillation", "none", "--model", "unxt"], "did you mean unext"),
        (
            ["train", "demo", "--distillation", "none", "--iterations", "2", "--epochs", "3"],
            "exactly one of iterations and epochs",
        ),
        (["train", "clinicdb-unext", "--dataset.root", "nowhere"], "nowhere"),
        (["evaluate", "nowhere"], "nowhere is not a run folder"),
        (["predict", "nowhere", "image.png"], "nowhere is not a run folder"),
        (
            [
                "train",
                "demo",
                "--teacher.untrained",
                "--sward.student-layers",
                "encoder.9",
                "--sward.teacher-layers",
                "levels.0",
            ],
            "layer 'encoder.9' does not exist in UNeXt; did you mean one of",
        ),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence in printed


@pytest.fixture
def run() -> Path:
    assert main(["train", "demo", "--distillation", "none", *TINY]) == 0
    return Path("runs/demo/none-seed0")


@pytest.mark.parametrize("batch", ["0", "-1"])
def test_an_empty_batch_leaves_the_scores_alone(batch: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run)]) == 0
    scores = (run / "evaluation-scenes-val.json").read_text()
    assert main(["evaluate", str(run), "--batch", batch]) == 2
    assert capsys.readouterr().err == f"sward evaluate: batch must be at least 1, got {batch}\n"
    assert (run / "evaluation-scenes-val.json").read_text() == scores


def test_the_score_of_a_class_that_never_occurs_is_null(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sward.metrics.ConfusionMatrix.iou", lambda self: torch.full((self.num_classes,), torch.nan))
    assert main(["evaluate", str(run)]) == 0
    scores = json.loads((run / "evaluation-scenes-val.json").read_text(), parse_constant=pytest.fail)
    assert set(scores["class_iou"].values()) == {None}
    assert main(["report", str(run)]) == 0
    assert "<td>-</td>" in (run / "report.html").read_text(encoding="utf-8")


def test_a_run_leaves_what_the_documentation_lists(run: Path) -> None:
    assert {path.name for path in run.iterdir()} == {
        "config.json",
        "dataset.json",
        "environment.json",
        "metrics.jsonl",
        "MODEL_CARD.md",
        "checkpoints",
    }


@pytest.mark.parametrize("folder", ["a-file", "a-file/deeper", "/proc", "/proc/new"])
@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["train", "demo", "--distillation", "none", *TINY], ""),
        (["train-teacher", "demo", *TINY], ""),
        (["train-masks", "demo", "--teacher.untrained", "--steps", "2", *TINY[:5]], "tokens.pt"),
        (["predict", "runs/demo/none-seed0", "photo.jpg"], ""),
        (["report", "runs/demo/none-seed0"], "page.html"),
    ],
)
def test_an_output_that_cannot_be_written_is_named_before_any_work(
    words: list[str], name: str, folder: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    if folder.startswith("/proc") and not Path("/proc").is_dir():
        pytest.skip("no /proc, a folder that nobody can write to, on this machine")
    if words[0] in ("predict", "report"):
        request.getfixturevalue("run")
    Path("a-file").write_text("kept")
    Image.new("RGB", (50, 37)).save("photo.jpg")
    capsys.readouterr()
    assert main([*words, "--output", str(Path(folder) / name)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"sward {words[0]}: cannot write to {folder} (")
    assert printed.endswith("); choose another --output\n")
    assert Path("a-file").read_text() == "kept"


def test_a_demo_cannot_go_to_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a-file").write_text("kept")
    assert main(["demo", "--output", "a-file"]) == 2
    assert "cannot write to a-file/unlabelled (Not a directory); choose another --output" in capsys.readouterr().err


def test_a_page_is_not_a_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("pages").mkdir()
    assert main(["report", str(run), "--output", "pages"]) == 2
    assert "output must be a file, got the folder pages; use pages/report.html" in capsys.readouterr().err


def test_a_wrong_option_exits_with_2() -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["train", "demo", "--optimizer.learning", "1"])
    assert exit_.value.code == 2


def test_a_checkpoint_of_another_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "demo", "--distillation", "none", *TINY]) == 0
    run = Path("runs/demo/none-seed0")
    config = json.loads((run / "config.json").read_text())
    config["model"] = "resunetpp"
    (run / "config.json").write_text(json.dumps(config))
    assert main(["evaluate", str(run)]) == 2
    assert "does not fit ResUNetPlusPlus; it was saved from another model" in capsys.readouterr().err


def test_the_module_runs_as_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "sward", "trian"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "sward trian: unknown command 'trian'; did you mean train or train-masks?\n"


@pytest.mark.parametrize("name", presets.names())
def test_presets_survive_their_config_file(name: str) -> None:
    preset = presets.get(name)
    preset.student.check()
    preset.teacher.check()
    assert from_json(DistillationConfig, to_json(preset.student)) == preset.student
    assert from_json(TeacherTrainingConfig, to_json(preset.teacher)) == preset.teacher


def test_presets_hold_section_4_1() -> None:
    city, polyp = presets.get("cityscapes-mbv3").student, presets.get("colondb-resunetpp").student
    assert (city.batch, city.iterations, city.epochs, city.dataset.image_size) == (16, 40_000, None, (512, 1024))
    assert (city.optimizer.lr, city.optimizer.weight_decay, city.optimizer.schedule) == (1e-3, 1e-4, "poly")
    assert (polyp.batch, polyp.iterations, polyp.epochs, polyp.dataset.image_size) == (8, None, 200, (512, 512))
    assert (polyp.optimizer.lr, polyp.optimizer.weight_decay, polyp.optimizer.schedule) == (5e-4, 1e-4, "cosine")
    for config in (city, polyp):
        assert config.sward.weights == (2.0, 1.0)
        assert config.sward.terms == (1.0, 1.0, 1.0)
        assert config.sward.pdr_terms == (1.0, 1.0)
        assert config.sward.margin == 1.3
        assert config.sward.shift == "stochastic"
        assert config.sward.teacher_projections == "learned"
        assert config.sward.teacher_normalization == "none"
        assert config.sward.context_reduction == "sum"
        assert config.sward.normalize is False


def test_a_mask_with_a_value_that_is_no_class_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        for kind, mode in (("images", "RGB"), ("masks", "L")):
            folder = Path("pairs") / kind / split
            folder.mkdir(parents=True)
            for name in "ab":
                Image.new(mode, (64, 64), 7 if mode == "L" else (9, 9, 9)).save(folder / f"{name}.png")
    options = ["--dataset.name", "folder", "--dataset.root", "pairs", "--dataset.num-classes", "3"]
    assert main(["train", "demo", "--distillation", "none", *options, *TINY]) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert "masks/train/" in printed
    assert "must be 0 to 2, or 255 for pixels to ignore, got 7" in printed
