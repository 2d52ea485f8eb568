"""Time every operation at the paper's shapes, with each implementation of it, forward and backward, in fp32.

    make bench
    python -m pytest benchmarks --benchmark-only -k "relational_kl and eager"

Each result is compared with `reference` in float64 before anything is timed; where they disagree the benchmark fails
and prints no time. Runs on the GPU when there is one, with the paper's batch, else on the CPU with two images.
CONTRIBUTING.md says how to compare two commits. On a GPU these times include the host's; `gpu_suite.py` leaves it out.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from harness import worst_error
from sward_kernels import (
    prototype_discrimination,
    relational_kl,
    windowed_distillation,
    windowed_feature_distillation,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU_BATCH = 2
TOLERANCE = 1e-4
"""Largest error of a loss or gradient, relative to the largest value of each."""

Results: TypeAlias = dict[str, Tensor]


class Windowed(NamedTuple):
    """One stage of MWAD: the common grid of student and teacher, with the paper's window size and width."""

    batch: int
    height: int
    width: int
    window_size: int = 8
    dim: int = 64

    def __str__(self) -> str:
        return f"windowed_distillation-B{self.batch}-D{self.dim}-{self.height}x{self.width}-M{self.window_size}"

    def inputs(self) -> list[Tensor]:
        """Return queries, keys and values of student and teacher."""
        shape = (self.batch, 3 * self.dim, self.height, self.width)
        return [_normal(*shape, seed=seed).requires_grad_() for seed in (0, 1)]

    def run(self, inputs: list[Tensor], implementation: str) -> Results:
        student, teacher = inputs
        shift = (3, 5)
        loss = windowed_distillation(
            qkv_student=student,
            qkv_teacher=teacher,
            window_size=self.window_size,
            shift=shift,
            implementation=implementation,
        ).loss
        # The learned projections of the teacher need its gradient too.
        gradients = torch.autograd.grad(loss, (student, teacher))
        return {"loss": loss.detach(), "gradient_student": gradients[0], "gradient_teacher": gradients[1]}


class Features(NamedTuple):
    """One stage of MWAD whose maps have few channels, so that they are projected inside the operation."""

    batch: int
    student_channels: int
    teacher_channels: int
    height: int
    width: int
    window_size: int = 8
    dim: int = 64

    def __str__(self) -> str:
        channels = f"C{self.student_channels}-{self.teacher_channels}"
        return f"windowed_feature_distillation-B{self.batch}-{channels}-{self.height}x{self.width}-M{self.window_size}"

    def inputs(self) -> list[Tensor]:
        """Return features of student and teacher, then their weights."""
        channels = (self.student_channels, self.teacher_channels)
        features = [_normal(self.batch, each, self.height, self.width, seed=each) for each in channels]
        weights = [_normal(3 * self.dim, each, seed=each + 1) / each**0.5 for each in channels]
        return [one.requires_grad_() for one in (*features, *weights)]

    def run(self, inputs: list[Tensor], implementation: str) -> Results:
        features_student, features_teacher, weight_student, weight_teacher = inputs
        loss = windowed_feature_distillation(
            features_student=features_student,
            features_teacher=features_teacher,
            weight_student=weight_student,
            weight_teacher=weight_teacher,
            window_size=self.window_size,
            shift=(3, 5),
            implementation=implementation,
        ).loss
        names = ("features_student", "features_teacher", "weight_student", "weight_teacher")
        gradients = torch.autograd.grad(loss, inputs)
        return {"loss": loss.detach(), **{f"gradient_{name}": one for name, one in zip(names, gradients)}}


