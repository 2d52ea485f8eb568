"""CIRKD's mini-batch pixel-to-pixel relation in C++ (`native.cpp`): fp32 on a CPU, every pair of images once."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from sward_kernels import cpp

LIBRARY = cpp.Library("relational_kl", Path(__file__).with_name("native.cpp"))

MOST_PIXELS = 2048
"""Pixels per image up to which this runs: two maps of `P x P` exponentials exist at once, 32 MiB here."""

LOWEST_TEMPERATURE = 0.03
"""Below it, the exponential of a cosine of -1 against one of 1, times a small difference of scores, would underflow in
fp32."""


class _Arguments(ctypes.Structure):
    """`Arguments` of native.cpp."""

    _fields_ = (
        ("images", ctypes.c_int64),
        ("pixels", ctypes.c_int64),
        ("channels", ctypes.c_int64 * 2),
        ("units", ctypes.c_void_p * 2),
        ("inverse_temperature", ctypes.c_float),
        ("gradient", ctypes.c_void_p),
        ("loss", ctypes.c_void_p),
    )


def serves(student: Tensor, temperature: float) -> bool:
    """Whether this operator is written for such a call."""
    return (
        student.is_cpu
        and student.dtype == torch.float32
        and student.shape[1] <= MOST_PIXELS
        and temperature >= LOWEST_TEMPERATURE
    )


def require_support(student: Tensor, temperature: float) -> None:
    """Raise NotImplementedError, with the reason, if this operator cannot run such a call here."""
    if not serves(student, temperature):
        raise NotImplementedError(
            f"implementation='native' of relational_kl takes at most {MOST_PIXELS} fp32 pixels per image on a CPU and "
            f"a temperature of at least {LOWEST_TEMPERATURE}, got {student.shape[1]} of {student.dtype} on "
            f"{student.device.type} and {temperature}; use 'eager'"
        )
    LIBRARY.require()


def relational_kl(
    student_units: Tensor, teacher_units: Tensor, temperature: float, wants_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Return the scalar loss and its gradient with respect to `student_units` (empty if not wanted)."""
    images, pixels, _ = student_units.shape
    student, teacher = student_units.contiguous(), teacher_units.contiguous()
    loss = student.new_empty((), dtype=torch.float64)
    gradient = torch.empty_like(student_units) if wants_gradient else student.new_empty(0)
    dense = torch.empty_like(student) if wants_gradient and not gradient.is_contiguous() else gradient
    arguments = _Arguments(
        images,
        pixels,
        (student.shape[2], teacher.shape[2]),
        (student.data_ptr(), teacher.data_ptr()),
        1 / temperature,
        dense.data_ptr() if wants_gradient else None,
        loss.data_ptr(),
    )
    if LIBRARY.functions.relate_images(ctypes.byref(arguments), torch.get_num_threads()):
        raise MemoryError("relational_kl has no memory left for the relation of two images")
    # The strides that the operator announces to torch.compile are those of the input.
    return loss.float(), gradient if dense is gradient else gradient.copy_(dense)
