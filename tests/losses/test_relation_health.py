"""Signs of collapse, against collapses made by hand."""

import math

import pytest
import torch
from torch import Tensor

from sward.losses import MWADLoss
from sward.losses.relation_health import relation_health


def stacked(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return torch.cat((queries, keys, values), dim=1)


def test_values_that_all_point_one_way_are_seen() -> None:
    noise = torch.randn(2, 6, 8, 8)
    direction = torch.randn(1, 6, 1, 1)
    collapsed = relation_health(stacked(noise, noise, direction * torch.randn(2, 1, 8, 8)), 4)
    assert collapsed.value_rank.item() == pytest.approx(1.0, abs=1e-3)
    assert collapsed.value_cosine.item() == pytest.approx(1.0, abs=1e-5)
    healthy = relation_health(stacked(noise, noise, torch.randn(2, 6, 8, 8)), 4)
    assert healthy.value_rank > 5.5
    assert healthy.value_cosine < 0.5


def test_effective_rank_is_the_exponential_of_the_entropy_of_the_singular_values() -> None:
    values = torch.randn(2, 5, 6, 7) * torch.tensor([3.0, 1.0, 0.5, 0.1, 0.0]).view(1, 5, 1, 1)
    singular = torch.linalg.svdvals(values.permute(0, 2, 3, 1).reshape(-1, 5).double())
    share = singular / singular.sum()
    expected = math.exp(-sum(p * math.log(p) for p in share.tolist() if p > 1e-12))
    assert relation_health(stacked(values, values, values), 3).value_rank.item() == pytest.approx(expected, rel=1e-5)


def test_cosine_is_the_mean_over_pairs_of_different_tokens_of_a_window() -> None:
    # One window of four tokens whose values are x, x, -x and y: |cosine| is 1 for 3 of the 6 pairs and 0 for the rest.
    values = torch.stack([torch.tensor([[1.0, 1.0], [-2.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 3.0]])])[None]
    health = relation_health(stacked(values, values, values), 2)
    assert health.value_cosine.item() == pytest.approx(3 / 6)


def test_attention_entropy_runs_from_one_key_to_all_keys() -> None:
    values = torch.randn(1, 4, 4, 4)
    flat = relation_health(stacked(torch.zeros(1, 4, 4, 4), values, values), 4)
    assert flat.attention_entropy.item() == pytest.approx(1.0)
    keys = torch.nn.functional.one_hot(torch.arange(16), 16).float().T.reshape(1, 16, 4, 4)
    sharp = relation_health(stacked(1e3 * keys, keys, keys), 4)
    assert sharp.attention_entropy.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(("size", "window"), [(5, 4), (4, 8), (12, 8)])
def test_padding_is_no_token(size: int, window: int) -> None:
    values = torch.ones(1, 3, size, size)
    health = relation_health(stacked(values, values, values), window)
    # Of equal keys; the zeros of padding are no keys.
    assert health.attention_entropy.item() == pytest.approx(1.0 if size != 5 else 24 / 25)
    assert health.value_cosine.item() == pytest.approx(1.0)
    assert health.value_rank.item() == pytest.approx(1.0, abs=1e-3)


def test_a_single_token_a_window_is_no_relation() -> None:
    health = relation_health(torch.randn(1, 6, 3, 3), 1)
    assert (health.value_cosine.item(), health.attention_entropy.item()) == (0.0, 0.0)


def test_mwad_reports_every_stage_and_side_and_draws_nothing() -> None:
    loss = MWADLoss([3, 4], [5, 6], window_size=4, embed_dim=8, generator=torch.Generator().manual_seed(3))
    student = [torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(2, 4, 4, 4)]
    teacher = [torch.randn(2, 5, 8, 8), torch.randn(2, 6, 8, 8)]
    before = loss.generator.get_state(), torch.get_rng_state()
    health = loss.diagnostics(student, teacher)
    assert torch.equal(before[0], loss.generator.get_state())
    assert torch.equal(before[1], torch.get_rng_state())
    assert set(health) == {
        f"stage{stage}/{side}/{name}"
        for stage in (0, 1)
        for side in ("student", "teacher")
        for name in ("value_rank", "value_cosine", "attention_entropy")
    }
    assert not any(value.requires_grad for value in health.values())
    assert all(value.isfinite() for value in health.values())
    with torch.no_grad():
        # A dead projection: all of the student's values become one vector.
        loss.theta_student[0].weight[16:] = loss.theta_student[0].weight[16:17]
    assert loss.diagnostics(student, teacher)["stage0/student/value_rank"] < 1.01
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(value.dtype == torch.float32 for value in loss.diagnostics(student, teacher).values())
