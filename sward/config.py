"""Everything a run can be told, as plain dataclasses. `sward.presets` fills them, the command line overrides them."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from sward.data.files import OnCorrupt
from sward.losses.mwad import ShiftStrategy
from sward.losses.recipes import (
    RECIPES,
    RECOMMENDED,
    ContextReduction,
    RecipeName,
    TeacherNormalization,
    TeacherProjections,
)

Precision = Literal["fp32", "bf16", "fp16"]
"""`fp32` computes everything in float32; the others run under autocast, weights and optimiser stay in float32."""

MaskMethod = Literal["maskd", "freekd"]
"""The methods that learn something on the teacher before they distil it."""

UNCOMPARED = {
    "resume",
    "log_every",
    "checkpoint_every",
    "tensorboard",
    "device",
    "output",
    "on_corrupt",
    "dataset.root",
    "dataset.workers",
    "dataset.packed",
    "teacher.run",
    "teacher.masks",
    "teacher.cache",
    "cache",
}
"""Fields that say where and how a run works, not what it computes: they may differ from those of a stored run."""


NEEDS_VIEWS = (
    "{name} must be None where dataset.views is None, got {folder}; every epoch draws new crops and flips then, and "
    "only features of images that come again can be kept: fix them with --dataset.views N, N augmented views per image"
)


@dataclass
class DatasetConfig:
    """Which images, and how they are cut.

    Attributes:
        name: a name that `sward.data.build` knows.
        root: folder that holds the data set; None looks in `$SWARD_DATA`, then in `./data`.
        image_size: height and width in pixels that the network sees in training.
        split_by: for polyps `"sequence"`, `"ratio"` or the path of a list file; None is the data set's own split.
        num_classes: classes of a `folder` of images and masks; every other data set knows its own.
        workers: loader processes; 0 loads in the training process. Results do not depend on it.
        packed: `"auto"` reads the pack that `sward data pack` left in the data set's folder, if there is one;
            `"none"` decodes the image files; a path is a pack that lies elsewhere. Results do not depend on it.
        views: fixed augmented views an image, taken in turn epoch by epoch; None draws new ones each epoch.
    """

    name: str = "scenes"
    root: Path | None = None
    image_size: tuple[int, int] = (128, 128)
    split_by: str | None = None
    num_classes: int | None = None
    workers: int = 0
    packed: str = "auto"
    views: int | None = None


@dataclass
class OptimizerConfig:
    """AdamW and its schedule.

    Attributes:
        lr: initial learning rate.
        weight_decay: decoupled weight decay, on every parameter.
        schedule: `"poly"` is `lr (1 - step/steps)^power`, `"cosine"` anneals to 0, both per step.
        power: exponent of `"poly"`.
        warmup: steps over which the rate rises linearly to `lr` first.
        clip_norm: greatest norm of the gradient of all parameters together; a longer one is scaled down to it.
            None never clips.
    """

    lr: float = 1e-3
    weight_decay: float = 1e-4
    schedule: Literal["poly", "cosine"] = "poly"
    power: float = 0.9
    warmup: int = 0
    clip_norm: float | None = None


@dataclass
class TeacherConfig:
    """The frozen network that is distilled.

    Attributes:
        run: folder of the `sward train-teacher` run to load; None takes `runs/PRESET/teacher`.
        untrained: distil the teacher `name` with random weights instead, to try shapes and speed without a checkpoint.
        name: for `untrained`: a teacher that `sward.models.build` knows.
        image_size: height and width of the images that the teacher sees: the student's own views (same crop, flips and
            colours) sampled at this size, with the same aspect ratio. None takes `dataset.image_size`.
        masks: file that `sward train-masks` wrote, for `maskd` and `freekd`; None takes `runs/PRESET/METHOD.pt`.
        cache: folder in which the teacher's features are kept, so that it runs once per view of an image; needs
            `dataset.views`. None runs it every step.
        precision: of the teacher's forward pass, whatever the student's is.
    """

    run: Path | None = None
    untrained: bool = False
    name: str = "hiera_demo"
    image_size: tuple[int, int] | None = None
    masks: Path | None = None
    cache: Path | None = None
    precision: Precision = "fp32"


@dataclass
class SWARDConfig:
    """MWAD, PDR and their weights (Eq. 11-20). The defaults are the recommended recipe, see `sward.losses.recipes`.

    Attributes:
        weights: beta of MWAD and gamma of PDR in Eq. 20; alpha of the task loss is 1.
        student_layers: layers of the student for MWAD, shallow to deep; empty takes its stages.
        teacher_layers: layers of the teacher that they meet, as many; empty takes its stages.
        window_size: window side, one number or one a stage.
        embed_dim: width of queries, keys and values.
        shift: window strategy (Table 4).
        terms: weights of the attention, value and context terms (Table 3).
        teacher_normalization: standardise each channel of the teacher's features, or take them as they are.
        teacher_projections: whether the teacher's projections learn.
        context_reduction: sum over channels as Eq. 13 is written, or mean.
        margin: least distance of two prototypes (Eq. 16).
        pdr_weights: lambda_1 of separation and lambda_2 of compactness (Eq. 19).
        pdr_layer: the student's layer for PDR; None takes its deepest encoder map.
        normalize: L2-normalise PDR's features first.
    """

    weights: tuple[float, float] = RECOMMENDED.weights
    student_layers: tuple[str, ...] = ()
    teacher_layers: tuple[str, ...] = ()
    window_size: tuple[int, ...] = (8,)
    embed_dim: int = 64
    shift: ShiftStrategy = "stochastic"
    terms: tuple[float, float, float] = (1.0, 1.0, 1.0)
    teacher_normalization: TeacherNormalization = RECOMMENDED.teacher_normalization
    teacher_projections: TeacherProjections = RECOMMENDED.teacher_projections
    context_reduction: ContextReduction = RECOMMENDED.context_reduction
    margin: float = 1.3
    pdr_weights: tuple[float, float] = (1.0, 1.0)
    pdr_layer: str | None = None
    normalize: bool = RECOMMENDED.normalize


@dataclass
class TrainingConfig:
    """A network, a data set and a schedule.

    Attributes:
        preset: the preset this started from.
        model: the network that learns, a name that `sward.models.build` knows.
        dataset: images and labels.
        optimizer: AdamW and its schedule.
        batch: images a step, on all processes together.
        iterations: steps of the run; exactly one of `iterations` and `epochs` is set.
        epochs: passes over the training set.
        seed: seeds weights, sampling, augmentation and window shifts, each from a stream of its own.
        metric: what picks the best checkpoint: mean IoU over classes, or the foreground's Dice averaged over images.
        evaluate_every: epochs between validations; None validates only at the end.
        batch_norm_images: training images over which batch normalisation estimates its statistics anew before each
            validation; None keeps the running ones. For runs of a few hundred steps: MobileNetV3's momentum of 0.01
            leaves the running statistics of such a run far behind its weights.
        log_every: steps between lines of `metrics.jsonl`.
        checkpoint_every: steps between checkpoints; one is written at every validation too.
        precision: of the forward pass: `"fp32"`, or autocast to `"bf16"` or `"fp16"` (the latter with loss scaling).
        compile: run student and teacher through `torch.compile`.
        channels_last: keep the networks' weights and maps in channels_last order, which suits GPU convolutions.
        sync_batch_norm: with several processes, normalise over the global batch. Needs GPUs.
        tensorboard: write `tensorboard/` into the run folder, with the numbers of `metrics.jsonl`.
        device: where to train; None takes the GPU where there is one.
        output: run folder; None takes `runs/PRESET/METHOD-seedN`.
        resume: continue the run in `output` from its last checkpoint, or begin it if there is none.
        on_corrupt: about a training image or mask that cannot be read: `"stop"` ends the run with its path, `"skip"`
            warns once a file and trains on the next image in its place.
    """

    preset: str = "demo"
    model: str = "unext"
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    batch: int = 8
    iterations: int | None = None
    epochs: int | None = None
    seed: int = 0
    metric: Literal["mean_iou", "dice"] = "mean_iou"
    evaluate_every: int | None = None
    batch_norm_images: int | None = None
    log_every: int = 20
    checkpoint_every: int = 500
    precision: Precision = "fp32"
    compile: bool = False
    channels_last: bool = False
    sync_batch_norm: bool = False
    tensorboard: bool = False
    device: str | None = None
    output: Path | None = None
    resume: bool = False
    on_corrupt: OnCorrupt = "stop"

    def check(self) -> None:
        """Raises a ValueError, in one sentence, for a field that no run could use."""
        if (self.iterations is None) == (self.epochs is None):
            raise ValueError(
                "exactly one of iterations and epochs must be set, "
                f"got iterations={self.iterations} and epochs={self.epochs}"
            )
        lengths = {
            "batch": self.batch,
            "iterations": self.iterations,
            "epochs": self.epochs,
            "batch_norm_images": self.batch_norm_images,
            "log_every": self.log_every,
            "checkpoint_every": self.checkpoint_every,
        }
        for name, value in lengths.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.optimizer.lr <= 0:
            raise ValueError(f"optimizer.lr must be positive, got {self.optimizer.lr}")
        if self.optimizer.clip_norm is not None and self.optimizer.clip_norm <= 0:
            raise ValueError(f"optimizer.clip_norm must be positive, got {self.optimizer.clip_norm}")

    def steps(self, images: int) -> int:
        """Optimiser steps of the run on a training set of `images` images; the last partial batch is dropped.

        Raises:
            ValueError: if the training set is smaller than one batch.
        """
        if images < self.batch:
            raise ValueError(
                f"batch is {self.batch}, but the training set has only {images} images; use a smaller batch"
            )
        return self.iterations if self.iterations is not None else (self.epochs or 0) * (images // self.batch)


@dataclass
class DistillationConfig(TrainingConfig):
    """A student's run, alone (`distillation="none"`) or with a teacher.

    Attributes:
        distillation: the method: `"none"`, or a name in `sward.runs.methods.METHODS`.
        teacher: the frozen network.
        recipe: which recipe `sward` started from: `"recommended"`, or `"paper"` for the equations and section 4.1 to
            the letter. On the command line it sets its fields of `sward` first; options for single fields come after.
        sward: settings of `"sward"`.
    """

    distillation: str = "sward"
    recipe: RecipeName = "recommended"
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    sward: SWARDConfig = field(default_factory=SWARDConfig)

    @property
    def teacher_image_size(self) -> tuple[int, int]:
        """Height and width of the images that the teacher sees."""
        return self.teacher.image_size or self.dataset.image_size

    def use_recipe(self, name: RecipeName) -> None:
        """Sets the fields of `sward` that the recipe `name` defines and leaves the others.

        Raises:
            ValueError: if there is no such recipe.
        """
        if name not in RECIPES:
            raise ValueError(f"recipe must be one of {', '.join(map(repr, RECIPES))}, got {name!r}")
        self.recipe = name
        self.sward = dataclasses.replace(self.sward, **RECIPES[name]._asdict())

    def check(self) -> None:
        """As for every run; and features can be kept only of images that come again."""
        super().check()
        (height, width), (tall, wide) = self.dataset.image_size, self.teacher_image_size
        if tall * width != wide * height:
            raise ValueError(
                f"teacher.image_size must have the aspect ratio of dataset.image_size, {height}x{width}, "
                f"got {tall}x{wide}"
            )
        if self.teacher.cache is not None and self.dataset.views is None:
            raise ValueError(NEEDS_VIEWS.format(name="teacher.cache", folder=self.teacher.cache))

    def teacher_masks(self) -> Path:
        """The file of the method's masks on this teacher.

        Raises:
            FileNotFoundError: if it is not there.
        """
        path = self.teacher.masks or masks_path(self.preset, self.distillation)
        if not path.exists():
            raise FileNotFoundError(
                f"{self.distillation} needs masks learned on the teacher, and there are none at {path}; learn them "
                f"with 'sward train-masks {self.preset} --method {self.distillation}', or name a file with "
                "--teacher.masks"
            )
        return path


@dataclass
class TeacherTrainingConfig(TrainingConfig):
    """A teacher's run.

    Attributes:
        options: options of the network's builder, such as `backend` of the Hiera trunks.
        trunk_checkpoint: SAM 2.1 or MedSAM2 file to load into the trunk first.
        train_trunk: train the trunk too. The paper's teachers keep it frozen and train the head.
        cache: folder in which the maps of the frozen trunk are kept, so that it runs once per view of an image; needs
            `dataset.views`. With the same folder as `--teacher.cache`, students with the same seed read them too.
            None runs the trunk every step.
    """

    options: dict[str, int | str] = field(default_factory=dict)
    trunk_checkpoint: Path | None = None
    train_trunk: bool = False
    cache: Path | None = None

    def check(self) -> None:
        """As for every run; and a cache needs a frozen trunk and images that come again."""
        super().check()
        if self.cache is not None and self.train_trunk:
            raise ValueError(f"cache must be None where train_trunk is set, got {self.cache}; such a trunk changes")
        if self.cache is not None and self.dataset.views is None:
            raise ValueError(NEEDS_VIEWS.format(name="cache", folder=self.cache))


@dataclass
class MaskTrainingConfig:
    """Learning MasKD's tokens or FreeKD's prompts on a trained teacher.

    Attributes:
        preset: the preset this started from.
        method: the method that will use them.
        dataset: images and labels.
        teacher: the trained teacher.
        batch: images a step.
        steps: optimiser steps; None takes the papers': 10000 for `maskd`, 2000 for `freekd`.
        seed: of the masks' start and of the order of images.
        device: where to train; None takes the GPU where there is one.
        output: file to write; None takes `runs/PRESET/METHOD.pt`.
        on_corrupt: as in a run.
    """

    preset: str = "demo"
    method: MaskMethod = "maskd"
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    batch: int = 8
    steps: int | None = None
    seed: int = 0
    device: str | None = None
    output: Path | None = None
    on_corrupt: OnCorrupt = "stop"


def masks_path(preset: str, method: str) -> Path:
    """Where a method's masks go unless `output` says otherwise, and where a student's run looks for them."""
    return Path("runs") / preset / f"{method}.pt"


Config = TypeVar("Config")


def to_json(config: Any) -> str:
    """A dataclass as JSON text, paths as strings."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str)


