"""Files that are never seen half written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Writes JSON beside its place and renames it; the folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f"{path.name}.partial")
    staged.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(staged, path)


def differences(one: Any, other: Any, path: str = "") -> set[str]:
    """The dotted names at which two trees of plain values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = one.keys() | other.keys()
        return set().union(*(differences(one.get(n), other.get(n), f"{path}.{n}" if path else n) for n in names))
    return set() if one == other else {path}
