"""How an operation says, once, that it runs another implementation than the one its tensors call for."""

from __future__ import annotations

import warnings

from sward_kernels.registration import constant_in_graphs

_warned: set[str] = set()


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
