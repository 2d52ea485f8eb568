"""The Triton implementation of the prototypes beyond its numbers: memory traffic, small operations, compilations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

import tests.support.interpreter  # noqa: F401  (makes it fast)
from sward_kernels.gpu import launching
from sward_kernels.prototypes import launch, plan
from tests.support.mocked_gpu import compilations
from tests.support.prototype_cases import close_clusters

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("poison_empty_tensors")


def case(*sizes: int, layout: str = "nchw") -> tuple[Tensor, Tensor]:
    features, labels = close_clusters(*sizes, dtype=torch.float32)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return features.detach().contiguous(memory_format=memory_format), labels


class Traffic:
    """Record the elements of each tensor that interpreted kernels load and store, without masked lanes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.interpreter import interpreter_builder

        self.loads: list[tuple[int, int]] = []
        self.stores: list[tuple[int, int]] = []
        for name, log in (("create_masked_load", self.loads), ("create_masked_store", self.stores)):
            monkeypatch.setattr(interpreter_builder, name, self._counted(getattr(interpreter_builder, name), log, name))

    @staticmethod
    def _counted(original: Callable, log: list[tuple[int, int]], name: str) -> Callable:
        mask_position = 1 if name == "create_masked_load" else 2

        def counted(*arguments: object) -> object:
            pointers, mask = arguments[0].data, arguments[mask_position].data.astype(bool)
            log.extend(zip(*torch.tensor(pointers[mask].astype("int64")).unique(return_counts=True)))
            return original(*arguments)

        return counted

    @staticmethod
    def of(log: list[tuple[int, int]], tensor: Tensor) -> tuple[int, int]:
        """How many elements of `tensor` were loaded or stored, and how many times in total."""
        begin = tensor.data_ptr()
        end = begin + tensor.untyped_storage().nbytes()
        mine = [(int(address), int(times)) for address, times in log if begin <= int(address) < end]
        return len({address for address, _ in mine}), sum(times for _, times in mine)


@pytest.mark.skipif(DEVICE == "cuda", reason="counts what the interpreter does")
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("num_classes", [2, 19, 64, 150, 256])
def test_features_and_gradient_move_once(monkeypatch: pytest.MonkeyPatch, layout: str, num_classes: int) -> None:
    features, labels = case(2, 40, 10, 7, num_classes, layout=layout)
    values = features.detach()
    traffic = Traffic(monkeypatch)
    watch(PASSES, traffic, monkeypatch)
    launch.passes.statistics(values, labels, num_classes, 255, False)
    assert traffic.of(traffic.loads, values) == (values.numel(), values.numel())
    assert traffic.of(traffic.stores, values) == (0, 0)

    traffic.loads.clear()
    traffic.stores.clear()
    slope, offset = torch.rand(num_classes), torch.rand(num_classes, 40)
    gradient = launch.passes.gradient(values, labels, slope, offset, 255, False)
    assert traffic.of(traffic.loads, values) == (values.numel(), values.numel())
    assert traffic.of(traffic.stores, gradient) == (values.numel(), values.numel())
    assert not gradient.isnan().any()


