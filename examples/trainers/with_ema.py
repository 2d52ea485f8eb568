"""Gradient accumulation, and a moving average of the student: it averages `distiller.student`, not the distiller."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sward import Distiller


def train(distiller: Distiller, batches: Iterable[tuple[Tensor, Tensor]], accumulate: int = 2) -> AveragedModel:
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-3)
    average = AveragedModel(distiller.student, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for step, (images, labels) in enumerate(batches, start=1):
        (distiller(images, labels).loss / accumulate).backward()
        if step % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(distiller.student)
    return average
