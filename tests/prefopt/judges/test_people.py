"""People as judges: a blind page, votes of several people, and the whole way through a real browser."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from prefopt.data.sources import load
from prefopt.errors import ConfigError, DataError, OutputError
from prefopt.judges.people import find_page, import_people, make_page, read_page, write_rows
from prefopt.judges.samples import Sample, SamplePairs, pair_samples

Run = Callable[..., Any]


def pairs(count: int = 12) -> SamplePairs:
    """Ours says OURS, so a test can tell who is who."""
    ours = [Sample(f"prompt {i}", f"OURS <b>{i}</b> & a longer answer", f"ours.jsonl:{i + 1}") for i in range(count)]
    theirs = [Sample(f"prompt {i}", f"THEIRS {i}", f"theirs.jsonl:{i + 1}") for i in range(count)]
    return pair_samples(ours, theirs)


def vote_for(folder: Path, side: str, name: str = "votes.jsonl", rows: slice = slice(None)) -> Path:
    """A file of votes for "ours", "theirs" or "tie" on all rows of a page."""
    lines = []
    for row in map(json.loads, (folder / "pairs.jsonl").read_text().splitlines()[rows]):
        preferred = {"ours": row["ours"], "theirs": 1 - row["ours"], "tie": "tie"}[side]
        lines.append(json.dumps({"id": row["id"], "preferred": preferred, "left": 0}) + "\n")
    (folder / name).write_text("".join(lines))
    return folder / name


def test_the_page_does_not_say_whose_completions_are_whose(tmp_path: Path) -> None:
    page, shown = make_page(tmp_path / "first", pairs(40), seed=1)
    assert shown == 40
    text = page.read_text()
    assert "ours.jsonl" not in text
    assert '"ours"' not in text
    held = re.search(r'id="content">(.*?)</script>', text, re.DOTALL)
    assert held
    rows = json.loads(held.group(1))["rows"]
    # Neither the place in the page's data nor the side says it.
    for place in ((row["completions"][0] for row in rows), (row["completions"][row["left"]] for row in rows)):
        assert 10 < sum(said.startswith("OURS") for said in place) < 30
    kept = [json.loads(line) for line in (tmp_path / "first" / "pairs.jsonl").read_text().splitlines()]
    assert all(row["completions"][row["ours"]].startswith("OURS") for row in kept)
    assert make_page(tmp_path / "again" / "first", pairs(40), seed=1)[0].read_text() == text
    with pytest.raises(OutputError, match="is not empty"):
        make_page(tmp_path / "first", pairs(), seed=1)


def test_equal_completions_are_not_shown_and_a_count_draws_some(tmp_path: Path) -> None:
    equal = pair_samples(
        [Sample("p", "same", "a:1"), Sample("q", "x", "a:2")], [Sample("p", " same", "b:1"), Sample("q", "y", "b:2")]
    )
    assert make_page(tmp_path / "one", equal)[1] == 1
    assert make_page(tmp_path / "five", pairs(), count=5)[1] == 5
    with pytest.raises(DataError, match="all 1 pairs hold two equal completions"):
        make_page(tmp_path / "none", pair_samples([Sample("p", "same", "a:1")], [Sample("p", "same", "b:1")]))
    with pytest.raises(ConfigError, match="count is -1"):
        make_page(tmp_path / "bad", pairs(), count=-1)


def test_votes_of_several_people_are_a_win_rate_agreement_and_training_rows(tmp_path: Path) -> None:
    """Ann votes for ours 12 times; Bob 6 times for theirs and leaves 6 out: 6 wins and 6 ties, (6 + 3) / 12."""
    make_page(tmp_path / "page", pairs())
    folder = tmp_path / "page"
    ann, bob = vote_for(folder, "ours", "ann.jsonl"), vote_for(folder, "theirs", "bob.jsonl", slice(0, 6))
    page = read_page(folder)
    found = import_people(page, [ann, bob])
    summary = found.judged.summary("people")
    assert (summary.win_rate.rate, summary.win_rate.wins, summary.win_rate.ties) == (0.75, 6, 6)
    assert found.persons.summary("bob").win_rate.unread == 6
    assert found.votes == {"ann": 12, "bob": 6}
    (together,) = found.persons.agreement()
    assert (together.one, together.other, together.pairs, together.same) == ("ann", "bob", 6, 0.0)
    loaded = load((str(write_rows(folder, page, found)),)).records
    assert sorted(record.labels.soft_label or 0 for record in loaded) == [0.5] * 6 + [1.0] * 6
    assert all("OURS" in str(record.completions[0]) for record in loaded if record.labels.soft_label == 1.0)


def test_votes_on_another_page_and_bad_files_are_refused(tmp_path: Path) -> None:
    for name, count in (("one", 5), ("two", 6)):
        make_page(tmp_path / name, pairs(count))
    page = read_page(tmp_path / "one")
    with pytest.raises(DataError, match=r"votes.jsonl:1: '\w+:1' is no row of this page \("):
        import_people(page, [vote_for(tmp_path / "two", "ours")])
    votes = vote_for(tmp_path / "one", "ours")
    with pytest.raises(DataError, match="named twice"):
        import_people(page, [votes, votes])
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(DataError, match="no vote at all"):
        import_people(page, [empty])
    assert find_page(None, [votes]) == tmp_path / "one"
    with pytest.raises(ConfigError, match=r"holds no pairs.jsonl: name the folder"):
        find_page(None, [empty])
    broken = tmp_path / "one" / "pairs.jsonl"
    broken.write_text(broken.read_text().replace('"ours": 0', '"ours": 7').replace('"ours": 1', '"ours": 7'))
    with pytest.raises(DataError, match=r"pairs.jsonl:1: not a pair of this page \(ours is 7\)"):
        read_page(tmp_path / "one")


class Browser:
    """Headless Chromium through its driver, by the WebDriver protocol."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._process = subprocess.Popen(
            ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._url = f"http://127.0.0.1:{port}"
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        options = {
            "args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1000,800"],
            "prefs": {"download.default_directory": str(folder)},
        }
        asked = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        deadline = time.monotonic() + 60
        while True:
            try:
                self._session = self.call("POST", "/session", {"capabilities": {"alwaysMatch": asked}})["sessionId"]
                return
            except urllib.error.URLError:
                if time.monotonic() > deadline:
                    self.close()
                    raise
                time.sleep(0.1)

    def call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"}, method=method)
        with self._opener.open(request, timeout=60) as response:
            return json.loads(response.read())["value"]

    def act(self, path: str, body: Any) -> Any:
        return self.call("POST", f"/session/{self._session}{path}", body)

    def script(self, text: str) -> Any:
        return self.act("/execute/sync", {"script": text, "args": []})

    def click(self, name: str) -> None:
        (element,) = self.act("/element", {"using": "css selector", "value": f"#{name}"}).values()
        self.act(f"/element/{element}/click", {})

    def log(self, kind: str) -> list[str]:
        return [entry["message"] for entry in self.act("/se/log", {"type": kind})]

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)

    def quit(self) -> None:
        self.call("DELETE", f"/session/{self._session}")
        self.close()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    opened = Browser(tmp_path)
    yield opened
    opened.quit()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromedriver") is None, reason="needs Chromium and its driver")
