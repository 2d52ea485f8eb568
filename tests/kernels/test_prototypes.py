"""Prototype discrimination: every implementation against loops, by hand, and against the reference."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sward_kernels import prototype_discrimination
from sward_kernels.prototypes import api, classes, closed_form, eager
from tests.support.prototype_cases import by_loops, close_clusters, run

EVERY = ("reference", "eager")


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("implementation", EVERY)
def test_two_classes_by_hand(implementation: str) -> None:
    """Class 0 at (0,0) and (2,0), class 1 at (1,1) alone: means 1 apart, trace 2 and none."""
    features = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    features = features.T.reshape(1, 2, 1, 3).clone().requires_grad_()
    labels = torch.tensor([[[0, 0, 1]]])
    result, gradient = run(implementation, features, labels, 3, margin=1.3, weights=(2.0, 3.0))
    assert result.separation.item() == pytest.approx(0.3)
    assert result.compactness.item() == pytest.approx(2 / 2)
    assert result.loss.item() == pytest.approx(2 * 0.3 + 3 * 1.0)
    assert result.counts.tolist() == [2, 1, 0]
    assert result.prototypes.tolist() == [[1, 0], [1, 1], [0, 0]]
    # separation falls when mu_0 moves down and mu_1 up; each pixel carries 1/n_k of its mean
    # compactness: 2/(K'(n-1)) (f - mu) = (f - mu), times 3
    expected = torch.tensor([[-3.0, 1.0], [3.0, 1.0], [0.0, -2.0]], dtype=torch.float64)
    torch.testing.assert_close(gradient[0, :, 0].T, expected)


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("normalize", [False, True])
@given(
    sizes=st.tuples(*(st.integers(1, 6) for _ in range(4))),
    num_classes=st.integers(1, 9),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    ignore_index=st.sampled_from([255, 0, -1]),
    seed=st.integers(0, 999),
)
@settings(max_examples=40, deadline=None)
def test_equals_loops_over_classes(
    implementation: str,
    normalize: bool,
    sizes: tuple[int, int, int, int],
    num_classes: int,
    ignored: float,
    ignore_index: int,
    seed: int,
) -> None:
    features, labels = close_clusters(*sizes, num_classes, ignored=ignored, ignore_index=ignore_index, seed=seed)
    options = {"ignore_index": ignore_index, "normalize": normalize}
    expected = by_loops(features, labels, num_classes, **options)
    result, gradient = run(implementation, features, labels, num_classes, **options)
    assert result.separation.item() == pytest.approx(expected.separation, abs=1e-12)
    assert result.compactness.item() == pytest.approx(expected.compactness, abs=1e-12)
    np.testing.assert_allclose(result.prototypes.numpy(), expected.prototypes, atol=1e-12)
    np.testing.assert_array_equal(result.counts.numpy(), expected.counts)
    outside = (labels == ignore_index)[:, None].expand_as(gradient)
    assert (gradient[outside] == 0).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("channels", "num_classes"), [(8, 1), (24, 19), (5, 150), (2048, 2)])
def test_gradient_equals_autograd_in_float64(normalize: bool, channels: int, num_classes: int) -> None:
    features, labels = close_clusters(3, channels, 9, 7, num_classes)
    options = {"weights": (0.7, 1.9), "upstream": -2.5, "normalize": normalize}
    expected, expected_gradient = run("reference", features, labels, num_classes, **options)
    result, gradient = run("eager", features, labels, num_classes, **options)
    torch.testing.assert_close(result, expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_each_weight_alone(weights: tuple[float, float]) -> None:
    features, labels = close_clusters(2, 6, 5, 4, 4)
    _, expected = run("reference", features, labels, 4, weights=weights)
    result, gradient = run("eager", features, labels, 4, weights=weights)
    torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=0)
    weighted = weights[0] * result.separation + weights[1] * result.compactness
    torch.testing.assert_close(result.loss.detach(), weighted)
    assert result.separation > 0
    assert result.compactness > 0


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck(implementation: str, normalize: bool) -> None:
    features, labels = close_clusters(2, 4, 3, 3, 3)

    def loss(x: Tensor) -> Tensor:
        return prototype_discrimination(x, labels, 3, normalize=normalize, implementation=implementation).loss

    assert torch.autograd.gradcheck(loss, (features,))


@pytest.mark.parametrize("implementation", EVERY)
def test_large_mean_small_spread(implementation: str) -> None:
    """Features `1000 + N(0, 1)`: `E|f|^2 - |mu|^2` in fp32 would lose the trace, and `a f + b` the gradient."""
    generator = torch.Generator().manual_seed(1)
    features = (1000 + torch.randn(4, 32, 64, 64, generator=generator)).requires_grad_()
    labels = torch.randint(5, (4, 64, 64), generator=generator)
    double = features.detach().double().requires_grad_()
    expected, expected_gradient = run("reference", double, labels, 5, margin=40.0)
    result, gradient = run(implementation, features, labels, 5, margin=40.0)
    assert result.compactness.item() == pytest.approx(expected.compactness.item(), rel=1e-4)
    assert result.separation.item() == pytest.approx(expected.separation.item(), rel=1e-4)
    if implementation != "reference":  # autograd's own fp32 means are no better than their fp32 sums
        assert relative(gradient, expected_gradient) < 1e-4


def test_classes_far_apart_keep_their_traces() -> None:
    """No common shift serves classes at -1000 and 1000; each needs its own mean."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(2, (2, 32, 32), generator=generator)
    noise = torch.randn(2, 8, 32, 32, generator=generator)
    features = (labels[:, None] * 2000.0 - 1000 + noise).requires_grad_()
    expected, expected_gradient = run("reference", features.detach().double().requires_grad_(), labels, 2)
    result, gradient = run("eager", features, labels, 2)
    assert result.compactness.item() == pytest.approx(expected.compactness.item(), rel=1e-4)
    assert relative(gradient, expected_gradient) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalize", [False, True])
