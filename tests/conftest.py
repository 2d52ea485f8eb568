"""Session-wide test settings.

Triton decides at import whether its kernels run in the interpreter, so the choice is made here, before any
test imports it: interpreted on a machine without a GPU, compiled on one with a GPU. The tests are the same.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# What data checks keep must not reach the user's cache folder.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="sward-tests-")

import pytest
from hypothesis import settings

from tests.support.drawn_figures import drawn_figures  # noqa: F401  (a fixture, found by name)
from tests.support.poison import poison_empty_tensors  # noqa: F401  (a fixture, found by name)

# The same examples in every run, so that a failure belongs to a change; what they take depends on the machine's load.
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")


def pytest_unconfigure() -> None:
    """Leave nothing on the disk."""
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same global seed; no test depends on the order of the others."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_launches() -> Iterator[None]:
    """No test launches with the tiles that another test chose."""
    yield
    launching = sys.modules.get("sward_kernels.gpu.launching")
    if launching is not None:
        launching.forget_calls()


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The generated data set cut to 18 + 4 images, for tests that ask for it."""
    # Imported here: most tests train nothing.
    from tests.support.training_runs import use_few_images

    use_few_images(monkeypatch)
