"""CIRKD: the memory relation, the ring buffers of both kinds, and the memory's life across steps and restarts."""

from __future__ import annotations

import copy
import re
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sward.losses import cirkd
from sward.losses.cirkd import CIRKDLoss, memory_relation
from sward.losses.class_queue import PIXELS_PER_CLASS, ClassQueue, pick_rows
from sward.losses.protocol import LOGITS, DistillationInputs
from tests.support.peers import TAPS, batch


def random_units(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def relation(student: Tensor, teacher: Tensor, keys: Tensor, usable: Tensor | None = None) -> Tensor:
    if usable is None:
        usable = torch.ones(len(keys), dtype=torch.bool)
    return memory_relation(student, teacher, keys, usable, torch.full((len(student),), 1 / len(student)))


def queue(classes: int = 3, size: int = 40, channels: int = 2, *, official: bool = False, seed: int = 0) -> ClassQueue:
    return ClassQueue(classes, size, channels, torch.Generator().manual_seed(seed), official=official)


# --- the memory relation ---------------------------------------------------------------------------------------------


def test_memory_relation_of_one_anchor_and_two_keys() -> None:
    keys = torch.eye(2, dtype=torch.float64)
    assert relation(keys[1:], keys[:1], keys).item() == pytest.approx(9.9990920, abs=5e-8)


def test_memory_relation_of_equal_vectors_is_zero_and_positive_otherwise() -> None:
    same, keys = random_units(6, 4), random_units(9, 4)
    assert abs(relation(same, same.clone(), keys).item()) < 1e-14
    assert relation(random_units(6, 4), same, keys).item() > 0


def test_memory_relation_ignores_order_and_doubling_of_the_keys() -> None:
    student, teacher, keys = random_units(6, 4), random_units(6, 4), random_units(9, 4)
    expected = relation(student, teacher, keys)
    torch.testing.assert_close(relation(student, teacher, keys[torch.randperm(9)]), expected)
    torch.testing.assert_close(relation(student, teacher, keys.repeat(2, 1)), expected)


def test_memory_relation_leaves_out_unusable_keys_and_weightless_rows() -> None:
    student, teacher, keys = random_units(6, 4), random_units(6, 4), random_units(9, 4)
    usable = torch.arange(9) < 5
    torch.testing.assert_close(relation(student, teacher, keys, usable), relation(student, teacher, keys[:5]))
    weights = torch.tensor([0.5, 0.5, 0, 0, 0, 0])
    partial = memory_relation(student, teacher, keys, torch.ones(9, dtype=torch.bool), weights)
    torch.testing.assert_close(partial, relation(student[:2], teacher[:2], keys))


def test_memory_relation_multiplies_by_the_square_of_the_second_temperature() -> None:
    student, teacher, keys = random_units(6, 4), random_units(6, 4), random_units(9, 4)
    usable, weights = torch.ones(9, dtype=torch.bool), torch.full((6,), 1 / 6)
    twice = memory_relation(student, teacher, keys, usable, weights, 0.1, 2.0)
    torch.testing.assert_close(twice, 4 * memory_relation(student, teacher, keys, usable, weights, 0.2, 1.0))


def test_memory_relation_in_chunks_has_the_same_value_and_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, keys = random_units(10, 4).requires_grad_(), random_units(10, 4), random_units(9, 4)
    whole = relation(student, teacher, keys)
    gradient = torch.autograd.grad(whole, student)[0]
    monkeypatch.setitem(cirkd._CHUNK_ELEMENTS, "cpu", 30)
    parts = relation(student, teacher, keys)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts, student)[0], gradient)
    assert torch.autograd.gradcheck(lambda s: relation(s, teacher, keys), (student,))


# --- picking rows ----------------------------------------------------------------------------------------------------


def encoded(classes: Tensor) -> Tensor:
    """`[B, 2, P]` unit vectors whose angle tells the class."""
    angle = classes.double()
    return torch.stack((angle.cos(), angle.sin()), dim=1)


