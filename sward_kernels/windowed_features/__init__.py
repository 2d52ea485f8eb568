"""Windowed relational distillation of features, whose projections (Eq. 8) are part of the operation."""

from sward_kernels.windowed_features.api import windowed_feature_distillation

__all__ = ["windowed_feature_distillation"]
