"""The Triton kernels of the prototype regularization: in Triton's interpreter without a GPU, else on the GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

import tests.support.interpreter  # noqa: F401  (makes it fast)
from sward_kernels import labels as labels_module
from sward_kernels import prototype_discrimination
from sward_kernels.gpu import launching
from sward_kernels.prototypes import launch, plan
from sward_kernels.prototypes.tile_table import class_tiles
from tests.support.error_budget import FORWARD_FACTOR, GRADIENT_FACTOR, assert_within_budget
from tests.support.prototype_cases import by_loops, close_clusters, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("poison_empty_tensors")


def case(*sizes: int, layout: str = "nchw", **options: object) -> tuple[Tensor, Tensor]:
    features, labels = close_clusters(*sizes, **options)
    values = features.detach().to(DEVICE)
    if layout == "channels_last":
        values = values.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        batch, channels, height, width = values.shape
        wide = values.new_full((batch, channels + 3, height + 2, width + 5), torch.nan)
        wide[:, 2:-1, 1:-1, 3:-2] = values
        values = wide[:, 2:-1, 1:-1, 3:-2]
    elif layout == "transposed":
        values = values.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == "expanded":
        values = values[:1].expand(values.shape)
    return values.requires_grad_(), labels.to(DEVICE)


def assert_equals_reference(features: Tensor, labels: Tensor, num_classes: int, **options: object) -> None:
    """Compare the kernels with the reference, both in float64."""
    expected, expected_gradient = run("reference", features, labels, num_classes, **options)
    result, gradient = run("triton", features, labels, num_classes, **options)
    torch.testing.assert_close(result, expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    ("num_classes", "channels", "normalize"),
    [
        (*sizes, normalize)
        for sizes in ((1, 8), (2, 24), (19, 96), (19, 576), (150, 256), (256, 24), (2, 2048))
        for normalize in (False, True)
        if (*sizes, normalize) != (256, 24, True)  # takes longest, and 150 classes show the same
    ],
)
def test_sizes(num_classes: int, channels: int, normalize: bool) -> None:
    features, labels = case(1, channels, 9, 8, num_classes)
    assert_equals_reference(features, labels, num_classes, normalize=normalize, upstream=-1.7, terms=(0.6, 2.0))


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "transposed", "expanded"])
@pytest.mark.parametrize("normalize", [False, True])
def test_layouts(layout: str, normalize: bool) -> None:
    features, labels = case(2, 40, 8, 10, 4, layout=layout)
    assert_equals_reference(features, labels, 4, normalize=normalize)
    _, gradient = run("triton", features, labels, 4, normalize=normalize)
    if layout == "channels_last":
        assert gradient.stride() == features.stride()


@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 35), st.integers(1, 12), st.integers(1, 12)),
    num_classes=st.integers(1, 70),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    ignore_index=st.sampled_from([255, 0, -1]),
    normalize=st.booleans(),
    layout=st.sampled_from(["nchw", "channels_last", "sliced"]),
    seed=st.integers(0, 999),
)
@settings(max_examples=8)
def test_equals_loops_over_classes(
    sizes: tuple[int, int, int, int],
    num_classes: int,
    ignored: float,
    ignore_index: int,
    normalize: bool,
    layout: str,
    seed: int,
) -> None:
    features, labels = case(*sizes, num_classes, layout=layout, ignored=ignored, ignore_index=ignore_index, seed=seed)
    options = {"ignore_index": ignore_index, "normalize": normalize}
    expected = by_loops(features.cpu(), labels.cpu(), num_classes, **options)
    result, gradient = run("triton", features, labels, num_classes, **options)
    assert result.separation.item() == pytest.approx(expected.separation, abs=1e-12)
    assert result.compactness.item() == pytest.approx(expected.compactness, abs=1e-12)
    torch.testing.assert_close(result.prototypes.cpu(), torch.from_numpy(expected.prototypes), atol=1e-12, rtol=0)
    assert result.counts.tolist() == expected.counts.tolist()
    outside = (labels == ignore_index)[:, None].expand_as(gradient)
    assert (gradient[outside] == 0).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("normalize", [False, True])
def test_many_tiles_and_chunks(normalize: bool) -> None:
    """More pixels than one program takes, a last tile that is not full, and more channels than one block."""
    problem = plan.Problem(40, 19, torch.float64, False, True, False, False, normalize, "interpreter")
    constants, _ = problem.constants("statistics")
    assert constants["TILES"] > 1
    assert constants["BLOCK_PIXELS"] * constants["TILES"] < 27 * 31
    assert constants["BLOCK_CHANNELS"] < 40
    features, labels = case(1, 40, 27, 31, 19)
    assert_equals_reference(features, labels, 19, normalize=normalize)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("normalize", [False, True])
def test_error_budget(dtype: torch.dtype, layout: str, normalize: bool) -> None:
    features, labels = case(2, 48, 12, 12, 11, dtype=dtype, layout=layout)
    double = features.detach().double().requires_grad_()
    oracle, oracle_gradient = run("reference", double, labels, 11, normalize=normalize)
    reference, reference_gradient = run("reference", features, labels, 11, normalize=normalize)
    result, gradient = run("triton", features, labels, 11, normalize=normalize)
    assert gradient.dtype == dtype
    for name in ("loss", "separation", "compactness", "prototypes"):
        fields = (getattr(outcome, name).detach() for outcome in (result, reference, oracle))
        assert_within_budget(*fields, FORWARD_FACTOR, name)
    assert_within_budget(gradient, reference_gradient, oracle_gradient, GRADIENT_FACTOR, "gradient")


def test_large_mean_small_spread() -> None:
    generator = torch.Generator().manual_seed(1)
    features = (1000 + torch.randn(2, 32, 32, 32, generator=generator)).to(DEVICE).requires_grad_()
    labels = torch.randint(5, (2, 32, 32), generator=generator).to(DEVICE)
    expected, expected_gradient = run("reference", features.detach().double().requires_grad_(), labels, 5, margin=40.0)
    result, gradient = run("triton", features, labels, 5, margin=40.0)
    assert result.compactness.item() == pytest.approx(expected.compactness.item(), rel=1e-4)
    assert result.separation.item() == pytest.approx(expected.separation.item(), rel=1e-4)
    assert (gradient - expected_gradient).abs().max() < 1e-4 * expected_gradient.abs().max()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16])
def test_label_dtypes(dtype: torch.dtype) -> None:
    features, labels = case(2, 8, 6, 5, 7, ignore_index=100)
    expected, expected_gradient = run("reference", features, labels, 7, ignore_index=100)
    result, gradient = run("triton", features, labels.to(dtype), 7, ignore_index=100)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_degenerate_batches() -> None:
    features, labels = case(1, 3, 2, 2, 2)
    same = torch.ones_like(features).requires_grad_()
    result, gradient = run("triton", same, torch.tensor([[[0, 1], [1, 2]]], device=DEVICE), 3)
    assert result.separation.item() == pytest.approx(1.3)
    assert (gradient == 0).all()
    result, gradient = run("triton", features, torch.full_like(labels, 255), 2)
    assert result.loss.item() == 0
    assert (gradient == 0).all()
    result, gradient = run("triton", features[:, :, :1, :1], labels[:, :1, :1] * 0, 2)
    assert result.loss.item() == 0
    zero = torch.zeros_like(features).requires_grad_()
    _, gradient = run("triton", zero, labels * 0, 2, normalize=True)
    assert (gradient == 0).all()


def test_label_outside_the_classes() -> None:
    features, labels = case(1, 3, 4, 4, 4, ignored=0.0)
    wrong = labels.clone()
    wrong[0, 1, 2] = 2**32  # would be class 0 if narrowed to 32 bits
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=r"labels must be classes in .*, got 4294967296"):
            prototype_discrimination(features, wrong, 4, implementation="triton")
    else:
        ignored = labels.clone()
        ignored[0, 1, 2] = 255
        expected, expected_gradient = run("triton", features, ignored, 4)
        result, gradient = run("triton", features, wrong, 4)
        assert torch.equal(result.loss, expected.loss)
        assert torch.equal(gradient, expected_gradient)


def test_kernels_ignore_what_the_launcher_did_not_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU labels are not checked; the kernels themselves must ignore those that are out of range."""
    monkeypatch.setattr(labels_module, "require_classes", lambda *_: None)
    features, labels = case(1, 3, 4, 4, 4, ignored=0.0)
    ignored, wrong = labels.clone(), labels.clone()
    ignored[0, 1] = 255
    wrong[0, 1] = torch.tensor([-1, 4, 2**32, -(2**32)], device=DEVICE)
    expected, expected_gradient = run("triton", features, ignored, 4)
    result, gradient = run("triton", features, wrong, 4)
    assert torch.equal(result.loss, expected.loss)
    assert torch.equal(gradient, expected_gradient)


