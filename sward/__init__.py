"""SWARD: distil a transformer segmentation model into a small convolutional network.

Start at `sward.losses` (any trainer), `sward.models`, `sward.data`, or the command line `sward`.
"""

__version__ = "0.1.0"