def decoded(rows: Tensor) -> Tensor:
    return torch.atan2(rows[..., 1], rows[..., 0]).round().long()


def test_every_picked_row_is_of_its_class() -> None:
    classes = torch.randint(0, 4, (3, 200))
    classes[0, :150] = 3
    rows = pick_rows(encoded(classes), classes, 3, torch.rand(3, 200), official=False)
    assert rows.pixels.shape == (3, 3, PIXELS_PER_CLASS, 2)
    for image in range(3):
        for k in range(3):
            there = int((classes[image] == k).sum())
            assert rows.pixel_counts[image, k] == min(there, PIXELS_PER_CLASS)
            assert (decoded(rows.pixels[image, k, : min(there, PIXELS_PER_CLASS)]) == k).all()
            assert rows.region_counts[image, k] == (there > 0)
            if there:
                assert decoded(rows.regions[image, k, 0]) == k


def test_picked_pixels_are_distinct_and_random() -> None:
    classes = torch.zeros(1, 100, dtype=torch.int64)
    units = F.normalize(torch.randn(1, 3, 100), dim=1)
    picks = [
        pick_rows(units, classes, 2, torch.rand(1, 100, generator=torch.Generator().manual_seed(s)), official=False)
        for s in (0, 0, 1)
    ]
    assert len(picks[0].pixels[0, 0].unique(dim=0)) == PIXELS_PER_CLASS
    assert torch.equal(picks[0].pixels, picks[1].pixels)
    assert not torch.equal(picks[0].pixels, picks[2].pixels)


def test_official_picks_come_from_the_top_of_the_image_whatever_their_class() -> None:
    # Ten pixels of class 1 at the bottom: the official code stores the first ten pixels, which are of class 0.
    classes = torch.tensor([[0] * 90 + [1] * 10])
    fixed, official = (
        pick_rows(encoded(classes), classes, 2, torch.rand(1, 100), official=mode) for mode in (False, True)
    )
    assert (decoded(fixed.pixels[0, 1, :10]) == 1).all()
    assert (decoded(official.pixels[0, 1, :10]) == 0).all()
    assert torch.equal(fixed.regions, official.regions)


def test_region_row_is_the_unit_mean_of_the_class() -> None:
    classes = torch.tensor([[0, 1, 0, 2]])
    units = F.normalize(torch.randn(1, 3, 4, dtype=torch.float64), dim=1)
    rows = pick_rows(units, classes, 2, torch.rand(1, 4), official=False)
    torch.testing.assert_close(rows.regions[0, 0, 0], F.normalize(units[0, :, [0, 2]].mean(dim=1), dim=0))


# --- the ring buffers ------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    counts=st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=2), min_size=1, max_size=12),
    images=st.integers(1, 3),
)
def test_ring_buffer_keeps_the_newest_rows(counts: list[list[int]], images: int) -> None:
    size, held = 13, [[], []]  # type: ignore[var-annotated]
    buffer, number = queue(2, size, 1), 0
    for start in range(0, len(counts), images):
        group = counts[start : start + images]
        rows = torch.zeros(len(group), 2, 4, 1)
        for n, taken in enumerate(group):
            for k in range(2):
                for m in range(4):
                    number += 1
                    rows[n, k, m] = number
                    if m < taken[k]:
                        held[k].append(number)
        buffer.enqueue(rows, torch.tensor(group))
    for k in range(2):
        assert buffer.pointer[k] == len(held[k]) % size
        assert buffer.filled[k] == min(len(held[k]), size)
        stored = buffer.rows[k, :, 0].tolist()
        for age, value in enumerate(held[k][::-1][:size]):
            assert stored[(len(held[k]) - 1 - age) % size] == value


