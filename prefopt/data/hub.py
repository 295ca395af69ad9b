"""Data sets of the Hugging Face hub, through `datasets` (an extra), which is imported only here."""

from __future__ import annotations

import importlib.util
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

from prefopt.errors import ConfigError, HubError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w./-]+)?")
PROBE_SECONDS = 1.5
_OFFLINE_SWITCHES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
_LOCAL = "A local copy works without a hub: --data FOLDER (its .jsonl or .jsonl.gz files)."

# Anthropic's subsets are folders of one data set, not configurations of it.
_SUBSETS_ARE_FOLDERS = frozenset({"anthropic/hh-rlhf"})


def is_hub_id(source: str) -> bool:
    """True for `owner/name` and `owner/name:subset`."""
    return HUB_ID.fullmatch(source) is not None


def hub_splits(source: str) -> Iterator[tuple[str, Iterator[Mapping[str, Any]]]]:
    """(split name, rows) of a hub data set, for a source `owner/name` or `owner/name:subset`.

    With HF_HUB_OFFLINE or HF_DATASETS_OFFLINE set, only the local cache of `datasets` is used.

    Raises:
        ConfigError: `datasets` is not installed.
        HubError: the hub does not answer within two seconds, or does not have this data set.
    """
    if importlib.util.find_spec("datasets") is None:
        raise ConfigError(f"{source!r} is a hub data set, which needs the package datasets: pip install -e .[data]. {_LOCAL}")
    offline = is_offline(*_OFFLINE_SWITCHES)
    problem = None if offline else why_unreachable()
    if problem is not None:
        raise HubError(
            f"{source!r} is no local file or folder, and {problem}. {_LOCAL} "
            "A copy in the cache of datasets: set HF_HUB_OFFLINE=1."
        )
    import datasets

    name, _, subset = source.partition(":")
    which = {"data_dir" if name.lower() in _SUBSETS_ARE_FOLDERS else "name": subset} if subset else {}
    try:
        splits = datasets.load_dataset(name, **which)
    # Whatever a third-party loader raises (HTTP, a missing name, a broken file), the user needs the same answer.
    except Exception as error:
        where = "the local cache (offline mode is set)" if offline else "the hub"
        raise HubError(f"cannot load {source!r} from {where}: {type(error).__name__}: {error}. {_LOCAL}") from error
    for split in sorted(splits):
        yield split, iter(splits[split])


def is_offline(*switches: str) -> bool:
    """True when one of these environment variables says that only local copies may be used."""
    return any(os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"} for name in switches)


def why_unreachable() -> str | None:
    """Asks the hub for its front page: what went wrong within `PROBE_SECONDS`, or None, for any HTTP answer will do."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    answers: list[str | None] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(endpoint, method="HEAD")
            with urllib.request.urlopen(request, timeout=PROBE_SECONDS):
                answers.append(None)
        except urllib.error.HTTPError:
            answers.append(None)
        except (OSError, ValueError) as error:
            answers.append(str(error))

    thread = threading.Thread(target=ask, daemon=True)  # because name resolution knows no timeout
    thread.start()
    thread.join(PROBE_SECONDS)
    problem = answers[0] if answers else f"no answer within {PROBE_SECONDS} s"
    return None if problem is None else f"the hub at {endpoint} cannot be reached ({problem})"
