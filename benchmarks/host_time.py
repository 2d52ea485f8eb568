"""Host time of each operation: the Python and PyTorch work around the Triton kernels, with the GPU's driver mocked.

    python benchmarks/host_time.py

Needs no GPU and measures none. The maps are tiny CPU tensors, so allocations and small tensor operations cost what
dispatching them costs; `cuLaunchKernel` itself, a few microseconds per launch, is missing. Numbers are microseconds of
processor time of this process, the minimum over repetitions, since the machine may be busy with other work.

The last line names what Triton would compile in one step of MWAD over four stages.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import mocked_gpu
import torch
from torch import Tensor

from sward.losses import MWADLoss
from sward_kernels import prototype_discrimination, relational_kl, windowed_distillation, windowed_feature_distillation

compiled = mocked_gpu.install()  # the modules that launch kernels are not imported before the first call

REPETITIONS = 500
CALLS = 5


def microseconds(run: Callable[[], object]) -> float:
    """Return the least processor time of one call, over repetitions of many calls."""
    for _ in range(20):
        run()
    least = float("inf")
    for _ in range(REPETITIONS):
        began = time.process_time()
        for _ in range(CALLS):
            run()
        least = min(least, (time.process_time() - began) / CALLS)
    return least * 1e6


def channels_last(channels: int, requires_grad: bool = True) -> Tensor:
    maps = torch.zeros(1, channels, 8, 8, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    return maps.requires_grad_(requires_grad)


def losses() -> dict[str, tuple[Callable[[], Tensor], tuple[Tensor, ...]]]:
    """Return each operation as `(loss, inputs that need a gradient)`."""
    student, teacher = channels_last(192), channels_last(192)
    shift = torch.zeros(2, dtype=torch.int64)
    features, classes = channels_last(64), torch.zeros(1, 8, 8, dtype=torch.int64)
    vectors = torch.zeros(2, 64, 64, requires_grad=True)
    weight = torch.zeros(192, 64, dtype=torch.bfloat16, requires_grad=True)
    frozen = features.detach(), weight.detach()
    return {
        "windowed_distillation": (
            lambda: windowed_distillation(student, teacher, 8, shift, implementation="triton").loss,
            (student, teacher),
        ),
        "windowed_feature_distillation": (
            lambda: (
                windowed_feature_distillation(
                    features, frozen[0], weight, frozen[1], 8, shift, implementation="triton"
                ).loss
            ),
            (features, weight),
        ),
        "prototype_discrimination": (
            lambda: prototype_discrimination(features, classes, 19, implementation="triton").loss,
            (features,),
        ),
        "relational_kl": (lambda: relational_kl(vectors, vectors, implementation="triton"), (vectors,)),
    }


def compilations_of_four_stages() -> list[str]:
    """Return the kernels compiled in one forward and backward pass of MWAD over four stages, in order."""
    loss = MWADLoss([32] * 4, [32] * 4, embed_dim=48, teacher_projections="learned", implementation="triton")
    loss = loss.to(memory_format=torch.channels_last)
    maps = [[torch.randn(1, 32, 8 * side, 8).to(memory_format=torch.channels_last) for side in (1, 2, 3, 4)]] * 2
    before = len(compiled)
    loss(*maps).loss.backward()
    return compiled[before:]


def main() -> None:
    print(f"{'microseconds of host time':<30}{'forward':>10}{'both':>10}")
    for name, (loss, inputs) in losses().items():

        def both(loss: Callable[[], Tensor] = loss, inputs: tuple[Tensor, ...] = inputs) -> object:
            return torch.autograd.grad(loss(), inputs)

        print(f"{name:<30}{microseconds(loss):>10.1f}{microseconds(both):>10.1f}", flush=True)
    print("compiled by MWAD over four stages: " + ", ".join(compilations_of_four_stages()))


if __name__ == "__main__":
    main()
