"""The state of a training run: updating it in a step, saving it and restoring it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from sward import distributed
from sward.training import checkpoints
from sward.training.observation import NonFiniteLossError, Stopwatch
from sward.training.run_folder import RunFolder


class TrainingState:
    """Networks, optimiser, random generators and counters of a run.

    Args:
        model: the network to train.
        distillation: the distillation loss, or None.
        optimizer: optimiser of the parameters of both.
        rate: the learning rate of a step, by the number of steps before it.
        scaler: loss scaler for fp16.
        clip_norm: largest norm of the gradient; None never clips.
        identity: what the state belongs to besides the configuration, name -> checksum, such as the data.
        task: the task loss, of which checkpoints hold what it learns.

    Attributes:
        step: optimiser steps taken.
        stopwatch: seconds of training.
        best_score: best validation score so far.
        validation_due: whether the weights of this step were to be scored and are not yet.
    """

    def __init__(
        self,
        model: nn.Module,
        distillation: nn.Module | None,
        optimizer: Optimizer,
        rate: Callable[[int], float],
        scaler: torch.amp.GradScaler,
        clip_norm: float | None = None,
        identity: Mapping[str, str] | None = None,
        task: nn.Module | None = None,
    ) -> None:
        self.model, self.distillation, self.task = model, distillation, task
        self.optimizer, self.rate, self.scaler, self.clip_norm = optimizer, rate, scaler, clip_norm
        self.identity = dict(identity or {})
        self.step = 0
        self.stopwatch = Stopwatch()
        self.best_score = -math.inf
        self.validation_due = False

    def update(self, loss: Tensor, *, measure: bool = False) -> Tensor | None:
        """Take one optimiser step; return the gradient's norm before clipping if `measure` is set or clipping is on."""
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        norm = None
        if measure or self.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            parameters = [parameter for each in self.optimizer.param_groups for parameter in each["params"]]
            norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
            if self.clip_norm is not None:
                clip_grads_with_norm_(parameters, self.clip_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        return norm

    def _check_finite(self) -> None:
        """Raise a NonFiniteLossError if a weight is infinite or not a number, which no loss shows before the next step.

        Running statistics count too: a checkpoint with such tensors could not be resumed. Waits for the device. All
        processes have the same weights.
        """
        held = self.model.state_dict()
        learned = [held[name] for name in checkpoints.learned_names(self.model)]
        for loss in (self.distillation, self.task):
            learned += [] if loss is None else [parameter.detach() for parameter in loss.parameters()]
        if not get_total_norm(learned).isfinite():
            raise NonFiniteLossError(
                f"the weights after step {self.step} are not finite, although its loss is; earlier checkpoints are "
                "kept; try a lower --optimizer.lr or --optimizer.clip-norm 1"
            )

    def save(self, run: RunFolder, score: float | None = None) -> None:
        """Write the last checkpoint and keep the previous one; write the best one if `score` beats every earlier score.

        An undefined score (-inf) is below every other, but the newest of them is written while there is no better one.
        All processes must call this at the same steps; rank 0 writes.

        Raises:
            NonFiniteLossError: if a weight is not finite; nothing is written.
        """
        self._check_finite()
        best = score is not None and (score > self.best_score or self.best_score == -math.inf)
        if best and score is not None:
            self.best_score = score
        generators = distributed.gather(_generator_states(self.distillation, self._device()))
        if distributed.is_main():
            if best:
                checkpoints.save(run.best, {"model": self.model.state_dict(), "step": self.step})
            checkpoints.save(run.last, self.state_dict(generators), keep=run.previous)

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def restore(self, run: RunFolder) -> None:
        """Restore the newest intact checkpoint of `run`, or start from the beginning if there is none.

        Raises:
            ValueError: if all checkpoints are damaged, or were saved from another network, loss or version.
        """
        state = checkpoints.load_newest([run.last, run.previous], checkpoints.learned_names(self.model))
        if state is not None:
            self._check_identity(state, run)
            try:
                self.load_state_dict(state)
            except Exception as error:  # a file of someone else can hold anything under any name
                reason = " ".join(str(error).split())
                raise ValueError(
                    f"the checkpoint in {run.last.parent} does not belong to this configuration, so the run cannot be "
                    f"resumed with it: {reason}"
                ) from error
        run.drop_records_after(self.step)

    def _check_identity(self, state: Mapping[str, Any], run: RunFolder) -> None:
        identity = state.get("identity", {})
        for name, before in identity.items() if isinstance(identity, dict) else ():
            if not isinstance(before, str):
                raise ValueError(
                    f"the checkpoint in {run.last.parent} does not belong to this configuration, so the run cannot be "
                    f"resumed with it: the checksum of the {name} is a {type(before).__name__}"
                )
            now = self.identity.get(name, before)
            if now != before:
                raise ValueError(
                    f"the {name} must be that with which the run in {run.path} began, got another one (checksum {now}, "
                    f"not {before}); choose another --output"
                )

    def state_dict(self, generators: list[dict[str, Any]]) -> dict[str, Any]:
        """Return tensors and plain values; `generators` are the random states of all processes, by rank."""
        return {
            "model": self.model.state_dict(),
            "distillation": {} if self.distillation is None else self.distillation.state_dict(),
            "task": {} if self.task is None else self.task.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "generators": generators,
            "step": self.step,
            "seconds": self.stopwatch.read(),
            "best_score": self.best_score,
            "validation_due": self.validation_due,
            "identity": self.identity,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned. A process that did not exist then keeps its fresh generators."""
        for name in ("step", "seconds", "best_score"):
            if not isinstance(state[name], (int, float)):
                raise ValueError(f"its {name} must be a number, got {state[name]!r}")
        # A float would be compared with every number of a range, one after the other.
        if not isinstance(state["step"], int) or not 0 <= state["step"] < 2**62:
            raise ValueError(f"its step must be a whole number from 0, got {state['step']!r}")
        # Older checkpoints do not say.
        due = state.get("validation_due", False)
        if not isinstance(due, bool):
            raise ValueError(f"its validation_due must be true or false, got {due!r}")
        self.model.load_state_dict(state["model"])
        if self.distillation is not None:
            self.distillation.load_state_dict(state["distillation"])
        # Older checkpoints hold no task loss; those of sward learn nothing.
        if self.task is not None and "task" in state:
            self.task.load_state_dict(state["task"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if distributed.rank() < len(state["generators"]):
            _set_generator_states(self.distillation, state["generators"][distributed.rank()], self._device())
        self.step, self.best_score, self.validation_due = state["step"], state["best_score"], due
        self.stopwatch.start(state["seconds"])


def seed_generators(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch; checkpoints contain their states."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


def _generator_states(loss: nn.Module | None, device: torch.device) -> dict[str, Any]:
    # sward does not use the global generators of Python and NumPy, but a user's model or data set may.
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "python": [version, torch.tensor(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "loss": [generator.get_state() for generator in _own_generators(loss)],
    }


def _set_generator_states(loss: nn.Module | None, states: Mapping[str, Any], device: torch.device) -> None:
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
    for generator, state in zip(_own_generators(loss), states["loss"], strict=True):
        generator.set_state(state)


def _own_generators(loss: nn.Module | None) -> list[torch.Generator]:
    found = [] if loss is None else [getattr(module, "generator", None) for module in loss.modules()]
    return [generator for generator in found if isinstance(generator, torch.Generator)]
