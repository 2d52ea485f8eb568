"""CIRKD's mini-batch pixel-to-pixel relation (CVPR 2022) without its maps of pixels by pixels."""

from sward_kernels.relation.api import relational_kl

__all__ = ["relational_kl"]
