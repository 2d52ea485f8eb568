"""The implementation of an operation: an unknown name is refused, and another than the wanted one is told, once."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence

from sward_kernels.registration import constant_in_graphs

_warned: set[str] = set()


def require_known(implementation: str, known: Sequence[str]) -> None:
    """Raises ValueError, naming those that are near, for an implementation that is not among the known ones."""
    if implementation not in known:
        near = difflib.get_close_matches(str(implementation), known)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"choose one of {', '.join(known)}."
        raise ValueError(f"implementation={implementation!r} is not known: {hint}")


@constant_in_graphs
def warn_once(message: str, stacklevel: int = 3) -> None:
    """Warns (RuntimeWarning) with a message that this process has not been given before.

    Args:
        message: what runs instead of what, and why.
        stacklevel: as for `warnings.warn`, so that the user's own line is named.
    """
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=stacklevel)