def test_people_vote_in_a_browser_from_the_command_to_the_win_rate(cli: Run, tmp_path: Path, browser: Browser) -> None:
    """Samples -> `judge page` -> clicks in Chromium -> the saved file -> `judge import`: ours wins where ours was clicked."""
    sides = {"ours": pairs(6).ours, "theirs": pairs(6).theirs}
    for name, texts in sides.items():
        lines = [json.dumps({"prompt": f"prompt {i}", "completion": text}) for i, text in enumerate(texts)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    done = cli("judge", "page", tmp_path / "ours.jsonl", tmp_path / "theirs.jsonl", "--output-dir", tmp_path / "blind")
    assert done.code == 0, done.err
    browser.act("/url", {"url": f"file://{tmp_path}/blind/label.html"})
    for number in range(6):
        ours_left = browser.script("return document.getElementById('left').textContent").startswith("OURS")
        # Four for ours, one for theirs, one tie.
        if number == 5:
            browser.click("vote-tie")
        else:
            browser.click("vote-left" if ours_left == (number != 4) else "vote-right")
        if number == 3:
            # What was voted on outlives a reload, and the page goes on behind it.
            browser.act("/refresh", {})
    assert "All are voted on" in browser.script("return document.getElementById('done').textContent")
    browser.click("save")
    saved = tmp_path / "votes-blind.jsonl"
    deadline = time.monotonic() + 20
    while not saved.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert browser.log("browser") == []
    asked = [json.loads(text)["message"] for text in browser.log("performance")]
    urls = [item["params"]["request"]["url"] for item in asked if item["method"] == "Network.requestWillBeSent"]
    assert urls
    assert {url.partition(":")[0] for url in urls} <= {"file", "blob", "data"}
    done = cli("judge", "import", saved, "--page", tmp_path / "blind")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "blind" / "people.json").read_text())["judges"][0]["win_rate"]
    assert (found["wins"], found["losses"], found["ties"], found["unread"]) == (4, 1, 1, 0)
    assert "75.0%" in done.flat
    assert len(load((str(tmp_path / "blind" / "rows.jsonl"),)).records) == 6
