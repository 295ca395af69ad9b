"""A study as one archive to publish: results, cells, versions and licences of what made them, and checksums of it all.

No weights and no data: the archive says how they were made, and `prefopt rerun` makes them again.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

from prefopt.compare import STUDY_FILE
from prefopt.errors import OutputError
from prefopt.report.schema import RESULTS_FILE

CHECKSUMS_FILE, LOCK_FILE, LICENCES_FILE = "sha256sums.txt", "requirements.lock.txt", "licences.txt"
# What a finished study's folder holds that is worth keeping. Weights and checkpoints are none of it.
_KEPT = (
    "*.json", "*.jsonl", "*.html", "*.md", "*.yaml", "*.txt", "figures/**/*", "tables/**/*", "cells/*/*.json",
    "cells/*/*.jsonl", "cells/*/*.txt", "tuning/cells/*/*.json", "tuning/cells/*/*.jsonl", "tuning/cells/*/*.txt",
)  # fmt: skip
# Zip has no earlier date; a bundle of equal files is then equal itself.
_EPOCH = (1980, 1, 1, 0, 0, 0)
_TEXT = (".json", ".jsonl", ".html", ".md", ".yaml", ".txt", ".csv", ".tex", ".svg")


def bundle(study: Path, target: Path, *, anonymous: bool = False) -> list[str]:
    """Writes the archive and returns the names in it.

    Args:
        study: folder of a finished comparison.
        target: a new .zip file.
        anonymous: replace the paths that the study names by their last part, and the user's home and name, in every text.

    Raises:
        OutputError: no finished comparison, or a target that exists or cannot be written.
    """
    if not (study / RESULTS_FILE).is_file() or not (study / STUDY_FILE).is_file():
        raise OutputError(f"{study}: expected the folder of a finished comparison, with {RESULTS_FILE} and {STUDY_FILE}.")
    if target.exists():
        raise OutputError(f"{target} exists; name another file.")
    hidden = _identifying(study) if anonymous else {}
    contents = {name: _hide(path, hidden) for name, path in _files(study)}
    contents |= {LOCK_FILE: _lock().encode(), LICENCES_FILE: _licences().encode()}
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in sorted(contents.items()))
    contents[CHECKSUMS_FILE] = sums.encode()
    staged = target.with_name(f"{target.name}.partial")
    try:
        with zipfile.ZipFile(staged, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in sorted(contents.items()):
                archive.writestr(zipfile.ZipInfo(f"{target.stem}/{name}", _EPOCH), data, zipfile.ZIP_DEFLATED)
        staged.replace(target)
    except OSError as error:
        raise OutputError(f"{target} cannot be written ({error.strerror}); name another file.") from error
    return sorted(contents)


def _files(study: Path) -> Iterator[tuple[str, Path]]:
    """Names in the archive and where they are; links are not followed out of the folder."""
    root = study.resolve()
    found = {path for pattern in _KEPT for path in study.glob(pattern) if path.is_file()}
    for path in sorted(found):
        if path.resolve().is_relative_to(root):
            yield path.relative_to(study).as_posix(), path


def _identifying(study: Path) -> dict[str, str]:
    """Texts that say where and by whom a study was run, each with what stands for it; longer ones first."""
    named = [value for value in _strings(json.loads((study / STUDY_FILE).read_text())) if Path(value).is_absolute()]
    places = {value: Path(value).name for value in (*named, str(study.resolve()), str(Path.cwd()))}
    home = Path.home()
    places |= {str(home): "~", home.name: "user"} if len(home.parts) > 2 else {}
    return dict(sorted(places.items(), key=lambda item: -len(item[0])))


def _strings(value: Any) -> Iterator[str]:
    """All texts in a tree of plain values; a source such as `sentiment:PATH` is read behind its colon."""
    if isinstance(value, str):
        yield value.partition(":")[2] if ":/" in value else value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _hide(path: Path, hidden: dict[str, str]) -> bytes:
    data = path.read_bytes()
    if path.suffix not in _TEXT:
        return data
    for secret, name in hidden.items():
        data = data.replace(secret.encode(), name.encode())
    return data


def _lock() -> str:
    """Every installed package with its version, as pip reads it."""
    found = {each.metadata["Name"].lower(): each.version for each in distributions() if each.metadata["Name"]}
    return "".join(f"{name}=={version}\n" for name, version in sorted(found.items()))


def _licences() -> str:
    """Every installed package with the licence that it declares."""
    found = {each.metadata["Name"]: _licence(each) for each in distributions() if each.metadata["Name"]}
    return "".join(f"{name}: {licence}\n" for name, licence in sorted(found.items(), key=lambda item: item[0].lower()))


def _licence(package: Distribution) -> str:
    declared = package.metadata
    classifiers = [line.split(" :: ")[-1] for line in declared.get_all("Classifier") or () if line.startswith("License ::")]
    first_line = (declared["License"] or "").strip().splitlines()[:1]
    return declared["License-Expression"] or ", ".join(classifiers) or (first_line[0] if first_line else "not declared")
