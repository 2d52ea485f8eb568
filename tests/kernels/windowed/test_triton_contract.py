"""The Triton implementation beyond its numbers: PyTorch's contracts, compilations, memory traffic."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

import tests.support.interpreter  # noqa: F401  (makes it fast)
from sward_kernels import windowed_distillation
from sward_kernels.windowed import launch, plan
from sward_kernels.windowed.tile_table import Tiles
from tests.support.distillation_cases import WEIGHTS, assert_same, maps_like, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def maps(height: int = 4, width: int = 3, dim: int = 8, **options: Any) -> tuple[Tensor, Tensor]:
    student, teacher = maps_like((1, 3 * dim, height, width), **options)
    return student.to(DEVICE), teacher.to(DEVICE)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_opcheck(layout: str) -> None:
    student, teacher = maps(layout=layout)
    shift = torch.tensor([1, 0], device=DEVICE)
    for save in (True, False):
        torch.library.opcheck(launch._forward_operator, (student, teacher, 2, (1, 0), None, WEIGHTS, save))
    torch.library.opcheck(launch._forward_operator, (student, teacher, 2, (0, 0), shift, WEIGHTS, True))
    _, statistics = launch._forward_operator(student, teacher, 2, (1, 0), None, WEIGHTS, True)
    upstream = torch.ones((), dtype=torch.float64, device=DEVICE)
    for sides in ((True, True), (False, True)):
        arguments = (upstream, student, teacher, statistics, 2, (1, 0), None, WEIGHTS, *sides)
        torch.library.opcheck(launch._backward_operator, arguments)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU takes the weights as fp32, too coarse for finite differences")
@pytest.mark.parametrize("window_size", [2, pytest.param(9, marks=pytest.mark.slow)])
def test_gradcheck(window_size: int) -> None:
    sides = [side.requires_grad_() for side in maps(3, 4, dim=2)]

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return windowed_distillation(student, teacher, window_size, (1, 1), terms=WEIGHTS, implementation="triton").loss

    assert torch.autograd.gradcheck(loss, sides, fast_mode=True)


def test_one_graph_under_torch_compile_forward_and_backward() -> None:
    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return windowed_distillation(student, teacher, 4, (1, 2), terms=WEIGHTS, implementation="triton").loss * 3

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for height in (4, 5):
        sides = [side.requires_grad_() for side in maps(height)]
        expected = torch.autograd.grad(loss(*sides), sides)
        actual = torch.autograd.grad(compiled(*sides), sides)
        assert all(torch.equal(one, other) for one, other in zip(actual, expected))


def test_autocast_leaves_the_precision_alone_and_takes_two_dtypes() -> None:
    student, teacher = maps(dtype=torch.float32)
    plain = windowed_distillation(student, teacher, 2, implementation="triton")
    with torch.autocast(DEVICE, torch.bfloat16):
        same = windowed_distillation(student, teacher, 2, implementation="triton")
        mixed = windowed_distillation(student, teacher.bfloat16(), 2, implementation="triton")
    assert torch.equal(same.loss, plain.loss)
    widened = windowed_distillation(student, teacher.bfloat16().float(), 2, implementation="triton")
    assert torch.equal(mixed.loss, widened.loss)


def test_nothing_is_saved_without_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []
    allocate = launch._allocate_forward

    def spy(*arguments: Any) -> tuple[Tensor, Tensor]:
        saved.append(allocate(*arguments)[1].numel())
        return allocate(*arguments)

    monkeypatch.setattr(launch, "_allocate_forward", spy)
    student, teacher = maps()
    losses = [windowed_distillation(student, teacher, 2, implementation="triton").loss]
    student.requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            losses.append(windowed_distillation(student, teacher, 2, implementation="triton").loss)
    assert saved == [0, 0, 0]
    losses.append(windowed_distillation(student, teacher, 2, implementation="triton").loss)
    assert saved[-1] == 2 * 4 * 4
    assert all(torch.equal(loss, losses[0]) for loss in losses)


def test_a_retained_graph_repeats_its_gradients_bit_for_bit() -> None:
    student, teacher = (side.requires_grad_() for side in maps())
    loss = windowed_distillation(student, teacher, 2, implementation="triton").loss
    first = torch.autograd.grad(loss, (student, teacher), retain_graph=True)
    copies = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(loss * 2, (student, teacher))
    assert all(torch.equal(one, copy) for one, copy in zip(first, copies))
    assert all(torch.equal(two, 2 * copy) for two, copy in zip(second, copies))


def test_the_loss_may_be_changed_in_place() -> None:
    student, teacher = (side.requires_grad_() for side in maps())
    loss = windowed_distillation(student, teacher, 2, implementation="triton").loss
    loss += 1
    loss.backward()
    assert student.grad is not None


def test_a_call_allocates_and_launches_and_does_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    # A CUDA graph needs this: no wait for the device, no copy to or from the host, grids that depend on shapes alone.
    # Fake tensors have no data to read, and stand in for GPU tensors.
    launched = []
    monkeypatch.setattr(plan, "family_of", lambda _: "ampere")
    monkeypatch.setattr(launch, "_launch", lambda plan, *_: launched.append(plan.kernel))
    operations = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            operations.add(function.overloadpacket)
            return function(*args, **(kwargs or {}))

    with FakeTensorMode():
        sides = [torch.empty(2, 24, 9, 9, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        shift = torch.empty(2, device="cuda", dtype=torch.int64)
        upstream = torch.empty((), device="cuda")
        for window_size in (4, 9):
            with Record():
                _, statistics = launch._forward(*sides, window_size, (0, 0), shift, WEIGHTS, True)
                launch._backward(upstream, *sides, statistics, window_size, (0, 0), shift, WEIGHTS, True, True)
    assert len(launched) == 4
    assert operations <= {torch.ops.aten.empty, torch.ops.aten.new_empty, torch.ops.aten.promote_types}


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("window_size", [4, 9])
def test_a_cuda_graph_replays_the_call(window_size: int) -> None:
    sides = [side.requires_grad_() for side in maps(9, 9, dtype=torch.float32)]
    shift = torch.zeros(2, dtype=torch.int64, device=DEVICE)

    def step() -> tuple[Tensor, ...]:
        loss = windowed_distillation(*sides, window_size, shift, terms=WEIGHTS, implementation="triton").loss
        return loss, *torch.autograd.grad(loss, sides)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compiles: not allowed during a capture
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    with torch.no_grad():
        sides[0].mul_(2)
        shift.add_(1)
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(replayed, step()))


# Runs only the part of a launch that requests a compilation: the real argument binding, without compiler and GPU.
SECOND_CALLS = """
import json, torch, triton
from triton.backends.compiler import GPUTarget

