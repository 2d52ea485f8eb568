"""What every data set shares: seeding, epochs, workers, batches, names and their mistakes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sward import data
from sward.data import DatasetInfo, Sample, SegmentationDataset, collate_evaluation, sample_seed


class Noise(SegmentationDataset):
    """Adds to every image a draw from torch's global generator, as torchvision's transforms do."""

    def __init__(self, seed: int = 0) -> None:
        info = DatasetInfo("noise", ("a", "b"), ((0, 0, 0), (1, 1, 1)))
        super().__init__(info, add_noise, seed)

    def __len__(self) -> int:
        return 6

    def read(self, index: int) -> tuple[Tensor, Tensor, str]:
        return torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.uint8), str(index)


def add_noise(image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return image + torch.rand(image.shape), labels.long()


def epoch_of_noise(workers: int, epoch: int) -> Tensor:
    dataset = Noise()
    dataset.set_epoch(epoch)
    return torch.cat([batch.image for batch in DataLoader(dataset, batch_size=2, num_workers=workers)])


def test_augmentation_does_not_depend_on_workers_order_or_what_was_drawn_before() -> None:
    alone = epoch_of_noise(workers=0, epoch=3)
    assert torch.equal(alone, epoch_of_noise(workers=2, epoch=3))
    dataset = Noise()
    dataset.set_epoch(3)
    torch.rand(17)
    assert torch.equal(dataset[4].image, alone[4])


def test_augmentation_changes_with_seed_epoch_and_index() -> None:
    dataset, other = Noise(seed=0), Noise(seed=1)
    first = dataset[0].image
    assert not torch.equal(first, dataset[1].image)
    assert not torch.equal(first, other[0].image)
    dataset.set_epoch(1)
    assert not torch.equal(first, dataset[0].image)
    dataset.set_epoch(0)
    assert torch.equal(first, dataset[0].image)


def test_the_new_epoch_reaches_persistent_workers() -> None:
    dataset = Noise()
    loader = DataLoader(dataset, batch_size=2, num_workers=1, persistent_workers=True)
    for epoch in (0, 1, 5):
        dataset.set_epoch(epoch)
        images = torch.cat([batch.image for batch in loader])
        assert torch.equal(images, epoch_of_noise(workers=0, epoch=epoch))


def test_global_random_state_is_left_as_it_was() -> None:
    before = torch.get_rng_state()
    Noise()[0]
    assert torch.equal(before, torch.get_rng_state())


def test_sample_seed_separates_neighbours() -> None:
    seeds = {sample_seed(seed, epoch, index) for seed in range(8) for epoch in range(8) for index in range(8)}
    assert len(seeds) == 512
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_wrong_index_epoch_and_seed() -> None:
    dataset = Noise()
    for index in (-1, 6):
        with pytest.raises(IndexError, match=f"noise has 6 samples, so there is no sample {index}"):
            dataset[index]
    with pytest.raises(ValueError, match="epoch must be 0 or more, got -1"):
        dataset.set_epoch(-1)
    with pytest.raises(ValueError, match="seed must be 0 or more, got -2"):
        Noise(seed=-2)


def test_evaluation_batches_keep_labels_of_different_sizes() -> None:
    samples = [Sample(torch.zeros(3, 4, 4), torch.zeros(size, dtype=torch.long), "n") for size in ((8, 6), (5, 7))]
    batch = collate_evaluation(samples)
    assert batch.images.shape == (2, 3, 4, 4)
    assert [tuple(labels.shape) for labels in batch.labels] == [(8, 6), (5, 7)]
    with pytest.raises(ValueError, match="batch size 1 or give an image_size"):
        collate_evaluation([samples[0], Sample(torch.zeros(3, 4, 8), samples[1].labels, "m")])


def test_describe_knows_every_data_set_without_its_files() -> None:
    for name in data.names():
        info = data.describe(name, num_classes=4 if name == "folder" else None)
        assert info.name == name
        assert info.ignore_index == 255
        assert len(set(info.palette)) == info.num_classes
        height, width = data.default_image_size(name)
        assert height % 32 == width % 32 == 0
    assert data.describe("cityscapes").num_classes == 19
    assert data.describe("camvid").num_classes == 11
    assert data.describe("cvc_clinicdb").classes == data.describe("cvc_colondb").classes == ("background", "polyp")
    assert data.describe("scenes").num_classes == 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: data.build("clinicdb", "train", train=True), "unknown data set 'clinicdb'; did you mean cvc_clinicdb"),
        (lambda: data.describe("Scene"), "unknown data set 'Scene'; did you mean scenes"),
        (lambda: data.describe("xyz"), "choose one of cityscapes, cvc_clinicdb, cvc_colondb, camvid, scenes, folder"),
        (lambda: data.describe("camvid", num_classes=2), "num_classes must be 11 for camvid, got 2"),
        (lambda: data.describe("folder"), "num_classes must be 2 to 255 for the data set 'folder', got None"),
        (lambda: data.describe("folder", num_classes=1), "num_classes must be 2 to 255, got 1"),
        (
            lambda: data.build("scenes", "val", train=False, split_by="ratio"),
            "split_by must be None for scenes, got 'ratio'; only polyps and folder can be split",
        ),
        (lambda: data.build("camvid", "val", train=False, count=3), "count must be None for camvid, got 3"),
        (lambda: data.build("scenes", "val", train=False, image_size=0), "image_size must be a positive number"),
        (lambda: data.build("scenes", "val", train=False, image_size=(64, 64, 3)), "image_size must be a positive"),
    ],
)
def test_wrong_arguments(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_root_comes_from_the_argument_then_the_environment_then_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def looked_in(root: str | None) -> str:
        with pytest.raises(data.DatasetNotFoundError) as caught:
            data.build("camvid", "train", train=True, root=root)
        return str(caught.value)

    monkeypatch.delenv("SWARD_DATA", raising=False)
    assert "in data/camvid, data/CamVid, data;" in looked_in(None)
    monkeypatch.setenv("SWARD_DATA", str(tmp_path / "here"))
    assert f"{tmp_path}/here/camvid" in looked_in(None)
    assert f"{tmp_path}/there/camvid" in looked_in(str(tmp_path / "there"))


def test_not_found_is_a_file_not_found_error_with_one_sentence() -> None:
    assert issubclass(data.DatasetNotFoundError, FileNotFoundError)
    with pytest.raises(FileNotFoundError) as caught:
        data.build("cityscapes", "train", train=True, root="/nowhere")
    message = str(caught.value)
    assert "\n" not in message
    assert "'leftImg8bit' and 'gtFine'" in message
    assert "/nowhere/cityscapes" in message
    assert "https://www.cityscapes-dataset.com" in message
    assert "SWARD_DATA" in message


def test_import_and_scenes_for_evaluation_need_torch_and_numpy_alone() -> None:
    code = (
        "import sys; from sward import data; data.build('scenes', 'val', train=False, image_size=64)[0]; "
        "print([name for name in ('torchvision', 'PIL', 'timm', 'sam2', 'matplotlib') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
