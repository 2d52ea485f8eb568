"""CIRKD's mini-batch pixel-to-pixel relation as plain autograd PyTorch: the specification, written to be read.

It holds `B^2` maps of `P x P` scores per network: use it to check the other implementations, not to train.
"""

import torch
from torch import Tensor


def relational_kl(student_units: Tensor, teacher_units: Tensor, temperature: float) -> Tensor:
    """Return the mean of `KL(teacher row || student row)` over all ordered pairs of images (i, j) and pixels p.

    Args:
        student_units: `[B, P, C_s]` vectors of length one.
        teacher_units: `[B, P, C_t]` vectors of length one; no gradient reaches them.
        temperature: divides every cosine similarity.
    """
    with torch.no_grad():
        teacher_scores = torch.einsum("ipc,jqc->ijpq", teacher_units, teacher_units) / temperature
        teacher_log = teacher_scores.log_softmax(dim=-1)
    student_scores = torch.einsum("ipc,jqc->ijpq", student_units, student_units) / temperature
    student_log = student_scores.log_softmax(dim=-1)
    return (teacher_log.exp() * (teacher_log - student_log)).sum(dim=-1).mean()
