"""Means over the valid pixels of all processes."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def mean_count(valid: Tensor, process_group: ProcessGroup | None) -> Tensor:
    """Return the mean number of valid pixels per process, by which a process divides its sum.

    For a single process, `sum / mean_count` is the mean over its valid pixels. For several, the average over processes
    of `sum / mean_count` is the mean over all valid pixels, however unevenly they are distributed; and averaging is
    what `DistributedDataParallel` does with the gradients. The all-reduce transfers one number.

    Args:
        valid: bool, any shape: which pixels are valid.
        process_group: the processes whose batches make up the global batch; None for this process alone.

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
