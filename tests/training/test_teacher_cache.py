"""Teacher features on disk: the same training with and without, and never the features of another image or teacher."""

import errno
import hashlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sward import data, models
from sward.config import (
    DatasetConfig,
    DistillationConfig,
    MaskTrainingConfig,
    SWARDConfig,
    TeacherConfig,
    TeacherTrainingConfig,
)
from sward.losses import LOGITS
from sward.losses.masks import teacher_fingerprint
from sward.models.registry import origin
from sward.models.teachers import Teacher
from sward.runs import train_masks, train_student, train_teacher
from sward.runs.load import build_split
from sward.training import FrozenTeacher, teacher_cache
from sward.training.teacher_cache import TeacherCache, TrunkCache


class Network(nn.Module):
    """Counts the images it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Conv2d(3, 5, 3, stride=2, padding=1)
        self.head = nn.Conv2d(5, 2, 1)
        self.seen = 0

    def forward(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return self.head(self.stage(images))


LAYERS = ("stage", LOGITS)


def cache(folder: Path, network: nn.Module, layers: tuple[str, ...] = LAYERS) -> TeacherCache:
    return TeacherCache(FrozenTeacher(network, layers), folder)


def test_the_teacher_runs_once_for_each_image(tmp_path: Path) -> None:
    network, images = Network(), torch.randn(4, 3, 32, 48)
    kept = cache(tmp_path, network)
    first = kept(images[:3])
    assert network.seen == 3
    again = kept(images[[2, 0, 3]])
    assert network.seen == 4
    assert (kept.files.hits, kept.files.misses) == (2, 4)
    direct = FrozenTeacher(network, LAYERS)(images)
    for layer in LAYERS:
        assert torch.equal(first[layer][[2, 0]], again[layer][:2])
        torch.testing.assert_close(again[layer], direct[layer][[2, 0, 3]])
    # Another process finds them too.
    seen = network.seen
    assert all(torch.equal(cache(tmp_path, network)(images[:3])[layer], first[layer]) for layer in LAYERS)
    assert network.seen == seen


def test_an_entry_does_not_depend_on_its_batch(tmp_path: Path) -> None:
    network, images = Network(), torch.randn(8, 3, 32, 32)
    whole = cache(tmp_path / "a", network)(images)
    single = [cache(tmp_path / "b", network)(image[None]) for image in images]
    for layer in LAYERS:
        assert torch.equal(whole[layer], torch.cat([each[layer] for each in single]))


def test_another_image_layer_weight_or_setting_is_another_entry(tmp_path: Path) -> None:
    network, images = Network(), torch.randn(1, 3, 32, 48)
    cache(tmp_path, network)(images)
    for other in (images.nextafter(images + 1), images.flip(-1), images.double().float() * 2):
        seen = network.seen
        cache(tmp_path, network)(other)
        assert network.seen == seen + 1
    cache(tmp_path, network, ("stage",))(images)
    teacher = FrozenTeacher(network, LAYERS)
    teacher.precision = "bf16"  # a setting that a teacher may have
    TeacherCache(teacher, tmp_path)(images)
    with torch.no_grad():
        network.head.bias[0] += 1e-6
    before = network.seen
    cache(tmp_path, network)(images)
    assert network.seen == before + 1
    assert len(list(tmp_path.iterdir())) == 4


class Dilated(nn.Module):
    """Networks of one class and one shape of weights."""

    def __init__(self, dilation: int = 1, heads: int = 1, activation: object = F.gelu) -> None:
        super().__init__()
        self.stage = nn.Conv2d(3, 4, 3, padding=dilation, dilation=dilation)
        self.attention = nn.MultiheadAttention(4, heads, batch_first=True)
        self.activation = activation

    def forward(self, images: Tensor) -> Tensor:
        maps = self.activation(self.stage(images))
        tokens = maps.flatten(2).transpose(1, 2)
        return self.attention(tokens, tokens, tokens)[0].transpose(1, 2).unflatten(2, maps.shape[-2:])


@pytest.mark.parametrize("change", [dict(dilation=2), dict(heads=2), dict(activation=F.relu)])
def test_a_teacher_of_the_same_weights_that_is_made_in_another_way_has_entries_of_its_own(
    change: dict[str, object], tmp_path: Path
) -> None:
    network, other, same = Dilated(), Dilated(**change), Dilated()
    for made in (other, same):
        made.load_state_dict(network.state_dict())
    images = torch.randn(1, 3, 8, 8)
    kept = cache(tmp_path, network)(images)
    found = cache(tmp_path, other)(images)
    assert torch.equal(found[LOGITS], FrozenTeacher(other, LAYERS)(images)[LOGITS])
    assert not torch.equal(found[LOGITS], kept[LOGITS])
    again = cache(tmp_path, same)
    assert torch.equal(again(images)[LOGITS], kept[LOGITS])
    assert again.files.hits == 1
    assert TrunkCache(network, tmp_path).files.folder != TrunkCache(other, tmp_path).files.folder


def test_trunks_of_the_small_presets_keep_their_folder(tmp_path: Path) -> None:
    trunk = models.build("vit_small_dinov2", 2, token_stride=14).trunk.eval()
    of_every_module = {name: str(value) for name, value in vars(nn.Module().eval()).items() if value in (None, False)}
    settings = {**of_every_module, "token_stride": "14", "blocks": "(2, 5, 8, 11)"}
    decisive = [1, settings, "DINOv2Trunk", teacher_fingerprint(trunk)]
    key = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:24]
    assert TrunkCache(trunk, tmp_path).files.folder.name == key


@pytest.mark.parametrize("damage", ["cut short", "a bit", "empty", "checksum alone"])
def test_a_damaged_entry_is_made_again(tmp_path: Path, damage: str) -> None:
    network, images = Network(), torch.randn(1, 3, 32, 48)
    whole = cache(tmp_path, network)(images)
    (path,) = tmp_path.glob("*/*.features")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    damaged = {"cut short": content[:-9], "a bit": content, "empty": b"", "checksum alone": content[:4]}[damage]
    path.write_bytes(damaged)
    with pytest.warns(UserWarning, match=r"\.features is damaged; computing its teacher features again"):
        again = cache(tmp_path, network)(images)
    assert all(torch.equal(whole[layer], again[layer]) for layer in LAYERS)
    seen = network.seen
    cache(tmp_path, network)(images)
    assert network.seen == seen


def test_a_full_disk_leaves_the_training_going(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, images = Network(), torch.randn(3, 3, 32, 48)
    kept = cache(tmp_path, network)

    def full(self: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.warns(UserWarning, match=r"cannot write teacher features to .* \(No space left on device\)") as warned:
        features = kept(images)
    assert len(warned) == 1
    torch.testing.assert_close(features["stage"], FrozenTeacher(network, LAYERS)(images)["stage"])
    assert not list(tmp_path.glob("*/*"))


# Whole runs


def small(tmp_path: Path, name: str, cached: bool = True, **changes: object) -> DistillationConfig:
    config = DistillationConfig(
        dataset=DatasetConfig(name="scenes", image_size=(64, 64), views=2),
        batch=6,
        iterations=9,
        log_every=1,
        teacher=TeacherConfig(untrained=True, cache=tmp_path / "cache" if cached else None),
        sward=SWARDConfig(window_size=(4,), embed_dim=8),
        output=tmp_path / name,
    )
    for key, value in changes.items():
        setattr(config, key, value)
    return config


def weights(run: Path) -> dict[str, Tensor]:
    return torch.load(run / "checkpoints" / "last.pt", weights_only=True)["model"]


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.usefixtures("few_images")
def test_a_run_is_the_same_from_an_empty_and_from_a_full_cache_and_close_to_one_without(tmp_path: Path) -> None:
    empty, full, without = (
        train_student(small(tmp_path, name, cached)).run
        for name, cached in (("empty", True), ("full", True), ("without", False))
    )
    found = weights(full)
    for key, value in weights(empty).items():
        assert torch.equal(value, found[key]), key
    # Teacher maps of one image and of a batch may differ in their last bits, and AdamW makes steps of rounding errors.
    for one, other in zip(losses(empty), losses(without), strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    # One file per distinct image of the two views (a flip may come out the same twice); nothing else was written.
    dataset, views = build_split(small(tmp_path, "empty"), "train", train=True), set()
    for epoch in range(2):
        dataset.set_epoch(epoch)
        views |= {dataset[index].image.numpy().tobytes() for index in range(len(dataset))}
    assert 18 < len(views) <= 36
    assert len(list((tmp_path / "cache").glob("*/*"))) == len(views)


class Gain(nn.Module):
    """A network that keeps its option where nobody looks."""

    def __init__(self, gain: float = 1) -> None:
        super().__init__()
        self.stage = nn.Conv2d(3, 8, 3, stride=8, padding=1)
        self.head = nn.Conv2d(8, 5, 1)
        self._gain = gain

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self._gain * self.stage(images))


class Pyramid(nn.Module):
    """A trunk around such a network."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.inner = Gain(gain)

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.inner(images)
        return [F.avg_pool2d(maps, side) for side in (1, 2, 4, 4)]


