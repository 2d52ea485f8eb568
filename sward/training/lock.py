"""One run per folder: a lock that ends with its process, whatever ends the process."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sward import distributed

try:
    import fcntl
except ImportError:  # Windows, where folders are not locked
    fcntl = None  # type: ignore[assignment]

_held: set[Path] = set()
"""Folders locked by this process. A lock of `fcntl` belongs to a process, so it does not tell its threads apart."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of an existing folder until the block ends; all processes of a group must call this.

    The operating system releases the lock when the process of rank 0 ends, even by SIGKILL. Loader processes do not
    inherit it, so none of them keeps the lock of a run that has died.

    Raises:
        ValueError: if another run works in the folder.
    """
    path, descriptor, holder = folder.resolve() / "run.lock", None, None
    if distributed.is_main():
        descriptor, holder = _acquire(path)
    holder = distributed.gather(holder)[0]
    if holder is not None:
        raise ValueError(f"{folder} must not be in use by another run, got {holder}; choose another --output")
    try:
        yield
    finally:
        if descriptor is not None:
            _held.discard(path)
            # Removed before it is released: whoever waits for this file sees that it is gone, and makes a new one.
            path.unlink(missing_ok=True)
            os.close(descriptor)


def _acquire(path: Path) -> tuple[int | None, str | None]:
    """Return an open file that holds the lock, or who holds it."""
    if fcntl is None:
        return None, None
    if path in _held:
        return None, "one in this process"
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = os.read(descriptor, 1000).decode(errors="replace").strip()
            os.close(descriptor)
            return None, holder or "one in another process"
        except OSError:
            pass  # A file system without locks: better than no training.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                break
        os.close(descriptor)  # Another run ended and removed the file between the two calls above.
    with contextlib.suppress(OSError):  # On a full disk the lock holds without a name.
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    _held.add(path)
    return descriptor, None
