"""Windowed relational distillation (Eq. 4-14)."""

from sward_kernels.windowed_distillation.api import WindowedDistillation, windowed_distillation

__all__ = ["WindowedDistillation", "windowed_distillation"]
