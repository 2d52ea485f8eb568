"""Windowed distillation with closed-form gradients, one cache-sized chunk of windows at a time, on any device.

A chunk is cut straight from the un-rolled, un-padded maps and its gradients are written back before the next one is
read: each score is computed once and nothing of size T x T outlives its chunk. `compiled` runs the same chunk through
`torch.compile`.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sward_kernels.registration import register
from sward_kernels.windowed.gradient_in_forward import (
    SCHEMA,
    Weights,
    allocate_gradients,
    fake,
    precision,
)
from sward_kernels.windowed.reference import COSINE_EPSILON
from sward_kernels.windows import WindowGrid

ActiveWeights = tuple[Tensor | None, ...]

# Elements of one chunk's score matrix, both sides together. On a CPU about four such matrices are alive at once and
# should stay in the cache; on a GPU a chunk must be large enough to fill the machine.
SCORE_ELEMENTS_CPU = 2**18
SCORE_ELEMENTS_GPU = 2**24


def _run(
    qkv_teacher: Tensor,
    qkv_student: Tensor,
    window_size: int,
    offsets: list[int],
    shift: Tensor | None,
    weights: Weights,
    teacher_gradient: bool,
    student_gradient: bool,
    *,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operators; arguments and results as in `gradient_in_forward.SCHEMA`."""
    wanted = (teacher_gradient, student_gradient)
    # Ordinary tensors even inside inference_mode: the compiled chunk would otherwise be compiled a second time.
    with torch.inference_mode(False), torch.no_grad():
        if shift is not None and not qkv_teacher.is_cpu:
            # Slices need host integers, and to read them would stall the device: roll the whole maps there instead.
            grid = WindowGrid(qkv_teacher.shape[2], qkv_teacher.shape[3], window_size)
            rolled = (grid.roll(qkv_teacher, shift), grid.roll(qkv_student, shift))
            means, *rolled_gradients = _run(*rolled, window_size, [0, 0], None, weights, *wanted, compiled=compiled)
            teacher, student = (grid.roll(rolled, -shift) if rolled.numel() else rolled for rolled in rolled_gradients)
            return means, teacher, student
        if shift is not None:
            offsets = shift.tolist()
        gradients = allocate_gradients(qkv_teacher, qkv_student, *wanted)
        run_chunk = _compiled_chunk if compiled else distil_chunk
        # As tensors, so that the compiled chunk does not depend on their values. None: the term is not wanted at all.
        scales = tuple(qkv_teacher.new_full((), w, dtype=precision(qkv_teacher)) if w else None for w in weights)
        sums = []
        for chunk in _chunks(qkv_teacher, qkv_student, window_size, offsets, whole=compiled):
            terms, *chunk_gradients = run_chunk(chunk.teacher, chunk.student, chunk.real, scales, *wanted)
            sums.append(terms.sum(-1))
            for block, gradient in zip(chunk_gradients, gradients):
                if block is not None:
                    chunk.write(block, gradient)
        batch, _, height, width = qkv_teacher.shape
        return torch.stack(sums).sum(0) / (batch * height * width), *gradients


class _Chunk(NamedTuple):
    """A block of windows: some strips (rows of windows, of any images) by some columns of windows.

    Attributes:
        teacher, student: `[strips, C, M, columns, M]`, rolled and padded with zeros, laid out as their maps are. Their
            queries are divided by `sqrt(D)`, so that `Q K^T` and `dS^T Q` come out scaled.
        real: 1 for a pixel and 0 for padding, `[strips, 1, M, columns, M]`; None if all are pixels.
        pieces: index pairs (into `[strips, C, M, columns * M]`, into a map) that say what was read from where.
    """

    teacher: Tensor
    student: Tensor
    real: Tensor | None
    pieces: list[tuple[tuple[Any, ...], tuple[Any, ...]]]

    def write(self, block: Tensor, target: Tensor) -> None:
        """Put `[strips, C, M, columns * M]` where this chunk was read from."""
        for inside, outside in self.pieces:
            target[outside] = block[inside]


