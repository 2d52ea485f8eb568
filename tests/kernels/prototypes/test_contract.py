"""Layouts, dtypes, repeatability, graphs and messages of the prototype regularization."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sward_kernels import prototype_discrimination
from sward_kernels.prototypes import api, closed_form, eager
from sward_kernels.prototypes.passes import Passes
from tests.support.prototype_cases import close_clusters, run

EVERY = ("reference", "eager")


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "transposed", "expanded"])
@pytest.mark.parametrize("implementation", EVERY)
def test_strides(implementation: str, layout: str) -> None:
    dense, labels = close_clusters(2, 6, 8, 5, 4)
    values = dense.detach()
    if layout == "channels_last":
        features = values.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        features = torch.randn(3, 9, 10, 12, dtype=values.dtype)[1:, 2:8, 1:9, 3:8]
        features.copy_(values)
    elif layout == "transposed":
        features = values.transpose(2, 3).contiguous().transpose(2, 3)
    else:
        features = values[:1].expand(2, -1, -1, -1)
    features.requires_grad_()
    expected, expected_gradient = run("reference", features.detach().contiguous().requires_grad_(), labels, 4)
    result, gradient = run(implementation, features, labels, 4)
    torch.testing.assert_close(result, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-12, rtol=1e-12)
    if layout == "channels_last" or (layout == "transposed" and implementation == "eager"):
        assert gradient.stride() == features.stride()


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32]
)
@pytest.mark.parametrize("implementation", EVERY)
def test_label_dtypes(implementation: str, dtype: torch.dtype) -> None:
    ignore_index = 100
    features, labels = close_clusters(2, 4, 6, 5, 7, ignore_index=ignore_index)
    expected, expected_gradient = run("reference", features, labels, 7, ignore_index=ignore_index)
    result, gradient = run(implementation, features, labels.to(dtype), 7, ignore_index=ignore_index)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_many_chunks_agree_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = close_clusters(5, 6, 12, 11, 4)
    expected, expected_gradient = run("eager", features, labels, 4)
    monkeypatch.setattr(eager, "_CHUNK_BYTES", {"cpu": 6 * 11 * 8 * 5})
    assert len(list(eager._chunks(features.detach()))) == 15
    result, gradient = run("eager", features, labels, 4)
    torch.testing.assert_close(result, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-12, rtol=1e-12)


@given(st.integers(1, 9), st.integers(1, 2000), st.integers(1, 200), st.integers(1, 9000))
def test_chunks_cover_every_row_once(batch: int, channels: int, height: int, width: int) -> None:
    seen = torch.zeros(batch, height, dtype=torch.int64)
    for images, _, rows, _ in eager._chunks(torch.empty(batch, channels, height, width, device="meta")):
        seen[images, rows] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("implementation", EVERY)
def test_repeats_bit_for_bit(implementation: str) -> None:
    features, labels = close_clusters(2, 16, 24, 24, 19, dtype=torch.float32)
    first, first_gradient = run(implementation, features, labels, 19)
    for _ in range(3):
        result, gradient = run(implementation, features, labels, 19)
        assert all(torch.equal(*pair) for pair in zip(result, first))
        assert torch.equal(gradient, first_gradient)


@pytest.mark.parametrize("implementation", EVERY)
def test_backward_twice_and_two_losses_on_one_input(implementation: str) -> None:
    features, labels = close_clusters(2, 6, 8, 5, 4)
    kept = features.detach().clone()
    first = prototype_discrimination(features, labels, 4, implementation=implementation).loss
    second = prototype_discrimination(features, labels, 4, margin=3.0, implementation=implementation).loss
    (once,) = torch.autograd.grad(first, features, retain_graph=True)
    (again,) = torch.autograd.grad(first, features, retain_graph=True)
    assert torch.equal(once, again)
    (other,) = torch.autograd.grad(second, features, retain_graph=True)
    (both,) = torch.autograd.grad(first + second, features)
    torch.testing.assert_close(both, once + other)
    assert torch.equal(features.detach(), kept)


@pytest.mark.parametrize("implementation", EVERY)
def test_without_gradients(implementation: str) -> None:
    features, labels = close_clusters(2, 6, 8, 5, 4)
    expected = prototype_discrimination(features, labels, 4, implementation=implementation)
    assert expected.loss.requires_grad
    assert not any(tensor.requires_grad for tensor in expected[1:])
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            result = prototype_discrimination(features, labels, 4, implementation=implementation)
        assert not result.loss.requires_grad
        assert torch.equal(result.loss, expected.loss.detach())


@pytest.mark.parametrize("implementation", EVERY)
def test_autocast_does_not_lower_the_precision(implementation: str) -> None:
    features, labels = close_clusters(2, 6, 8, 5, 4, dtype=torch.float32)
    expected, expected_gradient = run(implementation, features, labels, 4)
    half = features.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = prototype_discrimination(features, labels, 4, implementation=implementation)
        low = prototype_discrimination(half, labels, 4, implementation=implementation)
        if implementation != "reference":  # its backward is autograd's, which obeys the autocast around it
            (gradient,) = torch.autograd.grad(result.loss, features, retain_graph=True)
            assert torch.equal(gradient, expected_gradient)
    (gradient,) = torch.autograd.grad(result.loss, features)
    assert torch.equal(result.loss, expected.loss)
    assert torch.equal(gradient, expected_gradient)
    assert low.loss.dtype == torch.float32
    assert torch.autograd.grad(low.loss, half)[0].dtype == torch.bfloat16


def test_compiles_into_one_graph() -> None:
    features, labels = close_clusters(2, 6, 8, 5, 4)

    @torch.compile(fullgraph=True)
    def step(x: Tensor, y: Tensor) -> Tensor:
        return prototype_discrimination(x * 2, y, 4).loss + 1

    expected, expected_gradient = run("reference", (features.detach() * 2).requires_grad_(), labels, 4)
    loss = step(features, labels)
    (gradient,) = torch.autograd.grad(loss, features)
    torch.testing.assert_close(loss, expected.loss + 1)
    torch.testing.assert_close(gradient, expected_gradient * 2)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("normalize", [False, True])
def test_opcheck(layout: torch.memory_format, normalize: bool) -> None:
    features, labels = close_clusters(2, 6, 8, 5, 4, dtype=torch.float32)
    features = features.detach().contiguous(memory_format=layout)
    torch.library.opcheck(eager.passes.statistics, (features, labels, 4, 255, normalize))
    slope, offset = torch.rand(4), torch.rand(4, 6)
    torch.library.opcheck(eager.passes.gradient, (features, labels, slope, offset, 255, normalize))


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("label", [-1, 4, 254])
def test_label_outside_the_classes(implementation: str, label: int) -> None:
    features, labels = close_clusters(1, 3, 4, 4, 4)
    labels[0, 1, 2] = label
    with pytest.raises(ValueError, match=rf"labels must be classes in 0\.\.3 or ignore_index=255, got {label}$"):
        prototype_discrimination(features, labels, 4, implementation=implementation)


X = torch.zeros(2, 3, 4, 4)
Y = torch.zeros(2, 4, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X[0], Y, 2), {}, r"features must be .*, got shape \(3, 4, 4\)"),
        ((X[:0], Y[:0], 2), {}, r"features must be a non-empty \[B, C, H, W\], got shape \(0, 3, 4, 4\)"),
        ((X.int(), Y, 2), {}, "features must have a floating dtype, got torch.int32"),
        ((X, Y[:, :2], 2), {}, r"labels must be \[B, H, W\] = \[2, 4, 4\], .*, got shape \(2, 2, 4\)"),
        ((X, Y.float(), 2), {}, "labels must have an integer dtype, got torch.float32"),
        ((X, Y.bool(), 2), {}, "labels must have an integer dtype, got torch.bool"),
        ((X, Y.to("meta"), 2), {}, "on the same device, got cpu and meta"),
        ((X, Y, 0), {}, "num_classes must be an int of at least 1, got 0"),
        ((X, Y, 2.0), {}, "num_classes must be an int of at least 1, got 2.0"),
        ((X, Y, 2), {"margin": -1.0}, "margin must be a finite number of at least 0, got -1.0"),
        ((X, Y, 2), {"margin": math.nan}, "margin must be a finite number of at least 0, got nan"),
        ((X, Y, 2), {"terms": (1.0,)}, r"terms must be two finite numbers of at least 0, .*, got \(1.0,\)"),
        ((X, Y, 2), {"terms": (1.0, -1.0)}, r"terms must be .*, got \(1.0, -1.0\)"),
        ((X, Y, 2), {"implementation": "egaer"}, "implementation must be one of .*, got 'egaer'; did you mean 'eager'"),
    ],
)
def test_wrong_arguments(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prototype_discrimination(*arguments, **options)


def test_auto_on_the_cpu_is_eager_in_float64() -> None:
    features, labels = close_clusters(2, 6, 8, 5, 4)
    result, gradient = run("auto", features, labels, 4)
    expected, expected_gradient = run("eager", features, labels, 4)
    assert torch.equal(result.loss, expected.loss)
    assert torch.equal(gradient, expected_gradient)


def test_memory_is_the_gradient_and_a_chunk() -> None:
    """The gradient is the only tensor of the features' size that forward and backward allocate."""
    code = """
import sys, torch
sys.path.insert(0, "benchmarks")
from harness import peak_extra_bytes
from sward_kernels import prototype_discrimination
x = torch.randn(8, 256, 64, 64, requires_grad=True)
y = torch.randint(19, (8, 64, 64))
def step():
    torch.autograd.grad(prototype_discrimination(x, y, 19, implementation="eager").loss, x)
step()
print(peak_extra_bytes(step, torch.device("cpu")) / (x.numel() * 4))
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(output.stdout) < 1.5


def test_warns_once_when_auto_leaves_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(features: Tensor, num_classes: int) -> None:
        raise NotImplementedError("no such size")

    class OnGpu(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(api, "_triton_passes", refuse)
    monkeypatch.setattr("sward_kernels.fallback._warned", set())
    features = torch.randn(1, 2, 2, 2).as_subclass(OnGpu)
    with pytest.warns(RuntimeWarning, match="runs eager instead of triton: no such size"):
        assert api._choose_passes("auto", features, 2) is eager.passes
    assert api._choose_passes("auto", features, 2) is eager.passes
    with pytest.raises(NotImplementedError, match="no such size"):
        api._choose_passes("triton", features, 2)


def test_auto_runs_eager_where_a_pass_of_triton_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tensor:
        raise NotImplementedError("no such instruction")

    monkeypatch.setattr("sward_kernels.fallback._warned", set())
    features, labels = torch.randn(1, 2, 3, 4), torch.randint(3, (1, 3, 4))
    arguments = (labels, 3, 1.3, (1.0, 1.0), 255, False, None)
    results = []
    for passes in (
        eager.passes,
        api._or_eager(Passes(eager.passes.statistics, fail)),
        api._or_eager(Passes(fail, fail)),
    ):
        leaf = features.clone().requires_grad_()
        loss = closed_form.prototype_discrimination(leaf, *arguments, passes)[0]
        if passes is not eager.passes and len(results) == 1:
            with pytest.warns(RuntimeWarning, match="runs eager instead of triton: no such instruction"):
                loss.backward()
        else:
            loss.backward()
        results.append(leaf.grad)
    assert all(torch.equal(gradient, results[0]) for gradient in results)
