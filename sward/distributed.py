"""The parts of `torch.distributed` that the trainer uses. In a single process every function here is a no-op.

`torchrun` describes the processes in the environment. `joined` makes them a group; from then on `batch` is split among
them, `DistributedDataParallel` averages the gradients, and only rank 0 writes files.
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
    """Join the process group of `torchrun` (NCCL between GPUs, gloo between CPUs) and destroy it at the end.

    Does nothing for a single process, or if a group exists already.

    Raises:
        ConnectionError: in place of torch's errors if another process has died.
    """
    if launched_processes() == 1 or world_size() > 1:
        yield
        return
    # Import this before the group exists. Functions of the module bind the current group as a default argument, and DDP
    # imports the module. They would keep the group and its threads alive after `destroy_process_group`, and a thread
    # that frees a tensor while Python shuts down aborts the process (SIGABRT).
    importlib.import_module("torch.distributed.nn")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, size = next(rendezvous("env://"))
    # torchrun may share one store among all attempts (torch 2.14 does). With the same keys, a process could read the
    # address of a process that died in the previous attempt, and wait for it.
    store = dist.PrefixStore(f"attempt{_restarts()}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    # Not in a `finally`: after an error the other processes may be waiting in a collective, and destroying the group
    # would wait for them.
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        if not (isinstance(error, dist.DistError) or "gloo" in reason or "NCCL" in reason):
            raise
        raise ConnectionError(
            "another process of the run must have ended, since this one lost its connection; see the messages of the "
            f"others, and resume the run with --resume ({reason[:200]})"
        ) from error
    dist.destroy_process_group()


def launched_processes() -> int:
    """Return the number of processes that the launcher started on all nodes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Return the rank of this process on its node, which is also the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def restarted() -> bool:
    """Return whether torchrun restarted this process after a failure."""
    return _restarts() > 0


def group() -> ProcessGroup | None:
    """Return the group of all processes, or None in a single process."""
    return dist.group.WORLD if world_size() > 1 else None


def world_size() -> int:
    """Return the number of processes in the group, or 1 without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process in the group; outside of a group, the rank that the launcher assigned."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Return whether this process writes files and prints messages (rank 0)."""
    return rank() == 0


def share_of(batch: int, name: str = "batch") -> int:
    """Return the number of images per process in a global batch; `name` is its field, for the message.

    Raises:
        ValueError: if the number of processes does not divide `batch`.
    """
    if batch % world_size():
        raise ValueError(
            f"{name} must be a multiple of the number of processes ({world_size()}), got {batch}; "
            f"{name} counts the images of one step on all processes together"
        )
    return batch // world_size()


def rank_seed(seed: int) -> int:
    """Derive the seed of what each process draws for itself (dropout, window shifts).

    Rank 0 uses `seed`, like a single process; rank `r` uses 63 bits of `numpy.random.SeedSequence((seed, r))`.
    """
    if rank() == 0:
        return seed
    return int(np.random.SeedSequence((seed, rank())).generate_state(1, np.uint64)[0]) >> 1


Network = TypeVar("Network", bound=nn.Module)


def synchronise_batch_norm(module: Network) -> Network:
    """Convert the batch norm layers of `module` to normalise over all processes.

    The conversion replaces layers, so call this before anything else holds references to them.

    Raises:
        ValueError: on a CPU, where torch has no such layer.
    """
    if world_size() == 1:
        return module
    if any(parameter.device.type == "cpu" for parameter in module.parameters()):
        raise ValueError("sync_batch_norm must be off on CPUs, got True; torch's SyncBatchNorm runs on GPUs only")
    synchronised: Network = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    return synchronised


def replicate(module: nn.Module, device: torch.device) -> nn.Module:
    """Wrap `module` so that its backward pass averages gradients over all processes."""
    if world_size() == 1:
        return module
    return DistributedDataParallel(
        module, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )


def broadcast_buffers(module: nn.Module) -> None:
    """Broadcast the buffers of rank 0, such as running statistics, to all processes."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def mean(values: Tensor) -> Tensor:
    """Average a floating-point tensor over all processes."""
    if world_size() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / world_size()


def lowest(number: int) -> int:
    """Return the minimum of `number` over all processes."""
    if world_size() == 1:
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, op=dist.ReduceOp.MIN)
    return int(found)


def gather(value: Any) -> list[Any]:
    """Return the values of all processes, by rank, on every process; they are pickled, so keep them small and rare."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
