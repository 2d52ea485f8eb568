"""CIRKD's mini-batch pixel-to-pixel relation as plain autograd PyTorch: the specification, written to be read.

It holds `B^2` maps of `P x P` scores for each network; use it to check the other implementations, not to train.
"""

import torch
from torch import Tensor


def relational_kl(teacher_units: Tensor, student_units: Tensor, temperature: float) -> Tensor:
    """The mean over all ordered image pairs (i, j) and pixels p of ``KL(teacher row || student row)``.

    Args:
        teacher_units: ``[B, P, C_t]`` vectors of length one; no gradient reaches them.
        student_units: ``[B, P, C_s]`` vectors of length one.
        temperature: divides every cosine similarity.
    """
    with torch.no_grad():
        teacher_scores = torch.einsum("ipc,jqc->ijpq", teacher_units, teacher_units) / temperature
        teacher_log = teacher_scores.log_softmax(dim=-1)
    student_scores = torch.einsum("ipc,jqc->ijpq", student_units, student_units) / temperature
    student_log = student_scores.log_softmax(dim=-1)
    return (teacher_log.exp() * (teacher_log - student_log)).sum(dim=-1).mean()
