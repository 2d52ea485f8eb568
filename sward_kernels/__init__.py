"""Knowledge-distillation losses as tensor operations, independent of network, data set and trainer."""

from sward_kernels.prototypes import PrototypeDiscrimination, prototype_discrimination
from sward_kernels.relation import relational_kl
from sward_kernels.windowed import WindowedDistillation, windowed_distillation
from sward_kernels.windowed_features import windowed_feature_distillation

__all__ = [
    "PrototypeDiscrimination",
    "WindowedDistillation",
    "prototype_discrimination",
    "relational_kl",
    "windowed_distillation",
    "windowed_feature_distillation",
]
