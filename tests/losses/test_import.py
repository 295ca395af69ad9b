"""`import losses` stays light."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
import torch, einops
before = set(sys.modules)
import losses
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(new - set(sys.stdlib_module_names)))
"""


def test_importing_losses_needs_torch_einops_and_the_standard_library_only() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "['losses']"
