"""The Triton kernels of features beyond their numbers: PyTorch's contracts, compilations, memory traffic."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

import tests.support.interpreter  # noqa: F401  (makes it fast)
from sward_kernels import windowed_feature_distillation
from sward_kernels.gpu import launching
from sward_kernels.windowed_features import launch, plan
from tests.support.distillation_cases import WEIGHTS
from tests.support.feature_cases import Sides, assert_same, run, sides_like
from tests.support.memory_traffic import Traffic
from tests.support.mocked_gpu import compilations

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float64  # a GPU takes 16 bits


def sides_of(height: int = 4, width: int = 3, dtype: torch.dtype = DTYPE, **options: Any) -> Sides:
    return sides_like((1, height, width), dtype=dtype, **options).to(DEVICE)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_opcheck(layout: str) -> None:
    sides = sides_of(layouts=(layout, layout))
    shift = torch.tensor([1, 0], device=DEVICE)
    torch.library.opcheck(launch._forward_operator, (*sides, 2, (1, 0), None, WEIGHTS))
    torch.library.opcheck(launch._forward_operator, (*sides, 2, (0, 0), shift, WEIGHTS))
    upstream = torch.ones((), dtype=torch.promote_types(DTYPE, torch.float32), device=DEVICE)
    for wanted in ((True, True), (False, True)):
        torch.library.opcheck(launch._backward_operator, (upstream, *sides, 2, (1, 0), None, WEIGHTS, *wanted))


def test_one_graph_under_torch_compile_forward_and_backward() -> None:
    def loss(*tensors: Tensor) -> Tensor:
        return windowed_feature_distillation(*tensors, 4, (1, 2), terms=WEIGHTS, implementation="triton").loss * 3

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for height in (4, 5):
        sides = [tensor.requires_grad_() for tensor in sides_of(height)]
        expected = torch.autograd.grad(loss(*sides), sides)
        actual = torch.autograd.grad(compiled(*sides), sides)
        assert all(torch.equal(one, other) for one, other in zip(actual, expected))


def test_a_retained_graph_repeats_its_gradients_bit_for_bit() -> None:
    sides = [tensor.requires_grad_() for tensor in sides_of()]
    loss = windowed_feature_distillation(*sides, 2, implementation="triton").loss
    first = torch.autograd.grad(loss, sides, retain_graph=True)
    copies = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(loss * 2, sides)
    assert all(torch.equal(one, copy) for one, copy in zip(first, copies))
    assert all(torch.equal(two, 2 * copy) for two, copy in zip(second, copies))


def test_nothing_is_saved_but_features_and_weights() -> None:
    sides = [tensor.requires_grad_() for tensor in sides_of()]
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        windowed_feature_distillation(*sides, 2, terms=(1.0, 0.0, 0.0), implementation="triton")
    assert {tensor.data_ptr() for tensor in saved} == {tensor.data_ptr() for tensor in sides}


def test_autocast_computes_in_its_dtype() -> None:
    sides = sides_of(dtype=torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        actual = windowed_feature_distillation(*sides, 2, implementation="triton")
    expected = windowed_feature_distillation(*sides.to(torch.bfloat16), 2, implementation="triton")
    assert torch.equal(actual.loss, expected.loss)


def test_weights_may_have_any_strides() -> None:
    sides = sides_of(channels=(8, 4))
    transposed = sides._replace(weight_student=sides.weight_student.T.contiguous().T)
    assert_same(run(transposed, 2), run(sides, 2), 0.0)


SECOND_CALLS = """
import torch
from sward_kernels import windowed_feature_distillation

def call(batch, height, width, shift, channels=16, upstream=1):
    maps = [torch.empty(batch, height, width, channels, dtype=torch.bfloat16).movedim(3, 1) for _ in range(2)]
    weights = [torch.empty(48, channels, dtype=torch.bfloat16) for _ in range(2)]
    tensors = [maps[0].requires_grad_(), maps[1], weights[0].requires_grad_(), weights[1]]
    losses = [windowed_feature_distillation(*tensors, 4, shift, implementation="triton").loss for _ in range(upstream)]
    torch.stack(losses).mean().backward()
    return len(compiled)