@pytest.mark.skipif(DEVICE == "cuda", reason="counts what the interpreter does")
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_normalized_features_are_read_twice_by_one_program(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    """Features are read once for the lengths and once for the sums; besides, only tables of classes are stored."""
    features, labels = case(2, 40, 20, 14, 19, layout=layout)
    values = features.detach()
    constants, _ = plan.problem_of(values, labels, 19, True).constants("statistics")
    chunk = constants["BLOCK_PIXELS"] * constants["TILES"]
    traffic = Traffic(monkeypatch)
    programs = watch(PASSES, traffic, monkeypatch)
    launch.passes.statistics(values, labels, 19, 255, True)
    assert programs == [2 * -(-20 * 14 // chunk)]  # each with a chunk of pixels to itself
    assert traffic.of(traffic.loads, values) == (values.numel(), 2 * values.numel())
    assert len(traffic.stores) == programs[0] * 19 * (40 + 2)  # sums, and squares of two blocks of channels

    traffic.loads.clear()
    traffic.stores.clear()
    gradient = launch.passes.gradient(values, labels, torch.rand(19), torch.rand(19, 40), 255, True)
    assert traffic.of(traffic.loads, values) == (values.numel(), 2 * values.numel())
    assert traffic.of(traffic.stores, gradient) == (values.numel(), values.numel())


def test_a_call_allocates_and_launches_and_adds_one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small operations of PyTorch around the kernels took most of a call's time on the host."""
    launched = []
    monkeypatch.setattr(plan, "family_of", lambda _: "ampere")
    monkeypatch.setattr(
        launching.PreparedLaunch, "__call__", lambda prepared, *_: launched.append(prepared.kernel.__name__)
    )
    operations: Counter[Any] = Counter()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            operations[function.overloadpacket] += isinstance(result, Tensor)
            return result

    with FakeTensorMode():
        features = torch.empty(2, 64, 9, 9, device="cuda", dtype=torch.bfloat16, memory_format=torch.channels_last)
        labels = torch.empty(2, 9, 9, device="cuda", dtype=torch.int64)
        upstream = torch.empty((), device="cuda")
        for _ in range(2):  # the second call finds its plans made
            operations.clear()
            launched.clear()
            with Record():
                statistics = launch._statistics(features, labels, 19, 255, False)
                *_, slope, offset = launch._closed_form(*statistics, 1.3, (1.0, 1.0), features)
                launch._gradient(features, labels, slope, offset, 255, False, upstream)
    aten = torch.ops.aten
    # Outputs of the kernels; the scatter of a class is the sum of what its blocks of channels have.
    del operations[aten.fill_]  # of the fixture that poisons empty tensors
    assert +operations == {aten.new_empty: 13, aten.empty_like: 2, aten.sum: 1, aten.clamp_: 1}
    assert launched == [
        "count_kernel", "first_pixels_kernel", "statistics_kernel", "means_kernel",
        "loss_kernel", "total_kernel", "gradient_kernel",
    ]  # fmt: skip


SECOND_CALLS = """
import torch
from sward_kernels import prototype_discrimination

def call(batch, height, width, **options):
    features = torch.zeros(batch, 32, height, width).contiguous(memory_format=torch.channels_last).requires_grad_()
    labels = torch.zeros(batch, height, width, dtype=torch.int64)
    losses = [prototype_discrimination(features, labels, 5, implementation="triton", **options).loss for _ in range(2)]
    torch.stack(losses).mean().backward()
    return len(compiled)

counts.append(call(1, 4, 4))
for batch, *size, ignore_index in ((1, 3, 5, 1), (2, 16, 16, 16), (3, 33, 17, -1), (16, 48, 64, 255)):
    counts.append(call(batch, *size, ignore_index=ignore_index))
counts += [call(1, 4, 4, margin=2, terms=(0.5, 0)), call(1, 4, 4, margin=0.7, terms=(1, 0.25))]
"""


def test_no_size_weight_or_upstream_compiles_anything_new() -> None:
    assert compilations(SECOND_CALLS) == [7] * 7


def test_programs_for_every_multiprocessor() -> None:
    """Normalised statistics of sixteen maps of 32 x 64: with many channels per program, few pixels must suffice."""
    for num_classes, channels in plan.REPORTED_SIZES:
        problem = plan.Problem(channels, num_classes, torch.bfloat16, True, True, True, False, True, "hopper")
        constants, _ = problem.constants("statistics")
        chunks = -(-32 * 64 // (constants["BLOCK_PIXELS"] * constants["TILES"]))
        blocks = -(-channels // constants["BLOCK_CHANNELS"])
        assert 16 * chunks * -(-blocks // constants["OWN_BLOCKS"]) >= 128


PASSES = {"statistics_kernel", "gradient_kernel", "normalized_gradient_kernel"}
"""The kernels that read all features."""


def watch(kernels: set[str], traffic: Traffic, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let `traffic` forget what other kernels load and store; return how many programs these take, launch by launch."""
    launched = launching.PreparedLaunch.__call__
    programs = []

    def launch_and_forget(prepared: launching.PreparedLaunch, device: torch.device, arguments: dict) -> None:
        loads, stores = len(traffic.loads), len(traffic.stores)
        launched(prepared, device, arguments)
        if prepared.kernel.__name__ in kernels:
            programs.append(prepared.programs)
        else:
            del traffic.loads[loads:], traffic.stores[stores:]

    monkeypatch.setattr(launching.PreparedLaunch, "__call__", launch_and_forget)
    return programs


@pytest.mark.skipif(DEVICE == "cuda", reason="counts what the interpreter does")
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_besides_the_passes_one_pixel_of_each_class_is_read(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    features, labels = case(2, 40, 10, 7, 19, layout=layout)
    labels[labels == 4] = 5  # an absent class
    values = features.detach()
    traffic = Traffic(monkeypatch)
    programs = watch({"count_kernel", "first_pixels_kernel"}, traffic, monkeypatch)
    counts, _, _ = launch.passes.statistics(values, labels, 19, 255, False)
    present = int((counts > 0).sum())
    assert present < 19
    assert programs == [2, 19]  # one per image, one per class
    assert traffic.of(traffic.loads, values) == (present * 40, present * 40)
    assert traffic.of(traffic.loads, labels) == (labels.numel(), labels.numel())


@pytest.mark.parametrize(
    "target",
    [pytest.param("sm_80", marks=pytest.mark.slow), pytest.param("sm_89", marks=pytest.mark.slow), "sm_90", "gfx942"],
)
def test_kernels_compile_within_the_limits_of_a_target(target: str) -> None:
    """The widest features and all class tables, one dtype: `python -m sward_kernels.report` compiles every one."""
    from sward_kernels.report import report

    rows = report(
        [target],
        lambda shipped: (
            shipped.operation == "prototypes"
            and shipped.details["dtype"] == "bf16"
            and shipped.details["layout"] == "channels_last"
            and shipped.constants["CHANNELS"] == 576
        ),
    )
    assert {row["pass"] for row in rows} == {
        f"{direction} K={num_classes}{normalize}"
        for direction in ("statistics", "gradient")
        for num_classes in (19, 64, 100)
        for normalize in ("", " normalize")
    }
    for row in rows:
        assert row["spill_bytes"] == row["stack_bytes"] == 0, row
        assert row["shared_bytes"] <= row["shared_limit"], row
        assert row["vector_loads"] >= 1, row
