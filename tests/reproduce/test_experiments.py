"""The declared tables: every run can be configured, and no two different runs share a folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from sward import presets
from sward.config import DistillationConfig
from sward.methods import METHODS
from sward.models.inputs import SIZE_MULTIPLE
from sward.reproduce import experiments, own_tables, paper_tables
from sward.reproduce.experiments import TEACHER, Table, teacher_of
from sward.reproduce.figures import figure
from sward.reproduce.options import Options
from sward.reproduce.own_tables import length, methods, peers, questions
from sward.reproduce.study import Study

TABLES = [
    *(getattr(paper_tables, f"table{number}")(scale) for number in (1, 2, 3, 4) for scale in ("paper", "small")),
    *(
        make(preset)
        for make in (methods, questions, peers)
        for preset in ("clinicdb-small", "colondb-small", "camvid-small", "cityscapes-mbv3")
    ),
    length("clinicdb-small"),
    own_tables.unlabelled(),
    own_tables.masks(),
]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_row_has_a_run_and_figures_for_every_group_of_columns(table: Table) -> None:
    study = Study(Options("table1"))
    for row in table.rows:
        assert len(row.runs) == len(row.paper) == len(table.tests)
        for figures, test in zip(row.paper, table.tests):
            assert len(figures) in (0, len(test.metrics))
            assert not figures or test.paper is not None
    for run in table.runs():
        config = study.config(run, 0)
        config.check()
        sizes = [config.dataset.image_size]
        if isinstance(config, DistillationConfig):
            sizes.append(config.teacher_image_size)
        assert all(side % SIZE_MULTIPLE == 0 for size in sizes for side in size)


def test_runs_of_all_tables_that_share_a_folder_are_the_same_run() -> None:
    known: dict[tuple[str, str], object] = {}
    for table in TABLES:
        for run in table.runs():
            assert known.setdefault((run.preset, run.name), run) == run


def test_paper_scale_is_section_4_1() -> None:
    study = Study(Options("table1"))
    for table in TABLES[0:8:2]:
        for run in table.runs():
            config, preset = study.config(run, 0), presets.get(run.preset)
            recipe = preset.teacher if run.name == TEACHER else preset.student
            assert (config.batch, config.iterations, config.epochs) == (recipe.batch, recipe.iterations, recipe.epochs)
            assert config.optimizer == recipe.optimizer
            assert config.dataset.image_size == recipe.dataset.image_size
    city, polyp = presets.get("cityscapes-mbv3").student, presets.get("colondb-resunetpp").student
    assert (city.iterations, city.batch, city.dataset.image_size) == (40_000, 16, (512, 1024))
    assert (polyp.epochs, polyp.batch, polyp.dataset.image_size) == (200, 8, (512, 512))


def test_both_polyp_students_share_one_teacher() -> None:
    assert teacher_of("clinicdb-unext") == teacher_of("clinicdb-resunetpp")
    assert teacher_of("clinicdb-unext") != teacher_of("colondb-unext")
    assert teacher_of("clinicdb-small").preset == "clinicdb-small"


def test_table_3_switches_the_terms_on_one_after_the_other() -> None:
    study = Study(Options("table3"))
    settings = [study.config(row.runs[0], 0).sward for row in paper_tables.table3("paper").rows[2:]]
    assert [each.terms for each in settings] == [(1, 0, 0), (1, 1, 0), (1, 1, 1), (1, 1, 1)]
    assert [each.weights for each in settings] == [(2, 0), (2, 0), (2, 0), (2, 1)]


def test_table_4_changes_the_shift_alone() -> None:
    study = Study(Options("table4"))
    configs = [study.config(row.runs[0], 0) for row in paper_tables.table4("paper").rows[1:]]
    assert [config.sward.shift for config in configs] == ["none", "deterministic", "stochastic"]
    for config in configs:
        config.sward.shift, config.output = "none", Path()
    assert configs[0] == configs[1] == configs[2]


def test_methods_are_those_of_sward_train() -> None:
    names = [row.runs[0].name for row in methods("clinicdb-small").rows]
    assert sorted(names) == sorted([TEACHER, "none", *METHODS])


def test_unlabelled_frames_are_never_those_of_the_test() -> None:
    table = own_tables.unlabelled()
    study = Study(Options("unlabelled"))
    unseen = table.tests[1]
    frames = [run.unlabelled for run in table.runs() if run.unlabelled is not None]
    assert len(frames) == 2
    for each in frames:
        assert (each.dataset, each.split_by) == (unseen.dataset, unseen.split_by)
        assert each.split != unseen.split
    for row in table.rows:
        if row.against is not None:
            with_them, without = study.config(row.runs[0], 1), study.config(row.against, 1)
            assert with_them.unlabelled_batch is None
            assert with_them.has_unlabelled
            with_them.unlabelled, with_them.output = without.unlabelled, without.output
            assert with_them == without


def test_fewer_masks_take_as_many_steps_and_share_no_teacher() -> None:
    study = Study(Options("masks"))
    frames = presets.CLINICDB_FRAMES
    full = {run.name: study.config(run, 0) for run in own_tables.masks().runs() if run.preset == "clinicdb-small"}
    for preset, share in (("clinicdb-small-25", 0.25), ("clinicdb-small-10", 0.1)):
        assert teacher_of(preset).preset == preset
        for name, run in ((run.name, run) for run in own_tables.masks().runs() if run.preset == preset):
            config, other = study.config(run, 0), full[name]
            used = round(share * frames)
            assert config.steps(used) == other.steps(frames)
            every, other_every = (
                each.evaluate_every * (count // each.batch) for each, count in ((config, used), (other, frames))
            )
            assert every == pytest.approx(other_every, rel=0.05)
            assert config.dataset == dataclasses.replace(other.dataset, labelled_share=share)
            assert config.unlabelled_per_step(used, frames - used) == (config.batch if name == "sward" else 0)
            if name == "sward":
                assert config.teacher.run == study.folder(teacher_of(preset), 0).path


def test_questions_change_one_thing_each_from_the_preset() -> None:
    base = presets.get("clinicdb-small").student.sward
    study = Study(Options("questions"))
    runs = {row.title: row.runs[0] for row in questions("clinicdb-small").rows[2:]}
    changed = {title: study.config(run, 0) for title, run in runs.items()}
    literal = changed.pop("SWARD as the paper sets it")
    assert (literal.recipe, literal.sward) == ("paper", presets.get("clinicdb-unext").student.sward)
    # Half of 224 is no multiple of 32, which the teachers need.
    larger = [changed.pop(f"teacher sees {side} x {side} pixels") for side in (128, 448)]
    assert [config.sward for config in larger] == [base, base]
    assert [config.teacher_image_size for config in larger] == [(128, 128), (448, 448)]
    for title, config in changed.items():
        # How PDR's features are scaled matters only where PDR has a weight.
        fields = 2 if title == "PDR on features as they are" else 1
        assert sum(getattr(config.sward, name) != value for name, value in vars(base).items()) == fields, title


def test_a_preset_without_pdr_adds_it_and_one_with_it_leaves_it_out() -> None:
    study = Study(Options("table3"))
    for preset, beta, gamma in (("colondb-small", 1.0, 0.1), ("colondb-resunetpp", 2.0, 1.0)):
        assert study.config(experiments.mwad(preset), 0).sward.weights == (beta, 0.0)
        assert study.config(experiments.with_pdr(preset), 0).sward.weights == (beta, gamma)
        assert [run.name for run in (experiments.mwad(preset), experiments.with_pdr(preset))].count("sward") == 1
    rows = paper_tables.table3("small").rows[2:]
    assert len({row.runs[0].name for row in rows}) == len(rows)


def test_images_that_cannot_select_weights_score_the_last_ones() -> None:
    (camvid,) = paper_tables.table1("small").tests
    clinic, _, unseen = paper_tables.table2("small").tests
    student, teacher = experiments.method("camvid-small", "sward"), teacher_of("camvid-small")
    assert [test.checkpoint(student) for test in (camvid, clinic, unseen)] == ["last", "best", "last"]
    assert {test.checkpoint(teacher) for test in (camvid, clinic, unseen)} == {"best"}


@pytest.mark.parametrize("name", ["figure1", "figure3", "figure4", "attention"])
def test_a_figure_of_one_preset_needs_its_runs_alone(name: str) -> None:
    assert {run.preset for run in figure(name, "small", "demo").runs} == {"demo"}
    own = {run.preset for run in figure(name, "small", None).runs}
    assert (
        own
        == {
            "figure1": {"camvid-small", "clinicdb-small"},
            "figure3": {"camvid-small", "clinicdb-small"},
            "figure4": {"camvid-small"},
            "attention": {"clinicdb-small"},
        }[name]
    )


def test_peers_choose_from_the_same_factors_as_sward() -> None:
    study = Study(Options("peers", seeds=3))
    rows = peers("colondb-small").rows
    chosen = [row for row in rows if row.choices]
    assert [row.runs[0].name for row in chosen] == ["kd", "cwd", "cirkd", "maskd", "freekd", "sward"]
    for row in chosen:
        configs = [study.config(run, 0) for run in row.choices]
        assert sorted(config.distillation_factor for config in configs) == [0.01, 0.1, 1.0, 10.0]
        assert [len(study.seeds(run)) for run in row.choices] == [3, 1, 1, 1]
        for config in configs:
            config.distillation_factor, config.output = 1.0, Path()
        assert configs == [configs[0]] * 4


def test_a_precision_is_that_of_the_students_alone() -> None:
    study = Study(Options("methods", precision="bf16"))
    runs = [row.runs[0] for row in methods("camvid-small").rows]
    found = {run.name: study.config(run, 0).precision for run in runs}
    assert found.pop("teacher") == "fp32"
    assert set(found.values()) == {"bf16"}


def test_twice_the_length_changes_the_epochs_alone() -> None:
    study = Study(Options("length"))
    once, twice = (study.config(row.runs[0], 0) for row in length("colondb-small").rows[:2])
    assert (once.epochs, twice.epochs) == (60, 120)
    once.epochs, once.output = twice.epochs, twice.output
    assert once == twice
    # Twice what the options set, and of a preset in iterations.
    short = Study(Options("length", epochs=3))
    assert [short.config(row.runs[0], 0).epochs for row in length("colondb-small").rows] == [3, 6, 3, 6]
    trial = Study(Options("length", iterations=10))
    assert [trial.config(row.runs[0], 0).iterations for row in length("colondb-small").rows] == [10, 20, 10, 20]
    once, twice = (study.config(row.runs[0], 0) for row in length("cityscapes-mbv3").rows[:2])
    assert twice.iterations == 2 * once.iterations
