"""What a run can learn of its machine, and ask of it, without a dependency: memory, a readable console, a common end."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import threading
import time
from pathlib import Path

from rich.console import Console

# Tables have a dozen columns; a log file has no width of its own, and 80 columns would break every word.
_LOG_WIDTH = 170


def peak_memory_mb() -> float:
    """Most resident memory of this process so far, in MB.

    Linux's ru_maxrss survives exec, so a worker would report its parent's peak; VmHWM belongs to the process image.
    """
    peak = _status("VmHWM")
    if peak is not None:
        return peak
    reported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return reported / 2**20 if sys.platform == "darwin" else reported / 1024


def memory_mb() -> float:
    """Resident memory of this process, in MB; its peak where the system does not tell."""
    now = _status("VmRSS")
    return peak_memory_mb() if now is None else now


def _status(name: str) -> float | None:
    """A size in MB from Linux's table of the process, None elsewhere."""
    table = Path("/proc/self/status")
    for line in table.read_text().splitlines() if table.exists() else ():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    return None


# mallopt's names for its settings, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# The largest that glibc takes. Blocks from here on stay mappings of their own, which go back whole when they are freed: on the
# heap, small blocks would settle in the holes that they leave, and every chunk of the LM head would need fresh memory.
_MAPPED_FROM = 32 << 20


def keep_freed_memory() -> bool:
    """Asks glibc to keep the heap at its size when tensors are freed. True where that was possible.

    By default the end of the heap goes back to the kernel after every step, which then has to clear its pages again: hundreds
    of thousands of page faults in a step of a 135M model, some percent of its time. The peak stays the same; what is lost is
    that other processes could have used the memory between two steps.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and all(
        mallopt(name, value) for name, value in ((_M_TRIM_THRESHOLD, 2**31 - 1), (_M_MMAP_THRESHOLD, _MAPPED_FROM))
    )


def standard_console() -> Console:
    """Standard output: as wide as the terminal, or wide enough for tables where there is none.

    Text is printed as it is: paths, names of rows and messages of torch have brackets and colons, which rich would take for
    markup and emoji, leave out, or stop at.
    """
    return Console(width=None if sys.stdout.isatty() else _LOG_WIDTH, markup=False, emoji=False)


def end_with_parent() -> None:
    """Makes a worker process end when its parent is gone: after a kill -9 it would go on computing for nobody."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
