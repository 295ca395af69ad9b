"""What numbers depend on besides the options: versions and the machine."""

from __future__ import annotations

import os
import platform

import torch

from prefopt import __version__


def environment() -> dict[str, str]:
    """Versions, device and threads, for the files beside results."""
    import transformers

    return {
        "prefopt": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "threads": str(torch.get_num_threads()),
    }
