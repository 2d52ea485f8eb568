"""Eq. 20, the task loss, and SWARD under the protocol of all methods."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from sward.losses import (
    PAPER,
    DistillationInputs,
    MWADLoss,
    PDRLoss,
    SegmentationCrossEntropy,
    SWARDDistillation,
    SWARDLoss,
)


def batch() -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    logits = torch.randn(2, 3, 16, 16, requires_grad=True)
    labels = torch.randint(0, 3, (2, 16, 16))
    student = [torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(2, 6, 4, 4, requires_grad=True)]
    teacher = [torch.randn(2, 5, 8, 8), torch.randn(2, 7, 2, 2)]
    return logits, labels, student, teacher


def parts() -> tuple[MWADLoss, PDRLoss]:
    return MWADLoss([4, 6], [5, 7], window_size=4, embed_dim=8, shift="deterministic"), PDRLoss(3)


def test_total_is_the_weighted_sum_of_its_parts() -> None:
    mwad, pdr = parts()
    logits, labels, student, teacher = batch()
    output = SWARDLoss(SegmentationCrossEntropy(), mwad, pdr, weights=(0.7, 2.0, 0.3))(logits, labels, student, teacher)
    expected = (
        0.7 * F.cross_entropy(logits, labels) + 2.0 * mwad(student, teacher).loss + 0.3 * pdr(student[-1], labels).loss
    )
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.mwad, mwad(student, teacher).loss.detach())
    torch.testing.assert_close(output.pdr, pdr(student[-1], labels).loss.detach())
    assert set(output.terms) == {"task", "mwad", "attention", "value", "context", "pdr", "separation", "compactness"}
    assert not any(term.requires_grad for term in output.terms.values())


def test_pdr_may_look_at_another_map() -> None:
    mwad, pdr = parts()
    logits, labels, student, teacher = batch()
    other = torch.randn(2, 9, 4, 4)
    loss = SWARDLoss(SegmentationCrossEntropy(), mwad, pdr, weights=(1.0, 1.0, 0.1))
    output = loss(logits, labels, student, teacher, other)
    torch.testing.assert_close(output.pdr, pdr(other, labels).loss)


def test_a_zero_weight_skips_the_part() -> None:
    mwad, pdr = parts()
    logits, labels, student, teacher = batch()
    mwad.forward = pdr.forward = None  # type: ignore[method-assign,assignment]
    output = SWARDLoss(SegmentationCrossEntropy(), mwad, pdr, weights=(1.0, 0.0, 0.0))(logits, labels, student, teacher)
    torch.testing.assert_close(output.loss, F.cross_entropy(logits, labels))


def test_protocol_form_is_the_objective_without_its_task() -> None:
    mwad, pdr = parts()
    logits, labels, student, teacher = batch()
    method = SWARDDistillation(
        mwad, pdr, student_taps=["a", "b"], teacher_taps=["x", "y"], pdr_tap="deep", weights=PAPER.weights
    )
    assert method.student_taps == ("a", "b", "deep")
    inputs = DistillationInputs(
        {"a": student[0], "b": student[1], "deep": student[1], "logits": logits},
        {"x": teacher[0], "y": teacher[1]},
        labels,
    )
    whole = SWARDLoss(SegmentationCrossEntropy(), mwad, pdr, weights=(1.0, 2.0, 1.0))(logits, labels, student, teacher)
    torch.testing.assert_close(method(inputs).loss, whole.loss - F.cross_entropy(logits, labels))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_weighted_terms_add_up_to_the_loss(reduction: str) -> None:
    mwad, pdr = parts()
    mwad.terms, pdr.terms, mwad.context_reduction = (0.5, 2.0, 3.0), (0.3, 0.7), reduction
    _, labels, student, teacher = batch()
    method = SWARDDistillation(mwad, pdr, student_taps=["a", "b"], teacher_taps=["x", "y"], weights=(0.2, 5.0))
    output = method(DistillationInputs(dict(zip("ab", student)), dict(zip("xy", teacher)), labels))
    torch.testing.assert_close(sum(output.weighted.values()), output.loss.detach(), check_dtype=False)
    torch.testing.assert_close(output.weighted["context"], 0.2 * 3.0 * output.terms["context"])


def test_without_weight_mwad_reports_nothing() -> None:
    mwad, pdr = parts()
    _, labels, student, teacher = batch()
    method = SWARDDistillation(mwad, pdr, student_taps=["a", "b"], teacher_taps=["x", "y"], weights=(0.0, 1.0))
    assert method.diagnostics(DistillationInputs(dict(zip("ab", student)), dict(zip("xy", teacher)), labels)) == {}


@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.0, 2.0, 0.0), (0.0, 0.0, 1.0), (0.0, 0.0, 0.0)])
def test_parts_of_weight_zero_stay_in_the_graph(weights: tuple[float, float, float]) -> None:
    mwad, pdr = parts()
    logits, labels, student, teacher = batch()
    logits.data[0, 0, 0, 0] = float("inf") if not weights[0] else 1.0  # a part that is not computed cannot be NaN
    output = SWARDLoss(SegmentationCrossEntropy(), mwad, pdr, weights=weights)(logits, labels, student, teacher)
    output.loss.backward()
    assert output.loss.isfinite()
    trained = [parameter for parameter in mwad.parameters() if parameter.requires_grad]
    for weight, tensors in zip(weights, ([logits], [*trained, student[0]], [])):
        for tensor in tensors:
            assert tensor.grad is not None
            assert tensor.grad.any() == bool(weight)


def test_a_weight_that_is_ramped_up_from_zero_trains_the_projections() -> None:
    mwad, pdr = parts()
    logits, labels, student, teacher = batch()
    objective = SWARDLoss(SegmentationCrossEntropy(), mwad, pdr, weights=(1.0, 0.0, 1.0))
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    before = [parameter.detach().clone() for parameter in trained]
    for beta, moves in ((0.0, False), (2.0, True)):
        objective.weights = (1.0, beta, 1.0)
        optimizer.zero_grad()
        objective(logits, labels, student, teacher).loss.backward()
        optimizer.step()
        assert all(torch.equal(one, other) != moves for one, other in zip(before, trained))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, -1.0, 1.0), (1.0, float("nan"), 1.0), (1.0, float("inf"), 1.0)])
def test_weights_that_eq_20_does_not_have_are_refused(weights: tuple[float, ...]) -> None:
    message = re.escape(f"weights must be 3 finite numbers of at least 0, for alpha, beta, gamma, got {weights}")
    with pytest.raises(ValueError, match=message):
        SWARDLoss(SegmentationCrossEntropy(), *parts(), weights=weights)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"weights must be 2 finite numbers of at least 0, for beta, gamma, got \(2, -1\)"
    ):
        SWARDDistillation(*parts(), student_taps=["a", "b"], teacher_taps=["x", "y"], weights=(2, -1))
    with pytest.raises(ValueError, match=r"weights must be 3 finite numbers .* got 2\.0"):
        SWARDLoss(SegmentationCrossEntropy(), *parts(), weights=2.0)  # type: ignore[arg-type]


DISTRIBUTED = """
import sys
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from sward.losses import MWADLoss, PDRLoss, SegmentationCrossEntropy, SWARDLoss

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
torch.manual_seed(0)


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)
        self.only_for_distillation = nn.Conv2d(4, 4, 1)
        mwad = MWADLoss([4], [5], window_size=4, embed_dim=8, teacher_projections="learned")
        self.loss = SWARDLoss(SegmentationCrossEntropy(), mwad, PDRLoss(3))

    def forward(self, images, labels, teacher):
        features = self.trunk(images)
        return self.loss(self.head(features), labels, [self.only_for_distillation(features)], teacher).loss


