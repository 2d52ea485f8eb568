"""The settings of a run as plain dataclasses. `sward.presets` fills them, the command line overrides them."""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sward.data.files import OnCorrupt
from sward.data.folder import FolderOptions, refuse_options
from sward.losses.mwad import ShiftStrategy
from sward.losses.recipes import (
    RECIPES,
    RECOMMENDED,
    ContextReduction,
    RecipeName,
    TeacherNormalization,
    TeacherProjections,
)
from sward.losses.task import TaskName
from sward.tensor_layouts import Format, TapArguments

Precision = Literal["fp32", "bf16", "fp16"]
"""`fp32` computes everything in float32; the others use autocast and keep weights and optimiser in float32."""

MaskMethod = Literal["maskd", "freekd"]
"""The methods that learn masks on the teacher before they distil it."""
MASK_METHODS = typing.get_args(MaskMethod)

NEEDS_VIEWS = (
    "dataset.views must be set with {}, got None; every epoch would draw new crops and flips, --dataset.views N draws "
    "N fixed augmented views per image"
)


def _check_number(
    name: str, value: float | None, least: float | None = None, *, above: float = 0, below: float = math.inf
) -> None:
    """Raise a ValueError unless `value` is None or in the range; nan and infinity are in none."""
    if value is None or ((value > above if least is None else value >= least) and value < below):
        return
    condition = f"above {above}" if least is None else f"at least {least}"
    if value >= below:
        condition += " and finite" if below == math.inf else f" and below {below}"
    raise ValueError(f"{name} must be {condition}, got {value}")


def check_batch(batch: int, images: int) -> None:
    """Raise a ValueError if there are fewer training images than a batch needs."""
    if images < batch:
        raise ValueError(f"batch must be at most {images}, the number of training images, got {batch}")


@dataclass
class DatasetConfig:
    """Which images to use, and at what size."""

    name: str = "scenes"
    """Name of the data set, as in `sward.data.build`."""
    root: Path | None = None
    """Folder that holds the data set; None looks in `$SWARD_DATA`, then in `./data` (short: `--data`)."""
    image_size: tuple[int, int] = (128, 128)
    """Height and width in pixels of the training images."""
    split_by: str | None = None
    """For polyps `"sequence"`, `"ratio"`, `"parity"` (ColonDB) or the path of a list file; for a `folder` without
    splits, shares of train, val and test such as `80/10/10` or the path of a list (short: `--split`). None uses the
    data set's own split."""
    num_classes: int | None = None
    """Number of classes of a `folder` whose classes have no names; the other data sets define their own."""
    classes: tuple[str, ...] = ()
    """For a `folder`, the names of the classes (short: `--classes background,polyp`)."""
    mask_values: tuple[str, ...] = ()
    """For a `folder`, the value of each class in the mask files, numbers, ranges (`0-127,128-255`) or `#rrggbb` (short:
    `--mask-values 0,255`); empty means 0, 1, 2, ..., and 255 for pixels to ignore."""
    ignore_values: tuple[str, ...] = ()
    """For a `folder` with `mask_values`, the values of pixels to ignore (short: `--ignore-values`)."""
    images: str | None = None
    """For a `folder`, the pattern of its image folder, such as `frames/{split}`; None finds the usual layouts (short:
    `--images`)."""
    masks: str | None = None
    """For a `folder`, the pattern of its masks, such as `masks/{split}/{name}_mask.png` (short: `--masks`)."""
    split_seed: int = 0
    """The seed of a `folder`'s split that is drawn, and of the frames of `labelled_share` (short: `--split-seed`)."""
    labelled_share: float = 1.0
    """Share of the training masks to use, drawn by hash of the frames' names (short: `--labelled-share`). A student
    with a teacher takes the other frames as unlabelled images; other runs leave them out."""
    group_by: str | None = None
    """For a `folder`, keep groups of frames in one split: a regular expression that finds the group in a frame's name,
    or a CSV file with the columns `frame_id` and `group` (short: `--group-by`). A split that breaks one is refused."""
    image_range: tuple[float, float] | None = None
    """Values that become black and white in images with more than 8 bits per channel; None refuses such images."""
    workers: int = 0
    """Loader processes; 0 loads in the training process. Results do not depend on it."""
    packed: str = "auto"
    """Pack to read: `"auto"` (the one in the data set's folder, if any), `"none"` (decode the files) or a path."""
    count: int | None = None
    """For `scenes`, the number of training images; None generates 1024."""
    series: int = 0
    """For `scenes`, the series of the training images: a teacher can learn from another one than its student."""
    views: int | None = None
    """Fixed augmented views per image, one per epoch in turn; None draws new ones each epoch."""

    @property
    def folder_options(self) -> FolderOptions | None:
        """The options of a `folder`; None for other data sets."""
        if self.name != "folder":
            return None
        return FolderOptions(
            self.classes,
            self.mask_values,
            self.ignore_values,
            self.images,
            self.masks,
            self.split_seed,
            self.group_by,
        )

    def check(self) -> None:
        """Raise a ValueError if a number is out of its range, or an option is not one of the data set."""
        _check_number("dataset.image_size", min(self.image_size), 1)
        _check_number("dataset.num_classes", self.num_classes, 2)
        _check_number("dataset.workers", self.workers, 0)
        _check_number("dataset.views", self.views, 1)
        if self.name == "scenes" and self.root is not None:
            raise ValueError(
                f"dataset.root must be None for scenes, which are generated, got {str(self.root)!r}; name another data "
                "set, or the preset 'own' for a folder of yours"
            )
        if self.name != "folder":
            given = dict(vars(self))
            if self.labelled_share < 1:
                del given["split_seed"]  # which draws these frames too
            refuse_options(given, self.name, "dataset.")


