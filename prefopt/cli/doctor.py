"""`prefopt doctor`: what a bug report should contain."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata

from cyclopts import App

from prefopt.compare import environment

_EXTRAS = {"data": "datasets", "peft": "peft", "stats": "scipy", "bench": "trl"}


def build(tokens: Sequence[str]) -> App:
    app = App("doctor", version_flags=(), help_format="plaintext")
    app.default(_doctor)
    return app


def _doctor() -> None:
    for name, value in environment().items():
        print(f"{name:13}{value}")
    for extra, package in _EXTRAS.items():
        try:
            print(f"[{extra}]".ljust(13) + f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            print(f"[{extra}]".ljust(13) + f"{package} is not installed: pip install -e '.[{extra}]'")
