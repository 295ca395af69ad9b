"""`prefopt doctor`: what a bug report should contain."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from importlib import metadata

from cyclopts import App

from prefopt.control.simulate import mujoco_conflict
from prefopt.environment import environment

# A dependency as the package's metadata writes it, with the extra that it belongs to.
_REQUIREMENT = re.compile(r"""^([\w.-]+).*;.*extra == ["'](\w+)["']""")


def build(tokens: Sequence[str]) -> App:
    app = App("doctor", version_flags=(), help_format="plaintext")
    app.default(_doctor)
    return app


def _doctor() -> None:
    for name, value in environment().items():
        print(f"{name:13}{value}")
    for package, extra in optional_packages():
        try:
            print(f"[{extra}]".ljust(13) + f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            print(f"[{extra}]".ljust(13) + f"{package} is not installed: pip install -e '.[{extra}]'")
    if (conflict := mujoco_conflict()) is not None:
        print("[control]".ljust(13) + conflict)


def optional_packages() -> Iterator[tuple[str, str]]:
    """Every package of the extras for users, and its extra, as pyproject.toml names them."""
    for requirement in metadata.requires("prefopt") or ():
        match = _REQUIREMENT.match(requirement)
        if match and match[2] != "dev":
            yield match[1], match[2]
