"""CIRKD, version 1: cross-image relational knowledge distillation (Yang et al., CVPR 2022)."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sward.alignment import resize_labels, resize_to_common
from sward.losses.class_queue import ClassQueue, ClassRows, pick_rows
from sward.losses.classic import pixel_divergence
from sward.losses.global_mean import mean_count
from sward.losses.pairs import TapComparison, in_own_dtype, require_same_classes
from sward.losses.protocol import LOGITS, DistillationOutput
from sward_kernels import relational_kl
from sward_kernels.arguments import are_weights, require_count, require_positive, shown
from sward_kernels.labels import class_indices
from sward_kernels.registration import first_derivative_only
from sward_kernels.relation.api import check_implementation

# Scores of one network at a time in the memory terms, of which there are up to four copies: few enough for a CPU core's
# cache, and enough rows to fill a GPU.
_CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}
# Removes a key from a softmax; finite, so that 0 * (difference of two such scores) is 0 and not NaN.
_REMOVED = -1e9


class CIRKDLoss(TapComparison):
    """Per-pixel KD, relations of pixels across the images of a batch, and relations to a memory of earlier batches.

        loss = w_kd KD + w_batch minibatch + w_pixel pixel + w_region region

    KD compares the logits, without temperature and without a mask for ignored pixels. The other three compare the maps
    that enter the classifiers. `minibatch` is `sward_kernels.relational_kl` over the images of this process. `pixel`
    and `region` compare, for every labelled pixel, the softmax over its similarities to stored teacher vectors: up to
    16 pixels of each class and image, and each class's mean in each image. For them the student's map goes through a
    learned projector (1x1 conv, BN, ReLU, 1x1 conv; `torch.nn.SyncBatchNorm.convert_sync_batchnorm` gives the official
    form on several GPUs).

    The memory is neither parameter nor buffer, but part of the state dict. It is the same on every rank: all random
    draws depend on `seed` and the step, and its new rows are gathered from all ranks, which must have equally many
    images. It is updated in training mode only.

    Args:
        student_channels: channels of the student's map.
        teacher_channels: channels of the teacher's map.
        num_classes: `K`, at least 2; a one-logit binary task has 2.
        student_tap: the student's layer that enters its classifier.
        teacher_tap: the teacher's layer that enters its classifier.
        terms: weights of KD, minibatch, pixel and region. Default 1, 1, 0.1, 0.1 (Cityscapes); VOC uses 0.01 for the
            last two. A term of weight 0 is not computed.
        temperature: divides similarities. Default 0.1.
        distribution_temperature: divides them again in pixel and region, whose KL is multiplied by its square.
            Default 1.
        pixel_queue: `"fixed"` (default) or `"official"`, which repeats four mistakes of the official code: the pixels
            stored for a class are taken from the top of the image whatever their class; a full queue overwrites its
            newest rows; rows that were never written, and are random, are used as keys; a pixel of the map has the
            label at its upper left corner and not at its centre.
        pixel_queue_size: stored pixels per class. Default 20000. A bank takes `4 K size C_t` bytes.
        region_queue_size: stored means per class. Default 2000.
        pixel_keys: keys per step, `pixel_keys // K + 1` of each class. Default 4096.
        region_keys: the same for means. Default 1024.
        max_pixels: both maps are average-pooled by the smallest factor that leaves at most this many pixels per image;
            the cost of `minibatch` grows with its square. Default 2048 (a 512x1024 image at stride 16); None for no
            pooling, as in the official code.
        ignore_index: label of pixels without a class. Default 255.
        seed: seeds the initial random rows and the draws of stored pixels and keys.
        process_group: ranks that share the memory. Default: all, if `torch.distributed` is initialised.
        implementation: passed to `sward_kernels.relational_kl`.

    Raises:
        ValueError: for an argument that is out of its range or unknown; when called, on the CPU, for a label outside
            `0..K-1` that is not `ignore_index` (on a GPU it is ignored, since a check would stall the device).
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        num_classes: int,
        *,
        student_tap: str,
        teacher_tap: str,
        terms: tuple[float, float, float, float] = (1.0, 1.0, 0.1, 0.1),
        temperature: float = 0.1,
        distribution_temperature: float = 1.0,
        pixel_queue: Literal["fixed", "official"] = "fixed",
        pixel_queue_size: int = 20_000,
        region_queue_size: int = 2_000,
        pixel_keys: int = 4096,
        region_keys: int = 1024,
        max_pixels: int | None = 2048,
        ignore_index: int = 255,
        seed: int = 0,
        process_group: ProcessGroup | None = None,
        implementation: str = "auto",
    ) -> None:
        if pixel_queue not in ("fixed", "official"):
            raise ValueError(f"pixel_queue must be 'fixed' or 'official', got {pixel_queue!r}")
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2 (a one-logit task has 2), got {num_classes}")
        if not are_weights(terms, 4):
            raise ValueError(
                "terms must be four finite numbers of at least 0, for KD, minibatch, pixel and region, "
                f"got {shown(terms)}"
            )
        require_positive("temperature", temperature)
        require_positive("distribution_temperature", distribution_temperature)
        for name, count in (
            ("pixel_queue_size", pixel_queue_size),
            ("region_queue_size", region_queue_size),
            ("pixel_keys", pixel_keys),
            ("region_keys", region_keys),
        ):
            require_count(name, count)
        if max_pixels is not None:
            require_count("max_pixels", max_pixels)
        check_implementation(implementation)
        super().__init__(
            (LOGITS, student_tap), (LOGITS, teacher_tap), (None, student_channels), (None, teacher_channels)
        )
        self.num_classes = num_classes
        self.terms = terms
        self.temperature = temperature
        self.distribution_temperature = distribution_temperature
        self.official = pixel_queue == "official"
        self.keys = (pixel_keys // num_classes + 1, region_keys // num_classes + 1)
        self.max_pixels = max_pixels
        self.ignore_index = ignore_index
        self.seed = seed
        self.process_group = process_group
        self.implementation = implementation
        # Without a memory term the projector would get no gradient, for which DDP raises an error.
        self.projector: nn.Module = nn.Identity()
        if any(terms[2:]):
            self.projector = nn.Sequential(
                nn.Conv2d(student_channels, teacher_channels, 1, bias=False),
                nn.BatchNorm2d(teacher_channels),
                nn.ReLU(),
                nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
            )
        generator = torch.Generator().manual_seed(seed)
        self.pixel_queue, self.region_queue = (
            ClassQueue(num_classes, size, teacher_channels, generator, official=self.official)
            for size in (pixel_queue_size, region_queue_size)
        )
        self._step = 0

    def get_extra_state(self) -> dict[str, Any]:
        """Return the memory, for the state dict."""
        return {
            "step": self._step,
            "pixel_queue": self.pixel_queue.state(),
            "region_queue": self.region_queue.state(),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the memory from a state dict."""
        self._step = state["step"]
        self.pixel_queue.load(state["pixel_queue"])
        self.region_queue.load(state["region_queue"])

    def compare(self, student: list[Tensor], teacher: list[Tensor], labels: Tensor) -> DistillationOutput:
        kd_weight, batch_weight, pixel_weight, region_weight = self.terms
        terms: dict[str, Tensor] = {}
        if kd_weight:
            require_same_classes(student[0], teacher[0])
            terms["kd"] = pixel_divergence(*resize_to_common(student[0], teacher[0]), temperature=1.0).mean()
        student_map, teacher_map = self._pooled(*resize_to_common(student[1], teacher[1]))
        if batch_weight:
            terms["minibatch"] = relational_kl(
                student=student_map.flatten(2).mT,
                teacher=teacher_map.flatten(2).mT,
                temperature=self.temperature,
                implementation=self.implementation,
            )
        if pixel_weight or region_weight:
            height, width = student_map.shape[-2:]
            resized = resize_labels(labels, (height, width), pick="corner" if self.official else "centre")
            classes = class_indices(resized, self.num_classes, self.ignore_index).flatten(1)
            terms |= self._memory_terms(in_own_dtype(self.projector, student_map), teacher_map, classes)
        terms = {name: terms.get(name, student_map.new_zeros(())) for name in _TERMS}
        weighted = {name: weight * term for weight, (name, term) in zip(self.terms, terms.items())}
        return DistillationOutput(
            torch.stack(list(weighted.values())).sum(),
            {name: term.detach().float() for name, term in terms.items()},
            {name: term.detach().float() for name, term in weighted.items()},
        )

    def _pooled(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        if self.max_pixels is None:
            return student, teacher
        height, width = student.shape[-2:]
        factor = 1
        while -(-height // factor) * -(-width // factor) > self.max_pixels:
            factor += 1
        if factor == 1:
            return student, teacher
        return F.avg_pool2d(student, factor, ceil_mode=True), F.avg_pool2d(teacher, factor, ceil_mode=True)

    def _memory_terms(self, projected: Tensor, teacher: Tensor, classes: Tensor) -> dict[str, Tensor]:
        student_units = F.normalize(projected, dim=1).flatten(2)
        teacher_units = F.normalize(teacher, dim=1).flatten(2)
        for queue in (self.pixel_queue, self.region_queue):
            queue.to(teacher.device)
        if self.training:
            self._remember(teacher_units, classes)
        # The step seeds the draw, so that a resumed run continues identically and all ranks draw the same keys.
        generator = torch.Generator().manual_seed(_mixed(self.seed, self._step, 1))
        labelled = classes != self.num_classes
        row_weights = labelled / mean_count(labelled, self._processes())
        terms = {}
        queues = (self.pixel_queue, self.region_queue)
        for name, queue, count, weight in zip(_TERMS[2:], queues, self.keys, self.terms[2:]):
            order = torch.randperm(queue.size, generator=generator)[:count].to(teacher.device)
            if weight:
                terms[name] = memory_relation(
                    student_units.mT.flatten(0, 1),
                    teacher_units.mT.flatten(0, 1),
                    *queue.draw(order),
                    row_weights.flatten(),
                    self.temperature,
                    self.distribution_temperature,
                )
        return terms

    def _processes(self) -> ProcessGroup | None:
        if self.process_group is None and dist.is_available() and dist.is_initialized():
            return dist.group.WORLD
        return self.process_group

    def _remember(self, teacher_units: Tensor, classes: Tensor) -> None:
        processes = self._processes()
        ranks = 1 if processes is None else dist.get_world_size(processes)
        rank = 0 if processes is None else dist.get_rank(processes)
        images, pixels = classes.shape
        self._step += 1
        # What is not finite, as after an overflow in 16 bits, spoils the loss of this step and no other.
        finite = teacher_units.isfinite().all(dim=1)
        classes = classes.where(finite, self.num_classes)
        teacher_units = teacher_units.where(finite.unsqueeze(1), 0.0)
        # Drawn for the global batch, so that one process and several store the same pixels.
        generator = torch.Generator().manual_seed(_mixed(self.seed, self._step, 0))
        scores = torch.rand(ranks * images, pixels, generator=generator)[rank * images : (rank + 1) * images]
        rows = pick_rows(teacher_units, classes, self.num_classes, scores.to(classes.device), official=self.official)
        if ranks > 1:
            rows = ClassRows(*(_gathered(part, ranks, processes) for part in rows))
        self.pixel_queue.enqueue(rows.pixels, rows.pixel_counts)
        self.region_queue.enqueue(rows.regions, rows.region_counts)


_TERMS = ("kd", "minibatch", "pixel", "region")


def memory_relation(
    student_units: Tensor,
    teacher_units: Tensor,
    keys: Tensor,
    usable: Tensor,
    row_weights: Tensor,
    temperature: float = 0.1,
    distribution_temperature: float = 1.0,
) -> Tensor:
    """Return `T'^2 sum_v w_v KL( softmax_k(t_v.q_k / (T T')) || softmax_k(s_v.q_k / (T T')) )`.

    A bounded number of rows is computed at a time, together with their gradient, so that no scores are stored. Only
    `student_units` has a gradient, and no second one.

    Args:
        student_units: `[V, C]` projected student vectors of length one.
        teacher_units: `[V, C]` teacher vectors of length one.
        keys: `[N, C]` stored vectors.
        usable: `[N]` bool, False for keys that are left out.
        row_weights: `[V]`, 1/V' for each of V' labelled pixels and 0 for the others.
        temperature: `T`.
        distribution_temperature: `T'`.
    """
    scale = 1.0 / (temperature * distribution_temperature)
    keys = keys.to(student_units.dtype)
    removed = torch.zeros_like(keys[:, 0]).masked_fill(~usable, _REMOVED)
    total: Tensor = _MemoryRelation.apply(
        student_units, teacher_units, keys, removed, row_weights.to(student_units.dtype), scale
    )
    return distribution_temperature**2 * total


class _MemoryRelation(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any,
        student_units: Tensor,
        teacher_units: Tensor,
        keys: Tensor,
        removed: Tensor,
        row_weights: Tensor,
        scale: float,
    ) -> Tensor:
        rows = max(1, _CHUNK_ELEMENTS["cpu" if keys.is_cpu else "cuda"] // len(keys))
        total = student_units.new_zeros(())
        gradient = torch.empty_like(student_units) if context.needs_input_grad[0] else None
        for start in range(0, len(student_units), rows):
            chunk = slice(start, start + rows)
            weights = row_weights[chunk]
            student, teacher = (
                torch.addmm(removed, units[chunk], keys.mT, alpha=scale) for units in (student_units, teacher_units)
            )
            gap = teacher - student
            student_log_sum, teacher_log_sum = _softmax_(student), _softmax_(teacher)
            total += weights @ ((teacher * gap).sum(dim=-1) + student_log_sum - teacher_log_sum)
            if gradient is not None:
                # d KL / d score is the difference of the two softmaxes.
                gradient[chunk] = (scale * weights)[:, None] * ((student - teacher) @ keys)
        context.save_for_backward(gradient)
        return total

    @staticmethod
    @first_derivative_only
    def backward(context: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = context.saved_tensors
        return None if gradient is None else upstream * gradient, None, None, None, None, None


def _softmax_(scores: Tensor) -> Tensor:
    """Replace the scores of each row by their softmax; return the logarithm of the sum of their exponentials."""
    largest = scores.amax(dim=-1, keepdim=True)
    total = scores.sub_(largest).exp_().sum(dim=-1, keepdim=True)
    scores.div_(total)
    return (largest + total.log()).squeeze(-1)


def _gathered(part: Tensor, ranks: int, group: ProcessGroup | None) -> Tensor:
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(ranks)]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts)


def _mixed(seed: int, step: int, purpose: int) -> int:
    # Distinct for every (step, purpose) of a run, and far apart for runs with neighbouring seeds.
    return (seed * 1_000_003 + step * 2 + purpose) % 2**63
