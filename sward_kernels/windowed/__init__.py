"""Windowed relational distillation (Eq. 4-14)."""

from sward_kernels.windowed.api import WindowedDistillation, windowed_distillation

__all__ = ["WindowedDistillation", "windowed_distillation"]