def test_error_budget(dtype: torch.dtype, normalize: bool) -> None:
    """No further from float64 than the reference in the same dtype, give or take one rounding of the result."""
    features, labels = close_clusters(4, 48, 20, 20, 11, dtype=dtype)
    double = features.detach().double().requires_grad_()
    expected, expected_gradient = run("reference", double, labels, 11, normalize=normalize)
    reference, reference_gradient = run("reference", features, labels, 11, normalize=normalize)
    result, gradient = run("eager", features, labels, 11, normalize=normalize)
    assert gradient.dtype == dtype
    assert result.loss.dtype == result.prototypes.dtype == torch.float32
    band = torch.finfo(torch.float32).eps
    budget = 2 * (relative(reference.loss, expected.loss) + band)
    assert relative(result.loss, expected.loss) <= budget
    band = torch.finfo(dtype).eps
    assert relative(gradient, expected_gradient) <= 2 * (relative(reference_gradient, expected_gradient) + band)


@pytest.mark.parametrize("implementation", EVERY)
class TestDegenerate:
    def test_all_ignored(self, implementation: str) -> None:
        features, labels = close_clusters(2, 3, 4, 4, 3, ignored=1.0)
        result, gradient = run(implementation, features, labels, 3)
        assert [result.loss.item(), result.separation.item(), result.compactness.item()] == [0, 0, 0]
        assert result.counts.tolist() == [0, 0, 0]
        assert (result.prototypes == 0).all()
        assert (gradient == 0).all()

    def test_one_pixel(self, implementation: str) -> None:
        features = torch.randn(1, 3, 1, 1, dtype=torch.float64, requires_grad=True)
        result, gradient = run(implementation, features, torch.tensor([[[1]]]), 2)
        assert result.loss.item() == 0
        assert (gradient == 0).all()
        torch.testing.assert_close(result.prototypes[1], features.detach().flatten())

    def test_one_class(self, implementation: str) -> None:
        features, _ = close_clusters(2, 3, 4, 4, 1)
        result, _ = run(implementation, features, torch.zeros(2, 4, 4, dtype=torch.int64), 5)
        assert result.separation.item() == 0
        variance = features.detach().permute(0, 2, 3, 1).flatten(0, 2).var(0).sum()
        torch.testing.assert_close(result.compactness, variance)

    def test_equal_prototypes(self, implementation: str) -> None:
        """At distance 0 the hinge is the whole margin and its gradient is 0, not NaN."""
        features = torch.ones(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
        result, gradient = run(implementation, features, torch.tensor([[[0, 1], [1, 2]]]), 3)
        assert result.separation.item() == pytest.approx(1.3)
        assert (gradient == 0).all()

    def test_zero_vectors_normalized(self, implementation: str) -> None:
        features, labels = close_clusters(1, 3, 4, 4, 2, ignored=0)
        features.data[0, :, 0, 0] = 0
        expected = by_loops(features, labels, 2, normalize=True)
        result, gradient = run(implementation, features, labels, 2, normalize=True)
        assert result.compactness.item() == pytest.approx(expected.compactness)
        assert (gradient[0, :, 0, 0] == 0).all()
        assert gradient.isfinite().all()


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
    torch.library.opcheck(classes.class_indices_op, (labels, 4, 255))
    torch.library.opcheck(eager.passes.statistics, (features, labels, 4, 255, normalize))
    slope, offset = torch.rand(4), torch.rand(4, 6)
    torch.library.opcheck(eager.passes.gradient, (features, labels, slope, offset, 255, normalize))


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("label", [-1, 4, 254])
def test_label_outside_the_classes(implementation: str, label: int) -> None:
    features, labels = close_clusters(1, 3, 4, 4, 4)
    labels[0, 1, 2] = label
    with pytest.raises(ValueError, match=rf"labels hold {label}, which is neither a class in 0\.\.3 nor ignore_index"):
        prototype_discrimination(features, labels, 4, implementation=implementation)


X = torch.zeros(2, 3, 4, 4)
Y = torch.zeros(2, 4, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X[0], Y, 2), {}, r"features has shape \[3, 4, 4\]"),
        ((X[:0], Y[:0], 2), {}, r"features has shape \[0, 3, 4, 4\]; it must be a non-empty"),
        ((X.int(), Y, 2), {}, "features has dtype torch.int32"),
        ((X, Y[:, :2], 2), {}, r"labels has shape \[2, 2, 4\]; it must be \[B, H, W\] = \[2, 4, 4\]"),
        ((X, Y.float(), 2), {}, "labels has dtype torch.float32; it must be an integer dtype"),
        ((X, Y.bool(), 2), {}, "labels has dtype torch.bool"),
        ((X, Y.to("meta"), 2), {}, "labels is on meta and features on cpu"),
        ((X, Y, 0), {}, "num_classes=0 must be an int of at least 1"),
        ((X, Y, 2.0), {}, "num_classes=2.0"),
        ((X, Y, 2), {"margin": -1.0}, "margin=-1.0 must be"),
        ((X, Y, 2), {"margin": math.nan}, "margin=nan must be"),
        ((X, Y, 2), {"weights": (1.0,)}, r"weights=\(1.0,\) must be two finite numbers"),
        ((X, Y, 2), {"weights": (1.0, -1.0)}, "must be two finite numbers of at least 0"),
        ((X, Y, 2), {"implementation": "egaer"}, "implementation='egaer' is not known: did you mean 'eager'"),
    ],
)
def test_wrong_arguments(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prototype_discrimination(*arguments, **options)


def test_auto_on_the_cpu_is_eager() -> None:
    features, labels = close_clusters(2, 6, 8, 5, 4)
    result, gradient = run("auto", features, labels, 4)
    expected, expected_gradient = run("eager", features, labels, 4)
    assert torch.equal(result.loss, expected.loss)
    assert torch.equal(gradient, expected_gradient)


def test_memory_is_the_gradient_and_a_chunk() -> None:
    """Forward and backward keep no map of the features' size but the gradient itself."""
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


def test_merging_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes' statistics, summed as all-reduce would, are those of the concatenated batch."""
    features, labels = close_clusters(4, 5, 6, 6, 5)
    whole = closed_form.Statistics(*eager.passes.statistics(features.detach(), labels, 5, 255, False))
    parts = [
        closed_form.Statistics(*eager.passes.statistics(features.detach()[part], labels[part], 5, 255, False))
        for part in (slice(0, 1), slice(1, 4))
    ]
    sums: list[Tensor] = []

    def record(tensor: Tensor, group: object) -> None:
        sums.append(tensor.clone())

    monkeypatch.setattr(torch.distributed, "all_reduce", record)
    for part in parts:
        closed_form.merge_over_processes(part, None)
    totals = sums[0] + sums[2]

    def replay(tensor: Tensor, group: object) -> None:
        if tensor.dim() == 2:
            tensor.copy_(totals)
        else:
            sums.append(tensor.clone())

    monkeypatch.setattr(torch.distributed, "all_reduce", replay)
    merged = [closed_form.merge_over_processes(part, None) for part in parts]
    torch.testing.assert_close(merged[0].counts, whole.counts)
    torch.testing.assert_close(merged[0].means, whole.means)
    torch.testing.assert_close(sums[-1] + sums[-2], whole.scatter)


def test_warns_once_when_auto_leaves_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(features: Tensor, num_classes: int) -> None:
        raise NotImplementedError("no such size")

    class OnGpu(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(api, "_triton_passes", refuse)
    monkeypatch.setattr("sward_kernels.fallback._warned", set())
    features = torch.randn(1, 2, 2, 2).as_subclass(OnGpu)
    with pytest.warns(RuntimeWarning, match="runs eager instead of triton: no such size"):
        assert api._choose_passes("auto", features, 2, False) is eager.passes
    assert api._choose_passes("auto", features, 2, False) is eager.passes
    with pytest.raises(NotImplementedError, match="no such size"):
        api._choose_passes("triton", features, 2, False)