class Prototypes(NamedTuple):
    """PDR on the deepest map of one student's encoder."""

    batch: int
    channels: int
    height: int
    width: int
    num_classes: int

    def __str__(self) -> str:
        size = f"B{self.batch}-C{self.channels}-{self.height}x{self.width}"
        return f"prototype_discrimination-{size}-K{self.num_classes}"

    def inputs(self) -> list[Tensor]:
        """Return features and labels; prototypes lie close enough for the margin to act."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.height, self.width)
        labels = torch.randint(self.num_classes, shape, generator=generator).to(DEVICE)
        centres = 0.05 * _normal(self.num_classes, self.channels, seed=1)
        noise = _normal(*shape, self.channels, seed=2)
        features = (centres[labels] + noise).permute(0, 3, 1, 2).contiguous()
        return [features.requires_grad_(), labels]

    def run(self, inputs: list[Tensor], implementation: str) -> Results:
        features, labels = inputs
        loss = prototype_discrimination(features, labels, self.num_classes, implementation=implementation).loss
        return {"loss": loss.detach(), "gradient": torch.autograd.grad(loss, features)[0]}


class Relation(NamedTuple):
    """CIRKD's mini-batch relation on the maps before the classifiers, pooled to `CIRKDLoss`'s `max_pixels`."""

    batch: int
    pixels: int
    channels: int

    def __str__(self) -> str:
        return f"relational_kl-B{self.batch}-P{self.pixels}-C{self.channels}"

    def inputs(self) -> list[Tensor]:
        """Return the pixel vectors of student and teacher."""
        shape = (self.batch, self.pixels, self.channels)
        return [_normal(*shape, seed=0).requires_grad_(), _normal(*shape, seed=1)]

    def run(self, inputs: list[Tensor], implementation: str) -> Results:
        student, teacher = inputs
        loss = relational_kl(student=student, teacher=teacher, implementation=implementation)
        return {"loss": loss.detach(), "gradient": torch.autograd.grad(loss, student)[0]}


Case: TypeAlias = Windowed | Features | Prototypes | Relation

CASES: tuple[Case, ...] = (
    # Cityscapes, crops of 512x1024: the four levels of SAM 2.1.
    *(Windowed(16, height, 2 * height) for height in (128, 64, 32, 16)),
    # Polyps, 512x512: the four levels of MedSAM2.
    *(Windowed(8, height, height) for height in (128, 64, 32, 16)),
    Features(8, 32, 96, 128, 128),  # the first of them against UNeXt
    Prototypes(16, 576, 32, 64, 19),  # Cityscapes, MobileNetV3-Small
    Prototypes(8, 256, 16, 16, 2),  # polyps, UNeXt
    Prototypes(8, 256, 64, 64, 2),  # polyps, ResUNet++
    # Cityscapes; the reference holds B x B maps of P x P scores, which limits the batch.
    Relation(4, 2048, 256),
)
IMPLEMENTATIONS = {
    Windowed: ("reference", "eager", "compiled", "native", "triton"),
    Prototypes: ("reference", "eager", "compiled", "native", "triton"),
    Relation: ("reference", "eager", "native", "triton"),
    Features: ("reference", "eager", "compiled", "native"),  # its Triton kernels take 16-bit types only
}
ELSEWHERE = "native" if DEVICE.type == "cuda" else "triton"
"""The implementation that this device cannot run."""


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def _cases() -> Iterator[Case]:
    for case in CASES:
        yield case if DEVICE.type == "cuda" else case._replace(batch=CPU_BATCH)


@functools.lru_cache(maxsize=1)  # the implementations of one case run one after another
def _inputs_and_oracle(case: Case) -> tuple[list[Tensor], Results]:
    inputs = case.inputs()
    exact = [
        one.detach().double().requires_grad_(one.requires_grad) if one.is_floating_point() else one for one in inputs
    ]
    return inputs, case.run(exact, "reference")


@pytest.mark.parametrize(
    ("case", "implementation"),
    [
        pytest.param(case, implementation, id=f"{case}-{implementation}")
        for case in _cases()
        for implementation in IMPLEMENTATIONS[type(case)]
        if implementation != ELSEWHERE
    ],
)
def test_operation(case: Case, implementation: str, benchmark: BenchmarkFixture) -> None:
    inputs, oracle = _inputs_and_oracle(case)

    def run() -> Results:
        results = case.run(inputs, implementation)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize(DEVICE)
        return results

    # The check is the warm-up too: it compiles whatever has to be compiled.
    error = worst_error(run(), oracle)
    assert error <= TOLERANCE, f"relative error must be at most {TOLERANCE:.0e}, got {error:.1e}; not timed"
    benchmark.group = str(case)
    benchmark.extra_info["relative_error"] = error
    benchmark(run)