def test_official_ring_buffer_overwrites_its_end_and_starts_over() -> None:
    buffer = queue(1, 10, 1, official=True)
    for start in (0, 4, 8):
        rows = torch.arange(start, start + 4, dtype=torch.float32).view(1, 1, 4, 1)
        buffer.enqueue(rows, torch.tensor([[4]]))
    # 4 rows do not fit behind 8: they replace the last four, two of which had just come in.
    assert buffer.rows[0, :, 0].tolist() == [0, 1, 2, 3, 4, 5, 8, 9, 10, 11]
    assert buffer.pointer.item() == 0


def test_queue_too_small_for_a_batch_says_how_large_it_must_be() -> None:
    with pytest.raises(ValueError, match="make it at least 32"):
        queue(2, 20, 3).enqueue(torch.zeros(2, 2, 16, 3), torch.zeros(2, 2, dtype=torch.int64))


def test_keys_come_from_filled_slots_only_unless_official() -> None:
    buffer, official = queue(3, 40, 2), queue(3, 40, 2, official=True)
    rows = torch.full((1, 3, 5, 2), 7.0)
    for target in (buffer, official):
        target.enqueue(rows, torch.tensor([[5, 0, 2]]))
    order = torch.randperm(40)[:12]
    keys, usable = buffer.draw(order)
    assert keys.shape == (36, 2)
    assert usable.view(3, 12).all(dim=1).tolist() == [True, False, True]
    assert (keys[usable] == 7.0).all()
    keys, usable = official.draw(order)
    assert usable.all()
    assert torch.equal(keys.view(3, 12, 2), official.rows[:, order])


def test_full_queue_gives_the_drawn_slots_of_every_class() -> None:
    buffer = queue(2, 8, 3)
    buffer.enqueue(torch.randn(2, 2, 4, 3), torch.full((2, 2), 4))
    order = torch.tensor([5, 0, 3])
    assert torch.equal(buffer.draw(order)[0].view(2, 3, 3), buffer.rows[:, order])


# --- the loss --------------------------------------------------------------------------------------------------------


def build(**options: object) -> CIRKDLoss:
    torch.manual_seed(3)
    settings = {"pixel_queue_size": 64, "region_queue_size": 10, "pixel_keys": 30, "region_keys": 10, **options}
    return CIRKDLoss(3, 5, 2, **TAPS, **settings)  # type: ignore[arg-type]


def banks(method: CIRKDLoss) -> list[Tensor]:
    return [method.pixel_queue.rows.clone(), method.region_queue.rows.clone(), method.pixel_queue.pointer.clone()]


def test_pixels_in_the_bank_decode_to_their_class() -> None:
    labels = torch.zeros(1, 8, 8, dtype=torch.int64)
    labels[:, 4:] = 1
    labels[:, :, 6:] = 255
    teacher = encoded(labels.flatten(1)).float().view(1, 2, 8, 8)
    inputs = DistillationInputs(
        {LOGITS: torch.randn(1, 2, 8, 8), "s": torch.randn(1, 3, 8, 8)},
        {LOGITS: torch.randn(1, 2, 8, 8), "t": teacher},
        labels,
    )
    for mode in ("fixed", "official"):
        method = CIRKDLoss(3, 2, 2, **TAPS, pixel_queue=mode, pixel_queue_size=100, region_queue_size=10)  # type: ignore[arg-type]
        for _ in range(3):
            method(inputs)
        right = [(decoded(method.pixel_queue.rows[k, :48]) == k).all().item() for k in range(2)]
        assert right == ([True, True] if mode == "fixed" else [False, False])
        assert method.pixel_queue.pointer.tolist() == [48, 48]


