"""Student first, teacher second, in every loss that takes both."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sward.losses import DistillationInputs, MWADLoss, PDRLoss, SegmentationCrossEntropy, SWARDDistillation, SWARDLoss
from sward.losses.cirkd import memory_relation
from sward.losses.classic import pixel_divergence
from tests.support.peers import PEERS, batch

SYMMETRIC = {"at-code", "at-paper", "pairwise"}
"""Methods whose loss is a squared difference of the same function of both maps."""


def exchanged(inputs: DistillationInputs) -> DistillationInputs:
    """The student's maps under the teacher's taps and the other way round."""
    student = dict(zip(inputs.student, (each.detach().requires_grad_() for each in inputs.teacher.values())))
    teacher = dict(zip(inputs.teacher, (each.detach() for each in inputs.student.values())))
    return DistillationInputs(student=student, teacher=teacher, labels=inputs.labels)


@pytest.mark.parametrize("name", PEERS)
def test_a_swap_changes_the_value_of_every_peer_and_only_the_student_learns(name: str) -> None:
    inputs = batch(student_channels=4, teacher_channels=4, dtype=torch.float64)
    values = []
    for given in (inputs, exchanged(inputs)):
        torch.manual_seed(0)
        loss = PEERS[name](4, 4, 2).double().eval()
        for teacher in given.teacher.values():
            teacher.requires_grad_()
        output = loss(given).loss
        output.backward()
        assert any(student.grad is not None and student.grad.any() for student in given.student.values())
        assert all(teacher.grad is None for teacher in given.teacher.values())
        values.append(output.item())
    assert (values[0] == pytest.approx(values[1], rel=1e-9)) == (name in SYMMETRIC)


def projections_that_copy(loss: MWADLoss) -> None:
    """Make `phi` and both `Theta` the identity of one channel, so that both sides are projected alike."""
    with torch.no_grad():
        for convolution in (module for module in loss.modules() if isinstance(module, nn.Conv2d)):
            convolution.weight.fill_(1.0)
            if convolution.bias is not None:
                convolution.bias.zero_()


def maps() -> tuple[Tensor, Tensor]:
    return torch.randn(1, 1, 4, 4), 3 * torch.randn(1, 1, 4, 4)


def test_mwad() -> None:
    loss = MWADLoss([1], [1], window_size=4, embed_dim=1, shift="none", terms=(1.0, 0.0, 0.0))
    projections_that_copy(loss)
    one, other = maps()
    by_name = loss(student_features=[one], teacher_features=[other]).loss
    assert torch.equal(loss([one], [other]).loss, by_name)
    assert loss([other], [one]).loss.item() != pytest.approx(by_name.item(), rel=1e-2)


def test_mwad_project_returns_the_students_map_first() -> None:
    loss = MWADLoss([4], [4], embed_dim=2)
    one, other = torch.randn(2, 1, 4, 8, 8).unbind()
    qkv_student, qkv_teacher = loss.project(0, one, other)
    torch.testing.assert_close(qkv_student, loss.theta_student[0](one))
    torch.testing.assert_close(qkv_teacher, loss.theta_teacher[0](loss.phi[0](other)))
    swapped_student, _ = loss.project(0, other, one)
    assert not torch.allclose(swapped_student, qkv_student)


def test_mwad_diagnostics() -> None:
    loss = MWADLoss([1], [1], window_size=4, embed_dim=1)
    projections_that_copy(loss)
    one, other = maps()
    health, swapped = loss.diagnostics([one], [other]), loss.diagnostics([other], [one])
    name = "attention_entropy"
    assert health[f"stage0/student/{name}"] == swapped[f"stage0/teacher/{name}"]
    assert health[f"stage0/student/{name}"] != health[f"stage0/teacher/{name}"]


def test_sward_in_both_forms() -> None:
    mwad = MWADLoss(
        [1], [1], window_size=4, embed_dim=1, shift="none", terms=(1.0, 0.0, 0.0), teacher_normalization="none"
    )
    projections_that_copy(mwad)
    one, other = maps()
    logits, labels = torch.randn(1, 2, 4, 4), torch.randint(2, (1, 4, 4))
    whole = SWARDLoss(SegmentationCrossEntropy(), mwad, PDRLoss(2))
    by_name = whole(logits, labels, student_features=[one], teacher_features=[other], pdr_features=one)
    assert torch.equal(whole(logits, labels, [one], [other], one).loss, by_name.loss)
    assert whole(logits, labels, [other], [one], one).loss.item() != pytest.approx(by_name.loss.item(), rel=1e-2)
    method = SWARDDistillation(mwad, PDRLoss(2), student_taps=["s"], teacher_taps=["t"], weights=(1.0, 0.0))
    value = method(DistillationInputs({"s": one}, {"t": other}, labels)).loss.item()
    assert value == pytest.approx(by_name.terms["mwad"].item())
    assert method(DistillationInputs({"s": other}, {"t": one}, labels)).loss.item() != pytest.approx(value, rel=1e-2)


def test_functions_behind_the_peers() -> None:
    student, teacher = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64).unbind()
    by_name = pixel_divergence(student=student, teacher=teacher, temperature=1.0).mean()
    assert torch.equal(pixel_divergence(student, teacher, 1.0).mean(), by_name)
    assert pixel_divergence(teacher, student, 1.0).mean().item() != pytest.approx(by_name.item(), rel=1e-2)
    one, other = torch.nn.functional.normalize(torch.randn(2, 5, 4, dtype=torch.float64), dim=-1).unbind()
    keys, usable, rows = torch.eye(4, dtype=torch.float64), torch.ones(4, dtype=torch.bool), torch.full((5,), 0.2)
    by_name = memory_relation(student_units=one, teacher_units=other, keys=keys, usable=usable, row_weights=rows)
    assert torch.equal(memory_relation(one, other, keys, usable, rows), by_name)
    assert memory_relation(other, one, keys, usable, rows).item() != pytest.approx(by_name.item(), rel=1e-2)