def from_json(kind: type[Config], text: str) -> Config:
    """The dataclass `kind` from what `to_json` wrote.

    Raises:
        ValueError: if the text is no JSON object, or names a field that `kind` does not have.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"the configuration is not valid JSON: {error}") from error
    return _build(kind, values)


def _build(kind: Any, value: Any) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return (
            None if value is None else _build(next(choice for choice in arguments if choice is not type(None)), value)
        )
    if origin is tuple:
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_build(each, item) for each, item in zip(kinds, value))
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        unknown = set(value) - set(hints)
        if unknown:
            raise ValueError(
                f"{kind.__name__} has no field {sorted(unknown)[0]!r}; it was written by another version of sward"
            )
        return kind(**{name: _build(hints[name], item) for name, item in value.items()})
    return Path(value) if kind is Path else value


def differences(stored: Any, wanted: Any) -> list[str]:
    """What differs between two configurations in a way that changes results, one phrase for each field."""
    return _differences(json.loads(to_json(stored)), json.loads(to_json(wanted)))


def _differences(stored: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name in sorted({*stored, *wanted}):
        old, new = stored.get(name), wanted.get(name)
        if prefix + name in UNCOMPARED:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{name}.")
        elif name == "trunk_checkpoint" and old and new:
            if Path(old).name != Path(new).name:
                found.append(f"{prefix}{name} is {old}, not {new}")
        elif old != new:
            found.append(f"{prefix}{name} is {old}, not {new}")
    return found