@dataclass
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = 1e-3
    """Initial learning rate."""
    weight_decay: float = 1e-4
    """Decoupled weight decay, on every parameter."""
    schedule: Literal["poly", "cosine"] = "poly"
    """`"poly"` is `lr (1 - step/steps)^power`, `"cosine"` anneals to 0, both per step."""
    power: float = 0.9
    """Exponent of `"poly"`."""
    warmup: int = 0
    """Steps over which the rate rises linearly to `lr` first."""
    clip_norm: float | None = None
    """Largest norm of the gradient over all parameters; longer gradients are scaled down to it. None never clips."""


@dataclass
class TapConfig:
    """How the layers of a network that are compared arrange their output; see `sward.features.FeatureTaps`."""

    format: Format = "auto"
    """`"nchw"`, `"nhwc"` or `"tokens"`; `"auto"` finds it from the shapes."""
    prefix_tokens: int | Literal["auto"] = "auto"
    """Class and register tokens in front of the tokens of the grid."""
    select: int | str = -1
    """Which item of a tuple (index) or dictionary (key) holds the map."""

    def arguments(self) -> TapArguments:
        """Return the fields as keyword arguments of `sward.features.FeatureTaps`."""
        return {"format": self.format, "prefix_tokens": self.prefix_tokens, "select": self.select}


@dataclass
class TeacherConfig:
    """The frozen network that is distilled."""

    run: Path | None = None
    """Folder of the `sward train-teacher` run to load; None uses `runs/PRESET/teacher`. Only one of `run`, `untrained`
    and `weights` may be set."""
    untrained: bool = False
    """Distil the teacher `name` with random weights instead, to try shapes and speed without a checkpoint."""
    name: str = "hiera_demo"
    """Name of the teacher for `untrained` and `weights`, as in `sward.models.build`. With a run, a name that is not the
    preset's must be that of the run's network."""
    options: dict[str, int | str] = field(default_factory=dict)
    """Options of its builder, on the command line as `--teacher.options KEY=VALUE ...`; a run needs none."""
    weights: Path | None = None
    """Checkpoint of the whole network `name`, in the formats of `model_weights`, instead of the run of `sward
    train-teacher`. A `transformers:` folder brings its own."""
    image_size: tuple[int, int] | None = None
    """Height and width of the images that the teacher sees: the student's views (same crop, flips and colours), sampled
    at this size, with the same aspect ratio. None uses `dataset.image_size`."""
    masks: Path | None = None
    """File that `sward train-masks` wrote, for `maskd` and `freekd`; None uses `runs/PRESET/METHOD.pt`."""
    cache: Path | None = None
    """Folder that caches the teacher's features of each view of an image; needs `dataset.views`. None has no cache."""
    precision: Precision = "fp32"
    """Precision of the teacher's forward pass; independent of the student's."""
    taps: TapConfig = field(default_factory=TapConfig)
    """How its layers arrange their output."""
    normalization: TeacherNormalization = "none"
    """Standardise the feature maps that methods other than sward read; see `sward.teacher_normalization` for sward.
    freekd has none: its prompts are learned on the maps as they are."""


