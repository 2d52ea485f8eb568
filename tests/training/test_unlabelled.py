"""Images without masks: which terms see them, and that the labelled images stay the same."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sward import data
from sward.cli.main import main
from sward.config import DatasetConfig, DistillationConfig, TeacherConfig
from sward.config_json import differences
from sward.data import Batch, DatasetNotFoundError, unlabelled
from sward.data.frames import frame_sums
from sward.data.sample import Pair
from sward.data.transforms import normalise
from sward.data.unlabelled import UnlabelledImages, join, stream_seed
from sward.losses import CWDLoss, KDLoss, MWADLoss, PDRLoss, SegmentationCrossEntropy, SWARDLoss
from sward.runs import train_student
from sward.runs.load import build_datasets
from sward.training import loop
from sward.training.batches import batches
from sward.training.observation import NonFiniteLossError
from sward.training.pseudo_labels import pseudo_labels
from sward.training.run_folder import RunFolder
from tests.support.folder_data import wide_png
from tests.support.training_runs import assert_equal_runs, checkpoint, records, small, write_images

pytestmark = pytest.mark.usefixtures("few_images")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_images(tmp_path / "photos/a")
    write_images(tmp_path / "photos/b", 2)
    return tmp_path / "photos"


def squares(root: Path) -> DatasetConfig:
    """Write ten photos with masks; the transform of such a folder rotates and fills the corners."""
    write_images(root / "images", 10)
    (root / "masks").mkdir()
    for number in range(10):
        pixels = np.zeros((48, 56), np.uint8)
        pixels[10:30, 10:40] = 1
        Image.fromarray(pixels).save(root / f"masks/{number}.png")
    return DatasetConfig(name="folder", root=root, image_size=(64, 64), num_classes=2, split_by="80/20")


def joined(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """Collect the batches of the runs that follow, as the data sets give them."""
    found: list[Batch] = []

    def remember(*both: Batch) -> Batch:
        batch = join(*both)
        found.append(batch._replace(labels=batch.labels.clone()))
        return batch

    monkeypatch.setattr(loop, "join", remember)
    return found


def trained_labels(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Collect the labels that the losses of the runs that follow get."""
    found: list[torch.Tensor] = []

    def replicate(module: nn.Module, device: torch.device) -> Any:
        def step(images: torch.Tensor, labels: torch.Tensor, *rest: Any, **options: Any) -> Any:
            found.append(labels.clone())
            return module(images, labels, *rest, **options)

        return step

    monkeypatch.setattr(loop.distributed, "replicate", replicate)
    return found


def scenes(**options: Any) -> data.SegmentationDataset:
    return data.build("scenes", "train", train=True, image_size=(32, 32), **options)


def test_every_image_below_the_folders_is_taken(images: Path) -> None:
    dataset = UnlabelledImages([images], scenes(views=2), (32, 32), seed=0)
    assert len(dataset) == 7
    assert {dataset[index].name for index in range(7)} >= {"photos/a/0", "photos/b/1"}
    assert all((dataset[index].labels == 0).all() for index in range(7))
    assert dataset[0].image.shape == (3, 32, 32)
    assert dataset.views == 2
    assert UnlabelledImages([images], scenes(teacher_size=(64, 64)), (32, 32), seed=0)[0].teacher_image.shape == (
        3,
        64,
        64,
    )
    (images / "empty").mkdir()
    for folder in (images / "empty", images / "nowhere"):
        with pytest.raises(
            DatasetNotFoundError, match=r"must name folders of images or lists of them, got .*, which holds none"
        ):
            UnlabelledImages([images, folder], scenes(), (32, 32), seed=0)


def test_folders_of_one_name_keep_their_frames_apart(images: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "b/a", 3)
    dataset = UnlabelledImages([images / "a", tmp_path / "b/a", images / "b"], scenes(), (32, 32), seed=0)
    names = [pair.name for pair in dataset.pairs]
    assert names[:1] + names[5:6] + names[8:9] == ["photos/a/0", "b/a/0", "photos/b/0"]
    assert len(frame_sums(dataset)) == len(dataset) == 10


