"""Peak memory is the process's own: a worker must not report what its parent once held."""

from __future__ import annotations

import subprocess
import sys

import pytest

from prefopt.machine import peak_memory_mb, standard_console


def test_a_child_does_not_inherit_its_parents_peak() -> None:
    ballast = bytearray(b"x") * (400 * 2**20)
    assert peak_memory_mb() > 400
    code = "from prefopt.machine import memory_mb, peak_memory_mb; print(peak_memory_mb())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 1 < float(child.stdout) < 300
    del ballast


def test_freed_memory_is_kept() -> None:
    """The same tensors, made again, cost page faults under glibc's first settings and none once freed memory is kept."""
    code = """
import ctypes, resource, torch
from prefopt.machine import keep_freed_memory
if hasattr(ctypes.CDLL(None), "mallopt"):
    ctypes.CDLL(None).mallopt(-3, 128 << 10)  # glibc's first threshold for mappings, which it moves by what is freed
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        [torch.ones(2**21) for _ in range(8)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
by_default, kept = faults(), keep_freed_memory()
warm_up = [faults() for _ in range(6)]
print(by_default, kept, faults())
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    by_default, kept, after = child.stdout.split()
    if kept == "False":
        pytest.skip("the C library is not glibc, which alone can be asked")
    assert int(after) < 100 < int(by_default)


def test_memory_falls_where_the_peak_stays() -> None:
    """In a process of its own: another test may have asked this one to keep what is freed."""
    code = """
from prefopt.machine import memory_mb, peak_memory_mb
ballast = bytearray(b"x") * (200 * 2**20)
held = memory_mb()
del ballast
print(held, memory_mb(), peak_memory_mb())
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    held, after, peak = map(float, child.stdout.split())
    assert held - 150 > after > 10
    assert peak > held - 1  # Linux brings its two counters up to date in batches of pages


def test_text_with_brackets_and_colons_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """A path may hold what rich takes for markup, a row's name `file:100:` what it takes for an emoji."""
    for text in ("policy: runs/x[red]/[/b]", "a.jsonl:100: left out", "([enforce fail at a.cpp:1] err == 0)"):
        standard_console().print(text, highlight=False, soft_wrap=True)
        assert capsys.readouterr().out == f"{text}\n"
