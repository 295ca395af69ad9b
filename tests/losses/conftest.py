"""What the tests of losses share."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch

from losses import registry

# No deadline: the machine may be busy. Derandomised: the same examples in every run, so a failure is a change of the code.
hypothesis.settings.register_profile("losses", deadline=None, max_examples=30, derandomize=True)
hypothesis.settings.load_profile("losses")


@pytest.fixture
def fresh_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Losses registered by a test vanish with it."""
    monkeypatch.setattr(registry, "_LOSSES", dict(registry._LOSSES))
    return None


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
