"""What a run can learn of its machine without a dependency: peak memory, and a console of readable width."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from rich.console import Console

# Tables have a dozen columns; a log file has no width of its own, and 80 columns would break every word.
_LOG_WIDTH = 170


def peak_memory_mb() -> float:
    """Most resident memory of this process so far, in MB.

    Linux's ru_maxrss survives exec, so a worker would report its parent's peak; VmHWM belongs to the process image.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


def standard_console() -> Console:
    """Standard output: as wide as the terminal, or wide enough for tables where there is none."""
    return Console() if sys.stdout.isatty() else Console(width=_LOG_WIDTH)
