"""Freed memory is used again: in a process of its own, whose settings end with it."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAULTS = """
import resource, sys, torch
from reverie.kernels.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    return sum(float(x[0]) for x in [torch.ones(2**20 * n) for n in (1, 4, 2, 8)])  # 60 MiB, given back together
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(faults() for _ in range(10)))  # the heap has grown by then to what a step takes, in pieces that fit
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again_without_its_pages_asked_for():
    def faults(how):
        done = subprocess.run([sys.executable, "-c", FAULTS, how], cwd=ROOT, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert 2 * faults("keep") < faults("as it is")
