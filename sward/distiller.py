"""Student, teacher and distillation loss as one module, for a trainer of your own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sward import layers, methods
from sward.alignment import resize
from sward.config import MASK_METHODS, SWARDConfig, TapConfig
from sward.features import FeatureTaps, unknown_layer, unwrapped
from sward.layers import LayerChoice
from sward.losses import LOGITS, DistillationInputs, DistillationLoss, SegmentationCrossEntropy
from sward.losses.objective import zero_loss
from sward.losses.recipes import RECIPES, RecipeName
from sward.tensor_layouts import logits_of, refuse_probabilities
from sward.training.teacher import FrozenTeacher

PROBE_SIZES = ((256, 256), (224, 224), (512, 512), (128, 128))
"""Image sizes on which networks are tried, to find their layers and channels."""


class DistillerOutput(NamedTuple):
    """Result of one call of a `Distiller`."""

    loss: Tensor
    """Scalar with gradient: the task loss and the weighted distillation loss."""
    logits: Tensor
    """The student's `[B, K, H, W]`, at the labels' resolution where there are labels."""
    terms: dict[str, Tensor]
    """Name -> detached fp32 scalar: `task` and the unweighted terms of the method."""

    def backward(self) -> None:
        """Compute the gradients of `loss`."""
        self.loss.backward()


class Distiller(nn.Module):
    """Train `student` on the labels and on what `teacher` computes.

    Examples:
        >>> import torch
        >>> from sward import Distiller, models
        >>> student, teacher = models.build("unext", 3), models.build("hiera_demo", 3)
        >>> distiller = Distiller(student, teacher, num_classes=3, image_size=(64, 64), window_size=(4, 4, 2, 2))
        >>> distiller.student_layers
        ('encoder.1', 'encoder.2', 'encoder.3', 'encoder.4')
        >>> optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-3)
        >>> out = distiller(torch.randn(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64)))
        >>> out.backward()
        >>> optimizer.step()
        >>> out.loss.shape, out.logits.shape
        (torch.Size([]), torch.Size([2, 3, 64, 64]))
        >>> {"task", "attention", "value", "context"} <= set(out.terms)
        True

    `parameters()` and `state_dict()` hold the student and what the method learns. The teacher is no submodule: it stays
    in eval mode, gets no gradients, and is left out of checkpoints and of `DistributedDataParallel`; `to` moves it too.
    After training, `distiller.student` is the network to keep; `close` takes the hooks off both networks.

    Args:
        student: `images [B, 3, H, W] -> logits [B, K, h, w]`, also in a tuple or under `out` or `logits` in a
            dictionary. Logits of another size than the labels are resized. It may be compiled.
        teacher: the same; for methods that compare no logits, any network with feature maps.
        num_classes: K; a one-logit task has 2.
        method: a name in `sward.methods.METHODS`.
        student_layers: layers for MWAD, shallow to deep; for the methods that compare the deepest maps, the last one
            replaces it, and for those that compare the classifier's input (`"cirkd"`, `"freekd"`), a single one does;
            methods that compare logits only take none.
            None chooses, see `sward.layers.choose`; where only one side is None, as many as the other side names.
        teacher_layers: the same for the teacher, one per student layer.
        student_taps: how the student's layers arrange their output, such as `TapConfig(select=0)`, where that cannot be
            found from the shapes.
        teacher_taps: the same for the teacher.
        recipe: recipe of `"sward"`, see `sward.losses.recipes`.
        task: `(logits, labels) -> scalar`. Default: `SegmentationCrossEntropy(ignore_index)`.
        masks: file that `sward train-masks` or `sward.losses.save_masks` wrote, for `maskd` and `freekd`.
        image_size: height and width of images that both networks accept, to find layers and channels. None tries
            `PROBE_SIZES`.
        ignore_index: label that is left out.
        unlabelled: whether batches hold images without labels, whose rows of `labels` are all `ignore_index`. `"kd"`
            then compares every pixel, as `sward train --unlabelled` does.
        process_group: processes over which losses take their means.
        settings: of `"sward"`: fields of `sward.config.SWARDConfig`, such as `window_size=(8, 4)` or `embed_dim=32`;
            `window_size` may be one number.

    Raises:
        ValueError: if the arguments do not fit together; the message names the cure.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        num_classes: int,
        method: str = "sward",
        student_layers: Sequence[str] | None = None,
        teacher_layers: Sequence[str] | None = None,
        student_taps: TapConfig | None = None,
        teacher_taps: TapConfig | None = None,
        recipe: RecipeName = "recommended",
        task: Callable[[Tensor, Tensor], Tensor] | None = None,
        masks: str | Path | None = None,
        image_size: tuple[int, int] | None = None,
        ignore_index: int = 255,
        unlabelled: bool = False,
        process_group: ProcessGroup | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        methods.check_name(method)
        _check_options(method, recipe, masks, settings)
        _check_networks(student, teacher)
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2 (a one-logit task has 2), got {num_classes}")
        if image_size is not None and (not isinstance(image_size, Sequence) or len(image_size) != 2):
            raise ValueError(f"image_size must be (height, width), got {image_size!r}")
        for side, taps in (("student", student_taps), ("teacher", teacher_taps)):
            if taps is not None and not isinstance(taps, TapConfig):
                raise ValueError(f"{side}_taps must be a sward.config.TapConfig, got {taps!r}")
        for side, names, network, other in (
            ("student", student_layers, student, teacher),
            ("teacher", teacher_layers, teacher, student),
        ):
            _check_layers(side, names, network, other)
        student_size, student_choice = _layers_of(student, "student", student_layers, image_size, num_classes)
        teacher_size, teacher_choice = _layers_of(teacher, "teacher", teacher_layers, image_size, num_classes)
        student_stages, teacher_stages = layers.paired(
            student_choice.stages,
            teacher_choice.stages,
            student_named=method == "sward" and student_layers is not None,
            teacher_named=method == "sward" and teacher_layers is not None,
        )
        student_choice = dataclasses.replace(student_choice, stages=student_stages)
        teacher_choice = dataclasses.replace(teacher_choice, stages=teacher_stages)
        _check_classes(student, student_size, num_classes)
        pair = methods.DistillationPair(
            student=student,
            teacher=teacher,
            student_layers=student_choice,
            teacher_layers=teacher_choice,
            student_image_size=student_size,
            teacher_image_size=teacher_size,
            num_classes=num_classes,
            ignore_index=ignore_index,
            settings=_settings(recipe, settings),
            student_taps=student_taps or TapConfig(),
            teacher_taps=teacher_taps or TapConfig(),
            masks=lambda: _masks(masks, method),
            unlabelled=unlabelled,
            process_group=process_group,
        )
        self.method = method
        self.student = student
        self.distillation = methods.build(method, pair)
        self.task = task or SegmentationCrossEntropy(ignore_index, process_group=process_group)
        self.student_layers = student_choice.stages
        """Layers of the student that MWAD compares."""
        self.teacher_layers = teacher_choice.stages
        """Layers of the teacher that MWAD compares."""
        self._ignore_index = ignore_index
        _check_read(method, student_layers, teacher_layers, self.distillation)
        if LOGITS in self.distillation.teacher_taps:
            _check_teacher_logits(teacher, teacher_size, num_classes)
        self._teacher = FrozenTeacher(teacher, self.distillation.teacher_taps, precision=None, taps=teacher_taps)
        layers_of_student = [tap for tap in self.distillation.student_taps if tap != LOGITS]
        self._taps = FeatureTaps(student, layers_of_student, **pair.student_taps.arguments()).open()
        # Parameters of both networks may lie on a GPU already.
        self.distillation.to(next(student.parameters()).device)

    def close(self) -> None:
        """Take the hooks off both networks. The distiller cannot be called afterwards; the networks can."""
        self._taps.close()
        self._teacher.taps.close()

    @property
    def teacher(self) -> nn.Module:
        """The frozen network."""
        return self._teacher.network

    def forward(
        self, images: Tensor, labels: Tensor | None = None, *, teacher_images: Tensor | None = None
    ) -> DistillerOutput:
        """Compute the losses of one batch.

        Args:
            images: `[B, 3, H, W]`.
            labels: `[B, H, W]` integers. None distils only: no task loss, and no PDR in `"sward"`.
            teacher_images: the same views at the size that the teacher needs; None takes `images`.

        Raises:
            ValueError: if the method is `"cirkd"` and there are no labels, or as the losses do.
        """
        if labels is None and self.method == "cirkd":
            raise ValueError("labels must be given for method 'cirkd', got None")
        _check_images("images", images)
        if teacher_images is not None:
            _check_images("teacher_images", teacher_images)
        if labels is not None:
            _check_aspect(images, labels)
        seen = self._teacher(images if teacher_images is None else teacher_images)
        logits = logits_of(self.student(images), "student")
        if labels is not None and logits.shape[-2:] != labels.shape[-2:]:
            logits = resize(logits, (labels.shape[-2], labels.shape[-1]))
        classes = self._no_labels(logits) if labels is None else labels
        output = self.distillation(DistillationInputs({**self._taps.collect(), LOGITS: logits}, seen, classes))
        if labels is None:
            # `DistributedDataParallel` raises an error for parameters outside the graph, such as those of the head.
            return DistillerOutput(output.loss + zero_loss([logits]), logits, output.terms)
        task = self.task(logits, labels)
        return DistillerOutput(task + output.loss, logits, {"task": task.detach().float(), **output.terms})

    def _no_labels(self, logits: Tensor) -> Tensor:
        """Return labels with which PDR leaves out every pixel, and the other methods none."""
        other = 1 if self._ignore_index == 0 else 0
        label = self._ignore_index if self.method == "sward" else other
        return torch.full((len(logits), *logits.shape[-2:]), label, device=logits.device)

    if TYPE_CHECKING:

        def __call__(
            self, images: Tensor, labels: Tensor | None = None, *, teacher_images: Tensor | None = None
        ) -> DistillerOutput:
            """See `forward`; declared so that editors know the type of the output."""

    def _apply(self, fn: Any, recurse: bool = True) -> Distiller:
        super()._apply(fn, recurse)
        self._teacher.network._apply(fn, recurse)
        return self