def test_packs_of_unlabelled_images_are_read_bit_for_bit(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = UnlabelledImages([images / "a", images / "b"], scenes(), (32, 32), seed=0)
    expected = [decoded[index] for index in range(7)]
    assert main(["data", "pack", "unlabelled", "--root", str(images / "a")]) == 0
    read = []
    from_file = UnlabelledImages.read_files
    monkeypatch.setattr(
        UnlabelledImages, "read_files", lambda self, pair: read.append(pair.name) or from_file(self, pair)
    )
    packed = UnlabelledImages([images / "a", images / "b"], scenes(), (32, 32), seed=0)
    for index, sample in enumerate(expected):
        assert torch.equal(packed[index].image, sample.image)
        assert torch.equal(packed[index].labels, sample.labels)
        assert packed[index].name == sample.name
    assert set(read) == {"b/0", "b/1"}
    unpacked = UnlabelledImages([images / "a"], scenes(), (32, 32), seed=0, packed="none")
    assert torch.equal(unpacked[0].image, expected[0].image)
    assert "a/0" in read
    (images / "a/3.png").write_bytes((images / "a/2.png").read_bytes())
    with pytest.raises(
        ValueError, match=r"is stale: .*a/3.png has changed; pack again with 'sward data pack unlabelled"
    ):
        UnlabelledImages([images / "a"], scenes(), (32, 32), seed=0)


def test_a_list_names_images_relative_to_itself(images: Path, tmp_path: Path) -> None:
    listed = tmp_path / "some.txt"
    listed.write_text("photos/b/1.png\n\n  photos/a/3.png\n", encoding="utf-8")
    dataset = UnlabelledImages([listed, images / "a"], scenes(), (32, 32), seed=0)
    assert [pair.image for pair in dataset.pairs[:2]] == [images / "b/1.png", images / "a/3.png"]
    assert len(dataset) == 7
    assert len({pair.name for pair in dataset.pairs}) == 7
    listed.write_text("photos/b/1.png\nphotos/c/1.png\n", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*photos/c/1.png, which .*some.txt names"):
        UnlabelledImages([listed], scenes(), (32, 32), seed=0)


def test_masks_in_the_folder_are_no_images(images: Path) -> None:
    before = len(UnlabelledImages([images], scenes(), (32, 32), seed=0))
    for name in ("masks/1.png", "deep/Labels/2.png", "a/1_mask.png"):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(images / "a/1.png", images / name)
    with pytest.warns(
        UserWarning, match=r"3 files in .* are left out, since their folder .* masks: a/1_mask, .*masks/1"
    ):
        found = UnlabelledImages([images], scenes(), (32, 32), seed=0)
    assert len(found) == before
    for name in ("a/other_mask.png", "a/gt/9.png"):  # no image is called other or 9
        (images / name).parent.mkdir(exist_ok=True)
        shutil.copy(images / "a/1.png", images / name)
    with pytest.warns(UserWarning, match="3 files in"):
        assert len(UnlabelledImages([images], scenes(), (32, 32), seed=0)) == before + 2


@pytest.mark.parametrize("content", [b"\xff\xd8\xff\xe0 JFIF", "a.png\n".encode("utf-16")], ids=["jpeg", "utf-16"])
def test_a_file_that_is_no_list_is_named_with_what_is_wanted(images: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "one.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=r"must name folders, or text files in UTF-8 with .* got .*/one.jpg$"):
        UnlabelledImages([images, tmp_path / "one.jpg"], scenes(), (32, 32), seed=0)


def damage(images: Path, kind: str) -> None:
    """Make an image of the folder useless, or two of them."""
    path, pixels = images / "b/1.png", np.zeros((48, 56, 3), np.uint8)
    if kind == "16-bit":
        Image.fromarray(np.full((48, 56), 4000, np.uint16)).save(path)
    elif kind == "16-bit colour":
        path.write_bytes(wide_png(48, 56))
    elif kind == "pages":
        path.unlink()
        Image.fromarray(pixels).save(images / "b/1.tif", save_all=True, append_images=[Image.fromarray(pixels)])
    else:
        path.write_bytes(path.read_bytes()[:1000])
        (images / "a/2.png").write_bytes(b"no image")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("16-bit", "b/1.png must have 8 bits per channel, got the mode I;16; state the range"),
        ("16-bit colour", "b/1.png must have 8 bits per channel, got 16-bit colour; state"),
        ("pages", "b/1.tif must have one page, got 2"),
        ("cut off", r"cannot read .*a/2.png: the file is damaged or not an image .* \(and 1 more unlabelled images\)"),
    ],
)
@pytest.mark.parametrize("on_corrupt", ["stop", "skip"])
def test_images_that_cannot_be_used_are_found_before_the_run(
    images: Path, tmp_path: Path, kind: str, message: str, on_corrupt: Literal["stop", "skip"]
) -> None:
    damage(images, kind)
    options = dict(unlabelled=(images,), unlabelled_batch=7, on_corrupt=on_corrupt)
    config = small(tmp_path / "run", dataset=squares(tmp_path / "set"), iterations=1, **options)
    if on_corrupt == "skip" and kind == "cut off":
        with pytest.warns(UserWarning, match="skipped: cannot read") as caught:
            train_student(config)
        assert len([each for each in caught if "skipped" in str(each.message)]) == 2
        return
    with pytest.raises(ValueError, match=message):
        train_student(config)
    assert not (tmp_path / "run").exists()


def test_images_in_a_pack_are_not_looked_at_again(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["data", "pack", "unlabelled", "--root", str(images / "a")]) == 0
    looked = []
    monkeypatch.setattr(unlabelled, "check_end", lambda path, header: looked.append(path))
    UnlabelledImages([images / "a", images / "b"], scenes(), (32, 32), seed=0).check()
    assert sorted(looked) == [images / "b/0.png", images / "b/1.png"]


def test_frames_without_their_masks_are_looked_at_too(tmp_path: Path) -> None:
    folder = dataclasses.replace(squares(tmp_path / "set"), labelled_share=0.5)
    config = small(tmp_path / "run", dataset=folder, iterations=1)
    with_masks = {pair.name for pair in build_datasets(config)[0].pairs}
    hidden = build_datasets(config)[0].unlabelled[0]
    assert hidden.name not in with_masks
    hidden.image.write_bytes(hidden.image.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"cannot read {hidden.image}: the file is damaged"):
        train_student(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("step", [0, 2])
def test_an_image_that_fails_later_costs_no_step(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    read, reads = UnlabelledImages.read_files, []

    def fail(self: UnlabelledImages, pair: Pair) -> Any:
        reads.append(pair)
        if len(reads) > 2 * step:
            raise OSError("the disk is gone")
        return read(self, pair)

    def settings(name: str) -> DistillationConfig:
        return small(tmp_path / name, unlabelled=(images,), unlabelled_batch=2)

    with monkeypatch.context() as patch:
        patch.setattr(UnlabelledImages, "read_files", fail)
        with pytest.raises(OSError, match="the disk is gone"):
            train_student(settings("run"))
    if step == 0:
        assert not list((tmp_path / "run/checkpoints").iterdir())
        return
    assert checkpoint(tmp_path / "run")["step"] == step
    config = settings("run")
    config.resume = True
    train_student(config)
    train_student(settings("whole"))
    assert_equal_runs(tmp_path / "run", tmp_path / "whole")


def test_a_loss_that_is_not_finite_is_not_saved_when_an_image_fails(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches_ = loop.batches

    def one_bad(*arguments: Any, **options: Any) -> Iterator[Batch]:
        batch = next(batches_(*arguments, **options))
        yield batch._replace(images=batch.images * float("nan"))
        raise OSError("the disk is gone")

    monkeypatch.setattr(loop, "batches", one_bad)
    with pytest.raises(NonFiniteLossError):
        train_student(small(tmp_path / "run", log_every=4))
    assert not list((tmp_path / "run/checkpoints").iterdir())


def test_labelled_images_come_first_and_are_those_of_a_run_without(images: Path) -> None:
    alone = batches(scenes(), 4, seed=3)
    first, second = (
        batches(scenes(), 4, seed=3),
        batches(UnlabelledImages([images], scenes(), (32, 32), 3), 2, seed=stream_seed(3)),
    )
    for _ in range(6):
        labelled, both = next(alone), join(next(first), next(second))
        assert torch.equal(both.images[:4], labelled.images)
        assert torch.equal(both.labels[:4], labelled.labels)
        assert both.names[:4] == labelled.names
        assert len(both.names) == 6


class Maps(nn.Module):
    """Student and teacher maps of six images, of which the first four have labels."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Parameter(torch.randn(6, 8, 8, 8))
        self.teacher = torch.randn(6, 12, 8, 8)
        self.logits = nn.Parameter(torch.randn(6, 3, 16, 16))
        self.labels = torch.randint(0, 3, (6, 16, 16))
        self.labels[4:] = 255


def test_task_and_pdr_see_the_labelled_images_and_mwad_sees_all() -> None:
    maps = Maps()

    def loss() -> SWARDLoss:
        torch.manual_seed(1)
        mwad = MWADLoss([8], [12], window_size=4, embed_dim=8, shift="none")
        return SWARDLoss(SegmentationCrossEntropy(), mwad, PDRLoss(3), weights=(1.0, 1.0, 1.0))

    both = loss()(maps.logits, maps.labels, [maps.student], [maps.teacher])
    part = loss()(maps.logits[:4], maps.labels[:4], [maps.student[:4]], [maps.teacher[:4]])
    assert both.task == pytest.approx(part.task.item(), rel=1e-5)
    assert both.pdr == pytest.approx(part.pdr.item(), rel=1e-5)
    assert abs(both.mwad - part.mwad) > 1e-4
    both.loss.backward()
    assert (maps.logits.grad[4:] == 0).all()
    assert (maps.student.grad[4:].flatten(1).abs().sum(1) > 0).all()


@pytest.mark.parametrize("method", ["kd", "cwd"])
def test_losses_on_logits_see_unlabelled_images(method: str) -> None:
    maps = Maps()
    teacher = [torch.randn(6, 3, 16, 16)]
    loss = KDLoss(ignore_index=None) if method == "kd" else CWDLoss()
    loss.compare([maps.logits], teacher, maps.labels).loss.backward()
    assert (maps.logits.grad[4:].flatten(1).abs().sum(1) > 0).all()


def test_a_run_steps_on_both(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    remember = loop.LossWatch.remember
    monkeypatch.setattr(
        loop.LossWatch,
        "remember",
        lambda self, step, output, names, *maps: seen.append(names) or remember(self, step, output, names, *maps),
    )
    train_student(small(tmp_path / "run", iterations=3, unlabelled=(images,), unlabelled_batch=2))
    assert [len(names) for names in seen] == [6, 6, 6]
    assert all(name.startswith("photos/") for names in seen for name in names[4:])
    assert len({name for names in seen for name in names[4:]}) == 6
    assert len(records(tmp_path / "run")) > 3


def test_frames_whose_masks_are_not_used_are_unlabelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = dataclasses.replace(squares(tmp_path / "set"), labelled_share=0.5)
    seen = joined(monkeypatch)
    labels = trained_labels(monkeypatch)
    monkeypatch.setattr(
        UnlabelledImages, "read_mask", lambda self, pair: pytest.fail("the mask of an unlabelled frame was read")
    )
    train_student(small(tmp_path / "run", dataset=folder, iterations=2))
    labelled, others = ({name for batch in seen for name in batch.names[part]} for part in (slice(4), slice(4, None)))
    assert len(labelled) == len(others) == 4
    assert not labelled & others
    assert len(labels) == 2
    assert all((each[4:] == 255).all() and (each[:4] != 255).any() for each in labels)
    counted = json.loads((tmp_path / "run/labels.json").read_text())
    assert counted["train"]["masks"] == 4
    seen.clear()
    train_student(small(tmp_path / "alone", dataset=folder, iterations=2, distillation="none"))
    assert not seen


def test_the_teacher_s_maps_of_unlabelled_images_are_kept_too(images: Path, tmp_path: Path) -> None:
    teacher = TeacherConfig(name="hiera_demo", untrained=True, cache=tmp_path / "kept")
    dataset = DatasetConfig(name="scenes", image_size=(64, 64), views=1)
    options = dict(iterations=2, unlabelled=(str(images),), unlabelled_batch=3, teacher=teacher, dataset=dataset)
    train_student(small(tmp_path / "run", **options))
    assert len(list((tmp_path / "kept").rglob("*.features"))) == 2 * (4 + 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(distillation="none"), "unlabelled must be empty where distillation is 'none'"),
        (dict(unlabelled_batch=8), "unlabelled_batch must be at most 7, the number of unlabelled images, got 8"),
        (dict(unlabelled_batch=0), "unlabelled_batch must be at least 1"),
        (
            dict(unlabelled=(), dataset="all masks"),
            r"labelled_share must leave a training image without its mask, .* got 0.99 of 8 images",
        ),
        (dict(pseudo_labels=1.5), "pseudo_labels must be above 0 and at most 1 with unlabelled images .* got 1.5"),
        (dict(unlabelled=(), pseudo_labels=0.9), "pseudo_labels must be .* None without, got 0.9"),
        (dict(unlabelled=("a.tar", "b")), "unlabelled must be tar files alone, got other images too"),
        (
            dict(unlabelled=(), unlabelled_batch=2),
            "unlabelled_batch must be at least 1 with unlabelled and None without",
        ),
    ],
)
def test_what_cannot_work_is_said_before_any_step(images: Path, tmp_path: Path, changes: dict, message: str) -> None:
    if "dataset" in changes:
        changes["dataset"] = dataclasses.replace(squares(tmp_path / "set"), labelled_share=0.99)
    with pytest.raises(ValueError, match=message):
        train_student(small(tmp_path / "run", **{"unlabelled": (images,), **changes}))
    assert not (tmp_path / "run").exists()


def everywhere(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


def test_the_teacher_s_class_is_a_label_where_it_is_sure() -> None:
    labels = torch.tensor([[[0, 1]], [[255, 255]], [[255, 255]]])
    sure, unsure = [5.0, 0.0, 0.0], [0.2, 0.0, 0.1]  # probabilities 0.987 and 0.40
    logits = torch.tensor([[sure, sure], [sure, unsure], [unsure, sure[::-1]]]).permute(0, 2, 1)[:, :, None]
    for confidence, expected, share in (
        (0.98, [[0, 255], [255, 2]], 0.5),
        (0.3, [[0, 0], [0, 2]], 1.0),
        (0.99, [[255, 255], [255, 255]], 0.0),
    ):
        found, used = pseudo_labels(labels, logits, everywhere(2, 1, 2), confidence=confidence, ignore_index=255)
        assert found.tolist() == [[[0, 1]], *[[row] for row in expected]]
        assert used.item() == share
    # At a quarter of the labels' size.
    small_logits = torch.tensor([sure, sure]).T.reshape(1, 3, 2, 1)
    found, _ = pseudo_labels(
        torch.full((2, 4, 4), 255),
        small_logits.repeat(2, 1, 1, 1),
        everywhere(1, 4, 4),
        confidence=0.5,
        ignore_index=255,
    )
    assert (found[0] == 255).all()
    assert (found[1] == 0).all()


def test_the_filled_border_gets_no_label_and_does_not_count() -> None:
    # Sure of three pixels; of these one is outside the picture, as is the fourth.
    logits = torch.tensor([9.0, -9.0, 9.0, 0.0]).view(1, 1, 1, 4)
    inside = torch.tensor([[[True, True, False, False]]])
    for confidence, share in ((0.9, 1.0), (1.0, 0.0)):
        labels = torch.full((2, 1, 4), 255)
        found, used = pseudo_labels(labels, logits, inside, confidence=confidence, ignore_index=255)
        assert found.tolist() == [[[255] * 4], [[1, 0, 255, 255] if share else [255] * 4]]
        assert used.item() == share


def test_a_run_gives_no_labels_to_what_rotation_fills(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, batches_, labels = squares(tmp_path / "set"), joined(monkeypatch), trained_labels(monkeypatch)
    black = normalise(torch.zeros(3, 1, 1, dtype=torch.uint8))
    for name, confidence in (("all", 1e-6), ("without", None)):
        options = dict(unlabelled=(images,), unlabelled_batch=4, pseudo_labels=confidence)
        train_student(small(tmp_path / name, dataset=dataset, iterations=2, **options))
    for batch, seen in zip(batches_, labels, strict=True):
        outside = batch.labels[4:] == 255
        assert 0.02 < outside.float().mean() < 0.5
        # Colours are jittered after the rotation, and black stays black.
        assert (batch.images[4:] - black).abs().amax(1)[outside].max() < 0.4
        assert torch.equal(seen[:4], batch.labels[:4])
    for batch, seen in zip(batches_[:2], labels[:2]):
        assert torch.equal(seen[4:] == 255, batch.labels[4:] == 255)
    assert all((seen[4:] == 255).all() for seen in labels[2:])
    assert [record.get("pseudo_labelled_share") for record in records(tmp_path / "all")] == [1.0, 1.0, None]


def test_one_logit_of_the_teacher_is_the_log_odds_of_class_1() -> None:
    logits = torch.tensor([3.0, -3.0, 1.0, -1.0]).view(1, 1, 1, 4)  # probabilities of the class 0.95 and 0.73
    found, used = pseudo_labels(
        torch.full((1, 1, 4), 255), logits, everywhere(1, 1, 4), confidence=0.9, ignore_index=255
    )
    assert found.tolist() == [[[1, 0, 255, 255]]]
    assert used.item() == 0.5


def test_a_run_learns_from_the_teacher_s_labels_and_logs_their_share(images: Path, tmp_path: Path) -> None:
    for name, confidence in (("all", 1e-6), ("none", 1.0)):
        options = dict(unlabelled=(str(images),), unlabelled_batch=4, pseudo_labels=confidence)
        train_student(small(tmp_path / name, iterations=2, **options))
    shares = {
        name: [record.get("pseudo_labelled_share") for record in records(tmp_path / name)] for name in ("all", "none")
    }
    assert shares == {"all": [1.0, 1.0, None], "none": [0.0, 0.0, None]}
    first, other = (records(tmp_path / name)[0] for name in ("all", "none"))
    assert first["task"] != other["task"]
    assert first["attention"] == other["attention"]


@pytest.mark.parametrize(
    ("labelled", "unlabelled", "processes", "expected"),
    [
        (428, 4280, 1, 8),
        (428, 428, 1, 8),
        (428, 427, 1, 7),
        (428, 148, 1, 2),
        (428, 1, 1, 1),
        (428, 427, 2, 6),
        (428, 148, 4, 4),
        (428, None, 2, 8),
    ],
)
def test_no_unlabelled_image_is_seen_more_often_than_a_labelled_one_unless_processes_need_one_each(
    labelled: int, unlabelled: int | None, processes: int, expected: int
) -> None:
    config = DistillationConfig(batch=8, unlabelled=("x",))
    assert config.unlabelled_per_step(labelled, unlabelled, processes) == expected
    config.unlabelled_batch = 5
    assert config.unlabelled_per_step(labelled, unlabelled) == 5
    assert DistillationConfig(batch=8).unlabelled_per_step(labelled, unlabelled) == 0
    shared = DistillationConfig(batch=8, dataset=DatasetConfig(labelled_share=0.5))
    assert shared.unlabelled_per_step(214, 214) == 8


def test_the_default_reaches_the_run(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # 7 images beside 18: four of each per step would show them two to three times as often.
    config = small(tmp_path / "run", iterations=2, unlabelled=(str(images),))
    train_student(config)
    assert "unlabelled images: 7, 1 per step beside 4 labelled ones" in capsys.readouterr().out
    kept = RunFolder(tmp_path / "run").read()[0]
    assert kept.unlabelled_batch == 1
    assert differences(kept, config) == []
    assert differences(config, kept) == ["unlabelled_batch is None, not 1"]
    first, second = records(config.output)[:2]
    expected = (4 + 1) / (second["seconds"] - first["seconds"])
    assert second["images_per_second"] == pytest.approx(expected, rel=1e-6)


def test_a_single_unlabelled_image_is_said_to_be_seen_too_often(tmp_path: Path) -> None:
    write_images(tmp_path / "one", 1)
    config = small(tmp_path / "run", iterations=1, unlabelled=(str(tmp_path / "one"),))
    # 18 labelled images in steps of four: each is seen once in 4.5 steps, the unlabelled one in every step.
    with pytest.warns(UserWarning, match=r"will be seen 4\.5 times as often .* there are 1 of them beside 18;"):
        train_student(config)
