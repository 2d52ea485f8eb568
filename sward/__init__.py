"""SWARD: distil a transformer segmentation model into a small convolutional network.

Start with `sward.Distiller` (one call for any trainer), `sward.losses`, `sward.models`, `sward.data` or the `sward`
command line.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sward.distiller import Distiller, DistillerOutput

__version__ = "0.1.0"
__all__ = ["Distiller", "DistillerOutput"]


def __getattr__(name: str) -> object:
    """Import the distiller on first use, so that `import sward.losses` stays light."""
    if name in __all__:
        from sward import distiller

        return getattr(distiller, name)
    raise AttributeError(f"module 'sward' has no attribute {name!r}")
