"""accelerate: prepare the distiller as any model; it moves the teacher to the device too.

For several processes, build the `Distiller` after an `Accelerator`, with `process_group=torch.distributed.group.WORLD`,
so that losses take their means over the images of all.
"""

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import Tensor

from sward import Distiller


def train(distiller: Distiller, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    accelerator = Accelerator()
    model, optimizer = accelerator.prepare(distiller, torch.optim.AdamW(distiller.parameters(), lr=1e-3))
    for images, labels in batches:
        out = model(images.to(accelerator.device), labels.to(accelerator.device))
        accelerator.backward(out.loss)
        optimizer.step()
        optimizer.zero_grad()
