"""Class prototypes and the prototype discriminative regularization (Eq. 16-19)."""

from sward_kernels.prototypes.api import PrototypeDiscrimination, prototype_discrimination

__all__ = ["PrototypeDiscrimination", "prototype_discrimination"]
