"""Compiling this package's C++ for the processor at hand: once, on first use, into the user's cache."""

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
    """The shared library of one operation's C++, compiled and loaded when it is first needed.

    The compiler is `$CXX`, which may have arguments, or `c++`. Libraries are kept in `$XDG_CACHE_HOME/sward_kernels`,
    by default `~/.cache/sward_kernels`, under names that depend on sources, compiler and processor.

    Args:
        operation: whose C++ it is, for messages.
        source: a file that includes the standard library and headers of its own folder or this one.
    """

    def __init__(self, operation: str, source: Path) -> None:
        self.operation = operation
        self.source = source
        self._functions: ctypes.CDLL | None = None
        self._reason: str | None = None

        @constant_in_graphs
        def why_not() -> str | None:
            if self._functions is None and self._reason is None:
                try:
                    self._functions = ctypes.CDLL(str(_compile(source)))
                except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder
                    self._reason = str(error)
            return self._reason

        self.why_not = why_not
        """Why there is no library here; None if there is one. Asked again, it compiles nothing."""

    @property
    def functions(self) -> ctypes.CDLL:
        """The functions of the library; calls release the GIL. Raises as `require` does."""
        self.require()
        assert self._functions is not None
        return self._functions

    def require(self) -> None:
        """Raises NotImplementedError, with the reason, if the library cannot be had here."""
        reason = self.why_not()
        if reason is not None:
            raise NotImplementedError(
                f"implementation='native' of {self.operation} needs its C++ compiled, and that fails here: {reason}; "
                "use 'eager'."
            )


class _CompilerError(RuntimeError):
    pass


def _compile(source: Path) -> Path:
    command = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(command[0]) is None:
        raise _CompilerError(f"there is no C++ compiler {command[0]!r} (set CXX to name another)")
    command += FLAGS
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sward_kernels"
    folder.mkdir(parents=True, exist_ok=True)
    # What -march=native stands for on this machine is part of the compiler's verbose output: a home folder may be
    # shared by machines with different processors.
    target = _run([*command, "-E", "-v", "-x", "c++", os.devnull, "-o", os.devnull], folder)
    texts = [source, *sorted(source.parent.glob("*.h")), *sorted(HEADERS.glob("*.h"))]
    name = hashlib.sha256(b"".join([target.encode(), *(text.read_bytes() for text in texts)])).hexdigest()[:24]
    library = folder / f"{source.parent.name}-{name}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as workplace:
            unfinished = Path(workplace) / library.name
            _run([*command, str(source), "-o", str(unfinished)], folder)
            unfinished.replace(library)  # atomic: another process finds the whole library or none
    return library


def _run(command: list[str], folder: Path) -> str:
    # Always in the same folder, which clang's verbose output names.
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL
    )
    if done.returncode:
        complaint = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
        raise _CompilerError(f"{command[0]} says {complaint.strip()!r}")
    return done.stderr
