"""Runs whose data, pack or checkpoint lies elsewhere now, and images that training has passed over."""

from __future__ import annotations

from pathlib import Path

import pytest

import sward
from sward.deploy.proof import evaluation_images, prove
from sward.runs import evaluate_run, train_student
from sward.runs.load import load_run
from tests.support.deployable import make_run, register
from tests.support.folder_data import damage, pack, write_pairs
from tests.support.training_runs import on_folder


def test_a_table_with_splits_is_scored_by_its_own(tmp_path: Path) -> None:
    write_pairs(tmp_path / "data", train=6, val=2)
    for name, splits in (("a", ["train"] * 4 + ["val", "test"]), ("b", ["test"] * 4 + ["val", "train"])):
        rows = [f"images/train/train{n}.png,masks/train/train{n}.png,{split}" for n, split in enumerate(splits)]
        (tmp_path / f"data/{name}.csv").write_text("\n".join(["image,mask,split", *rows]))
    train_student(on_folder(tmp_path / "data/a.csv", tmp_path / "run"))
    with pytest.warns(UserWarning, match="were trained on"):
        assert evaluate_run(tmp_path / "run", split="test", root=tmp_path / "data/b.csv").images == 4
    for root in (None, tmp_path / "data/../data/a.csv"):
        assert evaluate_run(tmp_path / "run", split="test", root=root).images == 1


def test_another_spelling_of_the_runs_own_table_keeps_the_runs_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pairs(tmp_path / "data", train=6)
    rows = [f"images/train/train{n}.png,masks/train/train{n}.png,{'val' if n > 3 else 'train'}" for n in range(6)]
    (tmp_path / "data/a.csv").write_text("\n".join(["image,mask,split", *rows]))
    split = ["train", "train", "train", "val", "test", "test"]
    listed = [f"images/train/train{n},{each}" for n, each in enumerate(split)]
    (tmp_path / "list.csv").write_text("\n".join(["frame_id,split", *listed]))
    monkeypatch.chdir(tmp_path)
    config = on_folder(Path("data/a.csv"), tmp_path / "run")
    config.dataset.split_by = "list.csv"
    train_student(config)
    assert evaluate_run(tmp_path / "run", split="test", root=tmp_path / "data/a.csv").images == 2


def test_a_pack_is_not_needed_where_it_is_not(tmp_path: Path) -> None:
    write_pairs(tmp_path / "data", classes=3)
    pack(tmp_path / "data", tmp_path / "pack")
    config = on_folder(tmp_path / "data", tmp_path / "run")
    config.dataset.num_classes = 3
    config.dataset.packed = str(tmp_path / "pack")
    train_student(config)
    before = evaluate_run(tmp_path / "run").mean_iou
    write_pairs(tmp_path / "other", val=3, classes=3)
    assert evaluate_run(tmp_path / "run", root=tmp_path / "other").images == 3
    (tmp_path / "pack").rename(tmp_path / "gone")
    assert evaluate_run(tmp_path / "run").mean_iou == before


@pytest.mark.usefixtures("few_images")
def test_sizes_that_are_no_multiple_of_32_are_scored_as_they_are_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch)
    make_run(tmp_path / "run", (50, 70))
    scores = evaluate_run(tmp_path / "run")
    config, info, network = load_run(tmp_path / "run")
    images = evaluation_images(config, "val", None)
    proof = prove(network, sward.load(tmp_path / "run"), images, info, split="val", tolerance=1e-3)
    assert proof.mean_iou_evaluated == pytest.approx(scores.mean_iou, abs=1e-9)


@pytest.mark.usefixtures("few_images")
def test_a_checkpoint_may_be_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)
    make_run(tmp_path / "run")
    best = tmp_path / "run/checkpoints/best.pt"
    best.rename(tmp_path / "annex.pt")
    best.symlink_to(tmp_path / "annex.pt")
    assert len(sward.load(best).classes) == len(sward.load(tmp_path / "run").classes)
    sward.load(tmp_path / "run").export(tmp_path / "network.pt2", check=0)
    (tmp_path / "link.pt").symlink_to(best)
    best.unlink()
    (tmp_path / "annex.pt").rename(best)
    assert len(sward.load(tmp_path / "link.pt").classes) > 1


def test_examples_for_int8_pass_over_images_that_training_passed_over(tmp_path: Path) -> None:
    write_pairs(tmp_path / "data")
    config = on_folder(tmp_path / "data", tmp_path / "run")
    damage(tmp_path / "data/images/train/train1.png")
    assert len(list(evaluation_images(config, "train", 2, skip_corrupt=True).samples())) == 2
    assert len(list(evaluation_images(config, "train", 4, skip_corrupt=True).samples())) == 3
    with pytest.raises(ValueError, match=r"train1\.png: the file is damaged"):
        list(evaluation_images(config, "train", 4).samples())