class Driver:
    get_current_target = lambda self: GPUTarget("cuda", 80, 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device=None: 0

triton.runtime.driver.set_active(Driver())
compilations = []

def record(kernel, key, signature, *_):
    compilations.append(str(key))
    kernel.device_caches[0][0][key] = triton.compiler.CompiledKernel.__new__(triton.compiler.CompiledKernel)

triton.runtime.jit.JITFunction._do_compile = record
from sward_kernels.windowed import launch
from sward_kernels.windowed.plan import plan_of, problem_of

def call(batch, height, width, shift, dim=16, window_size=4, dtype=torch.bfloat16):
    sides = [torch.empty(batch, 3 * dim, height, width, dtype=dtype).contiguous(memory_format=torch.channels_last)] * 2
    wanted = {"WANTS_STUDENT_GRADIENT": True, "WANTS_TEACHER_GRADIENT": True}
    for direction, flags in (("forward", {"SAVE": True}), ("backward", wanted)):
        plan = plan_of(problem_of(*sides, window_size, (1.0, 1.0, 1.0)), direction, **flags)
        arguments = launch._arguments(*sides, shift, None, (1.0, 1.0, 1.0))
        float32 = torch.empty(16)
        arguments |= dict(partials=float32, statistics=float32, upstream=float32, student_gradient=sides[0],
                          teacher_gradient=sides[1], statistic_stride=batch * 16, inverse_count=1.0 / batch)
        arguments = {name: value for name, value in arguments.items() if name in plan.kernel.arg_names}
        plan.kernel.warmup(**arguments, **plan.constants, grid=(1,), num_warps=plan.tiles.num_warps, num_stages=1)
    return len(compilations)

counts = []
for window_size in (4, 9):
    counts.append(call(1, 4, 4, (0, 0), window_size=window_size))
    # Triton would specialise integers that are 1 or a multiple of 16.
    for batch, *size, shift in ((1, 1, 1, (0, 0)), (2, 16, 16, (1, 1)), (3, 33, 17, (2, 3)), (16, 48, 64, (0, 3))):
        counts.append(call(batch, *size, shift, window_size=window_size))
counts.append(call(1, 4, 4, (0, 0), dim=32))
print(json.dumps(counts))
"""


def test_no_shift_batch_or_size_compiles_anything_new() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    finished = subprocess.run(
        [sys.executable, "-c", SECOND_CALLS], capture_output=True, text=True, env=environment, timeout=300
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    # Two kernels for small windows, two for large ones, and two for another D.
    assert json.loads(finished.stdout) == [2] * 5 + [4] * 5 + [6]


class Traffic:
    """Count the loads and stores of every element, per argument and program; any other address is an error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime import interpreter

        self.launches: list[dict[str, dict[int, np.ndarray]]] = []  # "load student" -> program -> times, by element
        self._arguments: dict[str, Tensor] = {}
        builder = self._builder = interpreter.interpreter_builder
        load, store = builder.create_masked_load, builder.create_masked_store

        def counted_load(pointers: Any, mask: Any, *rest: Any) -> Any:
            self._count("load", pointers.data, mask.data)
            return load(pointers, mask, *rest)

        def counted_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._count("store", pointers.data, mask.data)
            return store(pointers, value, mask, *rest)

        monkeypatch.setattr(builder, "create_masked_load", counted_load)
        monkeypatch.setattr(builder, "create_masked_store", counted_store)
        run_launch = launch._launch

        def recorded(plan: Any, grid: Any, images: int, arguments: dict[str, Any]) -> None:
            self._arguments = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
            self.launches.append({})
            run_launch(plan, grid, images, arguments)

        monkeypatch.setattr(launch, "_launch", recorded)

    def _count(self, kind: str, addresses: np.ndarray, mask: np.ndarray) -> None:
        addresses, mask = np.broadcast_arrays(addresses, mask)
        remaining = addresses[mask].astype(np.int64)
        for name, tensor in self._arguments.items():
            first, reach = tensor.data_ptr(), _reach(tensor)
            here = (remaining >= first) & (remaining < first + reach * tensor.element_size())
            if here.any():
                elements = (remaining[here] - first) // tensor.element_size()
                programs = self.launches[-1].setdefault(f"{kind} {name}", {})
                counts = programs.setdefault(self._builder.grid_idx[0], np.zeros(reach, dtype=np.int64))
                counts += np.bincount(elements, minlength=reach)
            remaining = remaining[~here]
        assert remaining.size == 0, f"{kind} outside of every argument"

    def times(self, index: int, name: str) -> np.ndarray:
        """How often launch `index` loaded or stored each element of an argument, over all programs."""
        return sum(self.launches[index][name].values())

    def stored(self) -> dict[str, np.ndarray]:
        """The arguments that were written, and how often each element was, over all launches."""
        written: dict[str, np.ndarray] = {}
        for index, launched in enumerate(self.launches):
            for name in launched:
                if name.startswith("store"):
                    written[name] = written.get(name, 0) + self.times(index, name)
        return written


def _reach(tensor: Tensor) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) if tensor.numel() else 0


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Traffic:
    if DEVICE == "cuda":
        pytest.skip("memory traffic is counted in the interpreter")
    return Traffic(monkeypatch)


