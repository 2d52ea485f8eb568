"""Windowed distillation with closed-form gradients, one cache-sized chunk of windows at a time, on any device.

A chunk is cut straight from the un-rolled, un-padded maps, both sides stacked so that every product serves teacher and
student at once; its gradients are written back before the next chunk is read, so each score is computed once and
nothing of size T x T outlives its chunk. The gradients wait in private buffers and backward only scales them (equations.md,
section 4, "gradient in forward"). `compiled=True` runs the same chunk through `torch.compile`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sward_kernels.registration import register
from sward_kernels.windowed_distillation.reference import COSINE_EPSILON
from sward_kernels.windows import Shift, WindowGrid, merge_windows, split_windows

Weights = tuple[float, float, float]

# Elements of one chunk's score matrix, both sides together. On a CPU about four such matrices are alive at once and
# should stay in the cache; on a GPU a chunk must be large enough to fill the machine.
SCORE_ELEMENTS_CPU = 2**18
SCORE_ELEMENTS_GPU = 2**24


def windowed_distillation(
    qkv_teacher: Tensor,
    qkv_student: Tensor,
    window_size: int,
    shift: Shift,
    weights: Weights,
    *,
    compiled: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(loss, attention, value, context)` as the reference computes them; only the loss carries a gradient."""
    recording = torch.is_grad_enabled()
    terms, gradient_teacher, gradient_student = _operator(
        qkv_teacher.detach(),
        qkv_student.detach(),
        window_size,
        *((0, 0), shift) if isinstance(shift, Tensor) else (shift, None),
        weights,
        recording and qkv_teacher.requires_grad,
        recording and qkv_student.requires_grad,
        compiled,
    )
    attention, value, context = terms.unbind()
    loss = weights[0] * attention + weights[1] * value + weights[2] * context
    pixels = qkv_teacher.shape[0] * qkv_teacher.shape[2] * qkv_teacher.shape[3]
    # One node a side: autograd frees the first side's buffer before it scales the second's, so that no more than
    # three of these four maps are ever alive at once.
    for qkv, gradient in ((qkv_teacher, gradient_teacher), (qkv_student, gradient_student)):
        if recording and qkv.requires_grad:
            loss = _AttachGradient.apply(loss, qkv, gradient, pixels)
    return loss, attention, value, context


class _AttachGradient(torch.autograd.Function):
    """The identity on `loss`, whose gradient with respect to `qkv` becomes `gradient / pixels`."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, qkv: Tensor, gradient: Tensor, pixels: int) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.pixels = pixels
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        # The buffer is private and stays as it is: a second backward through a retained graph finds it unscaled.
        return upstream, gradient * (upstream / ctx.pixels), None, None


def _run(
    qkv_teacher: Tensor,
    qkv_student: Tensor,
    window_size: int,
    offsets: list[int],
    shift: Tensor | None,
    weights: Weights,
    teacher_gradient: bool,
    student_gradient: bool,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator: the three means `[3]`, and each wanted side's gradient times the number of pixels."""
    # Ordinary tensors even inside inference_mode: the compiled chunk would otherwise be compiled a second time.
    with torch.inference_mode(False), torch.no_grad():
        if shift is not None and not qkv_teacher.is_cpu:
            # Slices need host integers, and to read them would stall the device: roll the whole maps there instead.
            grid = WindowGrid(qkv_teacher.shape[2], qkv_teacher.shape[3], window_size)
            rolled = (grid.roll(qkv_teacher, shift), grid.roll(qkv_student, shift))
            flags = (teacher_gradient, student_gradient, compiled)
            means, *gradients = _run(*rolled, window_size, [0, 0], None, weights, *flags)
            return means, *(grid.roll(gradient, -shift) if gradient.numel() else gradient for gradient in gradients)
        if shift is not None:
            offsets = shift.tolist()
        sides = [side for side, wanted in enumerate((teacher_gradient, student_gradient)) if wanted]
        maps = (qkv_teacher, qkv_student)
        gradients = _allocate_gradients(qkv_teacher, qkv_student, teacher_gradient, student_gradient)
        run_chunk = _compiled_chunk if compiled else distil_chunk
        sums = []
        for chunk in _chunks(maps, window_size, offsets, whole=compiled):
            terms, chunk_gradients = run_chunk(chunk.block, chunk.real, window_size, weights, sides)
            sums.append(terms)
            for side, gradient in zip(sides, chunk_gradients if sides else ()):
                chunk.write(gradient, gradients[side])
        batch, _, height, width = qkv_teacher.shape
        return torch.stack(sums).sum(0) / (batch * height * width), *gradients


