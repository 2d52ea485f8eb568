"""Random shapes, strides and types for every operation: the reference's result, or a ValueError from all."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from sward_kernels import prototype_discrimination, relational_kl, windowed_distillation
from tests.support.fuzzing import assert_sentence, examples, for_each

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def strided(shape: tuple[int, ...], seed: int) -> Tensor:
    """Random values in a random layout: permuted, sliced, with steps, or expanded along one dimension."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(shape), generator=generator).tolist()
    steps = [1 + int(torch.randint(0, 3, (), generator=generator)) // 2 for _ in shape]
    room = torch.randn([shape[place] * steps[place] + seed % 3 for place in order], generator=generator).double()
    back = [order.index(place) for place in range(len(shape))]
    view = room.permute(back)[tuple(slice(None, None, step) for step in steps)]
    view = view[tuple(slice(0, side) for side in shape)]
    if seed % 5 == 0:
        place = seed // 5 % len(shape)
        view = view.narrow(place, 0, 1).expand(shape)
    assert view.shape == shape
    return view


def outcome(operation: Callable[[], Tensor], inputs: list[Tensor]) -> list[Tensor] | str:
    """Loss and gradients, or "refused" for a ValueError of one sentence."""
    for tensor in inputs:
        tensor.grad = None
    try:
        loss = operation()
    except ValueError as error:
        assert_sentence(str(error))
        return "refused"
    loss.backward()
    return [loss.detach(), *(tensor.grad for tensor in inputs if tensor.grad is not None)]


def compare(
    run: Callable[[str], Tensor], inputs: list[Tensor], dtype: torch.dtype, *, is_differentiable: bool = True
) -> None:
    """Fail where an implementation differs from the reference; where the loss has no gradient, in the loss alone."""
    wanted = outcome(lambda: run("reference"), inputs)
    wanted = wanted if isinstance(wanted, str) else [each.clone() for each in wanted]
    for implementation in ("eager", "auto"):
        found = outcome(lambda: run(implementation), inputs)  # noqa: B023
        if isinstance(wanted, str) or isinstance(found, str):
            assert found == wanted
            continue
        tolerance = {torch.float64: 1e-8, torch.float32: 2e-4}.get(dtype, 0.05)
        for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
            assert one.isfinite().all() == other.isfinite().all()
            if index and not is_differentiable:
                continue
            scale = max(1.0, float(other.abs().max()))
            assert torch.allclose(one.double(), other.double(), rtol=tolerance, atol=tolerance * scale), implementation


def leaf(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values in the same layout as a leaf of the graph."""
    if dtype != torch.float64:
        values = torch.empty_strided(values.shape, values.stride(), dtype=dtype).copy_(values) if all(
            values.stride()
        ) else values.to(dtype)  # fmt: skip
    return values.detach().requires_grad_()


SIDES, SEEDS = st.integers(1, 9), st.integers(0, 999)


@examples(60, 2000)
def test_windowed_distillation(count: int) -> None:
    shapes = st.tuples(st.integers(1, 3), st.integers(1, 7), SIDES, SIDES)

    def check(case: Any) -> None:
        (batch, depth, height, width), window, shift, seeds, dtype = case
        inputs = [leaf(strided((batch, 3 * depth, height, width), seed), dtype) for seed in seeds]
        compare(
            lambda implementation: windowed_distillation(*inputs, window, shift, implementation=implementation).loss,
            inputs,
            dtype,
        )

    cases = st.tuples(
        shapes, st.integers(-1, 11), st.tuples(st.integers(-2, 12), st.integers(-2, 12)), st.tuples(SEEDS, SEEDS),
        st.sampled_from(DTYPES),
    )  # fmt: skip
    for_each(cases, count, check)


def least_distance(features: Tensor, labels: Tensor, normalize: bool) -> float:
    """The distance of the nearest two prototypes; at 0 it has no gradient, and rounding alone decides a direction."""
    vectors = features.double().movedim(1, 3)
    vectors = torch.nn.functional.normalize(vectors, dim=3) if normalize else vectors
    means = [vectors[labels == label].mean(0) for label in labels.unique().tolist() if label not in (-1, 255)]
    return min((float((one - other).norm()) for one, other in itertools.combinations(means, 2)), default=math.inf)


@examples(60, 2000)
def test_prototype_discrimination(count: int) -> None:
    def check(case: Any) -> None:
        (batch, channels, height, width), classes, lowest, seed, dtype, normalize = case
        features = leaf(strided((batch, channels, height, width), seed), dtype)
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(lowest, classes + 1, (batch, height, width), generator=generator)
        labels[labels == classes] = 255
        compare(
            lambda implementation: (
                prototype_discrimination(
                    features, labels, classes, normalize=normalize, implementation=implementation
                ).loss
            ),
            [features],
            dtype,
            is_differentiable=least_distance(features.detach(), labels, normalize) > 1e-3,
        )

    cases = st.tuples(
        st.tuples(st.integers(1, 3), st.integers(1, 9), SIDES, SIDES), st.integers(1, 6), st.sampled_from([0, -1]),
        SEEDS, st.sampled_from(DTYPES), st.booleans(),
    )  # fmt: skip
    for_each(cases, count, check)


@examples(60, 2000)
def test_relational_kl(count: int) -> None:
    def check(case: Any) -> None:
        (batch, height, width), depths, seeds, temperature, dtype = case
        inputs = [leaf(strided((batch, depth, height, width), seed), dtype) for depth, seed in zip(depths, seeds)]
        inputs[1].requires_grad_(False)
        compare(
            lambda implementation: relational_kl(*inputs, temperature, implementation=implementation), inputs, dtype
        )

    cases = st.tuples(
        st.tuples(st.integers(1, 3), SIDES, SIDES), st.tuples(st.integers(1, 8), st.integers(1, 8)),
        st.tuples(SEEDS, SEEDS), st.sampled_from([0.1, 1.0, 5.0, 0.0, -1.0]), st.sampled_from(DTYPES),
    )  # fmt: skip
    for_each(cases, count, check)


def test_layouts_are_what_they_claim() -> None:
    assert len({strided((2, 3, 4, 5), seed).stride() for seed in range(30)}) > 15
    with pytest.raises(ValueError, match="window_size"):
        windowed_distillation(torch.ones(1, 3, 4, 4), torch.ones(1, 3, 4, 4), 0)
