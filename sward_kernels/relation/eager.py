"""CIRKD's mini-batch pixel-to-pixel relation in row tiles, with the gradient in closed form, on any device.

A tile holds the scores of some pixels of image i against all pixels of image j, so a plain softmax over a row suffices
and no map of `P x P` exists. With `S = U U^T / temperature`, the gradient of a row's KL with respect to its student
scores is `softmax(S_student) - softmax(S_teacher)`. It is multiplied with the vectors while the tile is still in cache,
so every score is computed once and backward only scales a stored tensor.
"""

import torch
from torch import Tensor

# About four tiles are alive at once. On a CPU each is 1 MiB in float32, a core's share of cache (the fastest of 2^17 to
# 2^22 elements); on a GPU a tile must be large enough to fill the device.
TILE_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}


def relational_kl(
    student_units: Tensor, teacher_units: Tensor, temperature: float, wants_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Return the scalar loss and its gradient with respect to `student_units` (empty if not wanted)."""
    images, pixels, _ = student_units.shape
    rows = max(1, TILE_ELEMENTS.get(student_units.device.type, 2**22) // pixels)
    student_scaled = student_units / temperature
    teacher_scaled = teacher_units / temperature
    # A float64 accumulator costs nothing here and keeps the sum of B^2 P rows exact to the last float32 bit.
    total = torch.zeros((), dtype=torch.float64, device=student_units.device)
    gradient = torch.zeros_like(student_units) if wants_gradient else student_units.new_empty(0)
    for i in range(images):
        for start in range(0, pixels, rows):
            tile = slice(start, start + rows)
            for j in range(images):
                teacher_log = (teacher_scaled[i, tile] @ teacher_units[j].mT).log_softmax(dim=-1)
                student_log = (student_scaled[i, tile] @ student_units[j].mT).log_softmax(dim=-1)
                teacher_probability = teacher_log.exp()
                divergence = teacher_log.sub_(student_log).mul_(teacher_probability)
                total += divergence.sum(dim=-1).sum(dtype=torch.float64)
                if wants_gradient:
                    scores_gradient = student_log.exp_().sub_(teacher_probability)
                    gradient[i, tile].addmm_(scores_gradient, student_units[j])
                    gradient[j].addmm_(scores_gradient.mT, student_units[i, tile])
    count = images * images * pixels
    if wants_gradient:
        gradient.div_(count * temperature)
    return (total / count).to(student_units.dtype), gradient
