"""Memory that tensors free, in processes of their own."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")

# 160 MiB: larger than what glibc keeps by itself.
PAGE_FAULTS = """
import resource, sys, torch
from sward.training import keep_freed_memory
print(keep_freed_memory())
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(40 << 20).fill_(1)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = (160 << 20) // 4096


def run(**variables: str) -> list[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", PAGE_FAULTS]
    done = subprocess.run(command, env=environment | variables, check=True, capture_output=True, text=True)
    return done.stdout.split()


def test_kept_memory_costs_no_page_faults() -> None:
    kept, *faults = run()
    assert kept == "True"
    # An aligned block needs a little more than the freed one has, so it takes some blocks until one fits.
    assert min(map(int, faults)) < PAGES / 100


@pytest.mark.parametrize(
    "variables", [{"MALLOC_ARENA_MAX": "2"}, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}], ids=lambda each: str(*each)
)
def test_the_users_own_settings_stay(variables: dict[str, str]) -> None:
    assert run(**variables)[0] == "False"
