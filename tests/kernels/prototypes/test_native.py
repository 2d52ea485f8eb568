"""The two passes of prototype discrimination in C++, compared with the reference in float64 and with eager."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from sward_kernels import cpp, prototype_discrimination
from sward_kernels.prototypes import native
from tests.support.prototype_cases import close_clusters, run

REASON = native.LIBRARY.why_not()
pytestmark = [
    pytest.mark.usefixtures("poison_empty_tensors"),
    pytest.mark.skipif(REASON is not None, reason=f"the C++ does not compile here: {REASON}"),
]


def layouts(values: Tensor) -> dict[str, Tensor]:
    """The same features in all strides that the C++ has separate code for."""
    batch, channels, height, width = values.shape
    room = torch.full((batch, channels + 1, height + 2, width + 3), float("nan"))
    sliced = room[:, 1:, 1:-1, 2:-1]
    sliced.copy_(values)
    last = torch.full((batch, height + 1, width + 2, channels + 8), float("nan"))[:, 1:, 1:-1, :channels]
    last.copy_(values.permute(0, 2, 3, 1))
    return {
        "nchw": values,
        "channels_last": values.contiguous(memory_format=torch.channels_last),
        "sliced": sliced,
        "sliced channels_last": last.permute(0, 3, 1, 2),
        "transposed": values.mT.contiguous().mT,
    }


def check(features: Tensor, labels: Tensor, num_classes: int, **options: Any) -> None:
    """Terms to 1e-5 and gradients to 1e-5 of the largest, whatever the layout."""
    double = features.detach().double().requires_grad_()
    expected, expected_gradient = run("reference", double, labels, num_classes, **options)
    rounding = 1e-9
    if options.get("normalize"):
        # What points along a vector cancels; with one channel that is all of the gradient. Twice the weight of
        # compactness bounds its gradient to a unit vector.
        lengths = double.detach().norm(dim=1)
        rounding += 1e-6 * 2 * options.get("terms", (1.0, 1.0))[1] / lengths[lengths > 1e-12].min().item()
    for name, layout in layouts(features.detach()).items():
        result, gradient = run("native", layout.requires_grad_(), labels, num_classes, **options)
        assert torch.equal(result.counts, expected.counts)
        for term in ("loss", "separation", "compactness", "prototypes"):
            actual, truth = getattr(result, term).double(), getattr(expected, term).double()
            torch.testing.assert_close(actual, truth, rtol=1e-5, atol=1e-6, msg=f"{term}, {name}")
        error = (gradient.double() - expected_gradient).abs().max()
        assert error <= 1e-5 * expected_gradient.abs().max() + rounding, name
        assert gradient.stride() == torch.empty_like(layout).stride()


@pytest.mark.parametrize("num_classes", [1, 2, 19, 150, 256])
@pytest.mark.parametrize("channels", [1, 8, 24, 27, 96, 576])
def test_channels_and_classes(channels: int, num_classes: int) -> None:
    features, labels = close_clusters(2, channels, 9, 11, num_classes, dtype=torch.float32)
    check(features, labels, num_classes)


@pytest.mark.parametrize(("channels", "num_classes"), [(1, 19), (8, 2), (27, 19), (96, 1), (576, 150)])
def test_normalised_channels_and_classes(channels: int, num_classes: int) -> None:
    # 99 pixels per image: more than the 64 that are measured together.
    features, labels = close_clusters(2, channels, 9, 11, num_classes, dtype=torch.float32)
    check(features, labels, num_classes, normalize=True)


@settings(max_examples=30)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 9), st.integers(1, 90)),
    num_classes=st.integers(1, 9),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    ignore_index=st.sampled_from([255, 0, -1]),
    labels_dtype=st.sampled_from([torch.int64, torch.int32, torch.int16]),
    normalize=st.booleans(),
)
def test_any_shape(
    sizes: tuple[int, int, int, int],
    num_classes: int,
    ignored: float,
    ignore_index: int,
    labels_dtype: torch.dtype,
    normalize: bool,
) -> None:
    options = {"ignored": ignored, "ignore_index": ignore_index, "labels_dtype": labels_dtype}
    features, labels = close_clusters(*sizes, num_classes, dtype=torch.float32, **options)
    check(features, labels, num_classes, ignore_index=ignore_index, terms=(0.7, 1.9), normalize=normalize)


@pytest.mark.parametrize("length", [1e-8, 1e8])
def test_normalised_vectors_of_any_length_and_zero_vectors(length: float) -> None:
    features, labels = close_clusters(2, 20, 7, 13, 3, dtype=torch.float32)
    features = features.detach() * length
    features[0, :, 2] = 0
    check(features, labels, 3, normalize=True)
    _, gradient = run("native", features.requires_grad_(), labels, 3, normalize=True)
    assert (gradient[0, :, 2] == 0).all()
    # The loss does not change along a vector, so its gradient is at a right angle to it.
    along = (gradient.double() * features.double()).sum(1).abs()
    assert (along <= 1e-5 * gradient.norm(dim=1) * features.norm(dim=1) + 1e-12).all()


@pytest.mark.parametrize("channels_last", [False, True])
def test_sums_of_many_pixels_keep_their_digits(channels_last: bool) -> None:
    """Features `1000 + N(0, 1)`, classes 2000 apart, and more pixels than one fp32 sum may have."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(3, (3, 64, 96), generator=generator)
    noise = torch.randn(3, 24, 64, 96, generator=generator)
    features = 1000 + 2000.0 * (labels == 2)[:, None] + noise
    if channels_last:
        features = features.contiguous(memory_format=torch.channels_last)
    expected, expected_gradient = run("reference", features.double().requires_grad_(), labels, 3, margin=40.0)
    result, gradient = run("native", features.requires_grad_(), labels, 3, margin=40.0)
    assert result.compactness.item() == pytest.approx(expected.compactness.item(), rel=1e-5)
    assert result.separation.item() == pytest.approx(expected.separation.item(), rel=1e-4)
    assert (gradient - expected_gradient).abs().max() <= 1e-4 * expected_gradient.abs().max()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_bits_do_not_depend_on_threads(channels_last: bool, normalize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = close_clusters(3, 40, 33, 70, 7, dtype=torch.float32)
    if channels_last:
        features = features.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    outcomes = []
    for threads in (1, 2, 3, 7, 1):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        outcomes.append(run("native", features, labels, 7, normalize=normalize))
    for result, gradient in outcomes[1:]:
        assert torch.equal(result.loss, outcomes[0][0].loss)
        assert torch.equal(result.prototypes, outcomes[0][0].prototypes)
        assert torch.equal(gradient, outcomes[0][1])


def test_labels_of_any_strides() -> None:
    features, labels = close_clusters(2, 12, 6, 5, 3, dtype=torch.float32)
    expected, expected_gradient = run("native", features, labels, 3)
    result, gradient = run("native", features, labels.mT.contiguous().mT, 3)
    assert torch.equal(result.loss, expected.loss)
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("normalize", [False, True])
def test_operators(normalize: bool) -> None:
    for features in layouts(torch.randn(2, 12, 5, 9)).values():
        labels = torch.randint(3, (2, 5, 9))
        opcheck(native.passes.statistics, (features, labels, 3, 255, normalize))
        opcheck(native.passes.gradient, (features, labels, torch.rand(3), torch.rand(3, 12), 255, normalize))


def test_one_graph_in_a_users_compile() -> None:
    features, labels = close_clusters(2, 12, 6, 5, 3, dtype=torch.float32)
    expected, expected_gradient = run("native", features, labels, 3)
    compiled = torch.compile(lambda x: prototype_discrimination(x, labels, 3).loss, fullgraph=True, backend="aot_eager")
    loss = compiled(features)
    assert torch.equal(loss, expected.loss)
    assert torch.equal(torch.autograd.grad(loss, features)[0], expected_gradient)


@pytest.mark.parametrize(
    ("dtype", "normalize", "chosen"),
    [(torch.float32, False, "native"), (torch.float32, True, "native"), (torch.float64, False, "eager")],
)
@pytest.mark.parametrize("implementation", ["auto", "compiled"])
def test_native_is_taken_where_it_serves(implementation: str, dtype: torch.dtype, normalize: bool, chosen: str) -> None:
    features, labels = close_clusters(2, 6, 8, 5, 4, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result, gradient = run(implementation, features, labels, 4, normalize=normalize)
    expected, expected_gradient = run(chosen, features, labels, 4, normalize=normalize)
    assert torch.equal(result.loss, expected.loss)
    assert torch.equal(gradient, expected_gradient)


def test_what_it_is_not_written_for_is_refused_by_name() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        features, labels = close_clusters(1, 4, 3, 3, 2, dtype=dtype)
        with pytest.raises(NotImplementedError, match=f"takes fp32 features on a CPU, got {dtype} on cpu; use 'eager'"):
            prototype_discrimination(features, labels, 2, implementation="native")


@pytest.mark.parametrize("implementation", ["auto", "compiled"])
def test_without_a_compiler_it_warns_once_and_runs_eager(
    implementation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    monkeypatch.setattr("sward_kernels.fallback._warned", set())
    monkeypatch.setattr(native, "LIBRARY", cpp.Library(native.LIBRARY.operation, native.LIBRARY.source))
    features, labels = close_clusters(2, 6, 8, 5, 4, dtype=torch.float32)
    with pytest.warns(RuntimeWarning, match=r"eager instead of native: .*no C\+\+ compiler"):
        result, _ = run(implementation, features, labels, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(implementation, features, labels, 4)
    assert torch.equal(result.loss, run("eager", features, labels, 4)[0].loss)
    with pytest.raises(NotImplementedError, match=r"implementation='native' .*no C"):
        run("native", features, labels, 4)
