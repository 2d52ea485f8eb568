"""Windowed distillation with closed-form gradients, one cache-sized chunk of windows at a time, on any device.

A chunk is cut straight from the maps, without rolling or padding them first, and its gradients are written back before
the next chunk is read: each score is computed once and nothing of size T x T outlives its chunk. `compiled` runs the
same chunk through `torch.compile`.
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
    Terms,
    allocate_gradients,
    fake,
    precision,
)
from sward_kernels.windowed.reference import COSINE_EPSILON
from sward_kernels.windows import WindowGrid

TermWeights = tuple[Tensor | None, ...]
"""Weights of the attention, value and context terms as scalar tensors; None for a term that is skipped."""

# Elements of one chunk's score matrices, both sides together. On a CPU about four such matrices are alive at once and
# should stay in cache; on a GPU a chunk must be large enough to fill the device.
SCORE_ELEMENTS_CPU = 2**18
SCORE_ELEMENTS_GPU = 2**24


def _run(
    qkv_student: Tensor,
    qkv_teacher: Tensor,
    window_size: int,
    offsets: list[int],
    shift: Tensor | None,
    terms: Terms,
    wants_student_gradient: bool,
    wants_teacher_gradient: bool,
    *,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operators; arguments and results as in `gradient_in_forward.SCHEMA`."""
    wanted = (wants_student_gradient, wants_teacher_gradient)
    # Ordinary tensors even inside inference_mode: the compiled chunk would otherwise be compiled a second time.
    with torch.inference_mode(False), torch.no_grad():
        if shift is not None and not qkv_student.is_cpu:
            # Slices need host integers, and reading them would stall the device: roll the whole maps there instead.
            grid = WindowGrid(qkv_student.shape[2], qkv_student.shape[3], window_size)
            rolled = (grid.roll(qkv_student, shift), grid.roll(qkv_teacher, shift))
            means, *rolled_gradients = _run(*rolled, window_size, [0, 0], None, terms, *wanted, compiled=compiled)
            gradients = allocate_gradients(qkv_student, qkv_teacher, *wanted)
            for gradient, each in zip(gradients, rolled_gradients):
                if gradient.numel():
                    gradient.copy_(grid.roll(each, -shift))
            return means, *gradients
        if shift is not None:
            offsets = shift.tolist()
        gradients = allocate_gradients(qkv_student, qkv_teacher, *wanted)
        run_chunk = _compiled_chunk if compiled else distil_chunk
        # As tensors, so that the compiled chunk does not depend on their values; None for a term that is skipped.
        scales = tuple(qkv_student.new_full((), w, dtype=precision(qkv_student)) if w else None for w in terms)
        sums = []
        for chunk in _chunks(qkv_student, qkv_teacher, window_size, offsets, whole=compiled):
            values, *chunk_gradients = run_chunk(chunk.student, chunk.teacher, chunk.real, scales, *wanted)
            sums.append(values.sum(-1))
            for block, gradient in zip(chunk_gradients, gradients):
                if block is not None:
                    chunk.write(block, gradient)
        batch, _, height, width = qkv_student.shape
        return torch.stack(sums).sum(0) / (batch * height * width), *gradients


class _Chunk(NamedTuple):
    """A block of windows: some strips (rows of windows, of any images) by some columns of windows.

    Both sides are `[strips, C, M, columns, M]`, rolled and padded with zeros, and laid out as their maps are. Their
    queries are divided by `sqrt(D)`, so that `Q K^T` and `dS^T Q` are scaled already.
    """

    student: Tensor
    teacher: Tensor
    real: Tensor | None
    """1 for a pixel and 0 for padding, `[strips, 1, M, columns, M]`; None if all are pixels."""
    pieces: list[tuple[tuple[Any, ...], tuple[Any, ...]]]
    """Pairs of indices, into `[strips, C, M, columns * M]` and into a map: what was read from where."""

    def write(self, block: Tensor, target: Tensor) -> None:
        """Write `[strips, C, M, columns * M]` to the pixels of `target` that this chunk was read from."""
        for inside, outside in self.pieces:
            target[outside] = block[inside]


