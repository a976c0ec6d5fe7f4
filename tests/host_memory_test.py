"""Freed memory is taken again without new pages, in threads too."""

import subprocess
import sys

import pytest

# Pages that eight blocks of 64 MB cost once a first one was freed, allocated by another thread as XLA does.
COUNT_PAGES = """
import resource, sys, threading
from mmei_jax import host_memory

if sys.argv[1] == "keep" and not host_memory.keep_freed_memory():
    sys.exit("not glibc")

def pages(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        b"x" * (64 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

found = []
thread = threading.Thread(target=lambda: found.extend([pages(1), pages(8)]))
thread.start()
thread.join()
print(found[1])
"""


def pages(choice):
    command = [sys.executable, "-c", COUNT_PAGES, choice]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if result.stderr.strip() == "not glibc":
        pytest.skip("the C library is not glibc, and nothing is changed")
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


def test_freed_blocks_are_taken_again_without_new_pages():
    assert pages("keep") < 100
    # What it is about: by default every block is mapped anew (16,384 pages of 4 kB each, fewer where pages are larger).
    assert pages("default") > 200
