"""`prefopt judge run` from files to numbers, the files it reads, and the judges it knows by name."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from prefopt.data.hh import record_key
from prefopt.errors import ConfigError, DataError, TrainingError
from prefopt.judges.build import build_judges, read_held_out
from prefopt.judges.functions import function_judge
from prefopt.judges.samples import pair_samples, read_samples

Run = Callable[..., Any]
Write = Callable[..., Path]
FUNCTIONS = """
def longer(prompts, completions):
    return [len(text) for text in completions]
def first_unless_empty(prompts, first, second):
    assert isinstance(prompts[0], (str, list))
    return [None if not one else 0.9 if one > other else 0.6 for one, other in zip(first, second)]
def fails(prompts, first, second):
    raise ValueError("no answer")
def three_too_many(a, b, c, d, e):
    pass
"""


@pytest.fixture
def functions(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FUNCTIONS)
    return path


def samples(count: int, text: str) -> list[dict[str, Any]]:
    return [{"prompt": f"question {i}", "completion": f"{text} {i}"} for i in range(count)]


def preferences(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"topic {i} ", "chosen": f"clear words {i % 7}", "rejected": f"vague words {i % 5}"} for i in range(count)
    ]


def test_judges_are_compared_on_two_files(cli: Run, jsonl: Write, functions: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    ours = jsonl([*samples(30, "clear"), {"prompt": "question 1", "completion": "clear again"}], "ours.jsonl")
    theirs = jsonl([*samples(29, "rather vague"), {"prompt": "elsewhere", "completion": "x"}], "theirs.jsonl")
    data, out = jsonl(preferences(300)), tmp_path / "out" / "judged.json"
    done = cli(
        "judge", "run", ours, theirs, "--judge", f"tfidf:{data}", f"{functions}:longer", f"{functions}:first_unless_empty",
        "--output", out,
    )  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads(out.read_text())
    rates = {judge["judge"]: judge["win_rate"] for judge in found["judges"]}
    assert rates["tfidf"]["rate"] == 1.0
    assert (rates["mine.py:longer"]["losses"], rates["mine.py:longer"]["pairs"]) == (29, 29)
    # Shares of 0.9 and 0.6, by the alphabet: in both orders (0.6 + 1 - 0.9) / 2 for ours.
    assert rates["mine.py:first_unless_empty"]["rate"] == pytest.approx(0.35)
    assert found["judges"][2]["templates"]["judge"]["position_bias"] == {"rate": 1.0, "first": 1.0, "pairs": 29}
    assert (found["pairs"], found["length_unit"], found["mean_lengths"]) == (29, "words", [2.0, 3.0])
    assert [record["name"] for record in found["records"]] == ["tfidf"]
    assert found["records"][0]["accuracy"] == 1.0
    assert "left out: 2 of the first file, 1 of the second" in found["notes"][0]
    assert {(item["one"], item["other"]): item["same"] for item in found["agreement"]}["tfidf", "mine.py:longer"] == 0.0
    rows = [json.loads(line) for line in (tmp_path / "out" / "judged.pairs.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * 29
    assert rows[0] == {
        "pair": "ours.jsonl:1", "prompt": "ours.jsonl:1", "judge": "tfidf", "share": 1.0, "our_length": 2, "their_length": 3
    }  # fmt: skip
    for text in ("win rate of ours.jsonl against theirs.jsonl", "not measured", "100.0% (", "same verdict", "longer in 0%"):
        assert text in done.flat
    again = cli("judge", "run", ours, theirs, "--judge", f"{functions}:longer", "--output", out)
    assert (again.code, "--overwrite replaces it" in again.err) == (2, True)


def test_held_out_pairs_measure_every_judge_and_leaks_are_said(cli: Run, jsonl: Write, functions: Path) -> None:
    pytest.importorskip("sklearn")
    data = jsonl(preferences(300))
    judge = build_judges([f"tfidf:{data}"], cache=Path("unused"))["tfidf"]
    known = [row for row in preferences(300) if record_key(row["prompt"], ()) in judge.trained_on]
    sides = [[{"prompt": row["prompt"], "completion": row[side]} for row in known] for side in ("chosen", "rejected")]
    ours, theirs = (jsonl(side, f"{name}.jsonl") for name, side in zip(("ours", "theirs"), sides, strict=True))
    held = jsonl(preferences(60), "test.jsonl")
    done = cli(
        "judge",
        "run",
        ours,
        theirs,
        "--judge",
        f"tfidf:{data}",
        f"{functions}:longer",
        "--held-out",
        held,
        "--max-held-out",
        20,
    )
    assert done.code == 0, done.err
    assert f"tfidf was fitted on the prompts of {len(known)} of {len(known)} pairs" in done.flat
    # test.jsonl is a test split as a whole; its rows that tfidf was fitted on are left out, and 20 of the others are read.
    assert len(read_held_out([str(held)])) == 60
    assert " 20 " in done.flat
    assert "Greyed out (mine.py:longer)" in done.flat


class Endpoint(BaseHTTPRequestHandler):
    """A chat-completion endpoint that prefers what comes later in the alphabet, and says which key it was sent."""

    keys: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.keys.append(self.headers["Authorization"])
        text = asked["messages"][-1]["content"]
        one, other = re.findall(r"BEGIN RESPONSE . \w+\n(.*?)\nEND", text, re.DOTALL)
        answers = "AB" if "one letter" in text else "12"
        said = {
            "choices": [{"message": {"content": answers[one < other]}}],
            "usage": {"prompt_tokens": 7, "completion_tokens": 1},
        }
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(said).encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_an_llm_is_a_judge_by_its_address(cli: Run, jsonl: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a server on this machine; its key is sent, and is in none of what is written."""
    monkeypatch.setenv("MY_KEY", "secret-123")
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out.json"
    with ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = (
            "judge", "run", jsonl(samples(5, "b"), "b.jsonl"), jsonl(samples(5, "a"), "a.jsonl"), "--judge",
            f"llm:http://127.0.0.1:{server.server_port}/v1#tiny", "--key-variable", "MY_KEY", "--output", out, "--overwrite",
        )  # fmt: skip
        done = cli(*command)
        assert done.code == 0, done.err
        server.shutdown()
    judge = json.loads(out.read_text())["judges"][0]
    assert (judge["judge"], judge["win_rate"]["wins"], judge["spread"]) == ("llm tiny", 5, 0.0)
    assert (judge["counts"]["calls"], judge["counts"]["prompt_tokens"]) == (20, 140)
    assert any("llm tiny: " in note for note in json.loads(out.read_text())["notes"])  # it gives no log-probs
    assert {*Endpoint.keys} == {"Bearer secret-123"}
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "secret" not in written + done.out + done.err
    assert "templates' win rates lie 0.0% apart" in done.flat
    # The server is gone: everything is answered from the cache.
    again = cli(*command)
    assert again.code == 0, again.err
    assert json.loads(out.read_text())["judges"][0]["counts"]["cached"] == 20


