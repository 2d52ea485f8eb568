"""One preset per experiment of the paper (section 4.1), and small presets for machines without a GPU."""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sward.config import (
    DatasetConfig,
    DistillationConfig,
    MaskTrainingConfig,
    OptimizerConfig,
    SWARDConfig,
    TeacherConfig,
    TeacherTrainingConfig,
)

CLINICDB_FRAMES = 428
"""Training frames of ClinicDB split by sequence."""


@dataclass
class Preset:
    """Training recipes of a student and its teacher."""

    description: str
    """One line for the list that `sward --help` prints."""
    student: DistillationConfig
    """Configuration of `sward train`."""
    teacher: TeacherTrainingConfig
    """Configuration of `sward train-teacher`. The paper does not publish its teachers' recipes; with a frozen trunk,
    these presets train the head with the student's optimiser."""
    mask_steps: int | None = None
    """Steps of `sward train-masks`, for MasKD's tokens and FreeKD's prompts; None for the papers' numbers."""

    @property
    def masks(self) -> MaskTrainingConfig:
        """Configuration of `sward train-masks`: the student's data, teacher and batch."""
        student = copy.deepcopy(self.student)
        return MaskTrainingConfig(
            preset=student.preset,
            dataset=student.dataset,
            teacher=student.teacher,
            batch=student.batch,
            steps=self.mask_steps,
        )


def names() -> list[str]:
    """Return the names of all presets, those of the paper first."""
    return list(_PRESETS)


def get(name: str) -> Preset:
    """Return a fresh copy of the preset `name`.

    Raises:
        ValueError: if there is no such preset; the message lists near matches, or says how to go on with a run.
    """
    if (Path(name) / "config.json").is_file():
        raise ValueError(
            f"preset must be a name or a configuration file, got the folder of a run, {name!r}; go on with that run by "
            f"the command that began it and --resume, or by {name}/config.json --output {name} --resume"
        )
    if name not in _PRESETS:
        near = difflib.get_close_matches(name, _PRESETS, n=3, cutoff=0.4) or names()
        raise ValueError(f"unknown preset {name!r}; did you mean {' or '.join(map(repr, near))}?")
    made = _PRESETS[name]()
    # Student and teacher share their data set object; copy both so that a change to one preset stays local.
    preset = dataclasses.replace(made, student=copy.deepcopy(made.student), teacher=copy.deepcopy(made.teacher))
    preset.student.preset = preset.teacher.preset = name
    return preset


def _as_the_paper(**settings: Any) -> DistillationConfig:
    config = DistillationConfig(**settings)
    config.use_recipe("paper")
    return config


def _cityscapes() -> Preset:
    dataset = DatasetConfig(name="cityscapes", image_size=(512, 1024), workers=8)
    optimizer = OptimizerConfig(lr=1e-3, weight_decay=1e-4, schedule="poly")
    teacher = "sam2_hiera_large_deeplabv3plus"
    return Preset(
        "Table 1: Cityscapes, SAM 2.1 Hiera-L to DeepLabV3+ MobileNetV3-Small",
        _as_the_paper(
            model="mbv3s_deeplabv3plus",
            dataset=dataset,
            optimizer=optimizer,
            batch=16,
            iterations=40_000,
            evaluate_every=20,
            teacher=TeacherConfig(name=teacher),
        ),
        TeacherTrainingConfig(
            model=teacher, dataset=dataset, optimizer=optimizer, batch=16, iterations=40_000, evaluate_every=20
        ),
    )


def _polyps(dataset_name: str, student: str, student_title: str) -> Callable[[], Preset]:
    def make() -> Preset:
        dataset = DatasetConfig(name=dataset_name, image_size=(512, 512), split_by="ratio", workers=4)
        optimizer = OptimizerConfig(lr=5e-4, weight_decay=1e-4, schedule="cosine")
        teacher = "medsam2_hiera_tiny_resunetpp"
        return Preset(
            f"Table 2: {dataset_name}, MedSAM2 Hiera-T to {student_title}",
            _as_the_paper(
                model=student,
                dataset=dataset,
                optimizer=optimizer,
                batch=8,
                epochs=200,
                metric="dice",
                evaluate_every=5,
                teacher=TeacherConfig(name=teacher),
            ),
            TeacherTrainingConfig(
                model=teacher,
                dataset=dataset,
                optimizer=optimizer,
                batch=8,
                epochs=200,
                metric="dice",
                evaluate_every=5,
            ),
        )

    return make


def _demo() -> Preset:
    dataset = DatasetConfig(name="scenes", image_size=(64, 64))
    # As many scenes as the teacher takes in: it sees each once, and none of its student's.
    endless = dataclasses.replace(dataset, count=2**20, series=1)
    optimizer = OptimizerConfig(lr=2e-3, schedule="cosine", warmup=20)
    return Preset(
        "generated scenes, hiera_demo to UNeXt, minutes on two cores",
        DistillationConfig(
            model="unext",
            dataset=dataset,
            optimizer=optimizer,
            batch=8,
            iterations=300,
            evaluate_every=2,
            teacher=TeacherConfig(name="hiera_demo"),
            # Windows fit the maps, which have 16, 8, 4 and 32 pixels per side at this size; the deepest stage, 2x2, is
            # too small to compare, and the decoder's last skip takes its place. PDR needs a map of many pixels too.
            sward=SWARDConfig(
                student_layers=("encoder.1", "encoder.2", "encoder.3", "up.3"),
                teacher_layers=("levels.0", "levels.1", "levels.2", "head.fuse"),
                window_size=(8, 8, 4, 8),
                embed_dim=32,
                pdr_layer="encoder.2",
            ),
        ),
        TeacherTrainingConfig(
            model="hiera_demo",
            dataset=endless,
            optimizer=optimizer,
            batch=8,
            iterations=500,
            train_trunk=True,
        ),
        mask_steps=100,
    )