def _check_options(method: str, recipe: RecipeName, masks: str | Path | None, settings: dict[str, Any]) -> None:
    """Raise a ValueError for an option that the method would not read."""
    if method != "sward" and settings:
        name, value = next(iter(settings.items()))
        raise ValueError(
            f"settings must be none for method {method!r}, got {name}={value!r}; they are those of 'sward', and "
            f"sward.losses has the classes of the other methods, with all their arguments"
        )
    if method != "sward" and recipe != "recommended":
        raise ValueError(f"recipe must be 'recommended' for method {method!r}, which has none, got {recipe!r}")
    if masks is not None and method not in MASK_METHODS:
        raise ValueError(f"masks must be None for method {method!r}, got {str(masks)!r}")


def _check_read(
    method: str,
    student_layers: Sequence[str] | None,
    teacher_layers: Sequence[str] | None,
    loss: DistillationLoss,
) -> None:
    """Raise a ValueError for layers in place of which the method compares others."""
    for side, names, taps in (
        ("student", student_layers, loss.student_taps),
        ("teacher", teacher_layers, loss.teacher_taps),
    ):
        if names is not None and names[-1] not in taps:
            wanted, why = (
                ("None", "logits only") if tuple(taps) == (LOGITS,) else ("a single one", "one pair of layers")
            )
            raise ValueError(
                f"{side}_layers must be {wanted} for method {method!r}, which compares {why}, got {list(names)}"
            )


