"""Time and memory of CIRKD's mini-batch relation, forward and backward, against the plain form.

    python benchmarks/relational_kl_throughput.py

Runs on the GPU when there is one. Writes a CSV file to `benchmarks/results/`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from harness import Case, Provider, Session
from sward_kernels import relational_kl

# (images, pixels, channels of the student, of the teacher): the default `max_pixels`, few and many channels.
SHAPES = ((2, 2048, 64, 64), (2, 2048, 128, 256), (4, 1024, 128, 256))


def step(student: Tensor, teacher: Tensor, implementation: str) -> Callable[[], Mapping[str, Tensor]]:
    def run() -> Mapping[str, Tensor]:
        leaf = student.detach().requires_grad_()
        loss = relational_kl(student=leaf, teacher=teacher, implementation=implementation)
        return {"loss": loss.detach(), "gradient": torch.autograd.grad(loss, leaf)[0]}

    return run


def main() -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    session = Session("relational_kl", device)
    session.print_banner()
    for images, pixels, student_channels, teacher_channels in SHAPES:
        generator = torch.Generator().manual_seed(0)
        student = torch.randn(images, pixels, student_channels, generator=generator).to(device)
        teacher = torch.randn(images, pixels, teacher_channels, generator=generator).to(device)
        case = Case(
            name=f"B={images} P={pixels} C_s={student_channels} C_t={teacher_channels}",
            oracle=step(student.double(), teacher.double(), "reference")(),
            tolerance=1e-4,
            ideal_bytes=4 * (teacher.numel() + 2 * student.numel()),
            baseline="plain",
        )
        providers = [
            Provider("plain", step(student, teacher, "reference")),
            Provider("eager", step(student, teacher, "eager")),
        ]
        if device.type == "cpu":
            providers.append(Provider("native", step(student, teacher, "native")))
        if device.type == "cuda":
            providers.append(Provider("triton", step(student, teacher, "triton")))
        session.run(case, providers, rounds=5, max_seconds=20.0)
    session.write_csv(Path(__file__).parent / "results" / f"relational_kl_{device.type}.csv")
    return session.exit_code


if __name__ == "__main__":
    sys.exit(main())
