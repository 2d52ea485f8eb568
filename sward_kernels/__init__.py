"""Losses of knowledge distillation as tensor operations: they know no network, no data set and no trainer."""

from sward_kernels.windowed_distillation import WindowedDistillation, windowed_distillation

__all__ = ["WindowedDistillation", "windowed_distillation"]
