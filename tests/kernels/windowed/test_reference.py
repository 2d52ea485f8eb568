"""The reference of windowed distillation compared with the equations: by hand, and by loops over single numbers."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from sward_kernels import windowed_distillation
from tests.support.distillation_cases import WEIGHTS, maps_like


def by_loops(student: Tensor, teacher: Tensor, side: int, shift: tuple[int, int]) -> tuple[float, float, float]:
    """Attention, value and context of Eq. 4-13 in Python floats, written without the package's window arithmetic."""
    batch, channels, height, width = student.shape
    dim = channels // 3
    attention = value = context = 0.0
    for image, top, left in product(range(batch), range(0, height, side), range(0, width, side)):
        tokens = [(row, column) for row in range(top, top + side) for column in range(left, left + side)]
        real = [row < height and column < width for row, column in tokens]

        def read(qkv: Tensor, image: int = image, tokens: list = tokens, real: list = real) -> list[list[float]]:
            return [
                qkv[image, :, (row + shift[0]) % height, (column + shift[1]) % width].tolist()
                if here
                else [0.0] * channels
                for (row, column), here in zip(tokens, real)
            ]

        attentions, contexts, values = [], [], []
        for vectors in (read(student), read(teacher)):
            q, k, v = ([vector[part * dim : part * dim + dim] for vector in vectors] for part in range(3))
            rows = []
            for query in q:
                scores = [sum(x * y for x, y in zip(query, key)) / math.sqrt(dim) for key in k]
                largest = max(scores)
                total = sum(math.exp(score - largest) for score in scores)
                rows.append([math.exp(score - largest) / total for score in scores])
            attentions.append(rows)
            contexts.append([[sum(p * w[d] for p, w in zip(row, v)) for d in range(dim)] for row in rows])
            values.append(v)
        for token in (index for index, here in enumerate(real) if here):
            a_s, a_t = attentions[0][token], attentions[1][token]
            attention += sum(p * (math.log(p) - math.log(r)) for p, r in zip(a_t, a_s))
            v_s, v_t = values[0][token], values[1][token]
            norms = math.hypot(*v_t) * math.hypot(*v_s)
            value += 1 - sum(x * y for x, y in zip(v_t, v_s)) / max(norms, 1e-8)
            context += sum((x - y) ** 2 for x, y in zip(contexts[0][token], contexts[1][token]))
    pixels = batch * height * width
    return attention / pixels, value / pixels, context / pixels


@pytest.mark.parametrize(
    ("shape", "side", "shift"),
    [
        ((2, 6, 4, 6), 2, (1, 1)),
        ((1, 9, 5, 7), 4, (3, 2)),  # padding on both sides
        ((2, 3, 3, 2), 4, (2, 3)),  # smaller than a window, shift beyond the map
        ((1, 6, 3, 4), 1, (0, 0)),
    ],
)
def test_reference_matches_loops(shape: tuple[int, int, int, int], side: int, shift: tuple[int, int]) -> None:
    student, teacher = maps_like(shape)
    result = windowed_distillation(student, teacher, side, shift, terms=WEIGHTS, implementation="reference")
    terms = by_loops(student, teacher, side, shift)
    assert [result.attention.item(), result.value.item(), result.context.item()] == pytest.approx(terms, rel=1e-12)
    assert result.loss.item() == pytest.approx(sum(w * term for w, term in zip(WEIGHTS, terms)), rel=1e-12)


@pytest.mark.parametrize("implementation", ["reference", "eager"])
def test_two_tokens_by_hand(implementation: str) -> None:
    # One image of 1 x 2 pixels in a 2 x 2 window: two real tokens and two of padding. D = 1.
    # Teacher: q = 0, so its attention is uniform over the four tokens: Z_t = (v1 + v2) / 4 = (3 + 1) / 4 = 1.
    # Student: q = 1 at both, k = (ln 2, 0), so its logits are (ln 2, 0, 0, 0) and A_s = (2, 1, 1, 1) / 5;
    # v = (5, -5): Z_s = (2 * 5 - 5) / 5 = 1, hence no context. Cosines of the values: 1 and -1.
    teacher = torch.tensor([[0.0, 0.0], [7.0, 7.0], [3.0, 1.0]], dtype=torch.float64).view(1, 3, 1, 2)
    student = torch.tensor([[1.0, 1.0], [math.log(2), 0.0], [5.0, -5.0]], dtype=torch.float64).view(1, 3, 1, 2)
    result = windowed_distillation(student, teacher, 2, implementation=implementation)
    kl = 0.25 * math.log(0.25 / 0.4) + 0.75 * math.log(0.25 / 0.2)
    assert result.attention.item() == pytest.approx(kl, rel=1e-14)
    assert result.value.item() == pytest.approx((0 + 2) / 2, rel=1e-14)
    assert result.context.item() == pytest.approx(0, abs=1e-14)
    assert result.loss.item() == pytest.approx(kl + 1, rel=1e-14)


@pytest.mark.parametrize("implementation", ["reference", "eager"])
def test_context_is_a_sum_over_channels(implementation: str) -> None:
    # Windows of one token attend to themselves only: Z = V, so context = |V_s - V_t|^2 = 3^2 + 4^2, attention = 0.
    student, teacher = torch.zeros(2, 2, 6, 3, 2, dtype=torch.float64).unbind()
    student[:, 4], student[:, 5] = 3.0, 4.0
    result = windowed_distillation(student, teacher, 1, implementation=implementation)
    assert [term.item() for term in result] == pytest.approx([26.0, 0.0, 1.0, 25.0], rel=1e-14)


def test_zero_value_vectors_give_value_one_and_no_gradient() -> None:
    student, teacher = maps_like((1, 6, 4, 4))
    teacher[:, 4:, 0] = 0
    student[:, 4:, 1] = 0
    student.requires_grad_(), teacher.requires_grad_()
    result = windowed_distillation(student, teacher, 2, terms=(0, 1, 0), implementation="reference")
    result.loss.backward()
    assert teacher.grad[:, :, :2].abs().max() == student.grad[:, :, :2].abs().max() == 0
    assert teacher.grad[:, 4:, 2:].abs().min() > 0


def test_skipped_terms_come_back_as_zero() -> None:
    student, teacher = maps_like((1, 6, 4, 4))
    full = windowed_distillation(student, teacher, 2, implementation="reference")
    for index, name in enumerate(("attention", "value", "context")):
        weights = tuple(float(place == index) for place in range(3))
        alone = windowed_distillation(student, teacher, 2, terms=weights, implementation="reference")
        assert getattr(alone, name) == getattr(full, name) == alone.loss
        assert sum(term != 0 for term in alone[1:]) == 1
