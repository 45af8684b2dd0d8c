"""What a process does to itself before it trains."""

import subprocess
import sys

import pytest
import torch

PAGES_TOUCHED = """
import resource, sys, torch
from titanlite.run.agreement import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()

def step():
    tensors = [torch.ones(8 << 20) for _ in range(4)]  # 32 MiB each
    return sum(float(t[-1]) for t in tensors)

for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory is kept only where steps are made on the CPU")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the setting is glibc's")
def test_a_step_finds_the_memory_of_the_one_before() -> None:
    faults = {
        how: int(subprocess.run([sys.executable, "-c", PAGES_TOUCHED, how], capture_output=True, check=True).stdout)
        for how in ("keep", "give back")
    }
    assert faults["give back"] > 5 * 4 * 16  # else this machine's C library keeps it anyway: at least 2 MiB pages
    assert faults["keep"] < faults["give back"] / 10