student = Student()
wrapped = DistributedDataParallel(student)
optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
# Two steps each: DDP complains of parameters that the step before left without a gradient.
for weights in ((1.0, 0.0, 0.0), (1.0, 0.0, 0.5), (0.0, 2.0, 0.0), (1.0, 2.0, 1.0)):
    student.loss.weights = weights
    before = student.loss.mwad.theta_student[0].weight.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        loss = wrapped(torch.randn(2, 3, 8, 8), torch.randint(3, (2, 8, 8)), [torch.randn(2, 5, 8, 8)])
        loss.backward()
        optimizer.step()
    assert torch.equal(before, student.loss.mwad.theta_student[0].weight) == (weights[1] == 0)
torch.distributed.destroy_process_group()
print("trained")
"""


def test_a_weight_of_zero_trains_under_ddp_and_can_be_ramped_up(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DISTRIBUTED]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for process in ranks:
        output, errors = process.communicate(timeout=120)
        # torch 2.9 prints a line of its own about the group.
        assert output.splitlines()[-1:] == ["trained"], errors[-2000:]


def test_cross_entropy_leaves_ignored_pixels_out_of_the_mean() -> None:
    logits, labels = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    labels[0, :2] = 255
    torch.testing.assert_close(
        SegmentationCrossEntropy()(logits, labels), F.cross_entropy(logits, labels, ignore_index=255)
    )


def test_one_logit_is_binary_cross_entropy() -> None:
    logits, labels = torch.randn(2, 1, 4, 4), torch.randint(0, 2, (2, 4, 4))
    labels[0, :2] = 255
    kept = labels != 255
    expected = F.binary_cross_entropy_with_logits(logits[:, 0][kept], labels[kept].float())
    torch.testing.assert_close(SegmentationCrossEntropy()(logits, labels), expected)


@pytest.mark.parametrize("classes", [1, 3])
def test_all_ignored_costs_nothing(classes: int) -> None:
    logits = torch.randn(1, classes, 4, 4, requires_grad=True)
    loss = SegmentationCrossEntropy()(logits, torch.full((1, 4, 4), 255))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert logits.grad.abs().sum() == 0


@pytest.mark.parametrize("channels", [1, 2])
def test_cross_entropy_refuses_a_label_that_is_no_class(channels: int) -> None:
    logits, labels = torch.randn(2, channels, 4, 4), torch.full((2, 4, 4), 255)
    labels[1, 2, 3] = 7
    message = r"labels must be classes in 0\.\.1 or ignore_index=255, got 7"
    for loss in (SegmentationCrossEntropy(), torch.compile(SegmentationCrossEntropy(), backend="aot_eager")):
        with pytest.raises(ValueError, match=message):
            loss(logits, labels)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (
            torch.zeros(2, 3, 32, 32),
            torch.zeros(2, 64, 64, dtype=torch.int64),
            r"labels must be \[2, 32, 32\], on the grid of logits \(2, 3, 32, 32\), got shape \(2, 64, 64\)",
        ),
        (
            torch.zeros(2, 1, 4, 4),
            torch.zeros(2, 1, 4, 4, dtype=torch.int64),
            r"labels must be \[B, H, W\], got shape \(2, 1, 4, 4\)",
        ),
        (
            torch.zeros(2, 4, 4),
            torch.zeros(2, 4, 4, dtype=torch.int64),
            r"logits must be \[B, K, H, W\], got shape \(2, 4, 4\)",
        ),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4), r"labels must have an integer dtype, got torch\.float32"),
        (torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4).bool(), r"labels must have an integer dtype, got torch\.bool"),
    ],
)
def test_cross_entropy_refuses_what_does_not_fit(logits: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentationCrossEntropy()(logits, labels)


@pytest.mark.parametrize("channels", [1, 3])
def test_cross_entropy_compiles_without_a_graph_break(channels: int) -> None:
    torch._dynamo.reset()
    logits, labels = torch.randn(2, channels, 4, 4), torch.randint(0, 2, (2, 4, 4))
    labels[0, :2] = 255
    compiled = torch.compile(SegmentationCrossEntropy(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, labels), SegmentationCrossEntropy()(logits, labels))


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_logits_of_other_classes_than_pdr_are_refused(channels: int) -> None:
    _, labels, student, teacher = batch()
    loss = SWARDLoss(SegmentationCrossEntropy(), *parts(), weights=(1.0, 2.0, 1.0))
    with pytest.raises(ValueError, match=rf"the logits \(2, {channels}, 16, 16\), .*got PDRLoss\(num_classes=3\)"):
        loss(torch.randn(2, channels, 16, 16), labels, student, teacher)


def test_one_logit_goes_with_two_prototypes() -> None:
    _, labels, student, teacher = batch()
    mwad, _ = parts()
    loss = SWARDLoss(SegmentationCrossEntropy(), mwad, PDRLoss(2), weights=(1.0, 1.0, 0.1))
    assert loss(torch.randn(2, 1, 16, 16), labels.clamp(max=1), student, teacher).loss.isfinite()


def test_the_recommended_recipe_needs_no_pdr_and_every_learnable_parameter_gets_a_gradient() -> None:
    logits, labels, student, teacher = batch()
    mwad, _ = parts()
    loss = SWARDLoss(SegmentationCrossEntropy(), mwad)
    output = loss(logits, labels, student, teacher)
    torch.testing.assert_close(output.loss, F.cross_entropy(logits, labels) + mwad(student, teacher).loss)
    assert output.pdr == output.terms["separation"] == 0
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in loss.parameters() if parameter.requires_grad)
    with pytest.raises(ValueError, match="pdr must be a PDRLoss where its weight gamma is not 0, got None"):
        SWARDLoss(SegmentationCrossEntropy(), mwad, weights=(1.0, 2.0, 1.0))


def test_importing_the_losses_is_light() -> None:
    """Beyond torch they load nothing but this project and the standard library: no Triton, no timm, no matplotlib."""
    code = "import sys, torch; before = set(sys.modules); import sward.losses; print(*set(sys.modules) - before)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    packages = {module.split(".")[0] for module in run.stdout.split()}
    assert packages - sys.stdlib_module_names == {"sward", "sward_kernels"}
