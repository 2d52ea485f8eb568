"""What the words of a command change in a preset or a file before its options are read."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from sward import presets
from sward.cli.main import main
from sward.cli.own_data import expand
from sward.cli.starting import apply_words, read_config, value_of, warn_of_unread, write_config
from sward.config import DatasetConfig, DistillationConfig, SWARDConfig
from sward.losses import PAPER


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_given_length_clears_the_other() -> None:
    by_epochs, by_steps = presets.get("clinicdb-unext").student, presets.get("demo").student
    apply_words(by_epochs, ["--iterations", "3"])
    apply_words(by_steps, ["--epochs=2"])
    assert (by_epochs.epochs, by_steps.iterations) == (None, None)
    both = presets.get("demo").student
    apply_words(both, ["--epochs", "2", "--iterations", "3"])
    assert both.iterations == presets.get("demo").student.iterations


@pytest.mark.parametrize(
    "words",
    [
        ["--model", "smp:Unet"],
        ["--teacher.name", "smp:Unet", "--teacher.untrained"],
        ["--sward.student-layers", "encoder.3", "--sward.teacher-layers", "levels.2"],
    ],
)
def test_another_pair_or_other_layers_clear_layers_and_windows_of_both(words: list[str]) -> None:
    student = presets.get("demo").student
    assert len(student.sward.window_size) == len(student.sward.student_layers) == 4
    apply_words(student, words)
    assert (student.sward.student_layers, student.sward.teacher_layers) == ((), ())
    assert student.sward.window_size == (8,)
    same = presets.get("demo").student
    apply_words(same, ["--model", "unext", "--seed", "1"])
    assert same.sward == presets.get("demo").student.sward


def test_another_data_set_forgets_the_scenes() -> None:
    teacher = presets.get("demo").teacher
    apply_words(teacher, ["--dataset.name", "camvid"])
    assert (teacher.dataset.count, teacher.dataset.series) == (None, 0)


def test_another_model_clears_the_options_and_layers_of_the_one_before() -> None:
    teacher = presets.get("clinicdb-small").teacher
    apply_words(teacher, ["--model", "vit_small_dinov2"])
    assert teacher.model_options == {"token_stride": 14}
    apply_words(teacher, ["--model", "hiera_demo"])
    assert teacher.model_options == {}
    student = presets.get("demo").student
    assert student.sward.pdr_layer == "encoder.2"
    apply_words(student, ["--model", "smp:Unet"])
    assert student.sward.pdr_layer is None


def test_another_data_set_clears_the_split() -> None:
    student = presets.get("clinicdb-unext").student
    apply_words(student, ["--dataset.name", "cvc_clinicdb"])
    assert student.dataset.split_by == "ratio"
    apply_words(student, ["--dataset.name", "camvid"])
    assert student.dataset.split_by is None


def test_another_data_set_clears_what_belongs_to_the_one_before() -> None:
    student = presets.get("clinicdb-unext").student
    assert student.metric == "dice"
    apply_words(student, ["--dataset.name", "cvc_colondb"])
    assert student.metric == "dice"
    apply_words(student, ["--dataset.name", "scenes"])
    assert student.metric == "mean_iou"
    own = presets.get("own").student
    own.dataset = DatasetConfig(
        "folder", Path("x"), (64, 96), "80/10/10", classes=("a", "b"), mask_values=("0,255",), masks="m/{name}.png",
        group_by="p", image_range=(0, 9), workers=3, views=2,
    )  # fmt: skip
    apply_words(own, ["--dataset.name", "camvid"])
    assert own.dataset == DatasetConfig("folder", image_size=(64, 96), workers=3, views=2)


def test_a_student_alone_takes_no_images_without_labels() -> None:
    student = replace(presets.get("demo").student, unlabelled=("photos",), unlabelled_batch=2, pseudo_labels=0.9)
    apply_words(student, ["--distillation", "kd"])
    assert student.unlabelled == ("photos",)
    apply_words(student, ["--distillation", "none"])
    assert (student.unlabelled, student.unlabelled_batch, student.pseudo_labels) == ((), None, None)
    student.check()


def test_options_of_networks_are_key_value_pairs() -> None:
    student = presets.get("demo").student
    words = ["--model-options", "a=3", "b=x=y", "--seed", "1", "--teacher.options", "c=-2"]
    assert apply_words(student, words) == ["--seed", "1"]
    assert student.model_options == {"a": 3, "b": "x=y"}
    assert student.teacher.options == {"c": -2}
    with pytest.raises(ValueError, match="--model-options must be followed by KEY=VALUE, got 'a'"):
        apply_words(student, ["--model-options", "a", "3"])


def test_options_of_the_student_may_be_spelled_as_those_of_the_teacher() -> None:
    assert expand(["--model.options", "a=3", "--model.weights=none", "--student-layers", "x"]) == [
        *("--model-options", "a=3", "--model-weights=none", "--sward.student-layers", "x")
    ]


def test_the_last_value_counts() -> None:
    assert value_of("--seed", ["--seed", "1", "--seed=2"]) == "2"
    assert value_of("--seed", ["--seeds", "1"]) is None


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_survives_a_file(name: str) -> None:
    preset = presets.get(name)
    for config in (preset.student, preset.teacher):
        Path("file.yaml").write_text(write_config(config))
        assert read_config(type(config), Path("file.yaml")) == config


def test_init_prints_what_train_reads(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "demo"]) == 0
    text = capsys.readouterr().out
    Path("mine.yaml").write_text(text.replace("seed: 0", "seed: 5"))
    assert read_config(DistillationConfig, Path("mine.yaml")).seed == 5


def test_a_recipe_in_a_file_sets_what_the_file_does_not_name() -> None:
    Path("file.yaml").write_text("recipe: paper\nepochs: 1\nsward: {context_reduction: mean}")
    config = read_config(DistillationConfig, Path("file.yaml"))
    config.check()
    assert config.sward == SWARDConfig(**{**PAPER._asdict(), "context_reduction": "mean"})
    text = write_config(presets.get("demo").student)
    Path("file.yaml").write_text(text.replace("recipe: recommended", "recipe: paper"))
    settings = presets.get("demo").student.sward
    assert read_config(DistillationConfig, Path("file.yaml")).sward == replace(settings, **PAPER._asdict())


def test_a_recipe_that_never_reached_the_settings_is_refused() -> None:
    config = DistillationConfig(recipe="paper", epochs=1)
    with pytest.raises(ValueError, match="recipe must be 'recommended' with these settings of sward, got 'paper'"):
        config.check()
    config.use_recipe("paper")
    config.sward.weights, config.sward.normalize = (1.0, 0.0), True
    config.check()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch: [", "must be YAML"),
        ("- 1", "must hold the fields of DistillationConfig: got list"),
        ("bach: 3", "has no field 'bach'"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.yaml").write_text(text)
    assert main(["train", "bad.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sward train: bad.yaml must")
    assert message in line
    assert main(["train", "absent.yaml"]) == 2


def test_numbers_with_exponents_are_numbers() -> None:
    Path("file.yaml").write_text("optimizer: {lr: 1e-4}")
    assert read_config(DistillationConfig, Path("file.yaml")).optimizer.lr == 1e-4


def test_numbers_are_text_where_a_field_holds_text() -> None:
    Path("file.yaml").write_text("class_weights: [1, 2.5]\ndataset: {mask_values: [0, 128-255], classes: [1, yes]}")
    with pytest.raises(ValueError, match=r"dataset\.classes must be text, got True"):
        read_config(DistillationConfig, Path("file.yaml"))
    Path("file.yaml").write_text("class_weights: [1, 2.5]\ndataset: {mask_values: [0, 128-255]}")
    config = read_config(DistillationConfig, Path("file.yaml"))
    assert config.class_weights == ("1", "2.5")
    assert config.dataset.mask_values == ("0", "128-255")


def test_short_help_names_what_there_is_and_help_all_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["demo", "--help"]):
        assert main(["train", *words]) == 0
        text = capsys.readouterr().out
        assert len(text.splitlines()) < 45
        for name in ("--iterations", "unext", "smp:Unet", "cirkd", "camvid", "clinicdb-small", "--help-all"):
            assert name in text
        assert "--optimizer.power" not in text
    with pytest.raises(SystemExit):
        main(["train", "demo", "--help-all"])
    assert "--optimizer.power" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "name"), [("models", "unext"), ("methods", "cirkd"), ("datasets", "camvid"), ("presets", "demo")]
)
def test_list(kind: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", kind]) == 0
    assert name in capsys.readouterr().out.splitlines()
    assert main(["list", kind, "more"]) == 2


def test_layers_as_json_and_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["layers", "unext", "--image-size", "64", "96"]
    assert main([*words, "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["encoder.3"]["channels"] == 160
    assert rows["encoder.3"]["grid"] == [4, 6]
    assert rows["encoder.3"]["stride"] == 16
    assert [name for name, row in rows.items() if row["default"]] == [f"encoder.{stage}" for stage in (1, 2, 3, 4)]
    assert main(words) == 0
    assert "* encoder.3" in capsys.readouterr().out


def test_a_frozen_trunk_without_weights_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train-teacher", "demo", "--no-train-trunk", "--iterations", "1"]) == 2
    assert "trunk_checkpoint must name the weights of a frozen trunk" in capsys.readouterr().err


def test_options_of_sward_beside_another_method_are_warned_of() -> None:
    words = expand(["--student-layers", "encoder.3", "--sward.embed-dim=8", "--recipe", "paper", "--batch", "4"])
    sentence = (
        r"^--sward\.student-layers, --sward\.embed-dim, --recipe without effect: only 'sward' reads it, not 'cwd'$"
    )
    with pytest.warns(UserWarning, match=sentence):
        warn_of_unread(words, "cwd")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in ("sward", "none"):
            warn_of_unread(words, method)
        warn_of_unread(["--batch", "4"], "cwd")


def test_a_normalisation_of_the_teacher_that_sward_would_not_read_is_refused() -> None:
    config = presets.get("demo").student
    config.teacher.normalization = "standardize"
    config.check()  # as the recommended recipe has it
    config.use_recipe("paper")
    with pytest.raises(
        ValueError, match=r"teacher\.normalization must be 'none' for sward, which has sward\.teacher_norm"
    ):
        config.check()