class Last(nn.Module):
    """A head that returns the last of its maps."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.scale * maps[-1]


@pytest.fixture
def mynets(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("mynets")
    vars(module).update(teacher=Gain, pyramid=lambda gain=1: Teacher(Pyramid(gain), Last()))
    monkeypatch.setitem(sys.modules, "mynets", module)


@pytest.mark.usefixtures("few_images", "mynets")
def test_an_option_that_no_module_shows_has_entries_of_its_own(tmp_path: Path) -> None:
    def distil(gain: int, name: str, cached: bool = True) -> list[float]:
        teacher = TeacherConfig(
            untrained=True,
            name="mynets:teacher",
            options={"gain": gain},
            cache=tmp_path / "cache" if cached else None,
        )
        return losses(train_student(small(tmp_path, name, teacher=teacher, distillation="kd", iterations=1)).run)

    first, third = distil(1, "first"), distil(3, "third")
    assert third == pytest.approx(distil(3, "third without", cached=False), rel=1e-5)
    assert third != pytest.approx(first, rel=1e-3)
    filled = sorted((tmp_path / "cache").glob("*/*"))
    assert distil(1, "again") == first
    assert sorted((tmp_path / "cache").glob("*/*")) == filled
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.usefixtures("few_images", "mynets")
def test_a_student_reads_what_its_teacher_with_such_options_kept(tmp_path: Path) -> None:
    for gain in (1, 3):
        teacher = TeacherTrainingConfig(
            model="mynets:pyramid",
            model_options={"gain": gain},
            model_weights="random",
            dataset=DatasetConfig(name="scenes", image_size=(64, 64), views=2),
            batch=6,
            iterations=3,
            cache=tmp_path / "cache",
            output=tmp_path / f"teacher{gain}",
        )
        train_teacher(teacher)
    filled = sorted((tmp_path / "cache").glob("*/*"))
    assert len({path.parent for path in filled}) == 2
    distilled = TeacherConfig(run=tmp_path / "teacher3", cache=tmp_path / "cache")
    train_student(small(tmp_path, "run", teacher=distilled, distillation="kd", iterations=3))
    assert sorted((tmp_path / "cache").glob("*/*")) == filled


def test_the_builder_counts_for_other_networks_than_those_of_sward() -> None:
    assert origin("vit_small_dinov2", {"token_stride": 14}) == origin("hiera_demo", {}) == ""
    others = [
        origin(name, options)
        for name in ("mynets:teacher", "timm:convnext_atto", "registered later")
        for options in ({}, {"gain": 1}, {"gain": 3})
    ]
    assert len({*others, ""}) == 10
    assert origin("a:b", {"c": 1, "d": 2}) == origin("a:b", {"d": 2, "c": 1})


@pytest.mark.usefixtures("few_images")
def test_a_layer_inside_the_trunk_may_be_distilled_from_a_cache(tmp_path: Path) -> None:
    settings = SWARDConfig(
        window_size=(4,),
        embed_dim=8,
        student_layers=("encoder.2", "encoder.3"),
        teacher_layers=("trunk.stem", "levels.1"),
    )
    filled, read, without = (
        train_student(small(tmp_path, name, name != "without", sward=settings, iterations=3)).run
        for name in ("filled", "read", "without")
    )
    found = weights(read)
    assert all(torch.equal(value, found[key]) for key, value in weights(filled).items())
    for one, other in zip(losses(filled), losses(without), strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    assert len(list((tmp_path / "cache").glob("*/*"))) == 18


def test_a_student_alone_does_not_ask_what_its_teacher_would_see(tmp_path: Path) -> None:
    teacher = TeacherConfig(image_size=(96, 128), cache=tmp_path)
    config = small(tmp_path, "run", dataset=DatasetConfig(image_size=(64, 64)), teacher=teacher)
    with pytest.raises(ValueError, match="the aspect ratio"):
        config.check()
    config.distillation = "none"
    config.check()


def test_training_without_fixed_views_is_refused(tmp_path: Path) -> None:
    config = small(tmp_path, "run", dataset=DatasetConfig(name="scenes", image_size=(64, 64)))
    with pytest.raises(
        ValueError, match=r"dataset\.views must be set with teacher\.cache, got None; .* --dataset\.views N"
    ):
        train_student(config)
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("few_images")
def test_the_teacher_may_see_more_pixels_than_the_student(tmp_path: Path) -> None:
    def larger(cached: bool = True) -> TeacherConfig:
        return TeacherConfig(untrained=True, image_size=(96, 96), cache=tmp_path / "cache" if cached else None)

    empty, full, without = (
        train_student(small(tmp_path, name, iterations=3, teacher=larger(name != "without"))).run
        for name in ("empty", "full", "without")
    )
    found = weights(full)
    assert all(torch.equal(value, found[key]) for key, value in weights(empty).items())
    for one, other in zip(losses(empty), losses(without), strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    entries = list((tmp_path / "cache").glob("*/*"))
    # Three batches of six, one view of each image.
    assert len(entries) == 18
    maps = torch.load(io.BytesIO(entries[0].read_bytes()[4:]), weights_only=True)
    # The trunk's finest map is its stem's.
    assert maps["1"].shape == (40, 24, 24)
    # What it sees there is more: the run is another one.
    same_size = train_student(small(tmp_path, "same size", iterations=3)).run
    assert losses(same_size) != losses(empty)


def test_what_the_student_sees_does_not_depend_on_the_teacher() -> None:
    alone, distilled = (
        data.build("scenes", "train", train=True, image_size=64, views=2, teacher_size=size)
        for size in (None, (96, 96))
    )
    for index in range(8):
        mine, theirs = alone[index], distilled[index]
        assert torch.equal(mine.image, theirs.image)
        assert torch.equal(mine.labels, theirs.labels)
        assert isinstance(theirs, data.TeacherSample)
        assert theirs.teacher_image.shape == (3, 96, 96)
        # The same flips: the teacher's picture, made smaller, is the student's.
        smaller = F.interpolate(theirs.teacher_image[None], size=(64, 64), mode="bilinear", antialias=True)[0]
        assert (smaller - mine.image).abs().mean() < 0.2
    assert isinstance(alone[0], data.Sample)
    with pytest.raises(ValueError, match=r"teacher_size must be None where train is False, got \(96, 96\)"):
        data.build("scenes", "val", train=False, image_size=64, teacher_size=(96, 96))
    # A rotation in another aspect would show the teacher another part of the image.
    with pytest.raises(ValueError, match="teacher_size must have the aspect ratio of image_size, 64x64, got 96x80"):
        data.build("scenes", "train", train=True, image_size=64, teacher_size=(96, 80))


def test_a_teacher_with_another_aspect_ratio_is_refused(tmp_path: Path) -> None:
    config = small(tmp_path, "run", teacher=TeacherConfig(untrained=True, image_size=(96, 128)))
    with pytest.raises(ValueError, match=r"the aspect ratio of dataset.image_size, 64x64, got 96x128"):
        train_student(config)


@pytest.mark.usefixtures("few_images")
def test_masks_are_learned_on_what_the_teacher_will_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def learn(
        masks: nn.Module, teacher: nn.Module, tap: str, stream: Iterator[data.Batch], *rest: object, **more: object
    ) -> None:
        seen.append(next(stream).images.shape)

    monkeypatch.setattr("sward.runs.train.learn_masks", learn)
    config = MaskTrainingConfig(
        dataset=DatasetConfig(name="scenes", image_size=(64, 64)),
        teacher=TeacherConfig(untrained=True, image_size=(96, 96)),
        batch=2,
        output=tmp_path / "tokens.pt",
    )
    train_masks(config)
    assert seen == [(2, 3, 96, 96)]
    assert config.dataset.image_size == (64, 64)


def test_maps_from_the_trunks_cache_may_be_kept_by_autograd(tmp_path: Path) -> None:
    network = models.build("hiera_demo", 2)
    network.trunk_cache = TrunkCache(network.trunk, tmp_path)
    teacher = FrozenTeacher(network, ["levels.3", LOGITS])
    images = torch.randn(2, 3, 32, 32)
    for _ in range(2):  # computed, then read
        maps = teacher(images)
        weight = torch.ones((), requires_grad=True)
        (maps["levels.3"] * weight).sum().backward()
        torch.testing.assert_close(weight.grad, maps["levels.3"].sum())
        (maps[LOGITS] * weight).sum().backward()


def test_an_entry_is_verified_when_it_is_read_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, images = Network(), torch.randn(2, 3, 32, 48)
    cache(tmp_path, network)(images)
    sums = []
    crc32 = teacher_cache.zlib.crc32
    monkeypatch.setattr(teacher_cache.zlib, "crc32", lambda content: sums.append(len(content)) or crc32(content))
    kept = cache(tmp_path, network)
    first, again = kept(images), kept(images)
    assert len(sums) == 2
    assert all(torch.equal(first[layer], again[layer]) for layer in LAYERS)