def test_labels_of_the_memory_are_those_at_the_centres_but_for_official() -> None:
    small = torch.randint(0, 2, (1, 8, 8))
    large = small.repeat_interleave(8, 1).repeat_interleave(8, 2)
    inputs = batch(images=1)

    def regions(mode: Literal["fixed", "official"], labels: Tensor) -> Tensor:
        method = CIRKDLoss(3, 5, 2, **TAPS, pixel_queue=mode, pixel_queue_size=100, region_queue_size=10)
        method(DistillationInputs(inputs.student, inputs.teacher, labels))
        return method.region_queue.rows[:, :1]

    # Moved by two pixels of eight: the corners of the cells hold their neighbours' labels, the centres do not.
    moved = large.roll((2, 2), (1, 2))
    assert torch.equal(regions("fixed", moved), regions("fixed", small))
    assert torch.equal(regions("official", large), regions("official", small))
    assert not torch.equal(regions("official", moved), regions("official", small))
    assert torch.equal(regions("official", moved), regions("official", small.roll((1, 1), (1, 2))))


def test_equal_networks_have_no_minibatch_loss_and_positive_memory_losses() -> None:
    inputs = batch(student_channels=5)
    same = DistillationInputs(
        {LOGITS: inputs.student[LOGITS], "s": inputs.teacher["t"]},
        {LOGITS: inputs.student[LOGITS].detach(), "t": inputs.teacher["t"]},
        inputs.labels,
    )
    method = CIRKDLoss(5, 5, 2, **TAPS, pixel_queue_size=64, region_queue_size=10)
    terms = method(same).terms
    assert abs(terms["kd"].item()) < 1e-6
    assert abs(terms["minibatch"].item()) < 1e-5
    assert terms["pixel"].item() > 0
    assert terms["region"].item() > 0


def test_loss_is_the_weighted_sum_of_its_terms() -> None:
    inputs, weights = batch(), (0.5, 2.0, 3.0, 7.0)
    output = build(terms=weights)(inputs)
    expected = sum(weight * term.item() for weight, term in zip(weights, output.terms.values()))
    assert list(output.terms) == ["kd", "minibatch", "pixel", "region"]
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)


def test_weight_of_zero_skips_the_term() -> None:
    method = build(terms=(1.0, 1.0, 0.0, 0.0))
    before = banks(method)
    terms = method(batch()).terms
    assert terms["pixel"] == terms["region"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, banks(method)))
    assert not list(method.parameters())


def test_a_map_that_overflowed_spoils_its_own_step_only() -> None:
    inputs, method = batch(), build()
    inputs.teacher["t"][0, :, 0, 0] = torch.inf
    assert not method(inputs).loss.isfinite()
    assert all(bank.isfinite().all() for bank in banks(method))
    later = method(batch())
    later.loss.backward()
    assert later.loss.isfinite()


def test_a_pixel_that_overflowed_is_stored_as_little_as_one_without_a_label() -> None:
    overflowed, unlabelled = batch(label_size=(8, 8)), batch(label_size=(8, 8))
    for inputs in (overflowed, unlabelled):
        # Of a class with few pixels, so that all of them are stored.
        inputs.labels[0] = 0
        inputs.labels[0, 0, :3] = 1
    overflowed.teacher["t"][0, 0, 0, 0] = torch.inf
    unlabelled.labels[0, 0, 0] = 255
    one, other = build(), build()
    one(overflowed)
    other(unlabelled)
    assert all(torch.equal(a, b) for a, b in zip(banks(one), banks(other)))


def test_image_without_labels_leaves_the_banks_alone_and_costs_nothing_in_memory() -> None:
    inputs = batch()
    inputs.labels.fill_(255)
    method = build()
    before = banks(method)
    output = method(inputs)
    output.loss.backward()
    assert output.terms["pixel"] == output.terms["region"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, banks(method)))
    assert all(p.grad is not None and not p.grad.any() for p in method.projector.parameters())


def test_image_without_labels_does_not_dilute_the_memory_terms_of_the_others() -> None:
    method, inputs = build(), batch()
    method(inputs)
    method.eval()
    inputs.labels[1] = 255
    first = DistillationInputs(
        {tap: maps[:1] for tap, maps in inputs.student.items()},
        {tap: maps[:1] for tap, maps in inputs.teacher.items()},
        inputs.labels[:1],
    )
    both, alone = method(inputs).terms, method(first).terms
    for name in ("pixel", "region"):
        torch.testing.assert_close(both[name], alone[name])


