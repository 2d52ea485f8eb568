"""Windowed distillation on the device, and what its results must agree with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from gpu_parts.rows import LAYOUTS, TOLERANCE, Row, Stage
from sward_kernels import windowed_distillation


@contextmanager
def fp32_products(precision: str) -> Iterator[None]:
    """Compute fp32 products in `"tf32"` or in full precision, `"ieee"`."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before


def maps_of(stage: Stage, dtype: torch.dtype, layout: str, device: torch.device) -> list[Tensor]:
    """The student's and the teacher's map, made on the device."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (stage.batch, 3 * stage.dim, stage.height, stage.width)
    return [
        torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        .to(dtype=dtype, memory_format=LAYOUTS[layout])
        .requires_grad_()
        for _ in range(2)
    ]


def shift_on(device: torch.device) -> Tensor:
    """The shift of all calls, made before the clock runs: a copy to the device would wait for it."""
    return torch.tensor([1, 3], device=device)


def results_of(stage: Stage, maps: list[Tensor], implementation: str) -> dict[str, Tensor]:
    """The loss, and its gradients times the number of pixels, which float16 holds."""
    shift = shift_on(maps[0].device)
    loss = windowed_distillation(maps[0], maps[1], stage.window_size, shift, implementation=implementation).loss
    student, teacher = torch.autograd.grad(loss, maps, loss.new_tensor(stage.pixels))
    return {"loss": loss.detach(), "student": student, "teacher": teacher}


def oracle_of(stage: Stage, maps: list[Tensor]) -> dict[str, Tensor]:
    """Eager in fp32, in full precision."""
    with fp32_products("ieee"):
        return results_of(stage, [each.detach().float().requires_grad_() for each in maps], "eager")


def verdict(error: float, dtype: str) -> Row:
    return {"error": error, "note": "" if error <= TOLERANCE[dtype] else f"FAILED: more than {TOLERANCE[dtype]:g}"}