def test_samples_are_read_in_every_form_that_is_written_here(jsonl: Write) -> None:
    turns = [{"role": "user", "content": "hi"}]
    path = jsonl(
        [
            {"prompt": "p", "completion": ""},
            {"prompt": turns, "completion": [{"role": "assistant", "content": "hello"}]},
            {"id": "round-01:1", "prompt": "q", "completions": ["one", "two"], "sampling": {}},
            {"prompt": "r", "chosen": "good", "rejected": "bad"},
            {"chosen": "\n\nHuman: x\n\nAssistant: yes", "rejected": "\n\nHuman: x\n\nAssistant: no"},
        ]
    )
    found = read_samples(path)
    assert [sample.completion for sample in found] == ["", "hello", "one", "two", "good", " yes"]
    assert [sample.where for sample in found][2:4] == ["pairs.jsonl:3.1", "pairs.jsonl:3.2"]
    assert found[5].prompt == "\n\nHuman: x\n\nAssistant:"
    # The k-th sample of a prompt meets the k-th, and a prompt's spaces at its ends do not matter.
    other = jsonl([{"prompt": "q ", "completions": ["A", "B", "C"]}, {"prompt": turns, "completion": "D"}], "other.jsonl")
    pairs = pair_samples(found, read_samples(other))
    assert list(zip(pairs.ours, pairs.theirs, strict=True)) == [("hello", "D"), ("one", "A"), ("two", "B")]
    assert (pairs.only_ours, pairs.only_theirs) == (3, 1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "p", "completion": "c"}, {"prompt": "p"}], "bad.jsonl:2: missing columns; expected prompt with"),
        ([{"prompt": "p", "completion": 3}], "bad.jsonl:1: completion has the wrong type"),
        ([{"prompt": "p", "completions": []}], "bad.jsonl:1: completions is not a list"),
        ([{"prompt": None, "completion": "c"}], "bad.jsonl:1: prompt is None"),
        ([b"{"], "bad.jsonl:1: broken JSON"),
        ([b"\xff"], "bad.jsonl:1: not UTF-8"),
        ([], "bad.jsonl: no row"),
    ],
)
def test_bad_samples_are_named_by_file_and_row(jsonl: Write, rows: Sequence[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_samples(jsonl(rows, "bad.jsonl"))


def test_files_without_a_common_prompt_or_that_do_not_exist(jsonl: Write, tmp_path: Path) -> None:
    ours, theirs = jsonl(samples(2, "a"), "a.jsonl"), jsonl([{"prompt": "x", "completion": "y"}], "b.jsonl")
    with pytest.raises(DataError, match=r"no prompt of a.jsonl \(2 samples\) is in b.jsonl \(1\)"):
        pair_samples(read_samples(ours), read_samples(theirs))
    with pytest.raises(DataError, match="no such file"):
        read_samples(tmp_path / "none.jsonl")


def test_judges_that_do_not_exist(jsonl: Write, functions: Path) -> None:
    cache = Path("unused")
    for specs, message in (
        ([], "name a judge: tfidf:PAIRS"),
        (["gpt"], "--judge gpt: expected tfidf:PAIRS"),
        ([f"{functions}:longer"] * 2, "a judge is named twice"),
        ([f"{functions}:three_too_many"], "a function of 5 arguments; expected f"),
        ([f"{functions}:nothing"], "has no"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_judges(specs, cache=cache)
    with pytest.raises(TrainingError, match="failed on 1 pairs: ValueError: no answer"):
        function_judge(f"{functions}:fails")(["p"], ["a"], ["b"])
    one_pair = jsonl([{"prompt": "p", "completion": "c"}], "test_plain.jsonl")
    with pytest.raises(DataError, match="none of its 1 test rows is a pair in an order"):
        read_held_out([str(one_pair)])
    # Two judges of one short name have their full names.
    other = functions.with_name("sub")
    other.mkdir()
    (other / "mine.py").write_text(FUNCTIONS)
    assert list(build_judges([f"{functions}:longer", f"{other / 'mine.py'}:longer"], cache=cache)) == [
        f"{functions}:longer", f"{other / 'mine.py'}:longer"
    ]  # fmt: skip
