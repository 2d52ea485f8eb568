"""What every peer must do alike: shapes, heads, layouts, precision, ignored labels, learning, several processes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sward.losses.cirkd import CIRKDLoss
from sward.losses.protocol import LOGITS, DistillationInputs, DistillationLoss
from sward.losses.standardized import StandardizedTeacher
from tests.support.peers import PEERS, batch
from tests.support.training_runs import SERVER

GRIDS = [(8, 8), (7, 9), (16, 8)]


def build(name: str, student_channels: int = 3, teacher_channels: int = 5, num_classes: int = 2) -> DistillationLoss:
    torch.manual_seed(5)
    return PEERS[name](student_channels, teacher_channels, num_classes)


def uses_features(method: DistillationLoss) -> bool:
    return method.student_taps[-1] != LOGITS


def check(method: DistillationLoss, inputs: DistillationInputs) -> Tensor:
    """One step: finite scalar and terms, gradient in every tapped map of the student, none in the teacher."""
    for maps in inputs.teacher.values():
        maps.requires_grad_()
    output = method(inputs)
    assert output.loss.shape == ()
    assert output.loss.isfinite()
    for term in output.terms.values():
        assert term.shape == ()
        assert term.dtype == torch.float32
        assert not term.requires_grad
    assert set(output.weighted) <= set(output.terms)
    torch.testing.assert_close(sum(output.weighted.values()), output.loss.detach(), check_dtype=False)
    output.loss.backward()
    for tap in method.student_taps:
        gradient = inputs.student[tap].grad
        assert gradient is not None
        assert gradient.isfinite().all()
        assert gradient.any()
    assert all(maps.grad is None for maps in inputs.teacher.values())
    return output.loss.detach()


@pytest.mark.parametrize("name", [name for name in PEERS if uses_features(build(name))])
def test_any_method_can_read_standardised_features(name: str) -> None:
    inputs = batch()
    teacher = inputs.teacher["t"]
    scaled = teacher * torch.tensor([30.0, 1.0, 0.01, 5.0, 1.0])[:, None, None] + 2
    by_hand = (teacher - teacher.mean((0, 2, 3), keepdim=True)) / teacher.std((0, 2, 3), correction=0, keepdim=True)
    method = StandardizedTeacher(build(name), [5])
    assert (method.student_taps, method.teacher_taps) == (method.method.student_taps, method.method.teacher_taps)
    expected = build(name)(inputs._replace(teacher={**inputs.teacher, "t": by_hand})).loss
    loss = check(method, inputs._replace(teacher={**inputs.teacher, "t": scaled}))
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-5)


def test_a_method_on_logits_has_nothing_to_standardise() -> None:
    with pytest.raises(ValueError, match=r"one number per teacher map of KDLoss, at least one; got 0 for \[\]"):
        StandardizedTeacher(build("kd"), [])
    with pytest.raises(ValueError, match=r"got 2 for \['t'\]"):
        StandardizedTeacher(build("fitnet"), [5, 5])


@pytest.mark.parametrize("name", PEERS)
def test_any_channels_and_any_two_grids(name: str) -> None:
    for student_channels, teacher_channels in [(3, 5), (5, 3), (4, 4)]:
        method = build(name, student_channels, teacher_channels)
        for student_grid in GRIDS:
            for teacher_grid in GRIDS:
                check(
                    method,
                    batch(
                        student_channels=student_channels,
                        teacher_channels=teacher_channels,
                        student_grid=student_grid,
                        teacher_grid=teacher_grid,
                    ),
                )


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("heads", [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_one_and_two_logit_heads(name: str, heads: tuple[int, int]) -> None:
    check(build(name), batch(student_heads=heads[0], teacher_heads=heads[1]))


@pytest.mark.parametrize("name", PEERS)
def test_logits_of_different_strides(name: str) -> None:
    inputs = batch(label_size=(16, 24))
    small = F.interpolate(inputs.teacher[LOGITS], size=(4, 6), mode="bilinear").detach()
    check(build(name), inputs._replace(teacher={**inputs.teacher, LOGITS: small}))


@pytest.mark.parametrize("name", PEERS)
def test_views_of_channels_last_maps(name: str) -> None:
    inputs = batch()

    def views(maps: Any) -> dict[str, Tensor]:
        # As a transformer hands out its tokens: a [B, H, W, C] tensor, permuted.
        return {
            tap: m.detach().permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2).requires_grad_(m.requires_grad)
            for tap, m in maps.items()
        }

    permuted = DistillationInputs(views(inputs.student), views(inputs.teacher), inputs.labels)
    assert not permuted.teacher["t"].is_contiguous()
    torch.testing.assert_close(check(build(name), permuted), check(build(name), inputs))


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_with_maps_in_half_precision(name: str, dtype: torch.dtype) -> None:
    exact = batch()
    half = DistillationInputs(
        {tap: m.detach().to(dtype).requires_grad_() for tap, m in exact.student.items()},
        {tap: m.detach().to(dtype) for tap, m in exact.teacher.items()},
        exact.labels,
    )
    rounded = DistillationInputs(
        {tap: m.detach().float().requires_grad_() for tap, m in half.student.items()},
        {tap: m.detach().float() for tap, m in half.teacher.items()},
        exact.labels,
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = check(build(name), half)
    # Everything after the taps runs in float32, so only the rounding of the inputs separates the two.
    torch.testing.assert_close(loss, check(build(name), rounded))


@pytest.mark.parametrize("name", PEERS)
def test_a_module_in_bf16_differs_by_the_rounding_of_its_weights(name: str) -> None:
    expected = check(build(name), batch())
    for dtype in (torch.float32, torch.bfloat16):
        torch.testing.assert_close(
            check(build(name).to(torch.bfloat16), batch(dtype=dtype)), expected, rtol=0.05, atol=0, check_dtype=False
        )


@pytest.mark.parametrize("name", PEERS)
def test_batch_without_a_label(name: str) -> None:
    inputs = batch()
    inputs.labels.fill_(255)
    output = build(name)(inputs)
    assert output.loss.isfinite()
    output.loss.backward()
    assert all(m.grad is None or m.grad.isfinite().all() for m in inputs.student.values())


@pytest.mark.parametrize("name", PEERS)
def test_ten_steps_lower_the_loss(name: str) -> None:
    inputs, method = batch(), build(name)
    if isinstance(method, CIRKDLoss):
        # New keys at every step would move the target.
        method(inputs)
        method.eval()
    learned = [*inputs.student.values(), *(p for p in method.parameters() if p.requires_grad)]
    optimizer = torch.optim.Adam(learned, lr=0.03)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = method(inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]


@pytest.mark.parametrize("name", PEERS)
def test_learned_parts_are_parameters_and_survive_a_checkpoint(name: str, tmp_path: Path) -> None:
    method = build(name)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.1)
    method(batch(seed=1))
    torch.save(method.state_dict(), tmp_path / "loss.pt")
    torch.manual_seed(99)
    restored = PEERS[name](3, 5, 2)
    restored.load_state_dict(torch.load(tmp_path / "loss.pt", weights_only=True))
    assert restored(batch()).loss.item() == method(batch()).loss.item()


@pytest.mark.parametrize("name", PEERS)
def test_two_runs_are_bitwise_equal(name: str) -> None:
    results = []
    for _ in range(2):
        inputs = batch()
        loss = check(build(name), inputs)
        results.append([loss, *(m.grad for m in inputs.student.values() if m.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("name", PEERS)
def test_missing_taps_and_wrong_channels_are_named(name: str) -> None:
    method, inputs = build(name), batch()
    tap = method.teacher_taps[-1]
    with pytest.raises(ValueError, match=f"the teacher's tap '{tap}' is missing"):
        method(inputs._replace(teacher={other: maps for other, maps in inputs.teacher.items() if other != tap}))
    with pytest.raises(ValueError, match=r"must be \[B, C, H, W\], got shape \(2, 5\)"):
        method(inputs._replace(teacher={tap: torch.zeros(2, 5) for tap in inputs.teacher}))
    if uses_features(method) and not name.startswith(("at", "pairwise")):
        with pytest.raises(ValueError, match="the student's tap 's' has 9 channels, the loss was built for 3"):
            method(batch(student_channels=9))


# --- several processes -----------------------------------------------------------------------------------------------


class Toy(nn.Module):
    """Student and loss as one module, as the trainer wraps them."""

    def __init__(self, method: DistillationLoss) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.student = nn.ModuleDict({"s": nn.Conv2d(3, 3, 1), LOGITS: nn.Conv2d(3, 2, 1)})
        self.method = method

    def forward(self, images: Tensor, teacher: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        student = {tap: layer(images) for tap, layer in self.student.items()}
        output = self.method(DistillationInputs(student, teacher, labels))
        # Every parameter takes part, as the task loss would see to.
        return output.loss + 0.0 * sum(p.sum() for p in self.parameters()), output.terms


def whole_batch(seed: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(4, 3, 8, 8, generator=generator)
    teacher = {
        "t": torch.randn(4, 5, 8, 8, generator=generator),
        LOGITS: torch.randn(4, 2, 8, 8, generator=generator),
    }
    # Ignored pixels at the same places of every image, so that a mean over valid pixels is one over images.
    labels = torch.randint(0, 2, (4, 8, 8), generator=generator)
    labels[:, :2] = 255
    return images, teacher, labels


def train(name: str, wrap: Any, part: slice) -> dict[str, Any]:
    """Two steps of SGD on a part of each batch."""
    toy = Toy(build(name))
    if isinstance(toy.method, CIRKDLoss):
        # Batch statistics and pairs of images are those of a process; the memory is everyone's.
        toy.method.terms = (1.0, 0.0, 1.0, 1.0)
        toy.method.projector[1].eval()
    module = wrap(toy)
    optimizer = torch.optim.SGD(toy.parameters(), lr=0.05)
    for step in range(2):
        images, teacher, labels = whole_batch(step)
        loss, terms = module(images[part], {tap: m[part] for tap, m in teacher.items()}, labels[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    result: dict[str, Any] = {"terms": terms, "weights": copy.deepcopy(toy.student.state_dict())}
    if isinstance(toy.method, CIRKDLoss):
        result["banks"] = toy.method.get_extra_state()
    return result


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {
        name: train(name, lambda toy: DistributedDataParallel(toy), slice(2 * rank, 2 * rank + 2)) for name in PEERS
    }
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    processes = [SERVER.Process(target=run_rank, args=(rank, str(folder))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
        assert process.exitcode == 0
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", PEERS)
def test_one_process_and_two_learn_alike(name: str, two_processes: list[dict[str, Any]]) -> None:
    alone = train(name, lambda toy: toy, slice(None))
    first, second = (ranks[name] for ranks in two_processes)
    for term, value in alone["terms"].items():
        torch.testing.assert_close((first["terms"][term] + second["terms"][term]) / 2, value)
    for key, value in alone["weights"].items():
        torch.testing.assert_close(first["weights"][key], value)
        assert torch.equal(first["weights"][key], second["weights"][key])


def test_memory_is_bit_equal_on_all_ranks_and_equals_that_of_one_process(two_processes: list[dict[str, Any]]) -> None:
    alone = train("cirkd", lambda toy: toy, slice(None))["banks"]
    first, second = (ranks["cirkd"]["banks"] for ranks in two_processes)
    for bank in ("pixel_queue", "region_queue"):
        assert first[bank]["pointer"].sum() > 0
        for part in ("rows", "pointer", "filled"):
            assert torch.equal(first[bank][part], second[bank][part])
            torch.testing.assert_close(first[bank][part], alone[bank][part])