def test_evaluation_does_not_fill_the_memory() -> None:
    method = build().eval()
    before = banks(method)
    method(batch())
    assert all(torch.equal(a, b) for a, b in zip(before, banks(method)))


@pytest.mark.parametrize("mode", ["fixed", "official"])
def test_memory_is_in_the_state_dict_and_a_restart_goes_on_alike(mode: str) -> None:
    method = build(pixel_queue=mode)
    for step in range(3):
        method(batch(seed=step))
    saved = copy.deepcopy(method.state_dict())
    restarted = build(pixel_queue=mode, seed=0)
    restarted.load_state_dict(saved)
    for step in range(3, 8):
        assert restarted(batch(seed=step)).loss.item() == method(batch(seed=step)).loss.item()
    assert all(torch.equal(a, b) for a, b in zip(banks(restarted), banks(method)))


def test_memory_stays_out_of_what_ddp_broadcasts() -> None:
    method = build()
    largest = max(tensor.numel() for tensor in (*method.buffers(), *method.parameters()))
    assert largest <= 5 * 5


def test_memory_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"saved memory bank has shape \(2, 64, 5\), this one \(2, 70, 5\)"):
        build(pixel_queue_size=70).load_state_dict(build().state_dict())


def test_seed_decides_what_is_stored() -> None:
    first, second, other = build(seed=1), build(seed=1), build(seed=2)
    for method in (first, second, other):
        method(batch())
    assert torch.equal(first.pixel_queue.rows, second.pixel_queue.rows)
    assert not torch.equal(first.pixel_queue.rows, other.pixel_queue.rows)


def test_pooling_bounds_the_pixels_of_an_image() -> None:
    inputs = batch(student_grid=(16, 12), teacher_grid=(16, 12), label_size=(16, 12))
    pooled = DistillationInputs(
        {**inputs.student, "s": F.avg_pool2d(inputs.student["s"], 3, ceil_mode=True)},
        {**inputs.teacher, "t": F.avg_pool2d(inputs.teacher["t"], 3, ceil_mode=True)},
        inputs.labels,
    )
    # 16 x 12 = 192, by 2: 48, by 3: 6 x 4 = 24.
    bounded = build(max_pixels=30)(inputs)
    unbounded = build(max_pixels=None)(pooled)
    assert bounded.loss.item() == pytest.approx(unbounded.loss.item(), rel=1e-6)


def test_wrong_labels_and_options_are_named() -> None:
    inputs = batch()
    inputs.labels[0, 0, 0] = 7
    inputs.labels[:] = inputs.labels.where(inputs.labels != 0, 7)
    with pytest.raises(ValueError, match=r"labels must be classes in 0\.\.1 or ignore_index=255, got 7"):
        build()(inputs)
    with pytest.raises(ValueError, match="pixel_queue must be 'fixed' or 'official', got 'broken'"):
        build(pixel_queue="broken")
    with pytest.raises(ValueError, match=r"implementation must be one of .*, got 'cuda'"):
        build(implementation="cuda")
    with pytest.raises(ValueError, match="num_classes must be at least 2"):
        CIRKDLoss(3, 5, 1, **TAPS)
    for option, value, condition in (
        ("terms", (1.0, 1.0), "four finite numbers of at least 0, for KD, minibatch, pixel and region"),
        ("temperature", 0.0, "a positive finite number"),
        ("distribution_temperature", 0, "a positive finite number"),
        ("pixel_queue_size", 0, "an int of at least 1"),
        ("region_queue_size", -1, "an int of at least 1"),
        ("pixel_keys", 0, "an int of at least 1"),
        ("region_keys", 0.5, "an int of at least 1"),
        ("max_pixels", 0, "an int of at least 1"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"{option} must be {condition}, got {value}")):
            build(**{option: value})