def _small(
    description: str,
    model: str,
    dataset: DatasetConfig,
    *,
    batch: int,
    epochs: int,
    teacher_size: tuple[int, int],
    token_stride: int,
    teacher_epochs: int,
    schedule: Literal["poly", "cosine"],
    metric: Literal["mean_iou", "dice"],
    mask_steps: int,
    batch_norm_images: int | None = None,
) -> Callable[[], Preset]:
    """Presets on real images for two CPU cores: a student from scratch, a teacher head on pretrained DINOv2.

    Both draw from four fixed views of each image, so that the features of the frozen trunk can be kept.
    """
    dataset = dataclasses.replace(dataset, views=4)

    def make() -> Preset:
        return Preset(
            description,
            DistillationConfig(
                model=model,
                dataset=dataset,
                optimizer=OptimizerConfig(lr=1e-3, schedule=schedule, warmup=50),
                batch=batch,
                epochs=epochs,
                metric=metric,
                evaluate_every=10,
                batch_norm_images=batch_norm_images,
                teacher=TeacherConfig(name="vit_small_dinov2", image_size=teacher_size),
            ),
            TeacherTrainingConfig(
                model="vit_small_dinov2",
                model_options={"token_stride": token_stride},
                dataset=dataclasses.replace(dataset, image_size=teacher_size),
                optimizer=OptimizerConfig(lr=5e-4, schedule=schedule),
                batch=batch,
                epochs=teacher_epochs,
                metric=metric,
                evaluate_every=5,
            ),
            mask_steps,
        )

    return make


def _small_unext(
    description: str, dataset: str, metric: Literal["mean_iou", "dice"], split_by: str | None = None
) -> Callable[[], Preset]:
    return _small(
        description,
        "unext",
        DatasetConfig(name=dataset, image_size=(128, 128), split_by=split_by),
        batch=8,
        epochs=60,
        teacher_size=(224, 224),
        token_stride=14,
        teacher_epochs=45,
        schedule="cosine",
        metric=metric,
        mask_steps=300,
    )


def _few_masks(share: float) -> Callable[[], Preset]:
    """`clinicdb-small` with a share of the masks: as many steps, and as many between validations."""
    percent = f"{share:.0%}".replace("%", " %")

    def make() -> Preset:
        preset = _PRESETS["clinicdb-small"]()
        preset.description = f"clinicdb-small with {percent} of its training masks, the other frames unlabelled"
        for config in (preset.student, preset.teacher):
            assert config.epochs is not None
            assert config.evaluate_every is not None
            full, short = (frames // config.batch for frames in (CLINICDB_FRAMES, round(share * CLINICDB_FRAMES)))
            config.iterations, config.epochs = config.epochs * full, None
            config.evaluate_every = config.evaluate_every * full // short
            config.dataset = dataclasses.replace(config.dataset, labelled_share=share)
        return preset

    return make


_PRESETS: dict[str, Callable[[], Preset]] = {
    "cityscapes-mbv3": _cityscapes,
    "clinicdb-resunetpp": _polyps("cvc_clinicdb", "resunetpp", "ResUNet++"),
    "clinicdb-unext": _polyps("cvc_clinicdb", "unext", "UNeXt"),
    "colondb-resunetpp": _polyps("cvc_colondb", "resunetpp", "ResUNet++"),
    "colondb-unext": _polyps("cvc_colondb", "unext", "UNeXt"),
    "demo": _demo,
    "own": _small_unext(
        "your own folder of images and masks, ViT-S/14 to UNeXt (docs/own_data.md)", "folder", "mean_iou"
    ),
    "clinicdb-small": _small_unext(
        "CVC-ClinicDB at 128x128, split by sequence, ViT-S/14 to UNeXt, two cores", "cvc_clinicdb", "dice", "sequence"
    ),
    "clinicdb-random-small": _small_unext(
        "CVC-ClinicDB at 128x128, random split, ViT-S/14 to UNeXt, two cores", "cvc_clinicdb", "dice", "ratio"
    ),
    "clinicdb-small-25": _few_masks(0.25),
    "clinicdb-small-10": _few_masks(0.1),
    "colondb-small": _small_unext(
        "CVC-ColonDB at 128x128, random split, ViT-S/14 to UNeXt, two cores", "cvc_colondb", "dice", "ratio"
    ),
    "colondb-sequence-small": _small_unext(
        "CVC-ColonDB at 128x128, split by sequence, ViT-S/14 to UNeXt, two cores", "cvc_colondb", "dice", "sequence"
    ),
    "camvid-small": _small(
        "CamVid at 128x160, ViT-S/14 to DeepLabV3+ MobileNetV3-Small, two cores",
        "mbv3s_deeplabv3plus",
        DatasetConfig(name="camvid", image_size=(128, 160)),
        batch=4,
        epochs=60,
        teacher_size=(256, 320),
        token_stride=16,
        teacher_epochs=30,
        schedule="poly",
        metric="mean_iou",
        mask_steps=200,
        batch_norm_images=160,
    ),
}
