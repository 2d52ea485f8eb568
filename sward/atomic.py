"""Files that are replaced whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(
    path: Path, *, keep: Path | None = None, shared: bool = False, durable: bool = True
) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the place of `path` when the block ends without an error.

    `path` holds either the old content or the whole new one, never a part of it.

    Args:
        path: the file.
        keep: where the old file goes. Between the two renames only this one exists.
        shared: several processes may write `path` at once, each to a partial file of its own; the last one wins.
        durable: wait until the content is on the disk, so that it survives a power cut.

    Raises:
        OSError: if the disk is full or not writable; what was at `path` before is still there.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial" if shared else f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        if keep is not None and path.exists():
            path.replace(keep)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    if durable:
        _sync_folder(path.parent)


def write(path: Path, content: bytes | memoryview, *, keep: Path | None = None) -> None:
    """Replace the content of `path`, whole or not at all; arguments and errors as for `replacing`."""
    with replacing(path, keep=keep) as file:
        file.write(content)


def _sync_folder(folder: Path) -> None:
    # A rename survives a power cut only once the folder itself is on the disk. Windows cannot open folders.
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
