"""The C++ under another compiler and on another processor: it compiles, and gives the same numbers.

`SWARD_NEEDS_COMPILERS` makes a missing compiler or emulator an error instead of a skip, for CI.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from sward_kernels import cpp
from sward_kernels.colours import native as colours
from sward_kernels.prototypes import native as prototypes
from sward_kernels.relation import native as relation
from sward_kernels.standardization import native as standardization
from sward_kernels.windowed import native as windowed
from sward_kernels.windowed_features import native as windowed_features

DRIVER = Path(__file__).with_name("foreign_processor.cpp")
# In the order of the numbers in the driver.
LIBRARIES = [each.LIBRARY for each in (windowed, prototypes, relation, standardization, windowed_features, colours)]
ARM = "aarch64-linux-gnu-g++"


def skip(reason: str) -> None:
    assert not os.environ.get("SWARD_NEEDS_COMPILERS"), f"SWARD_NEEDS_COMPILERS is set, and {reason}"
    pytest.skip(reason)


def program(command: list[str], library: cpp.Library, folder: Path) -> Path:
    """Compile the driver for one operation, with the warnings of a careful build as errors."""
    target = folder / library.operation
    number = LIBRARIES.index(library) + 1
    flags = [flag for flag in (*cpp.FLAGS, *library.flags) if flag not in ("-march=native", "-shared")]
    definitions = [f"-DOPERATION={number}", f'-DSOURCE="{library.source}"', f"-I{library.source.parent}"]
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-psabi"]
    line = [*command, *flags, *warnings, *definitions, str(DRIVER), "-o", str(target)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def numbers(command: list[str]) -> np.ndarray:
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    return np.array(output.split(), dtype=np.float64)


def assert_same(found: np.ndarray, expected: np.ndarray, library: cpp.Library) -> None:
    """8-bit images are equal; sums in another order differ by 1e-5 of the largest."""
    assert len(found) == len(expected) > 18
    assert np.isfinite(expected).all()
    assert expected.std() > 0
    if library is colours.LIBRARY:
        assert (found == expected).all()
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.fixture(scope="module", params=LIBRARIES, ids=lambda library: library.operation)
def library(request: pytest.FixtureRequest) -> cpp.Library:
    reason = request.param.why_not()
    if reason is not None:
        pytest.skip(f"the C++ does not compile here: {reason}")
    return request.param


@pytest.fixture(scope="module")
def own(library: cpp.Library, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """The numbers of the compiler that compiles the libraries here."""
    folder = tmp_path_factory.mktemp("own")
    return numbers([str(program([*cpp.compiler(), "-march=native"], library, folder))])


def test_clang_compiles_it_to_the_same_numbers(library: cpp.Library, own: np.ndarray, tmp_path: Path) -> None:
    if shutil.which("clang++") is None:
        skip("there is no clang++")
    probe = tmp_path / "probe.cpp"
    probe.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
    if subprocess.run(
        ["clang++", "-fopenmp", str(probe), "-o", str(tmp_path / "probe")], capture_output=True
    ).returncode:
        skip("clang++ has no OpenMP (libomp-dev)")
    assert_same(numbers([str(program(["clang++", "-march=native"], library, tmp_path))]), own, library)


def test_arm_gives_the_same_numbers(library: cpp.Library, own: np.ndarray, tmp_path: Path) -> None:
    if shutil.which(ARM) is None:
        skip(f"there is no {ARM}")
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if emulator is None and platform.machine() != "aarch64":
        skip("there is no qemu-aarch64")
    foreign = program([ARM, "-static"], library, tmp_path)
    assert_same(numbers([*([emulator] if emulator else []), str(foreign)]), own, library)
