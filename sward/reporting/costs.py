"""What a trained network costs: parameters, FLOPs, bytes and time per image."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from sward.data import evaluation_size
from sward.deploy.network import DeployedNetwork
from sward.deploy.proof import median_milliseconds
from sward.models.flops import gemm_flops
from sward.reporting.runs import Group
from sward.runs.load import load_run


@dataclass(frozen=True)
class Cost:
    """Cost of one image, at the size at which the network is evaluated."""

    params: int
    """Parameters."""
    flops: int
    """2 x multiply-adds of all matrix products."""
    bytes: int
    """Parameters and buffers as they are stored."""
    milliseconds: float
    """Median time on this CPU, with normalisation, padding and cropping."""
    size: tuple[int, int]
    """Height and width of the image."""


def cost_of(group: Group) -> Cost | None:
    """Measure the network of the first run of a group that has saved weights; None if none has."""
    run = next((run for run in group.runs if run.folder.best.exists()), None)
    if run is None:
        return None
    _, _, network = load_run(run.folder.path)
    data = run.config.dataset
    size = evaluation_size(data.name, data.image_size) or data.image_size
    deployed = DeployedNetwork(network)
    params = list(network.parameters())
    stored = [*params, *network.buffers()]
    image = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        milliseconds = median_milliseconds(lambda: deployed(image))
    return Cost(
        params=sum(each.numel() for each in params),
        flops=gemm_flops(deployed, size),
        bytes=sum(each.numel() * each.element_size() for each in stored),
        milliseconds=milliseconds,
        size=size,
    )


def this_cpu() -> str:
    """Return the processor's name and the number of threads that torch uses."""
    threads = torch.get_num_threads()
    return f"{processor()}, {threads} thread{'s' * (threads > 1)}"


def processor() -> str:
    """Return the name of the processor as the system gives it."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
