"""Optional libraries of networks: import one, and keep it quiet."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def library(source: str, module: str, package: str | None = None) -> Any:
    """Import the module of a library; raise ModuleNotFoundError with the install command if it is not there."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"models '{source}:...' need the package {package or module}; install it with 'pip install "
            f"{package or module}'"
        ) from error


@contextmanager
def quiet(library: str) -> Iterator[None]:
    """Keep the reports and warnings of a library's loader out of the output."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
