from __future__ import annotations

import importlib.util
import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from prefopt.data import hub
from prefopt.data.sources import load
from prefopt.errors import ConfigError, HubError

ROW = {"prompt": "p", "chosen": " yes", "rejected": " no"}


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    pytest.importorskip("datasets")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    return monkeypatch


@pytest.mark.fault(29)
def test_a_hub_that_does_not_answer_fails_within_two_seconds(online: pytest.MonkeyPatch) -> None:
    """A local port that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        online.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        begin = time.monotonic()
        with pytest.raises(HubError, match="--data FOLDER"):
            load(["owner/name"])
        assert time.monotonic() - begin < 2


@pytest.mark.fault(29)
def test_a_name_lookup_that_hangs_fails_as_fast(online: pytest.MonkeyPatch) -> None:
    """Name resolution takes no timeout, so the probe must not wait for it."""
    release = threading.Event()

    def hang(*args: Any, **kwargs: Any) -> Any:
        release.wait(10)
        raise OSError("released")

    online.setattr(hub.urllib.request, "urlopen", hang)
    begin = time.monotonic()
    with pytest.raises(HubError, match="no answer within"):
        load(["owner/name"])
    release.set()
    assert time.monotonic() - begin < 2


@pytest.mark.fault(29)
def test_a_hub_that_refuses_connections_is_named(online: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    online.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    with pytest.raises(HubError, match=f"127.0.0.1:{port} cannot be reached"):
        load(["owner/name"])


@pytest.mark.parametrize(
    ("source", "arguments"),
    [
        ("owner/name", {}),
        ("owner/name:subset", {"name": "subset"}),
        ("Anthropic/hh-rlhf:harmless-base", {"data_dir": "harmless-base"}),
    ],
)
def test_hub_splits_become_parts_and_test_is_official(
    monkeypatch: pytest.MonkeyPatch, source: str, arguments: dict[str, str]
) -> None:
    datasets = pytest.importorskip("datasets")
    calls: list[tuple[str, dict[str, Any]]] = []

    def fake(path: str, **kwargs: Any) -> Any:
        calls.append((path, kwargs))
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_list([ROW, {**ROW, "chosen": ""}]) for split in ("train", "test")}
        )

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets, "load_dataset", fake)
    loaded = load([source])
    assert calls == [(source.partition(":")[0], arguments)]
    assert [(record.id, record.official_test) for record in loaded.records] == [
        (f"{source}/test:1", True),
        (f"{source}/train:1", False),
    ]
    assert loaded.report.sources[0].files[0].dropped[0].examples == (f"{source}/test:2",)


def test_whatever_the_loader_raises_becomes_a_hub_error(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def fail(path: str, **kwargs: Any) -> Any:
        raise RuntimeError("Dataset scripts are no longer supported")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(HubError, match=r"from the local cache.*no longer supported.*--data FOLDER"):
        load(["owner/name"])


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install -e \.\[data\]"):
        load(["owner/name"])


@pytest.mark.fault(29)
def test_what_exists_locally_is_not_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "a.jsonl").write_text(json.dumps(ROW))
    monkeypatch.chdir(tmp_path)
    assert load(["owner/name"]).records[0].id == "name/a.jsonl:1"


@pytest.mark.parametrize(
    ("source", "expected"), [("a/b", True), ("a/b:c-d", True), ("a", False), ("/a/b", False), ("a/b/c", False), ("../b", False)]
)
def test_hub_ids_are_told_from_paths(source: str, expected: bool) -> None:
    assert hub.is_hub_id(source) is expected
