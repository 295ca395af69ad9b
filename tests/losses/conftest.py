"""`pytest tests/losses --import FILE` puts the losses of a user's own file under the laws."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from losses import registry

# No deadline: the machine may be busy. Derandomised: the same examples in every run, so a failure is a change of the code.
hypothesis.settings.register_profile("losses", deadline=None, max_examples=30, derandomize=True)
hypothesis.settings.load_profile("losses")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--import", action="append", default=[], metavar="FILE", help="a Python file that registers losses (repeatable)"
    )


def pytest_configure(config: pytest.Config) -> None:
    # Run from the repository's root without a path, this file is read after the command line: then there is no such option.
    for name in config.getoption("--import", default=[]):
        path = Path(name)
        if not path.is_file():
            raise pytest.UsageError(f"--import {name}: no such file; give the path of a Python file that registers losses.")
        spec = importlib.util.spec_from_file_location(f"imported_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.fixture
def fresh_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Losses registered by a test vanish with it."""
    monkeypatch.setattr(registry, "_LOSSES", dict(registry._LOSSES))
    return None


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
