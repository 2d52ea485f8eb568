"""Which tiles a device gets."""

from __future__ import annotations

import pytest
import torch

from sward_kernels.targets import TARGETS, family_of

# Without what it keeps: a test's device is not the machine's.
family = family_of.__wrapped__


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((8, 0), "ampere"),
        ((8, 6), "ampere"),
        ((8, 9), "ada"),
        ((9, 0), "hopper"),
        ((10, 0), "hopper"),
        ((12, 0), "ada"),
    ],
)
def test_family_of_an_nvidia_gpu(capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert family(torch.device("cuda")) == expected
    # The report compiles for the same tiles.
    reported = {target.arch: target.family for target in TARGETS.values()}
    assert reported.get(10 * capability[0] + capability[1], expected) == expected


def test_family_of_an_amd_gpu_and_of_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    # Those of AMD have capabilities too: an MI300's is that of Hopper.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    assert family(torch.device("cuda")) == "cdna"
    assert family(torch.device("cpu")) == "interpreter"
