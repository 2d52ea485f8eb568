"""Statistics of the channels of a feature map, and the map standardised by them on another grid."""

from sward_kernels.standardization.api import channel_moments, standardize

__all__ = ["channel_moments", "standardize"]
