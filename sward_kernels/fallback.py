"""Choice of an implementation: reject unknown names, and warn once when a different one runs."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence

from sward_kernels.registration import constant_in_graphs

_warned: set[str] = set()


def require_known(implementation: str, known: Sequence[str]) -> None:
    """Raise ValueError, suggesting near matches, if `implementation` is not one of `known`."""
    if implementation not in known:
        near = difflib.get_close_matches(str(implementation), known)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"implementation must be one of {', '.join(map(repr, known))}, got {implementation!r}{hint}")


def cannot_load(operation: str, error: ImportError) -> NotImplementedError:
    """The error to raise where the Triton kernels of `operation` cannot be imported."""
    return NotImplementedError(f"implementation='triton' of {operation} cannot be loaded here ({error}); use 'eager'")


@constant_in_graphs
def warn_once(message: str, stacklevel: int = 3) -> None:
    """Issue a RuntimeWarning, unless this process has issued one with the same message before.

    Args:
        message: which implementation runs instead of which, and why.
        stacklevel: as for `warnings.warn`, so that the warning names the line of the user.
    """
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=stacklevel)