def _chunks(
    qkv_teacher: Tensor, qkv_student: Tensor, window_size: int, offsets: list[int], whole: bool
) -> Iterator[_Chunk]:
    """Cut both maps into chunks. A `whole` one has at least two strips and two columns, and always says what is real.

    All chunks share their buffers: each is valid until the next is asked for.
    """
    batch, channels, height, width = qkv_teacher.shape
    dim = channels // 3
    grid = WindowGrid(height, width, window_size)
    windows = (SCORE_ELEMENTS_CPU if qkv_teacher.is_cpu else SCORE_ELEMENTS_GPU) // grid.tokens**2
    smallest = 2 if whole else 1
    strips, columns = batch * grid.window_rows, grid.window_columns
    chunk_columns = max(smallest, _even_share(columns, max(1, windows // smallest)))
    chunk_strips = max(smallest, _even_share(strips, max(1, windows // chunk_columns)))
    shape = (chunk_strips, window_size, chunk_columns * window_size)
    teacher, student = _zeros_like_map(qkv_teacher, *shape), _zeros_like_map(qkv_student, *shape)
    real = torch.ones_like(teacher[:, :1])

    for first_strip in range(0, strips, chunk_strips):
        for first_column in range(0, columns, chunk_columns):
            start, stop = first_column * window_size, (first_column + chunk_columns) * window_size
            pieces = []
            pixels = 0
            for strip in range(first_strip, min(first_strip + chunk_strips, strips)):
                image, row = divmod(strip, grid.window_rows)
                for rows in grid.row_runs(row * window_size, (row + 1) * window_size, offsets):
                    for cols in grid.column_runs(start, stop, offsets):
                        inside = (strip - first_strip, slice(None), rows.target, cols.target)
                        pieces.append((inside, (image, slice(None), rows.source, cols.source)))
                        pixels += real[inside].numel()
            partial = pixels < real.numel()
            if partial:
                for buffer in (teacher, student, real):
                    buffer.zero_()
            for inside, outside in pieces:
                teacher[inside] = qkv_teacher[outside]
                student[inside] = qkv_student[outside]
                if partial:
                    real[inside] = 1
            for buffer in (teacher, student):
                buffer[:, :dim].mul_(1 / math.sqrt(dim))
            cells = (buffer.unflatten(-1, (chunk_columns, window_size)) for buffer in (teacher, student, real))
            teacher_cells, student_cells, real_cells = cells
            yield _Chunk(teacher_cells, student_cells, real_cells if partial or whole else None, pieces)
            if partial:
                real.fill_(1)


def _even_share(total: int, most: int) -> int:
    """The smallest share that needs no more shares than `most` does."""
    return math.ceil(total / math.ceil(total / most))


def _zeros_like_map(maps: Tensor, strips: int, height: int, width: int) -> Tensor:
    """`[strips, C, height, width]` in at least fp32, with the channels innermost if they are in `maps`."""
    layout = torch.channels_last if maps.stride(1) == 1 else torch.contiguous_format
    shape = (strips, maps.shape[1], height, width)
    return torch.empty(shape, dtype=precision(maps), device=maps.device, memory_format=layout).zero_()


def distil_chunk(
    teacher: Tensor,
    student: Tensor,
    real: Tensor | None,
    weights: ActiveWeights,
    teacher_gradient: bool,
    student_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The three terms, summed a window, `[3, windows]`, and the wanted sides' gradients `[strips, C, M, columns * M]`.

    Args and layout as in `_Chunk`, names as in equations.md, section 4. A term whose weight is None is skipped.
    """
    attention_weight, value_weight, context_weight = weights
    (q_t, k_t, v_t), (q_s, k_s, v_s) = _tokens(teacher).chunk(3, dim=-1), _tokens(student).chunk(3, dim=-1)
    mask = None if real is None else _tokens(real)
    attention = value = context = teacher.new_zeros(q_t.shape[0])
    ds_t = ds_s = dv_t = dv_s = through_t = through_s = None
    if attention_weight is not None or context_weight is not None:
        scores_t, log_sum_exp_t, a_t = _attend(q_t, k_t, mask)
        scores_s, log_sum_exp_s, a_s = _attend(q_s, k_s, mask)
        if attention_weight is not None:
            log_ratio = (scores_t - scores_s).sub_(log_sum_exp_t - log_sum_exp_s)
            ds_t = a_t * log_ratio
            kl = ds_t.sum(-1, keepdim=True)
            attention = kl.sum((1, 2))
            ds_t = ds_t.addcmul_(a_t, kl, value=-1).mul_(attention_weight)
            ds_s = (a_s - a_t).mul_(attention_weight)
        if context_weight is not None:
            z_t, z_s = _product(a_t, v_t), _product(a_s, v_s)
            difference = z_s - z_t
            context = difference.square().sum((1, 2))
            dz_s = difference * (2 * context_weight)
            through_t, through_s = (a_t, z_t, -dz_s), (a_s, z_s, dz_s)
    if value_weight is not None:
        value, dv_t, dv_s = _value_term(v_t, v_s, mask, value_weight)
    gradient_t = gradient_s = None
    if teacher_gradient:
        gradient_t = _block(_backward(q_t, k_t, v_t, ds_t, dv_t, through_t), teacher.shape)
    if student_gradient:
        gradient_s = _block(_backward(q_s, k_s, v_s, ds_s, dv_s, through_s), student.shape)
    return torch.stack((attention, value, context)), gradient_t, gradient_s


def _tokens(cells: Tensor) -> Tensor:
    """`[strips, C, M, columns, M]` -> a copy `[windows, T, C]`; what is innermost in memory stays innermost."""
    strips, channels, side, columns, _ = cells.shape
    if cells.stride(1) == 1:
        tokens = cells.permute(0, 3, 2, 4, 1).clone(memory_format=torch.contiguous_format)
        return tokens.view(strips * columns, side * side, channels)
    tokens = cells.permute(0, 3, 1, 2, 4).clone(memory_format=torch.contiguous_format)
    return tokens.view(strips * columns, channels, side * side).mT


def _block(tokens: Tensor, shape: torch.Size) -> Tensor:
    """Undo `_tokens`, as `[strips, C, M, columns * M]`; `shape` is that of the cells."""
    strips, channels, side, columns, _ = shape
    if tokens.stride(2) == 1:
        cells = tokens.view(strips, columns, side, side, channels).transpose(1, 2)
        return cells.reshape(strips, side, columns * side, channels).permute(0, 3, 1, 2)
    cells = tokens.mT.view(strips, columns, channels, side, side).permute(0, 2, 3, 1, 4)
    return cells.reshape(strips, channels, side, columns * side)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """`x @ y`, laid out in memory as `y` is."""
    return torch.bmm(x, y) if y.stride(2) == 1 else torch.bmm(y.mT, x.mT).mT


def _attend(q: Tensor, k: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, their log-sum-exp a row and the attention. A padded query attends to nothing: all that follows is 0."""
    scores = torch.bmm(q, k.mT)
    a = scores.softmax(-1)
    # the largest probability of a row is at least 1/T, so its logarithm is exact to an ulp and saves a pass of exp
    log_sum_exp = scores.amax(-1, keepdim=True) - a.amax(-1, keepdim=True).log()
    return scores, log_sum_exp, a if mask is None else a * mask


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ds: Tensor | None,
    dv: Tensor | None,
    through_context: tuple[Tensor, Tensor, Tensor] | None,
) -> Tensor:
    """`dQ, dK, dV` of one side, `[windows, T, 3 * D]`, from its `Q / sqrt(D)`, `K` and `V`; None stands for zero.

    `ds` and `dv` reach the scores and the values directly; what comes through the context needs its `(A, Z, dZ)`.
    `ds` is overwritten.
    """
    if through_context is not None:
        a, z, dz = through_context
        da = torch.bmm(dz, v.mT).sub_((dz * z).sum(-1, keepdim=True))
        ds = da.mul_(a) if ds is None else ds.addcmul_(a, da)
        dv_context = _product(a.mT, dz)
        dv = dv_context if dv is None else dv_context.add_(dv)
    if ds is None:
        dq = dk = torch.zeros_like(q)
    else:
        dq, dk = _product(ds, k).mul_(1 / math.sqrt(q.shape[-1])), _product(ds.mT, q)
    if dv is None:
        dv = torch.zeros_like(v)
    if q.stride(2) == 1:
        return torch.cat((dq, dk, dv), 2)
    return torch.cat((dq.mT, dk.mT, dv.mT), 1).mT


def _value_term(v_t: Tensor, v_s: Tensor, mask: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of `1 - cosine` over the real tokens of each window, and its weighted gradient to both sides."""
    square_t, square_s = v_t.square().sum(-1, keepdim=True), v_s.square().sum(-1, keepdim=True)
    norm_product = square_t.sqrt() * square_s.sqrt()
    inverse = torch.where(norm_product > 0, 1 / norm_product.clamp_min(COSINE_EPSILON), 0)
    cosine = (v_t * v_s).sum(-1, keepdim=True) * inverse
    distance = 1 - cosine
    value = (distance if mask is None else distance * mask).sum((1, 2))
    # Below the floor the denominator is a constant, without a gradient of its own. Padded tokens are zero vectors.
    pull = torch.where(norm_product >= COSINE_EPSILON, cosine, 0) * weight
    push = inverse * weight
    dv_t = v_t * (pull / square_t.clamp_min(torch.finfo(v_t.dtype).tiny)) - v_s * push
    dv_s = v_s * (pull / square_s.clamp_min(torch.finfo(v_s.dtype).tiny)) - v_t * push
    return value, dv_t, dv_s


def _compiled_chunk(
    teacher: Tensor,
    student: Tensor,
    real: Tensor | None,
    weights: ActiveWeights,
    teacher_gradient: bool,
    student_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    assert real is not None
    for cells in (teacher, student, real):
        torch._dynamo.mark_dynamic(cells, (0, 3))  # strips and columns; all else is fixed by the key
    layouts = teacher.stride(1) == 1, student.stride(1) == 1
    work = tuple(weight is not None for weight in weights), teacher_gradient, student_gradient
    run = _compiler(teacher.shape[1:3], teacher.dtype, teacher.device.type, layouts, work)
    chunk: tuple[Tensor, Tensor | None, Tensor | None] = run(
        teacher, student, real, weights, teacher_gradient, student_gradient
    )
    return chunk


@functools.cache
def _compiler(*key: Any) -> Callable[..., Any]:
    # A code object of its own for each kind of chunk: Dynamo's recompile limit counts per code object, and a network
    # with many stages would reach it.
    code = distil_chunk.__code__.replace(co_name=distil_chunk.__name__)
    chunk = types.FunctionType(code, distil_chunk.__globals__, distil_chunk.__name__)
    return torch.compile(chunk, fullgraph=True)


eager = register("windowed_distillation_eager" + SCHEMA, functools.partial(_run, compiled=False), fake)
compiled = register("windowed_distillation_compiled" + SCHEMA, functools.partial(_run, compiled=True), fake)