def _check_networks(student: nn.Module, teacher: nn.Module) -> None:
    for side, network in (("student", student), ("teacher", teacher)):
        if not isinstance(network, nn.Module):
            raise ValueError(f"{side} must be an nn.Module, got {type(network).__name__}")
    if student is teacher:
        raise ValueError("teacher must be another network than the student, got the same module twice")
    shared = {id(parameter) for parameter in student.parameters()} & {id(each) for each in teacher.parameters()}
    if shared:
        raise ValueError(
            f"teacher must share no parameters with the student, got {len(shared)} shared ones; freezing it would "
            "freeze them"
        )
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ValueError("student must have parameters that require gradients, got none; the student comes first")


def _check_layers(side: str, names: Sequence[str] | None, network: nn.Module, other: nn.Module) -> None:
    if names is None:
        return
    if isinstance(names, str) or not names:
        raise ValueError(f"{side}_layers must be a list of at least one layer, got {names!r}")
    network, other = unwrapped(network), unwrapped(other)
    known, elsewhere = dict(network.named_modules()), dict(other.named_modules())
    for name in names:
        if name not in known:
            swapped = "; it exists in the other network, and the student comes first" if name in elsewhere else ""
            raise ValueError(f"{side}_{unknown_layer(name, network)}{swapped}")


