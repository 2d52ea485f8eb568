"""The equations of windowed distillation in plain PyTorch: the specification of the other implementations."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sward_kernels.windows import Shift, WindowGrid

COSINE_EPSILON = 1e-8
"""Floor of `|V_s| |V_t|` in the value term: a zero vector then gives value 1 and gradient 0."""


def windowed_distillation(
    qkv_student: Tensor, qkv_teacher: Tensor, window_size: int, shift: Shift, terms: tuple[float, float, float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(loss, attention, value, context)` by Eq. 4-14, differentiable by autograd.

    Arguments as in `sward_kernels.windowed_distillation`. 16-bit inputs are computed in fp32, and the four scalars are
    fp32 (float64 for float64 inputs). The terms keep their graph; the caller detaches them.
    """
    batch, _, height, width = qkv_student.shape
    grid = WindowGrid(height, width, window_size)
    precision = torch.promote_types(qkv_student.dtype, torch.float32)
    real = grid.real_tokens(qkv_student.device)
    real_count = batch * height * width
    q_s, k_s, v_s = grid.partition(qkv_student.to(precision), shift).chunk(3, dim=-1)  # each [B, windows, T, D]
    q_t, k_t, v_t = grid.partition(qkv_teacher.to(precision), shift).chunk(3, dim=-1)

    def mean_over_real_tokens(per_query: Tensor) -> Tensor:
        return per_query.masked_fill(~real, 0).sum() / real_count

    attention = value = context = q_s.new_zeros(())
    attention_weight, value_weight, context_weight = terms
    if attention_weight or context_weight:
        log_a_s = log_attention(q_s, k_s)
        log_a_t = log_attention(q_t, k_t)
        if attention_weight:  # Eq. 11
            attention = mean_over_real_tokens((log_a_t.exp() * (log_a_t - log_a_s)).sum(-1))
        if context_weight:  # Eq. 10 and 13
            z_s, z_t = log_a_s.exp() @ v_s, log_a_t.exp() @ v_t
            context = mean_over_real_tokens((z_s - z_t).square().sum(-1))
    if value_weight:  # Eq. 12
        value = mean_over_real_tokens(1 - cosine(v_s, v_t))
    loss = attention_weight * attention + value_weight * value + context_weight * context
    return loss, attention, value, context


def log_attention(queries: Tensor, keys: Tensor) -> Tensor:
    """`log softmax_rows(Q K^T / sqrt(D))` (Eq. 8-9): `[..., T, D]` twice -> `[..., T, T]`."""
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])
    return scores.log_softmax(-1)


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Cosine over the last axis with `max(|x| |y|, eps)` in the denominator; 0 with gradient 0 where x or y is zero."""
    norm_product = torch.linalg.vector_norm(x, dim=-1) * torch.linalg.vector_norm(y, dim=-1)
    ratio = (x * y).sum(-1) / norm_product.clamp_min(COSINE_EPSILON)
    return torch.where(norm_product > 0, ratio, 0)
