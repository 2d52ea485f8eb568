"""What the trainer needs of `torch.distributed`. In one process every function here does nothing, at no cost.

`torchrun` describes the processes in the environment. `joined` makes them a group; from then on `batch` is shared out
among them, gradients are averaged by `DistributedDataParallel`, and only the process of rank 0 writes.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Joins the processes that `torchrun` started, NCCL between GPUs and gloo between CPUs, and leaves them at the end.

    Does nothing for one process, or inside a group that exists already.
    """
    if launched_processes() == 1 or world_size() > 1:
        yield
        return
    # Before there is a group: functions of this module take the group that exists at its import as a default, and DDP
    # imports it. They would keep the group and its threads past the end, and a thread that frees a tensor while Python
    # shuts down ends the process with SIGABRT.
    importlib.import_module("torch.distributed.nn")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, size = next(rendezvous("env://"))
    # torchrun may serve one store to all attempts (torch 2.14 does). Under the same keys a process could read the
    # address of one that died in the attempt before, and wait for it.
    store = dist.PrefixStore(f"attempt{_restarts()}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    # Not in a finally: after an error the other processes may wait in a collective, and leaving would wait for them.
    yield
    dist.destroy_process_group()


def launched_processes() -> int:
    """Processes that the launcher started, on all nodes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Number of this process on its node, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def restarted() -> bool:
    """Whether torchrun started this process again after a failure."""
    return _restarts() > 0


def group() -> ProcessGroup | None:
    """All processes, or None where there is one."""
    return dist.group.WORLD if world_size() > 1 else None


def world_size() -> int:
    """Processes in the group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process in the group, from 0. Before the group is joined and after it was left, the launcher's."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this process writes files and talks to the user."""
    return rank() == 0


def share_of(batch: int) -> int:
    """Images of each process in a global batch.

    Raises:
        ValueError: if they cannot be shared out evenly.
    """
    if batch % world_size():
        raise ValueError(
            f"batch is {batch}, the images of one step on all processes together, and cannot be shared out evenly "
            f"among {world_size()} processes; use a multiple of {world_size()}"
        )
    return batch // world_size()


def rank_seed(seed: int) -> int:
    """Seed of what every process draws for itself (dropout, window shifts).

    The process of rank 0 keeps `seed`, as one process alone does; rank `r` takes 63 bits of
    `numpy.random.SeedSequence((seed, r))`.
    """
    if rank() == 0:
        return seed
    return int(np.random.SeedSequence((seed, rank())).generate_state(1, np.uint64)[0]) >> 1


Network = TypeVar("Network", bound=nn.Module)


def synchronise_batch_norm(module: Network) -> Network:
    """`module` with every batch norm normalising over all processes; call it before anything holds on to its layers.

    Raises:
        ValueError: on a CPU, where torch has no such layer.
    """
    if world_size() == 1:
        return module
    if any(parameter.device.type == "cpu" for parameter in module.parameters()):
        raise ValueError("sync_batch_norm needs GPUs: torch's SyncBatchNorm does not run on a CPU; leave it out")
    synchronised: Network = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    return synchronised


def replicate(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` so that its backward pass averages gradients over all processes."""
    if world_size() == 1:
        return module
    return DistributedDataParallel(
        module, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )


def broadcast_buffers(module: nn.Module) -> None:
    """Gives every process the buffers of rank 0, such as running statistics."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def mean(values: Tensor) -> Tensor:
    """Mean of a floating tensor over all processes."""
    if world_size() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / world_size()


def lowest(number: int) -> int:
    """The least of all processes' numbers."""
    if world_size() == 1:
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, op=dist.ReduceOp.MIN)
    return int(found)


def gather(value: Any) -> list[Any]:
    """The values of all processes, by rank, on every process. They travel pickled: for small things, and rarely."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
