"""Mixed precision, compilation and memory layout change how a step is computed, not what it learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sward import models
from sward.config import OptimizerConfig, Precision, TeacherConfig
from sward.losses import MWADLoss, PDRLoss, SegmentationCrossEntropy, SWARDDistillation
from sward.runs import train_student
from sward.training import FrozenTeacher, TrainingStep
from sward.training.state import TrainingState
from tests.support.peers import PEERS, batch
from tests.support.training_runs import checkpoint, records, small

pytestmark = pytest.mark.usefixtures("few_images")


def first_losses(run: Path) -> dict[str, float]:
    return records(run)[0]["weighted"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_starts_with_the_same_losses_up_to_its_rounding(tmp_path: Path, precision: Precision) -> None:
    train_student(small(tmp_path / "full", iterations=2))
    train_student(
        small(
            tmp_path / "half",
            iterations=2,
            precision=precision,
            teacher=TeacherConfig(name="hiera_demo", untrained=True, precision="bf16"),
        )
    )
    full, half = first_losses(tmp_path / "full"), first_losses(tmp_path / "half")
    assert half != full
    assert half == pytest.approx(full, rel=0.05, abs=0.02)
    state = checkpoint(tmp_path / "half")
    assert all(value.dtype == torch.float32 for value in state["model"].values() if value.is_floating_point())
    assert ("scale" in state["scaler"]) == (precision == "fp16")


def test_a_teacher_in_low_precision_hands_out_maps_that_autograd_may_keep() -> None:
    network = models.build("hiera_demo", 5)
    layer = models.describe("hiera_demo").stages[0].layer
    images = torch.randn(1, 3, 64, 64)
    exact = FrozenTeacher(network, [layer, "logits"])(images)
    low = FrozenTeacher(network, [layer], precision="bf16")(images)
    widened = FrozenTeacher(network, [layer], precision="bf16", dtype=torch.float32)(images)
    assert set(exact) == {layer, "logits"}
    assert set(low) == {layer}
    assert exact[layer].dtype == widened[layer].dtype == torch.float32
    assert not torch.equal(exact[layer], widened[layer])
    torch.testing.assert_close(exact[layer], widened[layer], rtol=0.1, atol=0.1)
    weight = torch.ones((), requires_grad=True)
    for maps in (exact, low, widened):
        assert not maps[layer].is_inference()
        (weight * maps[layer]).sum().backward()


def sward_loss(student_channels: int, teacher_channels: int, num_classes: int) -> SWARDDistillation:
    mwad = MWADLoss([student_channels], [teacher_channels], window_size=4, embed_dim=8)
    return SWARDDistillation(mwad, PDRLoss(num_classes), student_taps=["s"], teacher_taps=["t"])


LOSSES = {"sward": sward_loss} | {name: make for name, make in PEERS.items() if name != "cirkd"}
"""CIRKD draws what it stores from seeded generators, which torch.compile cannot trace: it runs between two graphs."""


@pytest.mark.parametrize("name", LOSSES)
def test_losses_compile_without_a_graph_break(name: str) -> None:
    torch._dynamo.reset()
    loss = LOSSES[name](3, 5, 2).eval()  # unshifted windows: the compiled draw is another one
    inputs = batch()
    expected = loss(inputs).loss
    # Graph breaks are Dynamo's; our own operations are traced down to their fake kernels as well.
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager" if name == "sward" else "eager")(inputs).loss
    torch.testing.assert_close(compiled, expected)
    compiled.backward()
    assert all(inputs.student[tap].grad is not None for tap in loss.student_taps)


def test_compiled_student_and_teacher_are_one_graph_each_and_their_taps_survive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    train_student(small(tmp_path / "eager", iterations=2))
    compiled: list[str] = []
    compile_module = nn.Module.compile

    def without_a_break(module: nn.Module) -> None:
        compiled.append(type(module).__name__)
        compile_module(module, backend="eager", fullgraph=True)

    monkeypatch.setattr(nn.Module, "compile", without_a_break)
    train_student(small(tmp_path / "compiled", iterations=2, compile=True))
    assert len(compiled) == 2
    for eager, other in zip(records(tmp_path / "eager")[:2], records(tmp_path / "compiled")[:2]):
        assert other["weighted"] == pytest.approx(eager["weighted"], rel=1e-3)
    assert checkpoint(tmp_path / "compiled")["model"].keys() == checkpoint(tmp_path / "eager")["model"].keys()


@pytest.mark.slow
def test_inductor_trains_as_eager_does(tmp_path: Path) -> None:
    torch._dynamo.reset()
    train_student(small(tmp_path / "eager", iterations=3))
    train_student(small(tmp_path / "compiled", iterations=3, compile=True))
    for eager, other in zip(records(tmp_path / "eager")[:3], records(tmp_path / "compiled")[:3]):
        assert other["weighted"] == pytest.approx(eager["weighted"], rel=1e-3)


def test_channels_last_reaches_the_tapped_maps_and_changes_no_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caught: list[Tensor] = []
    forward = PDRLoss.forward

    def keep(loss: PDRLoss, features: Tensor, labels: Tensor) -> object:
        caught.append(features)
        return forward(loss, features, labels)

    monkeypatch.setattr(PDRLoss, "forward", keep)
    sward = small(tmp_path).sward
    sward.pdr_layer = "encoder.2"
    for name, channels_last in (("contiguous", False), ("last", True)):
        train_student(small(tmp_path / name, iterations=1, channels_last=channels_last, sward=sward))
    # Two each: of the step that is tried before a run, and of the run.
    contiguous, last = caught[1::2]
    assert len(caught) == 4
    assert contiguous.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert not last.is_contiguous()
    assert first_losses(tmp_path / "last") == pytest.approx(first_losses(tmp_path / "contiguous"), rel=1e-3)


def test_the_gradient_is_clipped_to_its_norm_and_the_norm_before_is_logged(tmp_path: Path) -> None:
    norms = {}
    for clip in (None, 1e-3):
        run = tmp_path / str(clip)
        train_student(small(run, iterations=1, optimizer=OptimizerConfig(lr=1e-3, clip_norm=clip)))
        norms[clip] = records(run)[0]["gradient_norm"]
        # AdamW's first moment after one step is a tenth of the gradient.
        moments = [entry["exp_avg"] for entry in checkpoint(run)["optimizer"]["state"].values()]
        applied = 10 * torch.cat([moment.flatten() for moment in moments]).norm().item()
        assert applied == pytest.approx(norms[clip] if clip is None else clip, rel=1e-3)
    assert norms[None] == pytest.approx(norms[1e-3])
    with pytest.raises(ValueError, match=r"optimizer\.clip_norm must be above 0, got 0"):
        small(tmp_path, optimizer=OptimizerConfig(clip_norm=0)).check()


def test_a_gradient_scaled_for_half_precision_is_clipped_by_its_own_norm() -> None:
    model = nn.Linear(4, 1, bias=False)
    before = model.weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    state = TrainingState(model, None, optimizer, lambda step: 1.0, scaler, clip_norm=0.5)
    # The gradient is (1, 1, 1, 1), of norm 2.
    norm = state.update(model(torch.ones(1, 4)).sum())
    assert norm is not None
    assert norm.item() == pytest.approx(2.0)
    torch.testing.assert_close(model.weight.detach(), before - 0.25)


def test_the_task_loss_of_half_precision_logits_is_computed_in_float32() -> None:
    logits, labels = torch.randn(2, 4, 8, 8).bfloat16(), torch.randint(0, 4, (2, 8, 8))
    step = TrainingStep(nn.Identity(), SegmentationCrossEntropy(), precision="bf16")
    loss = step(logits, labels, {}).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits.float(), labels))


def test_the_factor_scales_the_distillation_loss_and_leaves_the_task_loss(tmp_path: Path) -> None:
    found = {}
    for factor in (1.0, 0.25):
        run = tmp_path / str(factor)
        train_student(small(run, iterations=1, distillation="cwd", distillation_factor=factor))
        found[factor] = records(run)[0]
    whole, quarter = found[1.0]["weighted"], found[0.25]["weighted"]
    assert quarter == {"task": whole["task"]} | {
        name: pytest.approx(value / 4) for name, value in whole.items() if name != "task"
    }
    assert quarter["task"] + sum(value for name, value in quarter.items() if name != "task") == pytest.approx(
        found[0.25]["loss"]
    )
    with pytest.raises(ValueError, match="distillation_factor must be above 0, got 0"):
        small(tmp_path, distillation_factor=0.0).check()
