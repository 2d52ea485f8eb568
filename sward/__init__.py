"""SWARD: distil a transformer segmentation model into a small convolutional network.

Start with `sward.losses` (for any trainer), `sward.models`, `sward.data` or the `sward` command line.
"""

__version__ = "0.1.0"