def _check_images(name: str, images: Tensor) -> None:
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"{name} must be [B, 3, H, W], got {'x'.join(map(str, images.shape))}")
    if not images.is_floating_point():
        raise ValueError(f"{name} must be floating-point numbers, as the networks were trained on, got {images.dtype}")


def _check_aspect(images: Tensor, labels: Tensor) -> None:
    """Raise a ValueError if labels cannot be those of the images in another size, because they are transposed, say."""
    if labels.dim() != 3:
        return  # The losses say what they want.
    (height, width), (tall, wide) = images.shape[-2:], labels.shape[-2:]
    # Sides that were rounded to pixels differ by less than one.
    if abs(tall * width - wide * height) > height + width:
        raise ValueError(
            f"labels must have the aspect ratio of the images, {height}x{width}, got {tall}x{wide}; [B, H, W] is the "
            "order of both"
        )


def _layers_of(
    network: nn.Module,
    side: str,
    names: Sequence[str] | None,
    image_size: tuple[int, int] | None,
    num_classes: int,
) -> tuple[tuple[int, int], LayerChoice]:
    """Return an image size that the network accepts, and its layers."""
    problem = ""
    for size in (image_size,) if image_size is not None else PROBE_SIZES:
        try:
            choice = layers.choose(unwrapped(network), size, num_classes=num_classes)
        except ValueError as error:
            problem = problem or str(error)
            continue
        if names is None:
            return size, choice
        return size, LayerChoice(tuple(names), names[-1], choice.penultimate if len(names) > 1 else names[-1])
    raise ValueError(f"{side}: {problem.removesuffix('.')}; pass image_size=(height, width) that both networks accept")


def _count_logits(network: nn.Module, side: str, size: tuple[int, int]) -> int:
    network = unwrapped(network)
    with torch.no_grad(), layers.evaluating(network), torch.compiler.set_stance("force_eager"):
        logits = logits_of(network(next(network.parameters()).new_zeros(1, 3, *size)), side)
    refuse_probabilities(logits, side)
    return logits.shape[1]


def _check_teacher_logits(teacher: nn.Module, size: tuple[int, int], num_classes: int) -> None:
    found = _count_logits(teacher, "teacher", size)
    if max(found, 2) != num_classes:
        raise ValueError(f"teacher must return {num_classes} logits, one per class as num_classes says, got {found}")


def _check_classes(student: nn.Module, size: tuple[int, int], num_classes: int) -> None:
    found = _count_logits(student, "student", size)
    classes = max(found, 2)
    if num_classes != classes:
        channels = "the channels of the student's logits" if found > 1 else "as the student has one logit"
        raise ValueError(f"num_classes must be {classes}, {channels}, got {num_classes}")


def _settings(recipe: RecipeName, given: dict[str, Any]) -> SWARDConfig:
    if recipe not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(map(repr, RECIPES))}, got {recipe!r}")
    known = [field.name for field in dataclasses.fields(SWARDConfig)]
    for name in given:
        if name not in known or name in ("student_layers", "teacher_layers"):
            raise ValueError(f"settings must be fields of SWARDConfig, got {name!r}; there are {', '.join(known)}")
    window = given.get("window_size")
    if isinstance(window, int):
        given = {**given, "window_size": (window,)}
    elif window is not None and not (isinstance(window, (list, tuple)) and all(isinstance(one, int) for one in window)):
        raise ValueError(f"window_size must be a whole number or a list of them, one per stage, got {window!r}")
    return SWARDConfig(**{**RECIPES[recipe]._asdict(), **given})


def _masks(path: str | Path | None, method: str) -> Path:
    if path is None:
        raise ValueError(f"masks must be a file for method {method!r}, got None; sward.losses.save_masks writes one")
    return Path(path)
