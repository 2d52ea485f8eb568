"""Compile this package's C++ for the local processor: once, on first use, into the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from sward_kernels.registration import constant_in_graphs

HEADERS = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", f"-I{HEADERS}")


class Library:
    """The shared library of one operation, compiled and loaded on first use.

    The compiler is `$CXX`, which may contain arguments, or `c++`. Libraries are stored in
    `$XDG_CACHE_HOME/sward_kernels`, by default `~/.cache/sward_kernels`, under names that depend on the sources, the
    compiler and the processor.

    Args:
        operation: name of the operation, for messages.
        source: a file that includes only the standard library and headers from its own folder or this one.
        flags: for the compiler, besides `FLAGS`.
    """

    def __init__(self, operation: str, source: Path, flags: tuple[str, ...] = ()) -> None:
        self.operation = operation
        self.source = source
        self.flags = flags
        self._functions: ctypes.CDLL | None = None
        self._reason: str | None = None

        @constant_in_graphs
        def why_not() -> str | None:
            if self._functions is None and self._reason is None:
                try:
                    self._functions = ctypes.CDLL(str(_compile(source, flags)))
                except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder
                    self._reason = str(error)
            return self._reason

        self.why_not = why_not
        """Return why the library is not available, or None if it is. Compiles on the first call only."""

    @property
    def functions(self) -> ctypes.CDLL:
        """The functions of the library; calls release the GIL. Raises what `require` raises."""
        self.require()
        assert self._functions is not None
        return self._functions

    def require(self) -> None:
        """Raise NotImplementedError, with the reason, if the library is not available."""
        reason = self.why_not()
        if reason is not None:
            raise NotImplementedError(
                f"implementation='native' of {self.operation} could not compile its C++ source: {reason}; use 'eager'"
            )


def compiler() -> list[str]:
    """The compiler and the arguments that `$CXX` gives it."""
    given = os.environ.get("CXX", "")
    try:
        return shlex.split(given) or ["c++"]
    except ValueError:  # an open quote; no program has this name
        return [given]


def cache_folder() -> Path:
    """The folder of the libraries."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sward_kernels"


class _CompilerError(RuntimeError):
    pass


def _compile(source: Path, flags: tuple[str, ...] = ()) -> Path:
    command = compiler()
    if shutil.which(command[0]) is None:
        raise _CompilerError(f"found no C++ compiler {command[0]!r} (set CXX to name another)")
    command += [*FLAGS, *flags]
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    # The verbose output includes what -march=native means on this machine: machines with different processors may share
    # a home folder.
    target = _run([*command, "-E", "-v", "-x", "c++", os.devnull, "-o", os.devnull], folder)
    texts = [source, *sorted(source.parent.glob("*.h")), *sorted(HEADERS.glob("*.h"))]
    decisive = [target.encode(), repr(flags).encode(), *(text.read_bytes() for text in texts)]
    name = hashlib.sha256(b"".join(decisive)).hexdigest()[:24]
    library = folder / f"{source.parent.name}-{name}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as workplace:
            unfinished = Path(workplace) / library.name
            _run([*command, str(source), "-o", str(unfinished)], folder)
            unfinished.replace(library)  # atomic: another process finds a complete library or none
    return library


def _run(command: list[str], folder: Path) -> str:
    # Always in the same folder: clang's verbose output contains its name.
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL
    )
    if done.returncode:
        complaint = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
        raise _CompilerError(f"{command[0]} says {complaint.strip()!r}")
    return done.stderr