@dataclass
class SWARDConfig:
    """MWAD, PDR and their weights (Eq. 11-20). The defaults are the recommended recipe, see `sward.losses.recipes`."""

    weights: tuple[float, float] = RECOMMENDED.weights
    """Beta of MWAD and gamma of PDR in Eq. 20; alpha of the task loss is 1."""
    student_layers: tuple[str, ...] = ()
    """Layers of the student for MWAD, shallow to deep; empty uses its default stages."""
    teacher_layers: tuple[str, ...] = ()
    """Layers of the teacher, one per student layer; empty uses its default stages."""
    window_size: tuple[int, ...] = (8,)
    """Window side: one number, or one per stage."""
    embed_dim: int = 64
    """Width of queries, keys and values."""
    shift: ShiftStrategy = "stochastic"
    """Window strategy (Table 4)."""
    terms: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Weights of the attention, value and context terms (Table 3)."""
    teacher_normalization: TeacherNormalization = RECOMMENDED.teacher_normalization
    """Standardise each channel of the teacher's features, or use them as they are."""
    teacher_projections: TeacherProjections = RECOMMENDED.teacher_projections
    """Whether the teacher's projections are trained."""
    context_reduction: ContextReduction = RECOMMENDED.context_reduction
    """Sum over channels, as in Eq. 13, or mean."""
    margin: float = 1.3
    """Distance that two prototypes should at least have (Eq. 16)."""
    pdr_terms: tuple[float, float] = (1.0, 1.0)
    """Weights of separation (lambda_1) and compactness (lambda_2) in Eq. 19."""
    pdr_layer: str | None = None
    """The student's layer for PDR; None uses its deepest encoder map."""
    normalize: bool = RECOMMENDED.normalize
    """L2-normalise PDR's features first."""

    def check(self) -> None:
        """Raise a ValueError if a field has an invalid value."""
        for name, weights in (("weights", self.weights), ("terms", self.terms), ("pdr_terms", self.pdr_terms)):
            for weight in weights:
                _check_number(f"sward.{name}", weight, 0)
        if not self.window_size:
            raise ValueError("sward.window_size must be one number or one per stage, got none")
        for side in self.window_size:
            _check_number("sward.window_size", side, 1)
        _check_number("sward.embed_dim", self.embed_dim, 1)
        _check_number("sward.margin", self.margin, 0)


