"""Unlabelled images in a batch: methods that read no labels learn from them, terms that need labels do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sward.losses import LOGITS, DistillationInputs, KDLoss, MWADLoss, PDRLoss, SegmentationCrossEntropy, SWARDLoss
from tests.support import peers

LABELLED = 2


def gradients(name: str) -> tuple[Tensor, Tensor]:
    """Return the largest gradient of the student's maps, of the labelled images and of the two others."""
    inputs = peers.batch(images=4)
    inputs.labels[LABELLED:] = 255
    loss = KDLoss(ignore_index=None) if name == "kd-all" else peers.PEERS[name](3, 5, 2)
    loss(inputs).loss.backward()
    found = [maps.grad.flatten(1).abs().amax(1) for maps in inputs.student.values() if maps.grad is not None]
    largest = torch.stack(found).amax(0)
    return largest[:LABELLED], largest[LABELLED:]


@pytest.mark.parametrize("name", ["kd-all", *(name for name in peers.PEERS if name not in ("kd", "cirkd"))])
def test_methods_without_labels_learn_from_every_image(name: str) -> None:
    labelled, unlabelled = gradients(name)
    assert (labelled > 0).all()
    assert (unlabelled > 0).all()


def test_per_pixel_terms_with_an_ignored_label_do_not_see_unlabelled_images() -> None:
    labelled, unlabelled = gradients("kd")
    assert (labelled > 0).all()
    assert (unlabelled == 0).all()


def test_cirkds_memory_holds_embeddings_of_labelled_images_only() -> None:
    both = peers.batch(images=4)
    both.labels[LABELLED:] = 255
    part = DistillationInputs(
        {tap: maps[:LABELLED] for tap, maps in both.student.items()},
        {tap: maps[:LABELLED] for tap, maps in both.teacher.items()},
        both.labels[:LABELLED],
    )
    memories = []
    for inputs in (both, part):
        torch.manual_seed(0)
        loss = peers.PEERS["cirkd"](3, 5, 2)
        loss(inputs)
        memories.append((loss.region_queue.state(), loss.pixel_queue.state()))
    (regions, pixels), (regions_of_part, pixels_of_part) = memories
    assert regions["filled"].tolist() == [LABELLED, LABELLED]
    torch.testing.assert_close(regions["rows"], regions_of_part["rows"])
    assert torch.equal(regions["filled"], regions_of_part["filled"])
    assert torch.equal(pixels["filled"], pixels_of_part["filled"])


def swards(labels: Tensor | None, gamma: float = 1.0) -> tuple[SWARDLoss, Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    student, teacher = torch.randn(2, 8, 8, 8, requires_grad=True), torch.randn(2, 12, 8, 8)
    logits = torch.randn(2, 3, 16, 16, requires_grad=True)
    mwad = MWADLoss([8], [12], window_size=4, embed_dim=8, shift="none")
    loss = SWARDLoss(SegmentationCrossEntropy(), mwad, PDRLoss(3), weights=(1.0, 2.0, gamma))
    output = loss(logits, labels, [student], [teacher])
    output.loss.backward()
    return output, logits, student, teacher


def test_sward_without_labels_is_mwad_alone() -> None:
    labels = torch.randint(0, 3, (2, 16, 16))
    without, logits, student, _ = swards(None)
    labelled, *_ = swards(labels)
    ignored, _, same, _ = swards(torch.full_like(labels, 255))
    assert labelled.pdr > 0
    assert labelled.task > 0
    assert without.task == without.pdr == 0
    assert without.mwad == labelled.mwad
    torch.testing.assert_close(without.loss, 2 * without.mwad)
    torch.testing.assert_close(student.grad, same.grad)
    assert (logits.grad == 0).all()  # Still in the graph, as DistributedDataParallel wants it.
    assert set(without.terms) == set(labelled.terms) == set(ignored.terms)
    assert LOGITS not in without.terms
