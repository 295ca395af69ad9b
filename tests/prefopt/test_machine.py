"""Peak memory is the process's own: a worker must not report what its parent once held."""

from __future__ import annotations

import subprocess
import sys

from prefopt.machine import peak_memory_mb


def test_a_child_does_not_inherit_its_parents_peak() -> None:
    ballast = bytearray(b"x") * (400 * 2**20)
    assert peak_memory_mb() > 400
    code = "from prefopt.machine import peak_memory_mb; print(peak_memory_mb())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 1 < float(child.stdout) < 300
    del ballast
