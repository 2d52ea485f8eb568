"""Grids, arguments and registration of the Triton kernels of CIRKD's mini-batch relation.

`_constants` gathers what decides a compilation; the launch and the report share it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from sward_kernels.fallback import warn_once
from sward_kernels.gpu.launching import (
    INTERPRETED,
    CallCache,
    PreparedLaunch,
    accumulator,
    full_float32_precision,
    product_precision,
    require_gpu,
)
from sward_kernels.registration import first_derivative_only, register
from sward_kernels.relation import eager
from sward_kernels.relation.kernels import backward_kernel, forward_kernel
from sward_kernels.relation.tile_table import RelationTiles, tiles_of
from sward_kernels.resources import Configuration
from sward_kernels.targets import Target, family_of


def relational_kl(student_units: Tensor, teacher_units: Tensor, temperature: float, falls_back: bool = False) -> Tensor:
    """Return the loss as the reference computes it, from fp32 or float64 vectors of length one.

    With `falls_back`, backward runs eager, with a warning, if its kernel cannot run.

    Raises:
        NotImplementedError: for CPU tensors, unless Triton interprets, and where Triton cannot compile the kernels.
    """
    require_gpu(student_units)
    loss: Tensor = _RelationalKL.apply(student_units.contiguous(), teacher_units.contiguous(), temperature, falls_back)
    return loss


class _RelationalKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student_units: Tensor, teacher_units: Tensor, temperature: float, falls_back: bool) -> Tensor:
        partials, statistics = _forward_operator(student_units, teacher_units, temperature)
        ctx.save_for_backward(student_units, teacher_units, statistics)
        ctx.temperature, ctx.falls_back = temperature, falls_back
        images, pixels, _ = student_units.shape
        return partials.sum() / (images * images * pixels)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        student_units, teacher_units, statistics = ctx.saved_tensors
        try:
            gradient = _backward_operator(upstream, student_units, teacher_units, statistics, ctx.temperature)
        except NotImplementedError as reason:
            if not ctx.falls_back:
                raise
            warn_once(f"relational_kl runs eager instead of triton: {reason}")
            _, gradient = eager.relational_kl(student_units, teacher_units, ctx.temperature, True)
            gradient = gradient * upstream
        return gradient, None, None, None


SHIPPED_CHANNELS = ((64, 128), (256, 256))
"""Channels of student and teacher in the report: fewer than one program writes of the gradient, and more."""


def configurations(target: Target) -> Iterator[Configuration]:
    """Every configuration that the report compiles for a target; other channels run the same code in other steps."""
    precisions = ("tf32", full_float32_precision(target.family))
    for precision, (student_channels, teacher_channels), direction in itertools.product(
        precisions, SHIPPED_CHANNELS, ("forward", "backward")
    ):
        tiles = tiles_of(target.family, direction)
        pointers = ("student", "teacher", "statistics", "partials" if direction == "forward" else "gradient")
        types = dict.fromkeys(pointers, "*fp32") | {"images": "i32", "pixels": "i32", "inverse_temperature": "fp32"}
        if direction == "backward":
            types["upstream"] = "*fp32"
        # The scores of both networks, and in backward one product with the student's vectors.
        products = teacher_channels + student_channels * (1 if direction == "forward" else 2)
        yield Configuration(
            operation="relational_kl",
            direction=direction,
            kernel=forward_kernel if direction == "forward" else backward_kernel,
            types=types,
            constants=_constants(tiles, direction, student_channels, teacher_channels, torch.float32, precision),
            num_warps=tiles.num_warps,
            details={
                "dtype": "fp32",
                "precision": precision,
                "layout": "dense",
                "dim": student_channels,
                "tile": f"{tiles.rows}x{tiles.keys}x{tiles.chunk}",
            },
            # Keys are read once per tile of rows, mostly from cache: arithmetic is what bounds this.
            ideal_bytes=4 * tiles.keys * (teacher_channels + student_channels),
            flops=2 * products * tiles.rows * tiles.keys,
            unit="score tile",
        )


def _constants(
    tiles: RelationTiles,
    direction: str,
    student_channels: int,
    teacher_channels: int,
    dtype: torch.dtype,
    precision: str,
) -> dict[str, Any]:
    constants: dict[str, Any] = {
        "STUDENT_CHANNELS": student_channels,
        "TEACHER_CHANNELS": teacher_channels,
        "CHUNK": tiles.chunk,
        "ROWS": tiles.rows,
        "KEYS": tiles.keys,
        "PRECISION": precision,
        "ACCUMULATE": accumulator(dtype),
        "INTERPRET": INTERPRETED,
    }
    if direction == "backward":
        constants["OUT"] = min(tiles.out, max(16, triton.next_power_of_2(student_channels)))
    return constants


_launches: CallCache[PreparedLaunch] = CallCache()


def _launch(direction: str, student: Tensor, teacher: Tensor, temperature: float, **others: Tensor) -> None:
    precision = torch.backends.cuda.matmul.fp32_precision
    key = (direction, student.shape, teacher.shape[-1], student.dtype, student.device, precision, temperature)
    prepared = _launches.get(key)
    if prepared is None:
        prepared = _launches.keep(key, _prepare(direction, student, teacher, temperature))
    prepared(student.device, {"student": student, "teacher": teacher, **others})


def _prepare(direction: str, student: Tensor, teacher: Tensor, temperature: float) -> PreparedLaunch:
    images, pixels, student_channels = student.shape
    family = family_of(student.device)
    tiles = tiles_of(family, direction)
    precision = product_precision(student.dtype, family, student.device)
    constants = _constants(tiles, direction, student_channels, teacher.shape[-1], student.dtype, precision)
    programs = images * triton.cdiv(pixels, tiles.rows)
    if direction == "forward":
        kernel, programs = forward_kernel, programs * images
    else:
        kernel, programs = backward_kernel, programs * triton.cdiv(student_channels, constants["OUT"])
    problem = ("relational_kl", family, student_channels, teacher.shape[-1], student.dtype, precision)
    known = {**constants, "images": images, "pixels": pixels, "inverse_temperature": 1.0 / temperature}
    return PreparedLaunch(problem, kernel, programs, tiles.num_warps, known)


def _forward(student_units: Tensor, teacher_units: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    partials, statistics = _forward_fake(student_units, teacher_units, temperature)
    _launch("forward", student_units, teacher_units, temperature, partials=partials, statistics=statistics)
    return partials, statistics


def _forward_fake(student_units: Tensor, teacher_units: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    images, pixels, _ = student_units.shape
    rows = tiles_of(family_of(student_units.device), "forward").rows
    programs = images * images * ((pixels + rows - 1) // rows)
    return student_units.new_empty(programs), student_units.new_empty(2, images, images, pixels)


def _backward(
    upstream: Tensor, student_units: Tensor, teacher_units: Tensor, statistics: Tensor, temperature: float
) -> Tensor:
    gradient = torch.empty_like(student_units)
    _launch(
        "backward",
        student_units,
        teacher_units,
        temperature,
        upstream=upstream,
        statistics=statistics,
        gradient=gradient,
    )
    return gradient


def _backward_fake(
    upstream: Tensor, student_units: Tensor, teacher_units: Tensor, statistics: Tensor, temperature: float
) -> Tensor:
    return torch.empty_like(student_units)


_forward_operator = register(
    "relational_kl_triton_forward(Tensor student_units, Tensor teacher_units, float temperature) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_backward_operator = register(
    "relational_kl_triton_backward(Tensor upstream, Tensor student_units, Tensor teacher_units, Tensor statistics, "
    "float temperature) -> Tensor",
    _backward,
    _backward_fake,
)
