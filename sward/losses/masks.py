"""Learn MasKD's tokens and FreeKD's prompts on a frozen teacher, and save and load them.

masks = ReceptiveTokens(channels=256, tokens=6, weighted=True)
learn_masks(masks, teacher, "decoder", loader, task_loss, steps=2000)
save_masks("tokens.pt", masks, teacher, "decoder")
...
loss = MasKDLoss(load_masks("tokens.pt", teacher, "decoder"), ...)
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from sward import atomic
from sward.features import evaluating, unwrapped
from sward.losses.freekd import FrequencyPrompts
from sward.losses.maskd import ReceptiveTokens
from sward.losses.pairs import class_logits
from sward.losses.protocol import LOGITS, DistillationOutput
from sward.tensor_layouts import describe

TeacherMasks = ReceptiveTokens | FrequencyPrompts
"""What is learned on a teacher: MasKD's tokens or FreeKD's prompts."""

TaskLoss = Callable[[Tensor, Tensor], Tensor]

STEPS_PER_CHECK = 20
"""Steps after which the losses are looked at together, since looking waits for the device."""

_KINDS: dict[str, type[ReceptiveTokens] | type[FrequencyPrompts]] = {
    ReceptiveTokens.kind: ReceptiveTokens,
    FrequencyPrompts.kind: FrequencyPrompts,
}


def mask_learning_loss(
    masks: TeacherMasks,
    teacher: nn.Module,
    tap: str,
    images: Tensor,
    labels: Tensor,
    task_loss: TaskLoss,
    diversity_weight: float = 1.0,
) -> DistillationOutput:
    """Return the loss for learning tokens or prompts: the teacher's task loss with masked features, plus diversity.

    The teacher's map at `tap`, `[B, C, h, w]`, is replaced by the masked map. The teacher must be in eval mode with its
    parameters frozen, which `learn_masks` ensures.

    Args:
        masks: the tokens or prompts to learn.
        teacher: `images [B, 3, H, W] -> logits [B, K, H, W]`.
        tap: the teacher's layer, or `"logits"`.
        images: one batch.
        labels: its `[B, H, W]` labels.
        task_loss: `(logits, labels) -> scalar`.
        diversity_weight: Default 1, in both papers.

    Raises:
        ValueError: if the teacher has no such layer, it returns no maps, or they and `masks` differ in channels.
    """
    diversity: list[Tensor] = []
    teacher = unwrapped(teacher)

    def masked(features: Any) -> Tensor:
        if not isinstance(features, Tensor) or features.dim() != 4:
            raise ValueError(f"the teacher's {tap!r} must return maps [B, C, h, w], got {describe(features)}")
        maps = class_logits(features) if tap == LOGITS else features
        if maps.shape[1] != masks.channels:
            raise ValueError(f"the teacher's {tap!r} has {maps.shape[1]} channels, the masks are for {masks.channels}")
        replaced, overlap = masks.reconstruct(maps)
        diversity.append(overlap)
        if maps.shape[1] != features.shape[1]:
            return replaced[:, 1:] - replaced[:, :1]
        return replaced

    if tap == LOGITS:
        logits = masked(teacher(images))
    else:
        layer = dict(teacher.named_modules()).get(tap)
        if layer is None:
            raise ValueError(f"the teacher {type(teacher).__name__} has no layer {tap!r}")
        handle = layer.register_forward_hook(lambda module, arguments, output: masked(output))
        try:
            # Compiled code would not call the hook.
            with torch.compiler.set_stance("force_eager"):
                logits = teacher(images)
        finally:
            handle.remove()
    task = task_loss(logits, labels)
    overlap = torch.stack(diversity).mean()
    return DistillationOutput(
        task + diversity_weight * overlap,
        {"task": task.detach().float(), "diversity": overlap.detach().float()},
    )


def learn_masks(
    masks: TeacherMasks,
    teacher: nn.Module,
    tap: str,
    batches: Iterable[Any],
    task_loss: TaskLoss,
    *,
    steps: int,
    on_step: Callable[[int, dict[str, Tensor]], None] | None = None,
) -> None:
    """Learn `masks` in place, in one process, on the device where they are.

    The teacher is in eval mode and frozen during learning, and has its previous state afterwards: neither its weights
    nor its batch-norm statistics change. (The official MasKD code leaves it in train mode.)

    Optimiser, from the official code: at `"logits"` SGD 0.1 with momentum 0.9, decaying as a polynomial of power 0.9;
    at a layer Adam 0.01, decaying as a cosine to 1e-6. Weight decay 1e-3 in both. FreeKD published none.

    Args:
        masks: the tokens or prompts to learn.
        teacher: as for `mask_learning_loss`, on the same device.
        tap: the teacher's layer, or `"logits"`.
        batches: yields `(images, labels, ...)`; iterated again until `steps` is reached.
        task_loss: `(logits, labels) -> scalar`.
        steps: optimiser steps. The papers use 10000 at the logits and 2000 at a layer.
        on_step: called after every step with its number, from 1, and the terms of the loss.

    Raises:
        ValueError: if `batches` is empty, or for what `mask_learning_loss` rejects.
        FloatingPointError: if a loss is infinite or not a number.
    """
    losses: list[Tensor] = []
    optimizer, scheduler = _recipe(masks, tap, steps)
    device = next(masks.parameters()).device
    with _frozen(teacher):
        for step, (images, labels, *_) in zip(range(1, steps + 1), _repeated(batches)):
            output = mask_learning_loss(masks, teacher, tap, images.to(device), labels.to(device), task_loss)
            optimizer.zero_grad(set_to_none=True)
            output.loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(output.loss.detach())
            if step % STEPS_PER_CHECK == 0 or step == steps:
                _check_finite(losses, step, tap)
                losses.clear()
            if on_step is not None:
                on_step(step, output.terms)


def _check_finite(losses: Sequence[Tensor], last: int, tap: str) -> None:
    bad = torch.stack(list(losses)).isfinite().logical_not().nonzero()
    if len(bad):
        step = last - len(losses) + 1 + int(bad[0])
        raise FloatingPointError(
            f"the loss of step {step} is not finite while masks of the teacher's layer {tap!r} are learned; "
            "nothing is saved"
        )


def save_masks(path: str | Path, masks: TeacherMasks, teacher: nn.Module, tap: str) -> None:
    """Save learned masks with the tap and the fingerprint of their teacher."""
    content = {
        "kind": masks.kind,
        "settings": masks.settings,
        "state": masks.state_dict(),
        "tap": tap,
        "teacher": teacher_fingerprint(teacher),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    atomic.write(Path(path), buffer.getbuffer())


def load_masks(path: str | Path, teacher: nn.Module, tap: str) -> TeacherMasks:
    """Load what `save_masks` wrote, on the CPU.

    Args:
        path: the file.
        teacher: the teacher to use them with.
        tap: its layer, or `"logits"`.

    Raises:
        ValueError: if the file contains no masks, or masks that were learned on another teacher, weights or tap.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # a changed byte can make the reader raise anything
        raise ValueError(f"{path} is damaged or holds no masks; `sward train-masks` writes such files") from error
    if not isinstance(content, dict) or content.get("kind") not in _KINDS:
        raise ValueError(f"{path} holds no masks; `sward train-masks` writes such files")
    if content.get("tap") != tap:
        raise ValueError(f"the masks in {path} were learned on the teacher's {content.get('tap')!r}, not on {tap!r}")
    if content.get("teacher") != teacher_fingerprint(teacher):
        raise ValueError(
            f"the masks in {path} were learned on other teacher weights; learn them again with `sward train-masks`"
        )
    try:
        masks = _KINDS[content["kind"]](**content["settings"])
        masks.load_state_dict(content["state"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"the masks in {path} must be of this version of sward, got others: {error}") from error
    if not all(value.isfinite().all() for value in masks.state_dict().values()):
        raise ValueError(f"the masks in {path} must be finite, got nan or infinity; learn them again")
    return masks


def teacher_fingerprint(teacher: nn.Module) -> str:
    """Return the SHA-256 of a network's parameters and buffers: names, dtypes, shapes and bytes, sorted by name.

    Wrappers of `torch.compile` and `DistributedDataParallel` do not count.
    """
    return state_fingerprint(unwrapped(teacher).state_dict())


def state_fingerprint(state: Mapping[str, Any]) -> str:
    """Return `teacher_fingerprint` of the network that has this state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _recipe(masks: TeacherMasks, tap: str, steps: int) -> tuple[Optimizer, LRScheduler]:
    if tap == LOGITS:
        sgd = torch.optim.SGD(masks.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        return sgd, torch.optim.lr_scheduler.PolynomialLR(sgd, total_iters=steps, power=0.9)
    adam = torch.optim.Adam(masks.parameters(), lr=0.01, weight_decay=1e-3)
    return adam, torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=steps, eta_min=1e-6)


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    learnable = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    network.requires_grad_(False)
    try:
        with evaluating(network):
            yield
    finally:
        for parameter, requires_grad in learnable:
            parameter.requires_grad_(requires_grad)


def _repeated(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError("batches is empty: nothing to learn the masks from")
