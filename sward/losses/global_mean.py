"""Means over the pixels of all processes, for losses whose pixels do not all count."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def mean_count(valid: Tensor, process_group: ProcessGroup | None) -> Tensor:
    """How many pixels count on the average process; what a process divides its sum by.

    `sum / mean_count` is the mean over this process's pixels if it is alone. Where there are several, its average over
    them is the mean over all their pixels, however unevenly the labelled ones are spread; and averaging is what
    `DistributedDataParallel` does with the gradients. One number travels.

    Args:
        valid: bool, any shape: which pixels count.
        process_group: the processes whose batches make up the global batch; None for this one alone.

    Returns:
        A scalar that is never 0, so that a batch without a valid pixel gives 0 and not NaN.
    """
    count = valid.sum()
    if process_group is None:
        return count.clamp(min=1)
    processes = dist.get_world_size(process_group)
    total = count.double()
    dist.all_reduce(total, group=process_group)
    return (total / processes).clamp(min=1 / processes).float()