def test_gradcheck() -> None:
    features, labels = case(1, 3, 3, 3, 3)
    for normalize in (False, True):
        assert torch.autograd.gradcheck(
            lambda x, n=normalize: prototype_discrimination(x, labels, 3, normalize=n, implementation="triton").loss,
            (features,),
            fast_mode=True,
        )


@pytest.mark.parametrize("normalize", [False, True])
def test_repeats_bit_for_bit(normalize: bool) -> None:
    features, labels = case(2, 16, 12, 12, 19, dtype=torch.float32)
    first, first_gradient = run("triton", features, labels, 19, normalize=normalize)
    result, gradient = run("triton", features, labels, 19, normalize=normalize)
    assert all(torch.equal(*pair) for pair in zip(result, first))
    assert torch.equal(gradient, first_gradient)


def test_64_bit_offsets_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for layout in ("nchw", "channels_last", "sliced"):
        features, labels = case(1, 8, 6, 6, 3, dtype=torch.float32, layout=layout)
        for normalize in (False, True):
            monkeypatch.setattr(launching, "WIDE_FROM", 2**31)
            launching.forget_calls()
            expected, expected_gradient = run("triton", features, labels, 3, normalize=normalize)
            monkeypatch.setattr(launching, "WIDE_FROM", 0)
            launching.forget_calls()
            result, gradient = run("triton", features, labels, 3, normalize=normalize)
            assert torch.equal(result.loss, expected.loss)
            assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_opcheck(layout: str) -> None:
    features, labels = case(1, 6, 4, 5, 4, dtype=torch.float32, layout=layout)
    features = features.detach()
    for normalize in (False, True):
        torch.library.opcheck(launch.passes.statistics, (features, labels, 4, 255, normalize))
        slope, offset = torch.rand(4, device=DEVICE), torch.rand(4, 6, device=DEVICE)
        torch.library.opcheck(launch.passes.gradient, (features, labels, slope, offset, 255, normalize))