@dataclass
class TrainingConfig:
    """A network, a data set and a schedule."""

    preset: str = "demo"
    """The preset that the run is based on."""
    model: str = "unext"
    """The network to train; a name that `sward.models.build` knows: registered, or as `smp:Unet`, `timm:NAME`,
    `torchvision:NAME`, `transformers:FOLDER` or `package.module:function`."""
    model_options: dict[str, int | str] = field(default_factory=dict)
    """Options of the network's builder, on the command line as `--model-options KEY=VALUE ...`."""
    model_weights: str | None = None
    """Initial weights: a file of the whole network (`torch.save` or safetensors; the state dict at the top level or
    under `model`, `state_dict` or `model_state_dict`; prefixes such as `module.` are stripped), `"imagenet"` (smp,
    torchvision and timm encoders), or `"none"` or None for random ones. A frozen trunk is refused random weights unless
    this is `"random"`."""
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    """Images and labels."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and its schedule."""
    batch: int = 8
    """Images per step, over all processes."""
    iterations: int | None = None
    """Steps of the run; exactly one of `iterations` and `epochs` is set."""
    epochs: int | None = None
    """Passes over the training set."""
    seed: int = 0
    """Seed of weights, sampling, augmentation and window shifts; each draws from its own stream."""
    task: TaskName = "ce"
    """Task loss: cross-entropy, soft Dice, their sum or focal loss; see `sward.losses.task`."""
    class_weights: tuple[str, ...] = ()
    """Weights of the classes in `ce` and `focal`: one number per class, or `auto` for the median share of pixels over
    the share of the class in the training masks."""
    label_smoothing: float = 0.0
    """Share of the target that cross-entropy spreads over all classes."""
    metric: Literal["mean_iou", "mean_dice", "dice"] = "mean_iou"
    """Score that selects the best checkpoint: mean IoU or Dice over classes, or with two classes the foreground's Dice
    averaged over images."""
    evaluate_every: int | None = None
    """Epochs between validations; None validates only at the end."""
    batch_norm_images: int | None = None
    """Training images to re-estimate batch norm statistics from before validation, at least 2; None keeps the running
    ones."""
    log_every: int = 20
    """Steps between lines of `metrics.jsonl`."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one is written at every validation too."""
    precision: Precision = "fp32"
    """Precision of the forward pass: `"fp32"`, or autocast to `"bf16"` or `"fp16"` (the latter with loss scaling)."""
    compile: bool = False
    """Run student and teacher through `torch.compile`."""
    channels_last: bool = False
    """Keep weights and feature maps in channels_last order, which suits GPU convolutions."""
    sync_batch_norm: bool = False
    """With several processes, batch norm uses the global batch. Needs GPUs."""
    tensorboard: bool = False
    """Also write the numbers of `metrics.jsonl` as TensorBoard events to `tensorboard/` in the run folder."""
    device: str | None = None
    """Device to train on; None uses the GPU if there is one."""
    output: Path | None = None
    """Run folder; None uses `runs/PRESET/METHOD-seedN`."""
    resume: bool = False
    """Resume the run in `output` from its last checkpoint, or start it if there is none."""
    on_corrupt: OnCorrupt = "stop"
    """If a training image cannot be read: `"stop"` ends the run, `"skip"` warns and uses the next image."""

    def check(self) -> None:
        """Raise a ValueError if a field has an invalid value."""
        if (self.iterations is None) == (self.epochs is None):
            raise ValueError(
                "exactly one of iterations and epochs must be set, "
                f"got iterations={self.iterations} and epochs={self.epochs}"
            )
        self._check_numbers()

    def _check_numbers(self) -> None:
        optimizer = self.optimizer
        self.dataset.check()
        _check_number("batch", self.batch, 1)
        _check_number("iterations", self.iterations, 1)
        _check_number("epochs", self.epochs, 1)
        _check_number("seed", self.seed, 0)
        _check_number("evaluate_every", self.evaluate_every, 1)
        _check_number("batch_norm_images", self.batch_norm_images, 2)
        _check_number("log_every", self.log_every, 1)
        _check_number("checkpoint_every", self.checkpoint_every, 1)
        _check_number("label_smoothing", self.label_smoothing, 0, below=1)
        _check_number("optimizer.lr", optimizer.lr)
        _check_number("optimizer.weight_decay", optimizer.weight_decay, 0)
        if optimizer.lr * optimizer.weight_decay > 1:
            raise ValueError(
                f"optimizer.weight_decay must be at most 1 / optimizer.lr, {1 / optimizer.lr:g}, got "
                f"{optimizer.weight_decay:g}; a step would turn the sign of every weight"
            )
        _check_number("optimizer.power", optimizer.power, 0)
        _check_number("optimizer.warmup", optimizer.warmup, 0)
        _check_number("optimizer.clip_norm", optimizer.clip_norm)

    def unlabelled_per_step(self, labelled: int, unlabelled: int | None, processes: int = 1) -> int:
        """Return the number of unlabelled images per step; only a student's run can have some."""
        return 0

    def steps(self, images: int) -> int:
        """Return the number of optimiser steps for `images` training images; the last partial batch is dropped.

        Raises:
            ValueError: if the training set is smaller than one batch.
        """
        check_batch(self.batch, images)
        return self.iterations if self.iterations is not None else (self.epochs or 0) * (images // self.batch)


@dataclass
class DistillationConfig(TrainingConfig):
    """A student's run, alone (`distillation="none"`) or with a teacher."""

    distillation: str = "sward"
    """The method: `"none"`, or a name in `sward.methods.METHODS`."""
    distillation_factor: float = 1.0
    """Factor of the whole distillation loss beside the task loss; 1 keeps the method's own weights, for the peers those
    that their authors published."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The frozen network."""
    recipe: RecipeName = "recommended"
    """Recipe that `sward` starts from: `"recommended"`, or `"paper"` for the equations and section 4.1 to the letter.
    `--recipe`, `use_recipe` and a configuration file's `recipe` set its fields of `sward`, and options or the file
    override single ones."""
    sward: SWARDConfig = field(default_factory=SWARDConfig)
    """Settings of `"sward"`."""
    student_taps: TapConfig = field(default_factory=TapConfig)
    """How the student's layers arrange their output."""
    unlabelled: tuple[str, ...] = ()
    """Folders of images without masks, text files with the path of one image per line, or tar files to stream, as
    `shards/{000..999}.tar` or `pipe:COMMAND`, which a shell runs. The teacher is distilled on them too; the task loss,
    PDR and all terms that need labels see the labelled images only."""
    unlabelled_batch: int | None = None
    """Unlabelled images per step, over all processes, beside `batch` labelled ones. None takes as many as `batch`, or,
    unless they come from tar files, fewer, so that none is seen more often than a labelled one; every process takes at
    least one. The configuration of a run keeps the number."""
    pseudo_labels: float | None = None
    """Probability from which the teacher's class is the label of an unlabelled pixel, for the task loss and all terms
    that need labels; None leaves unlabelled images without labels."""

    @property
    def has_unlabelled(self) -> bool:
        """Whether the run sees unlabelled images."""
        return bool(self.unlabelled) or (self.dataset.labelled_share < 1 and self.distillation != "none")

    def unlabelled_per_step(self, labelled: int, unlabelled: int | None, processes: int = 1) -> int:
        """Return the number of unlabelled images per step, over all processes; 0 for a run without.

        Unless `unlabelled_batch` sets it, there are as many as labelled ones, or fewer, so that no unlabelled image is
        seen more often than a labelled one: with 148 of them beside 428 labelled images, 8 per step cost points and 2
        gained (docs/results.md). Every process takes at least one.

        Args:
            labelled: number of labelled training images.
            unlabelled: number of unlabelled images; None if unknown, as in a stream.
            processes: number of processes, which must divide what is chosen.
        """
        if not self.has_unlabelled:
            return 0
        if self.unlabelled_batch is not None or unlabelled is None:
            return self.unlabelled_batch or self.batch
        most = min(self.batch, self.batch * unlabelled // labelled)
        return max(1, most // processes) * processes

    @property
    def teacher_image_size(self) -> tuple[int, int]:
        """Height and width of the images that the teacher sees."""
        return self.teacher.image_size or self.dataset.image_size

    def use_recipe(self, name: RecipeName) -> None:
        """Set the fields of `sward` that the recipe `name` defines and leaves the others.

        Raises:
            ValueError: if there is no such recipe.
        """
        if name not in RECIPES:
            raise ValueError(f"recipe must be one of {', '.join(map(repr, RECIPES))}, got {name!r}")
        self.recipe = name
        self.sward = dataclasses.replace(self.sward, **RECIPES[name]._asdict())

    def check(self) -> None:
        """Validate the fields; a teacher cache also needs fixed views, since it can only reuse repeated images."""
        super().check()
        _check_number("distillation_factor", self.distillation_factor)
        if self.distillation != "none":
            self.sward.check()
            self._check_recipe()
            self._check_teacher()
        if self.unlabelled and self.distillation == "none":
            raise ValueError(
                "unlabelled must be empty where distillation is 'none', since nothing would learn from them"
            )
        if self.unlabelled_batch is not None and (self.unlabelled_batch < 1 or not self.has_unlabelled):
            raise ValueError(
                f"unlabelled_batch must be at least 1 with unlabelled and None without, got {self.unlabelled_batch}"
            )
        if self.pseudo_labels is not None and not (0 < self.pseudo_labels <= 1 and self.has_unlabelled):
            raise ValueError(
                "pseudo_labels must be above 0 and at most 1 with unlabelled images and None without, got "
                f"{self.pseudo_labels:g}"
            )

    def _check_teacher(self) -> None:
        (height, width), (tall, wide) = self.dataset.image_size, self.teacher_image_size
        _check_number("teacher.image_size", min(tall, wide), 1)
        if tall * width != wide * height:
            raise ValueError(
                f"teacher.image_size must have the aspect ratio of dataset.image_size, {height}x{width}, "
                f"got {tall}x{wide}"
            )
        if self.teacher.cache is not None and self.dataset.views is None:
            raise ValueError(NEEDS_VIEWS.format("teacher.cache"))
        if self.distillation == "sward" and self.teacher.normalization not in (
            "none",
            self.sward.teacher_normalization,
        ):
            raise ValueError(
                f"teacher.normalization must be 'none' for sward, which has sward.teacher_normalization, got "
                f"{self.teacher.normalization!r}"
            )

    def _check_recipe(self) -> None:
        """Raise a ValueError if `sward` is set as another recipe than the named one, which never reached it."""
        for name, recipe in RECIPES.items():
            set_as_this = all(getattr(self.sward, key) == value for key, value in recipe._asdict().items())
            if set_as_this and name != self.recipe:
                raise ValueError(
                    f"recipe must be {name!r} with these settings of sward, got {self.recipe!r}; set both with "
                    f"--recipe or use_recipe({self.recipe!r})"
                )

    def teacher_masks(self) -> Path:
        """Return the path of the masks that the method learned on this teacher.

        Raises:
            FileNotFoundError: if the file does not exist.
        """
        path = self.teacher.masks or masks_path(self.preset, self.distillation)
        if not path.exists():
            raise FileNotFoundError(
                f"{self.distillation} needs masks learned on the teacher, but {path} does not exist; learn them "
                f"with 'sward train-masks {self.preset} --method {self.distillation}', or name a file with "
                "--teacher.masks"
            )
        return path


@dataclass
class TeacherTrainingConfig(TrainingConfig):
    """A teacher's run."""

    trunk_checkpoint: Path | None = None
    """Pretrained weights of the trunk: a SAM 2.1, MedSAM2, timm or DINOv2 checkpoint (`torch.save` or safetensors;
    prefixes such as `image_encoder.trunk.` are stripped)."""
    train_trunk: bool = False
    """Train the trunk too. By default it stays frozen and only the head is trained, as in the paper."""
    cache: Path | None = None
    """Folder that caches the maps of the frozen trunk, so that it runs once per view of an image; needs
    `dataset.views`. Students with the same seed read the same files through `--teacher.cache`. None runs the trunk in
    every step."""

    def check(self) -> None:
        """Validate the fields; a cache needs a frozen trunk and fixed views."""
        super().check()
        if self.cache is not None and self.train_trunk:
            raise ValueError(f"cache must be None where train_trunk is set, got {self.cache}; such a trunk changes")
        if self.cache is not None and self.dataset.views is None:
            raise ValueError(NEEDS_VIEWS.format("cache"))


@dataclass
class MaskTrainingConfig:
    """Settings for learning MasKD's tokens or FreeKD's prompts on a trained teacher."""

    preset: str = "demo"
    """The preset that the run is based on."""
    method: MaskMethod = "maskd"
    """The method that will use the masks."""
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    """Images and labels."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The trained teacher. `masks`, `cache`, `precision` and `normalization` have no effect here and stay unset."""
    batch: int = 8
    """Images per step."""
    steps: int | None = None
    """Optimiser steps; None uses the papers' values: 10000 for `maskd`, 2000 for `freekd`."""
    seed: int = 0
    """Seed of the initial masks and of the order of images."""
    device: str | None = None
    """Device to train on; None uses the GPU if there is one."""
    output: Path | None = None
    """File to write; None uses `runs/PRESET/METHOD.pt`."""
    on_corrupt: OnCorrupt = "stop"
    """What to do if an image or mask cannot be read: `"stop"`, or `"skip"` to warn and use the next image."""

    def check(self) -> None:
        """Raise a ValueError if a field has an invalid value, or one of the teacher's that has no effect here."""
        self.dataset.check()
        _check_number("batch", self.batch, 1)
        _check_number("steps", self.steps, 1)
        _check_number("seed", self.seed, 0)
        if self.teacher.image_size is not None:
            _check_number("teacher.image_size", min(self.teacher.image_size), 1)
        unused = TeacherConfig()
        for name in ("masks", "cache", "precision", "normalization"):
            default, got = getattr(unused, name), getattr(self.teacher, name)
            if got != default:
                raise ValueError(f"teacher.{name} must be {default!r} where masks are learned, got {str(got)!r}")


def masks_path(preset: str, method: str) -> Path:
    """Return the default path of a method's masks, used both to write and to load them."""
    return Path("runs") / preset / f"{method}.pt"
