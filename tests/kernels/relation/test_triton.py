"""The Triton kernels of CIRKD's mini-batch relation: in the interpreter without a GPU, on the GPU with one."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from sward_kernels import relational_kl
from sward_kernels.relation import launch, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)


def value_and_gradient(student: Tensor, teacher: Tensor, implementation: str) -> tuple[Tensor, Tensor]:
    student = student.detach().requires_grad_()
    loss = relational_kl(student, teacher, implementation=implementation)
    return loss.detach(), torch.autograd.grad(-3.0 * loss, student)[0]


# Less than a tile, several tiles with a ragged end, more channels than one program writes.
SHAPES = [((1, 3), (4, 2)), ((2, 70), (20, 5)), ((1, 20), (140, 17))]


@pytest.mark.parametrize(("grid", "channels"), SHAPES)
def test_float64_equals_the_reference(grid: tuple[int, int], channels: tuple[int, int]) -> None:
    student, teacher = random(*grid, channels[0]), random(*grid, channels[1])
    actual, expected = (value_and_gradient(student, teacher, name) for name in ("triton", "reference"))
    torch.testing.assert_close(actual, expected, rtol=1e-6 if DEVICE == "cuda" else 1e-10, atol=1e-10)


def test_float32_error_is_within_three_times_that_of_the_plain_form() -> None:
    student, teacher = random(2, 66, 9), random(2, 66, 12)
    exact = value_and_gradient(student, teacher, "reference")
    plain, ours = (value_and_gradient(student.float(), teacher.float(), name) for name in ("reference", "triton"))
    for e, p, o in zip(exact, plain, ours):
        budget = 3 * (p.double() - e).norm() + 3e-7 * e.norm()
        assert (o.double() - e).norm() <= budget


def test_padding_is_never_read_and_every_element_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    # Buffers start as NaN, which shows whatever is not written, or read without having been written.
    empty, empty_like = Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *a, **k: empty(self, *a, **k).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(torch.nan))
    units = [F.normalize(random(2, 5, c), dim=-1) for c in (3, 4)]
    partials, statistics = launch._forward(*units, 0.1)
    gradient = launch._backward(torch.ones((), device=DEVICE, dtype=torch.float64), *units, statistics, 0.1)
    assert partials.isfinite().all()
    assert statistics.isfinite().all()
    assert gradient.isfinite().all()


def test_strided_maps_and_no_gradient() -> None:
    student, teacher = random(1, 5, 2, 4, dtype=torch.float32), random(1, 3, 2, 4, dtype=torch.float32)
    with torch.no_grad():
        actual = relational_kl(student.flatten(2).mT, teacher.flatten(2).mT, implementation="triton")
        expected = relational_kl(student.flatten(2).mT, teacher.flatten(2).mT, implementation="eager")
    torch.testing.assert_close(actual, expected)


def test_registered_operators() -> None:
    units = [F.normalize(random(1, 5, c, dtype=torch.float32), dim=-1) for c in (3, 4)]
    torch.library.opcheck(launch._forward_operator, (*units, 0.1))
    _, statistics = launch._forward(*units, 0.1)
    torch.library.opcheck(launch._backward_operator, (torch.ones((), device=DEVICE), *units, statistics, 0.1))


def test_compiles_as_one_graph() -> None:
    student, teacher = random(1, 6, 4).requires_grad_(), random(1, 6, 3)
    compiled = torch.compile(relational_kl, fullgraph=True, backend="aot_eager")
    actual = compiled(student, teacher, implementation="triton")
    expected = relational_kl(student, teacher, implementation="triton")
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (actual, expected)))


def test_cpu_tensors_without_the_interpreter_are_refused_in_one_sentence() -> None:
    code = (
        "import torch; from sward_kernels import relational_kl\n"
        "try: relational_kl(torch.ones(1, 2, 3), torch.ones(1, 2, 3), implementation='triton')\n"
        "except NotImplementedError as error: print(error)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.strip() == (
        "implementation='triton' needs tensors on a GPU (or TRITON_INTERPRET=1 before Triton is imported); "
        "use 'eager' on the CPU"
    )


def test_backward_runs_eager_where_its_kernel_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tensor:
        raise NotImplementedError("no such instruction")

    monkeypatch.setattr(launch, "_backward_operator", fail)
    monkeypatch.setattr("sward_kernels.fallback._warned", set())
    student, teacher = (F.normalize(random(1, 3, 4), dim=-1) for _ in range(2))
    gradients = []
    for run in (partial(launch.relational_kl, falls_back=True), reference.relational_kl):
        leaf = student.clone().requires_grad_()
        loss = run(leaf, teacher, 0.5)
        if gradients:
            (-2 * loss).backward()
        else:
            with pytest.warns(RuntimeWarning, match="runs eager instead of triton: no such instruction"):
                (-2 * loss).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)
    with pytest.raises(NotImplementedError, match="no such instruction"):
        launch.relational_kl(student.requires_grad_(), teacher, 0.5).backward()