def test_compiles_into_one_graph_and_under_autocast() -> None:
    features, labels = case(2, 6, 8, 5, 4)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            return prototype_discrimination(x * 2, y, 4, implementation="triton").loss + 1

    expected, expected_gradient = run("reference", (features.detach() * 2).requires_grad_(), labels, 4)
    loss = step(features, labels)
    (gradient,) = torch.autograd.grad(loss, features)
    torch.testing.assert_close(loss, expected.loss + 1)
    torch.testing.assert_close(gradient, expected_gradient * 2)


def test_sizes_not_served() -> None:
    labels = torch.zeros(1, 1, 1, dtype=torch.int64, device=DEVICE)
    for channels, num_classes in ((2049, 2), (8, 257)):
        features = torch.zeros(1, channels, 1, 1, device=DEVICE)
        with pytest.raises(NotImplementedError, match="takes up to 256 classes and 2048 channels"):
            prototype_discrimination(features, labels, num_classes, implementation="triton")


def test_more_programs_than_one_step_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts, first pixels and sums of chunks arrive from more programs than one step of their readers takes."""
    small = dict.fromkeys(("BLOCK_PROGRAMS", "BLOCK_CHUNKS", "BLOCK_ROWS"), 4) | {"BLOCK_PIXELS": 16, "TILES": 2}
    monkeypatch.setattr(
        plan, "class_tiles", lambda *sizes: {name: small.get(name, tile) for name, tile in class_tiles(*sizes).items()}
    )
    launching.forget_calls()
    features, labels = case(5, 3, 9, 9, 7)  # 15 chunks of labels, 5 of features
    for normalize in (False, True):
        assert_equals_reference(features, labels, 7, normalize=normalize)


@pytest.mark.parametrize("channels", [150, 600])
def test_loss_over_several_blocks_of_channels(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the tiles of a GPU, whose blocks are narrower than the interpreter's."""
    monkeypatch.setattr(plan, "class_tiles", lambda *sizes: class_tiles(*sizes[:3], "ampere"))
    launching.forget_calls()
    features, labels = case(1, channels, 5, 4, 7)
    assert plan.problem_of(features, labels, 7, False).class_constants("loss")["BLOCK_CHANNELS"] < channels
    assert_equals_reference(features, labels, 7, terms=(0.6, 2.0))
