"""DistributedDataParallel: wrap the distiller as one module.

Run with `torchrun --nproc-per-node 2 -m examples.trainers.with_ddp`.
"""

from collections.abc import Iterable
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sward import Distiller


def train(distiller: Distiller, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    model = DistributedDataParallel(distiller)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for images, labels in batches:
        model(images, labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def network(width: int) -> nn.Sequential:
    sides = (3, width, 2 * width, 4 * width)
    stages = [nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.ReLU()) for a, b in pairwise(sides)]
    return nn.Sequential(*stages, nn.Conv2d(sides[-1], 3, 1))


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    distiller = Distiller(
        network(4), network(8), num_classes=3, image_size=(64, 64), window_size=(4,), process_group=dist.group.WORLD
    )
    torch.manual_seed(dist.get_rank())
    train(distiller, [(torch.randn(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64))) for _ in range(2)])
    print(f"process {dist.get_rank()}: {sum(p.double().sum().item() for p in distiller.student.parameters()):.10f}")
    dist.destroy_process_group()