OUTPUTS = {"store statistics", "store partials", "store student_gradient", "store teacher_gradient"}


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_memory_traffic_of_whole_windows(traffic: Traffic, layout: str) -> None:
    student, teacher = maps(9, 8, dim=24, layout=layout)
    run(student, teacher, 8, (3, 1), implementation="triton")
    assert len(traffic.launches) == 2
    for side in ("load student", "load teacher"):
        assert set(traffic.times(0, side)) == {1}
        assert set(traffic.times(1, side)) <= {1, 2, 3}
    assert "load statistics" not in traffic.launches[0]
    written = traffic.stored()
    assert written.keys() == OUTPUTS
    assert all(set(times) == {1} for times in written.values())
    windows, tokens = 2, 64
    assert written["store statistics"].size == 2 * windows * tokens
    assert written["store partials"].size == 4 * windows


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Tiles:
    """Run the kernels of large windows for a window of 25 tokens: two programs of each kind, two steps each."""
    tiles = Tiles(rows=16, keys=16, channels=16, num_warps=1)
    monkeypatch.setattr(plan, "tiles_of", lambda *_: tiles)
    return tiles


def test_programs_of_a_tiled_window_store_once_and_read_no_other_window(traffic: Traffic, small_tiles: Tiles) -> None:
    height, width, dim, side, shift = 5, 6, 8, 5, (3, 1)
    student, teacher = maps(height, width, dim)
    run(student, teacher, side, shift, implementation="triton")
    assert len(traffic.launches) == 2
    written = traffic.stored()
    assert written.keys() == OUTPUTS
    assert all(set(times) == {1} for times in written.values())
    tokens, windows, tiles = side * side, 2, 2
    assert written["store statistics"].size == 5 * windows * tokens
    assert written["store partials"].size == 4 * windows * tiles

    # Beyond 64 tokens a program loads an element once or twice per step. Only neighbouring programs, those of one
    # window, load the same element, so one load reads device memory and the others hit the cache.
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    window_of = ((y - shift[0]) % height // side) * 2 + (x - shift[1]) % width // side
    owner = window_of.expand(3 * dim, height, width).flatten().numpy()
    for index, programs_of_a_window, most in ((0, tiles, tiles), (1, 4 * tiles, 2 * tiles + 2)):
        for name in ("load student", "load teacher"):
            assert traffic.times(index, name).min() > 0
            for program, times in traffic.launches[index][name].items():
                assert set(owner[times > 0]) == {program // programs_of_a_window}
                assert times.max() <= most


def test_sides_of_unlike_layouts_take_a_launch_each(traffic: Traffic, small_tiles: Tiles) -> None:
    student, _ = maps(4, 5, layout="channels_last")
    _, teacher = maps(4, 5)
    run(student, teacher, 5, implementation="triton")
    assert [{name for name in launched if "gradient" in name} for launched in traffic.launches[1:]] == [
        {"store student_gradient"},
        {"store teacher_gradient"},
    ]
    assert all(set(times) == {1} for times in traffic.stored().values())


def test_triton_and_eager_agree_when_auto_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = maps(dtype=torch.float32)
    by_triton = run(student, teacher, 3, (1, 1), implementation="triton")
    assert_same(by_triton, run(student, teacher, 3, (1, 1), implementation="eager"), 1e-5)
