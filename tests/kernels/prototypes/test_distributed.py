"""Prototype statistics merged over processes: two processes compared with one that has the whole batch."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sward_kernels import prototype_discrimination
from tests.support.prototype_cases import close_clusters

NUM_CLASSES = 6
IMPLEMENTATIONS = ("reference", "eager")


def scenarios() -> dict[str, tuple[Tensor, Tensor]]:
    """Batches of four images, two per process, with different kinds of labels in each process."""
    features, labels = close_clusters(4, 5, 6, 7, NUM_CLASSES)
    features = features.detach()
    unequal = torch.cat([labels[:2].clamp(max=2), torch.where(labels[2:] < 2, 5, labels[2:])])
    empty = torch.cat([labels[:2], torch.full_like(labels[2:], 255)])
    single = torch.full_like(labels, 255)
    single[0, 0, 0], single[3, 1, 1], single[3, 2, 2] = 1, 1, 4
    return {
        "alike": (features, labels),
        "unequal class sets": (features, unequal),
        "empty process": (features, empty),
        "class with one pixel on each process": (features + 100, single),
        "nothing labelled": (features, torch.full_like(labels, 255)),
    }


def evaluate(
    features: Tensor, labels: Tensor, implementation: str, normalize: bool, **options: object
) -> dict[str, Tensor]:
    features = features.clone().requires_grad_()
    result = prototype_discrimination(
        features, labels, NUM_CLASSES, implementation=implementation, normalize=normalize, **options
    )
    (gradient,) = torch.autograd.grad(result.loss, features)
    return {**{name: value.detach() for name, value in result._asdict().items()}, "gradient": gradient}


def parameter_gradients(
    network: nn.Module, images: Tensor, labels: Tensor, implementation: str, **options: object
) -> list[Tensor]:
    loss = prototype_discrimination(network(images), labels, NUM_CLASSES, implementation=implementation, **options).loss
    loss.backward()
    return [parameter.grad.clone() for parameter in network.parameters()]


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Conv2d(5, 7, 3, padding=1).double()


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    group = torch.distributed.group.WORLD
    mine = slice(2 * rank, 2 * rank + 2)
    results = {}
    for name, (features, labels) in scenarios().items():
        for implementation in IMPLEMENTATIONS:
            for normalize in (False, True):
                results[name, implementation, normalize] = evaluate(
                    features[mine], labels[mine], implementation, normalize, process_group=group
                )
    features, labels = scenarios()["unequal class sets"]
    for implementation in IMPLEMENTATIONS:
        replica = DistributedDataParallel(network())
        results["ddp", implementation] = parameter_gradients(
            replica, features[mine], labels[mine], implementation, process_group=group
        )
    torch.save(results, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results() -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(process, (folder,), nprocs=2)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("scenario", scenarios())
def test_two_processes_equal_one(results: list[dict], scenario: str, implementation: str, normalize: bool) -> None:
    features, labels = scenarios()[scenario]
    whole = evaluate(features, labels, "reference", normalize)
    first, second = (result[scenario, implementation, normalize] for result in results)
    for name in ("loss", "separation", "compactness", "prototypes", "counts"):
        torch.testing.assert_close(first[name], whole[name], atol=1e-9, rtol=1e-9)
        assert torch.equal(first[name], second[name])
    # The gradient is that of the sum of both processes' (equal) losses.
    gradient = torch.cat([first["gradient"], second["gradient"]]) / 2
    torch.testing.assert_close(gradient, whole["gradient"], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_averaged_by_ddp_the_gradients_are_those_of_the_whole_batch(results: list[dict], implementation: str) -> None:
    features, labels = scenarios()["unequal class sets"]
    expected = parameter_gradients(network(), features, labels, "reference")
    assert any(gradient.abs().max() > 1e-3 for gradient in expected)
    for result in results:
        torch.testing.assert_close(result["ddp", implementation], expected, atol=1e-9, rtol=1e-9)
