"""Session-wide test settings.

Triton decides at import whether its kernels run in the interpreter, so the choice is made here, before any
test imports it: interpreted on a machine without a GPU, compiled on one with a GPU. The tests are the same.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest

from tests.support.poison import poison_empty_tensors  # noqa: F401  (a fixture, found by name)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same global seed; no test depends on the order of the others."""
    torch.manual_seed(0)
