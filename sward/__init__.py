"""SWARD: distil a transformer segmentation model into a small convolutional network.

Start with `sward.Distiller` (one call for any trainer), `sward.losses`, `sward.models`, `sward.data`, `sward.load` (for
a trained or exported network) or the `sward` command line.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sward.deploy.predictor import load as load
    from sward.distiller import Distiller as Distiller
    from sward.distiller import DistillerOutput as DistillerOutput

__version__ = "0.1.0"
__all__ = ["Distiller", "DistillerOutput", "load"]

_MODULES = {
    "load": "sward.deploy.predictor",
    "Distiller": "sward.distiller",
    "DistillerOutput": "sward.distiller",
}


def __getattr__(name: str) -> object:
    # Imported on first use: `import sward` needs no package but torch and takes no time.
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
