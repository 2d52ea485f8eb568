"""One training step: the student's forward pass, the task loss and the distillation loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sward.config import Precision, TapConfig
from sward.features import FeatureTaps
from sward.losses import LOGITS, DistillationInputs, DistillationLoss

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class StepOutput(NamedTuple):
    """What one training step returns.

    Attributes:
        loss: scalar with gradient, the sum of all weighted terms.
        terms: name -> detached fp32 scalar, unweighted.
        weighted: name -> detached fp32 scalar, the terms that make up `loss` as they enter it.
        diagnostics: name -> fp32 scalar, the distillation loss's own signs of health; empty unless asked for.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    weighted: dict[str, Tensor]
    diagnostics: dict[str, Tensor]


class TrainingStep(nn.Module):
    """Network, task loss and distillation loss as one module: one thing to optimise, to save and to wrap for DDP.

    Args:
        model: the network that learns.
        task: `(logits, labels) -> scalar`.
        distillation: None to train on the labels alone.
        factor: of the distillation loss beside the task loss, after the method's own weights.
        precision: of the forward pass, losses included (they keep to float32 where they need it).
        taps: how the network's layers arrange their output.
    """

    def __init__(
        self,
        model: nn.Module,
        task: nn.Module,
        distillation: DistillationLoss | None = None,
        *,
        factor: float = 1.0,
        precision: Precision = "fp32",
        taps: TapConfig | None = None,
    ) -> None:
        super().__init__()
        self.factor = factor
        self.precision: Precision = precision
        self.model = model
        self.task = task
        self.distillation = distillation
        layers = [] if distillation is None else [tap for tap in distillation.student_taps if tap != LOGITS]
        self.taps = FeatureTaps(model, layers, **(taps or TapConfig()).arguments()).open()

    def forward(
        self, images: Tensor, labels: Tensor, teacher: Mapping[str, Tensor], diagnose: bool = False
    ) -> StepOutput:
        """The losses of one batch, with the distillation loss's own signs of health if `diagnose` is set."""
        with autocast(images.device, self.precision):
            logits = self.model(images)
            task = self.task(logits, labels)
            terms = {"task": task.detach().float()}
            if self.distillation is None:
                return StepOutput(task, terms, terms, {})
            inputs = DistillationInputs({**self.taps.collect(), LOGITS: logits}, teacher, labels)
            output = self.distillation(inputs)
            diagnostics: dict[str, Tensor] = {}
            if diagnose:
                with torch.no_grad():
                    diagnostics = self.distillation.diagnostics(inputs)
            weighted = {name: self.factor * term for name, term in output.weighted_terms().items()}
        return StepOutput(task + self.factor * output.loss, terms | output.terms, terms | weighted, diagnostics)


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Return the autocast context of `precision` on `device`; for `"fp32"` one that does nothing."""
    return torch.autocast(device.type, _DTYPES.get(precision), enabled=precision in _DTYPES)