def _allocate_gradients(
    qkv_teacher: Tensor, qkv_student: Tensor, teacher_gradient: bool, student_gradient: bool
) -> tuple[Tensor, Tensor]:
    pairs = ((qkv_teacher, teacher_gradient), (qkv_student, student_gradient))
    teacher, student = (torch.empty_like(qkv) if wanted else qkv.new_empty(0) for qkv, wanted in pairs)
    return teacher, student


@dataclass
class _Chunk:
    """A block of windows of both sides: some strips (rows of windows, of any images) by some columns of windows.

    Attributes:
        block: `[2, strips, C, M, columns * M]`, teacher then student, rolled and padded with zeros.
        real: 1 for a pixel and 0 for padding, `[strips, 1, M, columns * M]`; None if all are pixels.
        pieces: index pairs (into `[strips, C, M, columns * M]`, into a map) that say what lies where.
    """

    block: Tensor
    real: Tensor | None
    pieces: list[tuple[tuple[Any, ...], tuple[Any, ...]]]

    def write(self, block: Tensor, target: Tensor) -> None:
        for inside, outside in self.pieces:
            target[outside] = block[inside]


def _chunks(maps: tuple[Tensor, Tensor], window_size: int, offsets: list[int], whole: bool) -> Iterator[_Chunk]:
    """Cut both maps into chunks; a `whole` chunk has at least two strips and columns, and says which tokens are real.

    All chunks share one buffer: each is valid until the next is asked for.
    """
    batch, channels, height, width = maps[0].shape
    grid = WindowGrid(height, width, window_size)
    windows = (SCORE_ELEMENTS_CPU if maps[0].is_cpu else SCORE_ELEMENTS_GPU) // (2 * grid.tokens**2)
    smallest = 2 if whole else 1
    strips, columns = batch * grid.window_rows, grid.window_columns
    chunk_columns = max(smallest, _even_share(columns, max(1, windows)))
    chunk_strips = max(smallest, _even_share(strips, max(1, windows // chunk_columns)))

    precision = torch.promote_types(maps[0].dtype, torch.float32)
    shape = (2, chunk_strips, channels, window_size, chunk_columns * window_size)
    block = maps[0].new_zeros(shape, dtype=precision)
    if maps[1].stride(1) == 1:
        block = block.new_zeros(shape[0], shape[1], shape[3], shape[4], shape[2]).movedim(-1, 2)
    real = block.new_zeros(shape[1], 1, *shape[3:])

    for first_strip in range(0, strips, chunk_strips):
        for first_column in range(0, columns, chunk_columns):
            start, stop = first_column * window_size, (first_column + chunk_columns) * window_size
            pieces = []
            for strip in range(first_strip, min(first_strip + chunk_strips, strips)):
                image, row = divmod(strip, grid.window_rows)
                for rows in grid.row_runs(row * window_size, (row + 1) * window_size, offsets):
                    for cols in grid.column_runs(start, stop, offsets):
                        inside = (strip - first_strip, slice(None), rows.target, cols.target)
                        pieces.append((inside, (image, slice(None), rows.source, cols.source)))
            filled = sum(math.prod(block[0][inside].shape[1:]) for inside, _ in pieces)
            partial = filled < real.numel()
            if partial:
                block.zero_()
                real.zero_()
            for inside, outside in pieces:
                block[0][inside] = maps[0][outside]
                block[1][inside] = maps[1][outside]
                real[inside] = 1
            yield _Chunk(block, real if partial or whole else None, pieces)


def _even_share(total: int, most: int) -> int:
    """The smallest share that needs no more shares than `most` does."""
    return math.ceil(total / math.ceil(total / most))


def distil_chunk(
    block: Tensor, real: Tensor | None, window_size: int, weights: Weights, sides: list[int]
) -> tuple[Tensor, Tensor]:
    """Sums of the three terms `[3]` and their weighted gradients `[sides, strips, C, M, columns * M]`.

    Args and names as in `_Chunk` and equations.md, section 4; `sides` lists those that want a gradient.
    """
    attention_weight, value_weight, context_weight = weights
    windows = split_windows(block, window_size).flatten(1, 2)  # [2, windows, C, T]
    channel_major = windows.stride(-1) == 1
    q, k, v = windows.mT.chunk(3, dim=-1)  # [2, windows, T, D]
    scale = 1 / math.sqrt(q.shape[-1])
    mask = None if real is None else split_windows(real, window_size).flatten(0, 1).mT  # [windows, T, 1]

    def product(x: Tensor, y: Tensor) -> Tensor:
        """`x @ y`, laid out in memory as the maps are."""
        x, y = x.flatten(0, 1), y.flatten(0, 1)
        result = torch.bmm(y.mT, x.mT).mT if channel_major else torch.bmm(x, y)
        return result.unflatten(0, (-1, windows.shape[1]))

    wanted = slice(sides[0], sides[-1] + 1) if sides else slice(0)
    zero = block.new_zeros(())
    attention = value = context = zero
    score_gradient = None
    value_gradient = None
    if attention_weight or context_weight:
        scores = torch.bmm((q * scale).flatten(0, 1), k.flatten(0, 1).mT).unflatten(0, (2, -1))
        a = scores.softmax(-1)
        log_sum_exp = scores.amax(-1, keepdim=True) - a.amax(-1, keepdim=True).log()
        if mask is not None:
            a = a * mask  # a padded query has no attention, and everything that follows from it is zero
        if attention_weight:
            log_ratio = (scores[0] - scores[1]) - (log_sum_exp[0] - log_sum_exp[1])
            kl_parts = log_ratio * a[0]
            kl = kl_parts.sum(-1, keepdim=True)
            attention = kl.sum()
        if context_weight:
            z = product(a, v)
            difference = z[1] - z[0]
            context = difference.square().sum()
        if sides:
            if context_weight:
                dz = torch.stack((difference, -difference)) * (-2 * context_weight)
                dz, z_, a_, v_ = dz[wanted], z[wanted], a[wanted], v[wanted]
                score_gradient = torch.bmm(dz.flatten(0, 1), v_.flatten(0, 1).mT).unflatten(0, (len(sides), -1))
                score_gradient = a_ * (score_gradient - (dz * z_).sum(-1, keepdim=True))
                value_gradient = product(a_.mT, dz)
            if attention_weight:
                parts = {0: kl_parts - a[0] * kl, 1: a[1] - a[0]}
                s = torch.stack([parts[side] for side in sides]) * attention_weight
                score_gradient = s if score_gradient is None else score_gradient + s
            dq = product(score_gradient, k[wanted]) * scale
            dk = product(score_gradient.mT, q[wanted]) * scale
    if value_weight:
        value, dv = _value_term(v, mask, wanted)
        if sides:
            dv = dv * value_weight
            value_gradient = dv if value_gradient is None else value_gradient + dv
    terms = torch.stack((attention, value, context))
    if not sides:
        return terms, zero
    if score_gradient is None:
        dq = dk = torch.zeros_like(q[wanted])
    if value_gradient is None:
        value_gradient = torch.zeros_like(v[wanted])
    gradient = torch.cat((dq, dk, value_gradient), -1).mT.unflatten(1, (block.shape[1], -1))
    return terms, merge_windows(gradient, window_size, gradient.shape[2])


def _value_term(v: Tensor, mask: Tensor | None, wanted: slice) -> tuple[Tensor, Tensor]:
    """Sum of `1 - cosine` over the real tokens, and its gradient `[sides, windows, T, D]`."""
    squares = v.square().sum(-1, keepdim=True)
    norms = squares.sqrt()
    norm_product = norms[0] * norms[1]
    inverse = torch.where(norm_product > 0, 1 / norm_product.clamp_min(COSINE_EPSILON), 0)
    if mask is not None:
        inverse = inverse * mask
    cosine = (v[0] * v[1]).sum(-1, keepdim=True) * inverse
    value = (1 - cosine).sum() if mask is None else ((1 - cosine) * mask).sum()
    # below the floor of the norm product the denominator is a constant and has no gradient of its own
    pull = torch.where(norm_product >= COSINE_EPSILON, cosine, 0) / torch.where(squares > 0, squares, 1)
    return value, (v * pull - v.flip(0) * inverse)[wanted]


@functools.cache
def _compiler() -> Any:
    return torch.compile(distil_chunk)


def _compiled_chunk(block, real, window_size, weights, sides):
    torch._dynamo.mark_dynamic(block, 1)
    torch._dynamo.mark_dynamic(block, 4)
    torch._dynamo.mark_dynamic(real, 0)
    torch._dynamo.mark_dynamic(real, 3)
    return _compiler()(block, real, window_size, weights, sides)


def _fake(qkv_teacher, qkv_student, window_size, offsets, shift, weights, teacher_gradient, student_gradient, compiled):
    precision = torch.promote_types(qkv_teacher.dtype, torch.float32)
    return qkv_teacher.new_empty(3, dtype=precision), *_allocate_gradients(
        qkv_teacher, qkv_student, teacher_gradient, student_gradient
    )


_operator = register(
    "windowed_distillation(Tensor qkv_teacher, Tensor qkv_student, int window_size, SymInt[] offsets, Tensor? shift, "
    "float[] weights, bool teacher_gradient, bool student_gradient, bool compiled) -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