counts.append(call(1, 4, 4, (0, 0)))
# Triton would specialise integers that are 1 or a multiple of 16.
for batch, *size, shift in ((1, 1, 1, (0, 0)), (2, 16, 16, (1, 1)), (3, 33, 17, (2, 3)), (16, 48, 64, (0, 3)),
                            (64, 256, 256, (0, 3))):
    counts.append(call(batch, *size, shift))
counts.append(call(1, 4, 4, (0, 0), upstream=4))
counts.append(call(1, 4, 4, (0, 0), channels=32))
"""


def test_no_shift_batch_size_or_stage_compiles_anything_new() -> None:
    # One kernel per pass, and two for other channels.
    assert compilations(SECOND_CALLS) == [2] * 7 + [4]


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_memory_traffic(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cuda":
        pytest.skip("memory traffic is counted in the interpreter")
    traffic = Traffic(launch, monkeypatch)
    monkeypatch.setattr(plan, "MOST_PROGRAMS", {"forward": 2, "backward": 2})
    run(sides_of(9, 16, channels=(12, 20), dim=24, layouts=(layout, layout)), 8, (3, 1))
    assert len(traffic.launches) == 3
    # Both maps once per pass and side; every element of a gradient once.
    for index, names in ((0, ("student", "teacher")), (1, ("own", "other")), (2, ("own", "other"))):
        for name in names:
            assert set(traffic.times(index, f"load {name}")) == {1}
        assert (traffic.times(index, f"load {names[0]}_weight") == 2).all()  # once per program
    for index in (1, 2):
        assert set(traffic.times(index, "store gradient")) == {1}
        assert set(traffic.times(index, "store partials")) == {1}
    assert traffic.times(1, "store partials").size == 2 * (12 * 12 + 24 * 12)
    assert {name for launched in traffic.launches for name in launched if name.startswith("store")} == {
        "store partials",
        "store gradient",
    }


@pytest.mark.skipif(DEVICE == "cuda", reason="compares with eager in fp32, which a GPU does not take")
@pytest.mark.parametrize("failing", ["forward", "backward"])
@pytest.mark.parametrize("shift", [(1, 1), "tensor"])
def test_auto_makes_queries_keys_and_values_where_a_kernel_fails(
    failing: str, shift: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = []

    class Kernel:
        def __init__(self, kernel: Any) -> None:
            self.arg_names, self.__name__, self.kernel = kernel.arg_names, kernel.__name__, kernel

        def __getitem__(self, grid: tuple[int]) -> Any:
            if self.__name__ != f"{failing}_kernel":
                return self.kernel[grid]
            attempts.append(self.__name__)
            raise OutOfResources(300000, 232448, "shared memory")

    monkeypatch.setattr(plan, "forward_kernel", Kernel(plan.forward_kernel))
    monkeypatch.setattr(plan, "backward_kernel", Kernel(plan.backward_kernel))
    monkeypatch.setattr("sward_kernels.windowed_features.api._prefers_triton", lambda *_: True)
    monkeypatch.setattr("sward_kernels.fallback._warned", set())
    if shift == "tensor":
        shift = torch.tensor([1, 1], device=DEVICE)
    sides = sides_of(dtype=torch.float32)
    with pytest.warns(RuntimeWarning, match=f"makes queries, keys and values .* {failing}_kernel .*OutOfResources"):
        actual = run(sides, 3, shift, implementation="auto", upstream=-2.0)
    assert_same(actual, run(sides, 3, shift, implementation="eager", upstream=-2.0), 1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(sides, 3, shift, implementation="auto")
    assert len(attempts) == 1  # a compilation that fails may take minutes
    with pytest.raises(NotImplementedError, match="cannot compile or load"):
        run(sides, 3, shift, implementation="triton")


def test_forgotten_calls_are_prepared_again() -> None:
    sides = sides_of()
    first = run(sides, 2)
    launching.forget_calls()
    assert not launch._calls
    assert_same(run(sides, 2), first, 0.0)
