"""A run distils the teacher that its configuration asks for, or none."""

import json
from pathlib import Path

import pytest
import torch

from sward import data, models
from sward.cli.main import main
from sward.cli.starting import apply_words
from sward.config import DistillationConfig, TeacherConfig, TeacherTrainingConfig
from sward.runs.load import load_teacher
from sward.training.run_folder import RunFolder

SCENES = data.describe("scenes")
RUN = Path("runs/demo/teacher")


@pytest.fixture(autouse=True)
def trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Leave a run of `timm:convnext_atto` where the preset demo looks for its teacher, `hiera_demo`."""
    monkeypatch.chdir(tmp_path)
    network = models.build("timm:convnext_atto", SCENES.num_classes, depths="(1,1,1,1)")
    RUN.mkdir(parents=True)
    RunFolder(RUN).start(
        TeacherTrainingConfig(model="timm:convnext_atto", model_options={"depths": "(1,1,1,1)"}), SCENES
    )
    torch.save({"model": network.state_dict()}, RunFolder(RUN).best)
    Path("bare").mkdir()
    Path("bare/config.json").write_text(json.dumps({"model_type": "segformer"}))


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (TeacherConfig(run=RUN, untrained=True), "only one of .* got teacher.run and teacher.untrained"),
        (TeacherConfig(run=RUN, weights=Path("w.pt")), "only one of .* got teacher.run and teacher.weights"),
        (TeacherConfig(weights=Path("w.pt"), untrained=True), "only one of .* got teacher.weights and teacher.untr"),
        (TeacherConfig(name="smp:Unet", run=RUN), "teacher.name must be 'timm:convnext_atto', .* got 'smp:Unet'"),
        (TeacherConfig(name="smp:Unet"), "teacher.name must be 'timm:convnext_atto', .* got 'smp:Unet'"),
        (TeacherConfig(options={"depths": "(9,9,9,9)"}), "teacher.options must be .*1,1,1,1.* got .*9,9,9,9"),
    ],
)
def test_another_teacher_than_the_one_asked_for_is_refused(teacher: TeacherConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_teacher(teacher, "demo", SCENES)


def test_a_folder_without_weights_is_not_replaced_by_a_run() -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="must be a transformers folder with weights, got 'transformers:bare' without"):
        load_teacher(TeacherConfig(name="transformers:bare"), "demo", SCENES)


@pytest.mark.parametrize(
    "teacher",
    [
        TeacherConfig(),
        TeacherConfig(run=RUN),
        TeacherConfig(name="timm:convnext_atto"),
        TeacherConfig(options={"depths": "(1,1,1,1)"}),
    ],
)
def test_the_run_names_its_network_where_nobody_asks_for_one(teacher: TeacherConfig) -> None:
    loaded = load_teacher(teacher, "demo", SCENES)
    assert (loaded.name, loaded.options) == ("timm:convnext_atto", {"depths": "(1,1,1,1)"})
    stored = torch.load(RunFolder(RUN).best)["model"]
    assert all(torch.equal(value, stored[key]) for key, value in loaded.network.state_dict().items())


def test_a_file_that_names_another_teacher_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text("epochs: 1\ndataset: {image_size: [64, 64]}\nteacher: {name: 'smp:Unet'}")
    assert main(["train", "mine.yaml"]) == 2
    assert "teacher.name must be 'timm:convnext_atto'" in capsys.readouterr().err
    assert not Path("runs/demo/sward-seed0").exists()


def test_words_replace_the_source_of_a_file() -> None:
    config = DistillationConfig(teacher=TeacherConfig(run=RUN))
    apply_words(config, ["--teacher.untrained"])
    assert config.teacher.run is None
    config = DistillationConfig(teacher=TeacherConfig(untrained=True))
    apply_words(config, ["--teacher.run=runs/demo/teacher"])
    assert not config.teacher.untrained