def _chunks(
    qkv_student: Tensor, qkv_teacher: Tensor, window_size: int, offsets: list[int], whole: bool
) -> Iterator[_Chunk]:
    """Cut both maps into chunks. With `whole`, a chunk has `real` and at least two strips and two columns.

    All chunks share their buffers: each is valid until the next one is yielded.
    """
    batch, channels, height, width = qkv_student.shape
    dim = channels // 3
    grid = WindowGrid(height, width, window_size)
    windows = (SCORE_ELEMENTS_CPU if qkv_student.is_cpu else SCORE_ELEMENTS_GPU) // grid.tokens**2
    smallest = 2 if whole else 1
    strips, columns = batch * grid.window_rows, grid.window_columns
    chunk_columns = max(smallest, _even_share(columns, max(1, windows // smallest)))
    chunk_strips = max(smallest, _even_share(strips, max(1, windows // chunk_columns)))
    shape = (chunk_strips, window_size, chunk_columns * window_size)
    student, teacher = _zeros_like_map(qkv_student, *shape), _zeros_like_map(qkv_teacher, *shape)
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
                for buffer in (student, teacher, real):
                    buffer.zero_()
            for inside, outside in pieces:
                student[inside] = qkv_student[outside]
                teacher[inside] = qkv_teacher[outside]
                if partial:
                    real[inside] = 1
            for buffer in (student, teacher):
                buffer[:, :dim].mul_(1 / math.sqrt(dim))
            cells = (buffer.unflatten(-1, (chunk_columns, window_size)) for buffer in (student, teacher, real))
            student_cells, teacher_cells, real_cells = cells
            yield _Chunk(student_cells, teacher_cells, real_cells if partial or whole else None, pieces)
            if partial:
                real.fill_(1)


def _even_share(total: int, most: int) -> int:
    """The smallest share of `total` that needs no more shares than shares of `most` would."""
    return math.ceil(total / math.ceil(total / most))


def _zeros_like_map(maps: Tensor, strips: int, height: int, width: int) -> Tensor:
    """Zeros `[strips, C, height, width]` in at least fp32, with the channels innermost if they are in `maps`."""
    layout = torch.channels_last if maps.stride(1) == 1 else torch.contiguous_format
    shape = (strips, maps.shape[1], height, width)
    return torch.empty(shape, dtype=precision(maps), device=maps.device, memory_format=layout).zero_()


def distil_chunk(
    student: Tensor,
    teacher: Tensor,
    real: Tensor | None,
    term_weights: TermWeights,
    wants_student_gradient: bool,
    wants_teacher_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The three terms summed per window, `[3, windows]`, and the wanted gradients, `[strips, C, M, columns * M]`.

    Arguments as in `_Chunk`. With Eq. 8-14's `S`, `A` and `Z` of a side and `dX` for `d loss / dX`::

        dS_s = a (A_s - A_t)                                       from attention, weight a
        dS_t = a A_t (L - sum(A_t L)),  L = log(A_t / A_s)
        dZ_s = 2 c (Z_s - Z_t) = -dZ_t                             from context, weight c
        dA   = dZ V^T,  dV = A^T dZ,  dS = A (dA - sum(A dA))      of either side
        dQ   = dS K / sqrt(D),  dK = dS^T Q / sqrt(D)
    """
    attention_weight, value_weight, context_weight = term_weights
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
        value, dv_s, dv_t = _value_term(v_s, v_t, mask, value_weight)
    gradient_s = gradient_t = None
    if wants_student_gradient:
        gradient_s = _block(_backward(q_s, k_s, v_s, ds_s, dv_s, through_s), student.shape)
    if wants_teacher_gradient:
        gradient_t = _block(_backward(q_t, k_t, v_t, ds_t, dv_t, through_t), teacher.shape)
    return torch.stack((attention, value, context)), gradient_s, gradient_t


def _tokens(cells: Tensor) -> Tensor:
    """Copy `[strips, C, M, columns, M]` to `[windows, T, C]`; the axis that is innermost in memory stays innermost."""
    strips, channels, side, columns, _ = cells.shape
    if cells.stride(1) == 1:
        tokens = cells.permute(0, 3, 2, 4, 1).clone(memory_format=torch.contiguous_format)
        return tokens.view(strips * columns, side * side, channels)
    tokens = cells.permute(0, 3, 1, 2, 4).clone(memory_format=torch.contiguous_format)
    return tokens.view(strips * columns, channels, side * side).mT


def _block(tokens: Tensor, shape: torch.Size) -> Tensor:
    """Inverse of `_tokens`, as `[strips, C, M, columns * M]`; `shape` is that of the cells."""
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
    """Scores, their log-sum-exp per row, and the attention: zeros for a padded query, so that it adds nothing."""
    scores = torch.bmm(q, k.mT)
    a = scores.softmax(-1)
    # The largest probability of a row is at least 1/T, so its logarithm is exact to an ulp and saves a pass of exp.
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

    `ds` and `dv` are what reaches the scores and the values directly; `through_context` is `(A, Z, dZ)`, from which the
    rest is computed. `ds` is overwritten.
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


def _value_term(v_s: Tensor, v_t: Tensor, mask: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of `1 - cosine` over the real tokens of each window, and its weighted gradients of student and teacher."""
    square_t, square_s = v_t.square().sum(-1, keepdim=True), v_s.square().sum(-1, keepdim=True)
    norm_product = square_t.sqrt() * square_s.sqrt()
    inverse = torch.where(norm_product > 0, 1 / norm_product.clamp_min(COSINE_EPSILON), 0)
    cosine = (v_t * v_s).sum(-1, keepdim=True) * inverse
    distance = 1 - cosine
    value = (distance if mask is None else distance * mask).sum((1, 2))
    # Below the floor the denominator is a constant, without a gradient of its own. Padded tokens are zero vectors.
    pull = torch.where(norm_product >= COSINE_EPSILON, cosine, 0) * weight
    push = inverse * weight
    dv_s = v_s * (pull / square_s.clamp_min(torch.finfo(v_s.dtype).tiny)) - v_t * push
    dv_t = v_t * (pull / square_t.clamp_min(torch.finfo(v_t.dtype).tiny)) - v_s * push
    return value, dv_s, dv_t


def _compiled_chunk(
    student: Tensor,
    teacher: Tensor,
    real: Tensor | None,
    term_weights: TermWeights,
    wants_student_gradient: bool,
    wants_teacher_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    assert real is not None
    for cells in (student, teacher, real):
        torch._dynamo.mark_dynamic(cells, (0, 3))  # strips and columns; all else is fixed by the key
        # Without this, Dynamo makes sizes dynamic that differ from an earlier kind of chunk, and with a dynamic D
        # Inductor's results for D = 1 are wrong.
        torch._dynamo.mark_static(cells, [1, 2, 4])
    layouts = student.stride(1) == 1, teacher.stride(1) == 1
    work = tuple(weight is not None for weight in term_weights), wants_student_gradient, wants_teacher_gradient
    run = _compiler(student.shape[1:3], student.dtype, student.device.type, layouts, work)
    chunk: tuple[Tensor, Tensor | None, Tensor | None] = run(
        student, teacher, real, term_weights, wants_student_gradient, wants_teacher_gradient
    )
    return chunk


@functools.cache
def _compiler(*key: Any) -> Callable[..., Any]:
    # Each kind of chunk gets a code object of its own: Dynamo's recompile limit counts per code object, and a network
    # with many stages would reach it.
    code = distil_chunk.__code__.replace(co_name=distil_chunk.__name__)
    chunk = types.FunctionType(code, distil_chunk.__globals__, distil_chunk.__name__)
    return torch.compile(chunk, fullgraph=True)


eager = register("windowed_distillation_eager" + SCHEMA, functools.partial(_run, compiled=False), fake)
compiled = register("windowed_distillation_compiled" + SCHEMA, functools.partial(_run, compiled=True), fake)
