"""Prototype discrimination: implementations compared with loops, with values by hand, and with the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sward_kernels import prototype_discrimination
from sward_kernels.prototypes import closed_form, eager
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
    result, gradient = run(implementation, features, labels, 3, margin=1.3, terms=(2.0, 3.0))
    assert result.separation.item() == pytest.approx(0.3)
    assert result.compactness.item() == pytest.approx(2 / 2)
    assert result.loss.item() == pytest.approx(2 * 0.3 + 3 * 1.0)
    assert result.counts.tolist() == [2, 1, 0]
    assert result.prototypes.tolist() == [[1, 0], [1, 1], [0, 0]]
    # Separation falls when mu_0 moves down and mu_1 up; each pixel contributes 1/n_k of its mean.
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
@settings(max_examples=40)
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
    options = {"terms": (0.7, 1.9), "upstream": -2.5, "normalize": normalize}
    expected, expected_gradient = run("reference", features, labels, num_classes, **options)
    result, gradient = run("eager", features, labels, num_classes, **options)
    torch.testing.assert_close(result, expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_each_weight_alone(weights: tuple[float, float]) -> None:
    features, labels = close_clusters(2, 6, 5, 4, 4)
    _, expected = run("reference", features, labels, 4, terms=weights)
    result, gradient = run("eager", features, labels, 4, terms=weights)
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
    """Classes at -1000 and 1000 need a shift of their own each; a common one would lose their traces."""
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
    """Errors are no larger than twice those of the reference in the same dtype plus one rounding of the result."""
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


@pytest.mark.parametrize("scale", [1e-10, 1e14])
def test_long_and_short_features_normalised(scale: float) -> None:
    """Features whose cubed inverse length is outside of the range of fp32."""
    features, labels = close_clusters(2, 48, 8, 8, 5, dtype=torch.float32)
    features = (features.detach() * scale).requires_grad_()
    _, expected = run("reference", features.detach().double().requires_grad_(), labels, 5, normalize=True)
    _, gradient = run("eager", features, labels, 5, normalize=True)
    assert relative(gradient, expected) < 1e-5


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
        """At distance 0 the hinge equals the margin, and its gradient is 0 and not NaN."""
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
