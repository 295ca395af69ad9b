"""Chat-completion endpoints: replies, retries, refusals, the cache, and a key that is seen nowhere."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from prefopt.chat import ChatError, Message, chat_model
from prefopt.chat.endpoint import NO_LOGPROBS, EndpointChat
from prefopt.errors import ConfigError

KEY = "sk-very-secret"
ASK = [[Message(role="user", content="which?")]]


def chat(server: Any, **options: Any) -> EndpointChat:
    return EndpointChat(server.url, "m", **{"backoff": 0.001, **options})


def several(count: int) -> list[list[Message]]:
    return [[Message(role="user", content=f"number {index}")] for index in range(count)]


def test_answers_are_weighed_by_the_alternatives(server: Any, reply: Any) -> None:
    server.answer = lambda body, number: (200, reply("1", [("1", {"1": 0.5, " 1": 0.1, "2": 0.2, "the": 0.2})]))
    model = chat(server)
    logps = model.choose(ASK, ["1", "2"])
    assert logps.dtype == torch.float64
    assert torch.allclose(logps.exp(), torch.tensor([[0.75, 0.25]]).double())
    assert server.requests[0]["top_logprobs"] == 20
    assert server.requests[0]["messages"] == [{"role": "user", "content": "which?"}]
    assert model.usage.as_dict() == {"calls": 1, "cached": 0, "prompt_tokens": 7, "completion_tokens": 2, "too_long": 0}
    assert model.notes == ()


def test_without_logprobs_the_words_are_read_and_what_cannot_be_is_nan(server: Any, reply: Any) -> None:
    texts = {"number 0": "2", "number 1": "Neither 1 nor 2.", "number 2": None, "number 3": "**1**"}
    server.answer = lambda body, number: (200, reply(texts[body["messages"][0]["content"]]))
    model = chat(server)
    logps = model.choose(several(4), ["1", "2"])
    assert logps[0].tolist() == [-math.inf, 0]
    assert bool(logps[1:3].isnan().all())
    assert logps[3].tolist() == [0, -math.inf]
    assert model.notes == (NO_LOGPROBS,)


def test_a_busy_endpoint_is_asked_again(server: Any, reply: Any) -> None:
    server.answer = lambda body, number: (429, {"error": "slow down"}) if number < 2 else (200, reply("2"))
    assert chat(server).complete(ASK, max_tokens=4, temperature=0.0, seed=0) == ["2"]
    assert len(server.requests) == 3


def test_it_waits_as_long_as_the_endpoint_says(server: Any, reply: Any) -> None:
    server.headers = {"Retry-After": "0.3"}
    server.answer = lambda body, number: (503, b"") if number == 0 else (200, reply("2"))
    begin = time.monotonic()
    chat(server).complete(ASK, max_tokens=4, temperature=0.0, seed=0)
    assert time.monotonic() - begin >= 0.3


@pytest.mark.parametrize(
    ("status", "found", "words"),
    [
        (500, {"error": "broken"}, "status 500"),
        (200, b"<html>busy</html>", "no chat completion"),
        (200, {"choices": []}, r"choices\[0\].message.content"),
        (200, {"choices": [{"message": {"content": 3}}]}, "of type int"),
    ],
)
def test_what_stays_broken_is_an_error_with_the_conversation(server: Any, status: int, found: Any, words: str) -> None:
    server.answer = lambda body, number: (status, found)
    with pytest.raises(ChatError, match=f"conversation 0: .*{words}.* after 3 tries"):
        chat(server, retries=2).complete(ASK, max_tokens=4, temperature=0.0, seed=0)
    assert len(server.requests) == 3


def test_the_failing_conversation_is_named_and_the_others_are_kept(server: Any, reply: Any, tmp_path: Path) -> None:
    server.answer = lambda body, number: (
        (404, {"error": "gone"}) if body["messages"][0]["content"] == "number 2" else (200, reply("1"))
    )
    with pytest.raises(ChatError, match="conversation 2: status 404"):
        chat(server, cache=tmp_path, parallel=1).choose(several(5), ["1", "2"])
    server.answer = lambda body, number: (200, reply("1"))
    again = chat(server, cache=tmp_path, parallel=1)
    again.choose(several(5), ["1", "2"])
    assert again.usage.cached >= 2
    assert again.usage.cached + again.usage.calls == 5


def test_a_parameter_that_the_endpoint_refuses_is_left_out_from_then_on(server: Any, reply: Any) -> None:
    def answer(body: dict[str, Any], number: int) -> tuple[int, Any]:
        for name in ("logprobs", "seed", "max_tokens"):
            if name in body:
                return 400, {"error": f"unsupported parameter {name}; use max_completion_tokens" if "max" in name else name}
        return 200, reply("1")

    server.answer = answer
    model = chat(server, parallel=1)
    model.choose(several(3), ["1", "2"])
    # 20 alternatives, 5, none, then the limit's other name; and the two that follow are right at once.
    assert [request.get("top_logprobs") for request in server.requests] == [20, 5, None, None, None, None]
    assert server.requests[-1]["max_completion_tokens"] == 16
    model.complete(ASK, max_tokens=3, temperature=1.0, seed=4)
    assert [request.get("seed") for request in server.requests[-2:]] == [4, None]
    assert any("no seed" in note for note in model.notes)


def test_a_refusal_that_names_nothing_is_final(server: Any) -> None:
    server.answer = lambda body, number: (400, {"error": "the content is not allowed, logprobs or not"})
    with pytest.raises(ChatError, match="status 400"):
        chat(server).complete(ASK, max_tokens=4, temperature=0.0, seed=0)
    assert len(server.requests) == 1


def test_a_rerun_asks_nothing_twice_and_other_questions_anew(server: Any, reply: Any, tmp_path: Path) -> None:
    server.answer = lambda body, number: (200, reply("1", [("1", {"1": 0.6, "2": 0.3})]))
    first = chat(server, cache=tmp_path).choose(several(3), ["1", "2"])
    model = chat(server, cache=tmp_path)
    assert torch.equal(model.choose(several(3), ["1", "2"]), first)
    assert (model.usage.calls, model.usage.cached, len(server.requests)) == (0, 3, 3)
    model.choose(several(4), ["1", "2"])
    model.complete(ASK, max_tokens=4, temperature=0.0, seed=0)
    model.complete(ASK, max_tokens=4, temperature=0.0, seed=1)
    EndpointChat(server.url, "other", cache=tmp_path).complete(ASK, max_tokens=4, temperature=0.0, seed=1)
    assert len(server.requests) == 7


def test_a_damaged_entry_of_the_cache_is_asked_for_again(server: Any, tmp_path: Path) -> None:
    chat(server, cache=tmp_path).choose(ASK, ["1", "2"])
    (entry,) = tmp_path.rglob("*.json")
    entry.write_text(entry.read_text()[:40])
    model = chat(server, cache=tmp_path)
    model.choose(ASK, ["1", "2"])
    assert (model.usage.calls, model.usage.cached) == (1, 0)
    assert len(list(tmp_path.rglob("*"))) == 2  # its folder and itself: no draft is left


def test_the_key_comes_from_the_environment_and_is_seen_nowhere(
    server: Any, reply: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    server.answer = lambda body, number: (200, reply(f"your key is {KEY}"))
    model = chat(server, key_variable="MY_KEY", cache=tmp_path)
    assert KEY not in model.complete(ASK, max_tokens=4, temperature=0.0, seed=0)[0]
    assert server.keys == [f"Bearer {KEY}"]
    assert not [path for path in tmp_path.rglob("*.json") if KEY in path.read_text()]
    assert KEY not in f"{model.name}{model.identity}{model.notes}{model.usage}{model!r}"
    server.answer = lambda body, number: (401, {"error": f"wrong key {KEY}"})
    with pytest.raises(ChatError, match="MY_KEY is not accepted") as caught:
        model.complete(several(1), max_tokens=4, temperature=0.0, seed=0)
    server.answer = lambda body, number: (400, {"error": f"wrong key {KEY}"})
    with pytest.raises(ChatError, match=r"wrong key \[key\]") as other:
        model.complete(several(1), max_tokens=4, temperature=0.0, seed=0)
    assert KEY not in f"{caught.value}{other.value}"
    assert caught.value.__cause__ is other.value.__cause__ is None


def test_a_missing_key_is_named(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answer = lambda body, number: (401, {})
    with pytest.raises(ChatError, match="PREFOPT_API_KEY is not set"):
        chat(server).complete(ASK, max_tokens=4, temperature=0.0, seed=0)
    assert server.keys == [None]
    with pytest.raises(ConfigError, match=r"MY_KEY.* is not set"):
        chat(server, key_variable="MY_KEY")
    monkeypatch.setenv("PREFOPT_API_KEY", KEY)
    with pytest.raises(ConfigError, match="no https") as caught:
        EndpointChat("http://example.org/v1", "m")
    assert KEY not in str(caught.value)
    with pytest.raises(ConfigError, match="a user or a query") as caught:
        EndpointChat(f"https://me:{KEY}@example.org/v1", "m")
    assert KEY not in str(caught.value)


def test_a_server_that_does_not_run_is_an_error_at_once(server: Any) -> None:
    server.close()
    begin = time.monotonic()
    with pytest.raises(ChatError, match="cannot connect"):
        EndpointChat(server.url, "m").complete(ASK, max_tokens=4, temperature=0.0, seed=0)
    assert time.monotonic() - begin < 2


def test_a_slow_reply_is_asked_for_again(server: Any, reply: Any) -> None:
    def answer(body: dict[str, Any], number: int) -> tuple[int, Any]:
        time.sleep(0.4 if number == 0 else 0)
        return 200, reply("1")

    server.answer = answer
    assert chat(server, timeout=0.1).complete(ASK, max_tokens=4, temperature=0.0, seed=0) == ["1"]


def test_an_endpoint_is_named_with_its_model(server: Any, tmp_path: Path) -> None:
    model = chat_model(f"{server.url}#org/m", cache=tmp_path)
    assert (model.name, model.parameters) == ("org/m at 127.0.0.1", None)
    model.choose(ASK, ["1", "2"])
    assert server.requests[0]["model"] == "org/m"
    with pytest.raises(ConfigError, match="#model"):
        chat_model(server.url, cache=tmp_path)
