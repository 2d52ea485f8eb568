"""SWARD: distil a transformer segmentation model into a small convolutional network.

Start with `sward.losses` (for any trainer), `sward.models`, `sward.data`, `sward.load` (for a trained or exported
network) or the `sward` command line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sward.deploy.predictor import load as load

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str) -> object:
    # Imported on first use: `import sward` needs no package but torch and takes no time.
    if name == "load":
        from sward.deploy.predictor import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
