"""Atomic file replacement: a reader sees the old content or the new, never a mixture."""

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
    """Open a temporary file for writing and rename it to `path` when the block ends without an error.

    `path` holds either the old content or all of the new content, never a part of it.

    Args:
        path: the file to replace.
        keep: where to move the old file. Between the two renames only this file exists.
        shared: allow several processes to write `path` at once, each to its own temporary file; the last one wins.
        durable: sync the content to disk first, so that it survives a power cut.

    Raises:
        OSError: if the disk is full or not writable; the old file stays in place.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial" if shared else f"{path.name}.partial")
    with naming(path):
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


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the name of a file into errors of the operating system that have none, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def write(path: Path, content: bytes | memoryview, *, keep: Path | None = None) -> None:
    """Replace the content of `path` atomically; see `replacing` for arguments and errors."""
    with replacing(path, keep=keep) as file:
        file.write(content)


def _sync_folder(folder: Path) -> None:
    # A rename survives a power cut only after the folder is synced too. Windows cannot open folders.
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
