"""The Triton implementation beyond its numbers: PyTorch's contracts, compilations, memory traffic."""

from __future__ import annotations

import warnings
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

import tests.support.interpreter  # noqa: F401  (makes it fast)
from sward_kernels import windowed_distillation
from sward_kernels.gpu import launching
from sward_kernels.windowed import api, launch, plan
from sward_kernels.windowed.tile_table import Tiles
from tests.support.distillation_cases import WEIGHTS, assert_same, maps_like, run
from tests.support.memory_traffic import Traffic
from tests.support.mocked_gpu import compilations

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
    *_, statistics = launch._forward_operator(student, teacher, 2, (1, 0), None, WEIGHTS, True)
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
    run_launch = launch._launch

    def spy(prepared: Any, arguments: dict[str, Any]) -> None:
        saved.append(arguments["statistics"].numel())
        run_launch(prepared, arguments)

    monkeypatch.setattr(launch, "_launch", spy)
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
    monkeypatch.setattr(launch, "_launch", lambda prepared, _: launched.append(prepared.kernel))
    operations: Counter[Any] = Counter()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            operations[function.overloadpacket] += isinstance(result, Tensor)
            return result

    with FakeTensorMode():
        sides = [torch.empty(2, 24, 9, 9, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        shift = torch.empty(2, device="cuda", dtype=torch.int64)
        upstream = torch.empty((), device="cuda")
        for window_size in (4, 9):
            for _ in range(2):  # the second call finds its plans made
                operations.clear()
                with Record():
                    *_, statistics = launch._forward(*sides, window_size, (0, 0), shift, WEIGHTS, True)
                    launch._backward(upstream, *sides, statistics, window_size, (0, 0), shift, WEIGHTS, True, True)
                # Partial sums and statistics; their sum, and the loss and the terms from it; two gradients.
                aten = torch.ops.aten
                assert +operations == {aten.new_empty: 2, aten.sum: 1, aten.select: 1, aten.div: 2, aten.empty_like: 2}
    assert len(launched) == 8


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


SECOND_CALLS = """
import torch
from sward_kernels import relational_kl, windowed_distillation

def call(batch, height, width, shift, dim=16, window_size=4, dtype=torch.bfloat16):
    sides = [torch.empty(batch, 3 * dim, height, width, dtype=dtype).contiguous(memory_format=torch.channels_last)
             .requires_grad_() for _ in range(2)]
    for _ in range(2):
        windowed_distillation(*sides, window_size, shift, implementation="triton").loss.backward()
    return len(compiled)

for window_size in (4, 9):
    counts.append(call(1, 4, 4, (0, 0), window_size=window_size))
    # Triton would specialise integers that are 1 or a multiple of 16.
    for batch, *size, shift in ((1, 1, 1, (0, 0)), (2, 16, 16, (1, 1)), (3, 33, 17, (2, 3)), (16, 48, 64, (0, 3))):
        counts.append(call(batch, *size, shift, window_size=window_size))
counts.append(call(1, 4, 4, (0, 0), dim=32))

# A mean over stages hands each of them a number of its own, at any address that a number may have.
for window_size in (4, 9):
    maps = [torch.zeros(1, 72, 8 * side, 8, requires_grad=True) for side in (1, 2, 3, 4)]
    losses = [windowed_distillation(each, each.detach(), window_size, implementation="triton").loss for each in maps]
    torch.stack(losses).mean().backward()
    counts.append(len(compiled))
units = torch.randn(2, 3, 8, requires_grad=True)
torch.stack([relational_kl(units, units, implementation="triton") for _ in range(4)]).mean().backward()
counts.append(len(compiled))

# Maps of the same strides, of which the second ones begin between multiples of 16 bytes: Triton's loads are others.
room = torch.zeros(1 + 48 * 16, dtype=torch.bfloat16)
for values in (room[:-1], room[1:]):
    maps = values.view(1, 48, 4, 4).requires_grad_()
    windowed_distillation(maps, maps.detach(), 4, implementation="triton").loss.backward()
    counts.append(len(compiled))
"""


def test_no_shift_batch_size_or_stage_compiles_anything_new() -> None:
    # Two kernels for small windows, two for large ones, two for another D; then one per pass, whatever the stage.
    # Only another alignment, at last, takes two again.
    assert compilations(SECOND_CALLS) == [2] * 5 + [4] * 5 + [6] + [8, 10, 12] + [14, 16]


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Traffic:
    if DEVICE == "cuda":
        pytest.skip("memory traffic is counted in the interpreter")
    return Traffic(launch, monkeypatch)


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
    launching.forget_calls()
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


@pytest.mark.parametrize("failing", ["forward", "backward"])
@pytest.mark.parametrize(
    "error",
    [
        CompilationError("def kernel():", SimpleNamespace(), "no such instruction"),
        OutOfResources(300000, 232448, "shared memory"),
        PTXASError("register allocation failed"),
        RuntimeError("PassManager::run failed"),
        FileNotFoundError("ptxas"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_auto_runs_eager_with_one_warning_where_a_kernel_fails(
    failing: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = _failing_kernel(failing, error, monkeypatch)
    student, teacher = maps(dtype=torch.float32)
    with pytest.warns(RuntimeWarning, match=f"eager instead of triton: .* {failing}_kernel .*{type(error).__name__}"):
        actual = run(student, teacher, 3, (1, 1), implementation="auto", upstream=-2.0)
    # Gradients are eager's; the scalars of a failed backward pass are those of the forward kernel.
    assert_same(actual, run(student, teacher, 3, (1, 1), implementation="eager", upstream=-2.0), 1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = run(student, teacher, 3, (1, 1), implementation="auto", upstream=-2.0)
        run(student[..., 1:], teacher[..., 1:], 3, (1, 1), implementation="auto")  # another size of the same problem
    assert_same(again, run(student, teacher, 3, (1, 1), implementation="eager", upstream=-2.0), 0.0)
    assert len(attempts) == 1  # a compilation that fails may take minutes
    with pytest.raises(NotImplementedError, match="cannot compile or load"):
        run(student, teacher, 3, (1, 1), implementation="triton")


def test_a_failure_disables_neither_other_shapes_nor_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = _failing_kernel("forward", OutOfResources(300000, 232448, "shared memory"), monkeypatch)
    sides = maps(dtype=torch.float32)
    narrow = [side[:, : side.shape[1] // 2] for side in sides]
    others = ((sides, 3), (sides, 4), (narrow, 3), ([side.double() for side in sides], 3))
    for count, (maps_of_call, window_size) in enumerate(others, start=1):
        for _ in range(2):
            with pytest.raises(NotImplementedError, match="OutOfResources"):
                windowed_distillation(*maps_of_call, window_size, implementation="triton")
        assert len(attempts) == count
    ((_, problem), reason) = next(iter(launching._failures.items()))
    launching._failures.clear()
    launching._failures[torch.device("cuda", 1), problem] = reason
    with pytest.raises(NotImplementedError):
        windowed_distillation(*sides, 3, implementation="triton")
    assert len(attempts) == len(others) + 1  # tried on this device, although it failed on another


def test_an_error_of_the_device_is_no_reason_to_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    _failing_kernel("forward", RuntimeError("Triton Error [CUDA]: an illegal memory access"), monkeypatch)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(*maps(dtype=torch.float32), 3, implementation="auto")


def _failing_kernel(failing: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make a kernel raise, and `auto` prefer triton as on a GPU; return the kernel's calls so far."""
    attempts = []

    class Kernel:
        def __init__(self, kernel: Any) -> None:
            self.arg_names, self.__name__, self.kernel = kernel.arg_names, kernel.__name__, kernel

        def __getitem__(self, grid: tuple[int]) -> Any:
            if self.__name__ != f"{failing}_kernel":
                return self.kernel[grid]
            attempts.append(self.__name__)
            raise error

    monkeypatch.setattr(plan, "forward_kernel", Kernel(plan.forward_kernel))
    monkeypatch.setattr(plan, "backward_kernel", Kernel(plan.backward_kernel))
    monkeypatch.setattr(api, "_preferred", lambda qkv, window_size: "triton")
    monkeypatch.setattr("sward_kernels.fallback._warned", set())
    return attempts


def test_old_gpus_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    with FakeTensorMode():
        sides = [torch.empty(1, 24, 4, 4, device="cuda") for _ in range(2)]
        with pytest.raises(
            NotImplementedError, match=r"needs compute capability 8\.0 or higher, got 7\.5 \(Tesla T4\); use 'eager'"
        ):
            windowed_distillation(*sides, 4, implementation="triton")
    launching._unsupported.cache_clear()
